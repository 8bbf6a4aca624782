"""Random directions of controls: the same for the same question, unrelated between layers."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saexp.config import SAEConfig, SAETrainerConfig
from saexp.models import Hookpoint
from saexp.saes.loading import random_sae
from saexp.saes.training import Training, TrainingSource
from saexp.stats.significance import random_directions

D, WIDTH = 256, 384
BASE = SAEConfig(name="random", loader="random", layer=2, d_in=D, width=WIDTH, device="cpu")
VARIANTS = {
    "layer": replace(BASE, layer=3),
    "stream": replace(BASE, stream="mlp_out"),
    "seed": replace(BASE, seed=1),
    "width": replace(BASE, width=WIDTH + 1),
}


def largest_cosine(a: Tensor, b: Tensor) -> float:
    unit_a, unit_b = (torch.nn.functional.normalize(x.double(), dim=-1) for x in (a, b))
    return float((unit_a @ unit_b.T).abs().max())


BY_CHANCE = 7 / D**0.5
"""Seven standard deviations: 150 000 cosines stay below it but for one in 10^6 tries."""


def test_control_saes_of_different_layers_share_no_direction() -> None:
    decoders = [random_sae(replace(BASE, layer=n)).W_dec for n in range(5)]
    for a, b in combinations(decoders, 2):
        assert largest_cosine(a, b) < BY_CHANCE
        assert abs(float((a * b).sum(-1).mean())) < 5 / (D * WIDTH) ** 0.5


@pytest.mark.parametrize("name", VARIANTS)
def test_they_differ_by_everything_that_tells_saes_apart(name: str) -> None:
    one, other = random_sae(BASE), random_sae(VARIANTS[name])
    assert largest_cosine(one.W_dec, other.W_dec) < BY_CHANCE
    assert one.metadata["fingerprint"] != other.metadata["fingerprint"]


def test_the_input_size_counts_too() -> None:
    wide = random_sae(replace(BASE, d_in=2 * D)).W_dec[:, :D]
    assert largest_cosine(random_sae(BASE).W_dec, wide) < BY_CHANCE


def test_the_same_question_has_the_same_answer() -> None:
    first = random_sae(BASE)
    torch.manual_seed(5)
    torch.randn(100)
    again = random_sae(BASE)
    assert torch.equal(first.W_dec, again.W_dec)
    assert first.metadata == again.metadata
    half = random_sae(replace(BASE, dtype="bfloat16")).W_dec
    assert torch.equal(half, first.W_dec.bfloat16())


def test_it_says_that_it_is_a_control() -> None:
    about = random_sae(BASE).metadata
    assert about["control"] == "random"
    assert about["name"] == f"random control, layer_2.resid_post, width {WIDTH}, seed 0"


def test_directions_are_a_prefix_of_more_of_them_and_uniform() -> None:
    some, more = (random_directions(n, 12, 0, "layer_1.resid_post") for n in (3, 4000))
    assert torch.equal(some, more[:3])
    torch.testing.assert_close(more.norm(dim=-1), torch.ones(4000))
    # Uniform on the sphere: mean 0, covariance 1/d.
    assert more.mean(0).abs().max() < 5 / (12 * 4000) ** 0.5
    torch.testing.assert_close(more.T @ more / 4000, torch.eye(12) / 12, atol=0.01, rtol=0)
    assert random_directions(0, 12, 0).shape == (0, 12)


def test_trainings_of_two_layers_start_from_different_directions(tmp_path: Path) -> None:
    cfg = SAETrainerConfig(name="topk", n_samples=64, batch_size=32, options={"k": 4})
    device = torch.device("cpu")

    def start(layer: int) -> Tensor:
        source = TrainingSource("m", Hookpoint(layer, "resid_post"), d_in=D, context_size=8)
        return Training(cfg, WIDTH, source, tmp_path, device).sae.W_dec.detach()

    assert largest_cosine(start(0), start(1)) < BY_CHANCE
    assert torch.equal(start(0), start(0))
