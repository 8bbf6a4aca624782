"""Gemma Scope 2: folders, releases, and what is said where they don't fit."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import saexp
from saexp.errors import SAEError
from saexp.models import Hookpoint
from saexp.registry import build
from saexp.saes.catalogue import find_entry
from tests.unit.saes.make import D_IN, parameters, points, publish, skip
from tests.unit.saes.make_formats import assert_near, double, jump, write_gemma2

RESID = "resid_post/layer_3_width_16k_l0_medium"
TRANSCODER = "transcoder_all/layer_3_width_16k_l0_small_affine"
NORMS = "model.layers.3.{}_feedforward_layernorm.output"
ENDS = {
    "hf_hook_point_in": NORMS.format("pre"),
    "hf_hook_point_out": NORMS.format("post"),
    "type": "transcoder",
}


def square() -> dict[str, torch.Tensor]:
    """A transcoder's parameters, d_out as d_in."""
    return {**parameters("jumprelu"), "W_skip": skip(D_IN, D_IN)}


@pytest.mark.parametrize("config", [None, {}], ids=["config", "no config"])
@pytest.mark.parametrize(
    ("folder", "stream", "module"),
    [
        (RESID, "resid_post", "output"),
        ("resid_post_all/layer_3_width_262k_l0_big", "resid_post", "output"),
        ("attn_out/layer_3_width_16k_l0_small", "attn_z", "self_attn.o_proj.input"),
        ("mlp_out/layer_3_width_1m_l0_big", "mlp_out", "post_feedforward_layernorm.output"),
    ],
)
def test_saes(
    tmp_path: Path, folder: str, stream: str, module: str, config: dict[str, Any] | None
) -> None:
    p = parameters("jumprelu")
    hook = f"model.language_model.layers.3.{module}"
    changed = {"hf_hook_point_in": hook, "hf_hook_point_out": hook}
    sae = saexp.load_sae(write_gemma2(tmp_path / folder, p, config=config, **changed))
    x, q = points(20, D_IN), double(p)
    acts = jump(x.double() @ q["W_enc"] + q["b_enc"], q["threshold"])
    assert 0.05 < (acts != 0).double().mean() < 0.9
    assert_near(sae.encode(x), acts)
    assert_near(sae.decode(sae.encode(x)), acts @ q["W_dec"] + q["b_dec"])
    assert (sae.hookpoint, sae.is_transcoder) == (Hookpoint(3, stream), False)
    assert sae.metadata["format"] == "Gemma Scope 2"
    if config is None:
        assert sae.metadata["model"] == "google/gemma-3-1b-pt"
        assert sae.metadata["expected_l0"] == 7.0


@pytest.mark.parametrize("affine", [True, False])
def test_transcoders(tmp_path: Path, affine: bool) -> None:
    p = square()
    if not affine:
        del p["W_skip"]
    path = write_gemma2(tmp_path / TRANSCODER, p, affine_connection=affine, **ENDS)
    sae = saexp.load_sae(path)
    x, q = points(20, D_IN), double(p)
    acts = jump(x.double() @ q["W_enc"] + q["b_enc"], q["threshold"])
    predicted = acts @ q["W_dec"] + q["b_dec"]
    if affine:
        # As published, the matrix is applied from the right: x @ affine_skip_connection.
        predicted = predicted + x.double() @ q["W_skip"].T
    assert_near(sae.encode(x), acts)
    assert_near(sae.decode(sae.encode(x), x), predicted)
    assert (sae.hookpoint, sae.hookpoint_out) == (Hookpoint(3, "mlp_in"), Hookpoint(3, "mlp_out"))
    moved = saexp.load_sae(path.rename(tmp_path / "moved"))
    assert (moved.hookpoint, moved.hookpoint_out) == (sae.hookpoint, sae.hookpoint_out)


def test_moved_without_a_config(tmp_path: Path) -> None:
    path = write_gemma2(tmp_path / "moved", parameters("jumprelu"), config={})
    with pytest.raises(SAEError, match=r"moved does not say its layer and stream; set layer= and"):
        saexp.load_sae(path)
    at = saexp.load_sae(path / "params.safetensors", layer=5, stream="resid_post").hookpoint
    assert at == Hookpoint(5, "resid_post")


@pytest.mark.parametrize(
    ("folder", "changed", "message"),
    [
        (RESID, {"without": "w_enc"}, "Gemma Scope 2 needs 'w_enc', which is missing"),
        (RESID, {"without": "threshold"}, "Gemma Scope 2 needs 'threshold', which is missing"),
        (
            RESID,
            {"hf_hook_point_in": "model.layers.4.output", "hf_hook_point_out": None},
            "its path says layer_3.resid_post, its config layer_4.resid_post; correct the",
        ),
        (
            TRANSCODER,
            {},
            "its path says layer_3.mlp_in to layer_3.mlp_out, its config layer_3.resid_post; corr",
        ),
        (
            RESID,
            {"hf_hook_point_in": "model.layers.3.mlp.gate"},
            "its config names 'model.layers.3.mlp.gate', which is not a hookpoint that saexp knows",
        ),
        (RESID, {"affine_connection": True}, "affine_connection, but 'affine_skip_connection' is"),
        (RESID, {"architecture": "topk"}, "config.json: architecture 'topk' is not supported; Gem"),
        ("clt/layer_3_width_16k", {}, "is a cross-layer transcoder, which is not supported; saexp"),
        (RESID, {"type": "clt"}, "is a cross-layer transcoder, which is not supported; saexp rea"),
        ("crosscoder/layer_3_5_width_16k", {}, "is a crosscoder, which is not supported; saexp re"),
    ],
)
def test_folders_that_do_not_fit(
    tmp_path: Path, folder: str, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(SAEError, match=message) as caught:
        saexp.load_sae(write_gemma2(tmp_path / folder, parameters("jumprelu"), **changed))
    assert "\n" not in str(caught.value)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    p = parameters("jumprelu")
    for name, shape in {
        "W_dec": r"\[12, 40\], not \[40, 12\]",
        "b_enc": r"\[12\], not \[40\]",
    }.items():
        wrong = {**p, name: p["W_dec"].T if name == "W_dec" else p["b_dec"].clone()}
        with pytest.raises(SAEError, match=f"{name} has shape {shape}"):
            saexp.load_sae(write_gemma2(tmp_path / RESID, wrong))
    with pytest.raises(SAEError, match="its files hold 'extra', which saexp cannot apply"):
        saexp.load_sae(write_gemma2(tmp_path / RESID, {**p, "extra": p["b_dec"].clone()}))
    with pytest.raises(
        SAEError, match="layer=5, but .* was trained on layer_3.resid_post; type la"
    ):
        saexp.load_sae(write_gemma2(tmp_path / RESID, p), layer=5)
    (tmp_path / RESID / "params.safetensors").write_bytes(b"cut off")
    with pytest.raises(SAEError, match=r"params.safetensors is not a safetensors file \("):
        saexp.load_sae(tmp_path / RESID)
    (tmp_path / RESID / "config.json").write_text("{")
    with pytest.raises(SAEError, match=r"config.json is not valid JSON \("):
        saexp.load_sae(tmp_path / RESID)


def test_cross_layer_folders_are_named(tmp_path: Path) -> None:
    save_file(parameters("jumprelu"), tmp_path / "params_layer_0.safetensors")
    with pytest.raises(SAEError, match="is a cross-layer transcoder, which is not supported"):
        saexp.load_sae(tmp_path)
    with pytest.raises(SAEError, match="^google/gemma-scope-2-1b-pt/clt/w is a cross-layer"):
        saexp.load_sae("google/gemma-scope-2-1b-pt/clt/w")


PRESET = ["sae=gemmascope2", "model=hf", "model.name=google/gemma-3-1b-pt"]


def test_preset(lens: ModuleType, tmp_path: Path, hub_cache: Path) -> None:
    """By layer and width, medium chosen and said; equal to sae-lens' own loading of weights."""
    cfg = saexp.compose([*PRESET, "layer=13"]).sae
    with pytest.raises(SAEError, match=r"params.safetensors is neither cached nor reachable"):
        build("sae", cfg)
    entry = find_entry(cfg)
    assert (entry.l0_name, entry.path) == ("medium", f"resid_post/{entry.id}")
    p = parameters("jumprelu", 8, 2**14)
    hook = "model.layers.13.output"
    sae_folder = tmp_path / "made" / entry.path
    write_gemma2(sae_folder, p, hf_hook_point_in=hook, hf_hook_point_out=hook)
    publish(hub_cache, entry.repo, tmp_path / "made")
    sae, x = build("sae", cfg), points(9, 8)
    by_path = saexp.load_sae(f"{entry.repo}/{entry.path}")
    assert sae.hookpoint == by_path.hookpoint == Hookpoint(13, "resid_post")
    assert torch.equal(sae.encode(x), by_path.encode(x))
    assert sae.metadata["chosen"] == "l0 medium of big, medium, small"
    assert sae.metadata["neuronpedia_id"] == entry.neuronpedia
    theirs = lens.JumpReLUSAE.from_dict(
        {"d_in": 8, "d_sae": 2**14, "apply_b_dec_to_input": False, "architecture": "jumprelu"}
    )
    theirs.load_state_dict(p)
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(x), theirs.encode(x))
        torch.testing.assert_close(sae.decode(sae.encode(x)), theirs(x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("words", "release", "sae_id", "chosen"),
    [
        (["layer=13"], "1b-pt-res", "layer_13_width_16k_l0_medium", "l0 medium of big, medium, s"),
        (["layer=13", "width=262k"], "1b-pt-res", "layer_13_width_262k_l0_medium", "l0 medium of"),
        (["layer=13", "sae.l0=150"], "1b-pt-res", "layer_13_width_16k_l0_big", None),
        (["layer=13", "sae.id=layer_13_width_16k_l0_small"], "1b-pt-res",
         "layer_13_width_16k_l0_small", None),
        (["layer=13", "sae.release=gemma-scope-2-1b-pt-transcoders"], "1b-pt-transcoders",
         "transcoder/layer_13_width_16k_l0_medium", "variant plain of affine, plain"),
        (["layer=12", "model.name=google/gemma-3-270m"], "270m-pt-res",
         "layer_12_width_16k_l0_medium", "l0 medium of"),
        (["layer=17", "model.name=google/gemma-3-4b-it"], "4b-it-res",
         "layer_17_width_16k_l0_medium", "l0 medium of"),
    ],
)  # fmt: skip
def test_which_of_a_release(
    words: list[str], release: str, sae_id: str, chosen: str | None
) -> None:
    entry = find_entry(saexp.compose([*PRESET, *words]).sae)
    assert (entry.release, entry.id) == (f"gemma-scope-2-{release}", sae_id)
    assert (chosen in (entry.chosen or "")) if chosen else entry.chosen is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["layer=12"],
            "has no SAE at layer=12; it has layers 7, 13, 17, 22; try layer=13 or "
            "sae.release=gemma-scope-2-1b-pt-res-all$",
        ),
        (["layer=13", "sae.l0=55"], "has no sae.l0=55 at layer=13; it has .*; try sae.l0="),
        (
            ["layer=12", "sae.release=gemma-scope-2-1b-pt-res-all"],
            "has 2 SAEs at layer=12: layer_12_width_16k_l0_big, layer_12_width_16k_l0_small; type",
        ),
    ],
)
def test_what_a_release_lacks(words: list[str], message: str) -> None:
    with pytest.raises(SAEError, match=message):
        find_entry(saexp.compose([*PRESET, *words]).sae)
