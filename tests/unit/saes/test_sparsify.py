"""sparsify folders: against the formula, and the library where installed."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import saexp
from saexp.errors import SAEError
from saexp.models import Hookpoint
from tests.unit.saes.make import D_IN, D_SAE, K, parameters, points, publish, skip
from tests.unit.saes.make_formats import assert_near, double, largest, write_sparsify

VARIANTS: list[dict[str, Any]] = [
    {},
    {"activation": "groupmax"},
    {"transcode": True},
    {"transcode": True, "skip_connection": True},
    {"transcode": True, "skip_connection": True, "activation": "groupmax"},
]


def make_weights(skips: bool = False) -> dict[str, Tensor]:
    p = parameters("topk")
    return {**p, "W_skip": skip(D_IN, D_IN)} if skips else p


def write(folder: Path, variant: dict[str, Any]) -> Path:
    """layers.3.mlp for transcoders, layers.3 for SAEs."""
    name = "layers.3.mlp" if variant.get("transcode") else "layers.3"
    return write_sparsify(
        folder / name, make_weights(bool(variant.get("skip_connection"))), **variant
    )


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_formula(tmp_path: Path, variant: dict[str, Any]) -> None:
    sae = saexp.load_sae(write(tmp_path, variant))
    x, p = points(30, D_IN), double(make_weights(bool(variant.get("skip_connection"))))
    read = x.double() if variant.get("transcode") else x.double() - p["b_dec"]
    pre = read @ p["W_enc"] + p["b_enc"]
    if variant.get("activation") == "groupmax":
        size = D_SAE // K
        acts = torch.cat([largest(pre[:, i : i + size], 1) for i in range(0, D_SAE, size)], dim=-1)
    else:
        acts = largest(pre, K)
    predicted = acts @ p["W_dec"] + p["b_dec"]
    if "W_skip" in p:
        predicted = predicted + x.double() @ p["W_skip"].T
    assert 0 < (acts != 0).double().sum(-1).mean() <= K
    assert_near(sae.encode(x), acts)
    assert_near(sae.encode_latents(x, [3, 30]), acts[:, [3, 30]])
    assert_near(sae.decode(sae.encode(x), x), predicted)
    if variant.get("transcode"):
        ends = (Hookpoint(3, "mlp_in"), Hookpoint(3, "mlp_out"))
        assert (sae.hookpoint, sae.hookpoint_out) == ends
    else:
        assert (sae.hookpoint, sae.hookpoint_out) == (Hookpoint(3, "resid_post"), None)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_library(
    other: Callable[[str], ModuleType], tmp_path: Path, variant: dict[str, Any]
) -> None:
    """Written by sparsify too, so that the layout is its own."""
    module = other("sparsify.sparse_coder")
    folder = write(tmp_path / "ours", variant)
    theirs = module.SparseCoder.load_from_disk(folder)
    theirs.save_to_disk(tmp_path / "theirs" / folder.name)
    ours, x = saexp.load_sae(tmp_path / "theirs" / folder.name), points(30, D_IN)
    with torch.no_grad():
        top, where, _ = theirs.encode(x)
        acts = torch.zeros(30, D_SAE).scatter(-1, where, top)
        assert_near(ours.encode(x), acts)
        assert_near(ours.decode(ours.encode(x), x), theirs(x).sae_out)


@pytest.mark.parametrize(
    ("folder", "transcode", "stream", "stream_out"),
    [
        ("layers.3", False, "resid_post", None),
        ("model.layers.3", False, "resid_post", None),
        ("h.3", False, "resid_post", None),
        ("layers.3.mlp", False, "mlp_out", None),
        ("layers.3.self_attn", False, "attn_out", None),
        ("layers.3.attention", False, "attn_out", None),
        ("layers.3.mlp/seed1", True, "mlp_in", "mlp_out"),
        ("layers.3", True, "resid_pre", "resid_post"),
    ],
)
def test_the_folder_says_where(
    tmp_path: Path, folder: str, transcode: bool, stream: str, stream_out: str | None
) -> None:
    sae = saexp.load_sae(write_sparsify(tmp_path / folder, make_weights(), transcode=transcode))
    assert sae.hookpoint == Hookpoint(3, stream)
    assert sae.hookpoint_out == (Hookpoint(3, stream_out) if stream_out else None)


def test_other_folders(tmp_path: Path) -> None:
    folder = write_sparsify(tmp_path / "embed_tokens", make_weights())
    assert saexp.load_sae(folder / "sae.safetensors").hookpoint == Hookpoint(0, "embed")
    moved = folder.rename(tmp_path / "mine")
    with pytest.raises(
        SAEError, match="name 'mine' is not a module such as layers.5 or layers.5.mlp"
    ):
        saexp.load_sae(moved)
    assert saexp.load_sae(moved, layer=2, stream="mlp_out").hookpoint == Hookpoint(2, "mlp_out")
    with pytest.raises(
        SAEError, match="layer=2, but .* was trained on layer_3.resid_post; type la"
    ):
        saexp.load_sae(write_sparsify(tmp_path / "layers.3", make_weights()), layer=2)


@pytest.mark.parametrize(
    ("folder", "changed", "message"),
    [
        (
            "layers.3",
            {"signed": True},
            "cfg.json: signed=true keeps negative latents; not supported",
        ),
        (
            "layers.3",
            {"activation": "relu"},
            "activation 'relu' is not supported; saexp reads topk, gr",
        ),
        ("layers.3", {"k": None}, "a topk SAE needs k, which its config lacks"),
        (
            "layers.3",
            {"activation": "groupmax", "k": 7},
            "40 latents do not make k=7 groups of equal",
        ),
        ("layers.3", {"without": "b_dec"}, "a sparsify SAE needs 'b_dec', which is missing"),
        (
            "layers.3",
            {"without": "encoder.weight"},
            "a sparsify SAE needs 'encoder.weight', which",
        ),
        (
            "layers.3.mlp",
            {"transcode": True, "skip_connection": True},
            "needs 'W_skip', which is missing",
        ),
        (
            "layers.3.attn",
            {"transcode": True},
            "transcoder of layer_3.attn_out, whose input is not a stream",
        ),
        ("layers.3.mlp.up_proj", {}, "'layers.3.mlp.up_proj' is not a module such as layers.5 or"),
        (
            "wte",
            {},
            "'wte' is not a module such as layers.5 or layers.5.mlp; set layer= and sae.str",
        ),
    ],
)
def test_folders_that_do_not_fit(
    tmp_path: Path, folder: str, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(SAEError, match=message) as caught:
        saexp.load_sae(write_sparsify(tmp_path / folder, make_weights(), **changed))
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    folder = tmp_path / "layers.3"
    with pytest.raises(SAEError, match=r"W_dec has shape \[12, 40\], not \[40, 12\]"):
        saexp.load_sae(
            write_sparsify(folder, {**make_weights(), "W_dec": make_weights()["W_dec"].T})
        )
    with pytest.raises(SAEError, match="'W_skip', which saexp cannot apply in a topk SAE"):
        saexp.load_sae(write_sparsify(folder, make_weights(True), skip_connection=True))
    (folder / "sae.safetensors").write_bytes(b"cut off")
    with pytest.raises(SAEError, match=r"sae.safetensors is not a safetensors file \("):
        saexp.load_sae(folder)


def test_hub(tmp_path: Path, hub_cache: Path) -> None:
    """By repository and path; the run's config beside the folders says the model."""
    repo, run = "EleutherAI/sae-tiny", tmp_path / "made"
    write_sparsify(run / "layers.3.mlp", make_weights())
    (run / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-70m"}))
    publish(hub_cache, repo, run)
    sae = saexp.load_sae(f"{repo}/layers.3.mlp")
    assert (sae.hookpoint, sae.settings.k) == (Hookpoint(3, "mlp_out"), K)
    assert (sae.metadata["format"], sae.metadata["model"]) == ("sparsify", "EleutherAI/pythia-70m")
    assert sae.metadata["fingerprint"] == Path(sae.metadata["path"]).resolve().name
    with pytest.raises(
        SAEError, match="EleutherAI/sae-tiny/layers.4/cfg.json is neither cached nor"
    ):
        saexp.load_sae(f"{repo}/layers.4")


def test_a_norm_after_the_module(tmp_path: Path) -> None:
    folder = write_sparsify(tmp_path / "layers.3.mlp", make_weights())
    (tmp_path / "config.json").write_text(json.dumps({"model": "google/gemma-2-2b"}))
    with pytest.raises(SAEError, match="of layer_3.mlp_out, but google/gemma-2-2b applies a norm"):
        saexp.load_sae(folder)
