"""Weights in bfloat16: all is computed in them, near what float32 gives."""

from typing import Any

import pytest
import torch

from saexp.saes import ARCHITECTURES, SparseAutoencoder
from tests.unit.saes.make import D_IN, points, sae, transcoder

OPTIONS: list[dict[str, Any]] = [
    {},
    {"normalize_activations": "expected_average_only_in", "norm_factor": 0.2},
    {"normalize_activations": "constant_norm_rescale"},
    {"normalize_activations": "layer_norm"},
    {"centre": True},
]


def assert_close_in_norm(
    lower: torch.Tensor, full: torch.Tensor, share: float, rows: float = 0.9
) -> None:
    """The error is a small share of the norm in this fraction of the rows."""
    error = (lower.float() - full).norm(dim=-1) / full.norm(dim=-1)
    assert error.median() < share / 2
    assert error.quantile(rows) < share


def check(full: SparseAutoencoder, lower: SparseAutoencoder) -> None:
    """Inputs of either dtype, activations of either dtype."""
    x = points(200, D_IN)
    acts, low = full.encode(x), lower.encode(x)
    assert low.dtype == lower.decode(low, x).dtype == torch.bfloat16
    assert torch.equal(low, lower.encode(x.bfloat16()))
    chosen = list(range(0, full.d_sae, 3))
    some = lower.encode_latents(x, chosen)
    # Some columns and all of them may be summed in different orders, which a threshold can show.
    assert torch.isclose(some, low[:, chosen], rtol=0.03, atol=0.03).float().mean() > 0.995
    # Each selection of matching pursuit depends on those before it.
    rows = 0.7 if full.architecture == "matching_pursuit" else 0.9
    assert_close_in_norm(low, acts, 0.1, rows)
    assert_close_in_norm(lower.decode(acts, x), full.decode(acts, x), 0.03)
    assert torch.equal(lower.decode(acts, x), lower.decode(acts.bfloat16(), x))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saes(architecture: str, options: dict[str, Any]) -> None:
    check(sae(architecture, **options), sae(architecture, **options).to(dtype=torch.bfloat16))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transcoders(architecture: str) -> None:
    check(transcoder(architecture), transcoder(architecture).to(dtype=torch.bfloat16))
