"""Llama Scope folders on disk: read without a release, and what is said where they don't fit."""

from pathlib import Path
from typing import Any

import pytest
import torch

import saexp
from saexp.errors import SAEError
from saexp.models import Hookpoint
from tests.unit.saes.make import D_IN, D_SAE, parameters, points
from tests.unit.saes.make_formats import LLAMA_CFG, write_llama


@pytest.mark.parametrize("before", [True, False], ids=["b_dec subtracted", "not subtracted"])
def test_scaling_in_and_out(tmp_path: Path, before: bool) -> None:
    """Training's own formula, in and out scaled apart; TopK read as JumpReLU."""
    sae = saexp.load_sae(write_llama(tmp_path / "sae", apply_decoder_bias_to_pre_encoder=before))
    p = {n: t.double() for n, t in parameters("standard").items()}
    into, out = (
        D_IN**0.5 / LLAMA_CFG["dataset_average_activation_norm"][end] for end in ("in", "out")
    )
    x = points(20, D_IN)
    # b_dec is of the output's scale; it is taken off in the model's.
    scaled = into * (x.double() - p["b_dec"] / out if before else x.double())
    pre = scaled @ p["W_enc"] + p["b_enc"]
    fires = pre / into > 0.7
    reconstruction = ((pre * fires) @ p["W_dec"] + p["b_dec"]) / out
    assert 0.1 < fires.double().mean() < 0.9
    torch.testing.assert_close(sae.encode(x).double(), pre * fires / into, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        sae.decode(sae.encode(x)).double(), reconstruction, rtol=1e-4, atol=1e-4
    )
    assert (sae.hookpoint, sae.d_sae) == (Hookpoint(3, "attn_out"), D_SAE)
    assert sae.metadata["format"] == "Llama Scope"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"without": "decoder.bias"}, "a Llama Scope SAE needs 'decoder.bias', which is missing"),
        (
            {"without": "jump_relu_threshold"},
            "hyperparams.json: 'jump_relu_threshold' is missing",
        ),
        (
            {"norm_activation": "token-wise"},
            'hyperparams.json: norm_activation is "token-wise", not dataset-wise',
        ),
        (
            {"dataset_average_activation_norm": {"in": 2}},
            "hyperparams.json: 'dataset_average_activation_norm.out' is missing",
        ),
        (
            {"hook_point_in": "nowhere"},
            "hyperparams.json: hook_point_in: 'nowhere' is not a hookpoint",
        ),
        (
            {"hook_point_out": "blocks.3.hook_mlp_out"},
            "writes to blocks.3.hook_mlp_out: saexp reads no transcoders",
        ),
        ({"act_fn": "relu"}, "only Llama Scope's JumpReLU SAEs are supported"),
        ({"use_glu_encoder": True}, "only Llama Scope's JumpReLU SAEs are supported"),
    ],
)
def test_folders_that_do_not_fit(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(SAEError, match=message) as caught:
        saexp.load_sae(write_llama(tmp_path / "sae", **changed))
    assert "\n" not in str(caught.value)


def test_damaged(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "sae")
    (folder / "checkpoints" / "final.safetensors").write_bytes(b"cut off")
    with pytest.raises(SAEError, match=r"final.safetensors is not a safetensors file \("):
        saexp.load_sae(folder)
    (folder / "hyperparams.json").write_text("{")
    with pytest.raises(SAEError, match=r"hyperparams.json is not valid JSON \("):
        saexp.load_sae(folder)
