"""What a user can get wrong, by the text they read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import saexp
from saexp.config import SAEConfig
from saexp.errors import ConfigError, ModelError, SAEError
from saexp.models import Hookpoint
from saexp.registry import build
from saexp.saes import SAESettings, SparseAutoencoder
from saexp.saes.loading import check_fits
from tests.random_models import D_MODEL, random_lm
from tests.unit.saes.make import D_IN, HOOK_NAME, parameters, sae, write_npz, write_saelens

AT = Hookpoint(3, "resid_post")


def local(folder: Path, **options: Any) -> SparseAutoencoder:
    return build("sae", SAEConfig(name="local", loader="path", path=str(folder), **options))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound SAELens folder, jumprelu, 40 latents on block 3's output."""
    cfg = {"architecture": "jumprelu", "metadata": {"hook_name": HOOK_NAME}}
    return write_saelens(tmp_path / "sound", cfg, parameters("jumprelu"))


def change(folder: Path, **cfg: Any) -> Path:
    old = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**old, **cfg}))
    return folder


@pytest.mark.parametrize(
    ("architecture", "changed", "options", "message"),
    [
        ("standard", {"b_enc": None}, {}, "mine: a standard SAE needs 'b_enc', which is missing"),
        ("jumprelu", {"threshold": None}, {}, "mine: a jumprelu SAE needs 'threshold', which"),
        ("gated", {"r_mag": None}, {}, "mine: a gated SAE needs 'r_mag', which is missing"),
        (
            "jumprelu",
            {"threshold": torch.ones(())},
            {},
            r"mine: threshold has shape \[\], not \[40\]",
        ),
        (
            "standard",
            {"W_dec": torch.ones(12, 40)},
            {},
            r"mine: W_dec has shape \[12, 40\], not \[40, 12\]",
        ),
        ("standard", {"b_dec": torch.ones(40)}, {}, r"b_dec has shape \[40\], not \[12\]"),
        ("standard", {"W_enc": torch.ones(40)}, {}, r"W_enc has shape \[40\], not \[d_in, d_sae\]"),
        (
            "jumprelu",
            {"W_skip": torch.ones(12, 12)},
            {},
            "mine: its files hold 'W_skip', which saexp cannot apply in a jumprelu SAE",
        ),
        ("topk", {}, {}, "mine: a topk SAE needs k, which its config lacks"),
        ("topk", {}, {"k": 0}, "mine: a topk SAE needs k, which its config lacks"),
        (
            "standard",
            {},
            {"architecture": "transcoder"},
            "mine: architecture 'transcoder' is not supported; saexp reads standard, jumprelu, "
            "topk, batchtopk, gated",
        ),
        (
            "standard",
            {},
            {"normalize_activations": "covariance_whitening"},
            "mine: input scaling 'covariance_whitening' is not supported; saexp knows none, ",
        ),
    ],
)
def test_weights_that_do_not_fit(
    architecture: str, changed: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    weights = {k: v for k, v in (parameters(architecture) | changed).items() if v is not None}
    options = {"architecture": architecture, **options}
    with pytest.raises(SAEError, match=message):
        SparseAutoencoder(weights, SAESettings(hookpoint=AT, **options), metadata={"name": "mine"})


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"metadata": {}}, "cfg.json has no hook_name, so the SAE's hookpoint is unknown"),
        (
            {"metadata": {"hook_name": "somewhere"}},
            "cfg.json: hook_name: 'somewhere' is not a hookpoint; type one such as",
        ),
        (
            {"activation_fn_str": "tanh-relu"},
            "cfg.json: activation_fn 'tanh-relu' is not supported; saexp reads relu, topk",
        ),
        ({"activation_fn_str": "topk"}, "a topk SAE needs k, which its config lacks"),
        ({"architecture": "temporal"}, "architecture 'temporal' is not supported"),
        ({"normalize_activations": True}, "its inputs are scaled by a factor that its files do"),
    ],
)
def test_saelens_configs(folder: Path, cfg: dict[str, Any], message: str) -> None:
    tensors = parameters("standard") if cfg.get("activation_fn_str") == "topk" else None
    if tensors:
        write_saelens(folder, json.loads((folder / "cfg.json").read_text()), tensors)
    with pytest.raises(SAEError, match=message) as caught:
        saexp.load_sae(change(folder, **cfg))
    assert "\n" not in str(caught.value)


def test_saelens_files(folder: Path) -> None:
    scaled = {**parameters("jumprelu"), "scaling_factor": torch.full((40,), 0.9)}
    write_saelens(folder, json.loads((folder / "cfg.json").read_text()), scaled)
    with pytest.raises(SAEError, match="its files hold 'scaling_factor', which saexp cannot apply"):
        saexp.load_sae(folder)
    (folder / "sae_weights.safetensors").write_bytes(b"cut off")
    with pytest.raises(SAEError, match=r"sae_weights.safetensors is not a safetensors file \("):
        saexp.load_sae(folder)
    (folder / "cfg.json").write_text("[1]")
    with pytest.raises(SAEError, match="cfg.json is not a JSON object"):
        saexp.load_sae(folder)
    (folder / "cfg.json").write_text("{")
    with pytest.raises(SAEError, match=r"cfg.json is not valid JSON \("):
        saexp.load_sae(folder)


def test_weights_are_read_in_float32_unless_asked(folder: Path) -> None:
    cfg = json.loads((folder / "cfg.json").read_text())
    write_saelens(folder, cfg, {n: p.half() for n, p in parameters("jumprelu").items()})
    assert saexp.load_sae(folder).W_dec.dtype == torch.float32
    assert local(folder).W_dec.dtype == torch.float32
    assert local(folder, dtype="bfloat16").W_dec.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 5}, "layer=5, but local was trained on layer_3.resid_post; type layer=3"),
        ({"layer": [1, 3]}, r"layer=\[1, 3\]: one SAE reads one layer; sweep with -m layer=0,1,2"),
        (
            {"layer": 3, "stream": "mlp_out"},
            "sae.stream=mlp_out, but local was trained on layer_3.resid_post; leave it out",
        ),
        ({"width": "16k"}, "width=16k, but local has d_sae=40"),
    ],
)
def test_contradictions(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SAEError, match=message):
        local(folder, **options)
    assert local(folder, layer=3, width=40, stream="resid_post").hookpoint == AT


def test_contradictions_in_python(folder: Path) -> None:
    assert saexp.load_sae(folder, layer=3).hookpoint == AT
    with pytest.raises(SAEError, match=r"layer=5, but .*sound was trained on layer_3.resid_post"):
        saexp.load_sae(folder, layer=5)
    with pytest.raises(ModelError, match="no stream 'embed_x'; did you mean embed?"):
        saexp.load_sae(folder, stream="embed_x")
    with pytest.raises(SAEError, match=r"sae.stream=attn_out, but .* leave it out"):
        saexp.load_sae(folder, stream="attn_out")


def test_paths(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(SAEError, match=r"sae.path is not set; type sae.path=<folder"):
        build("sae", SAEConfig(name="local", loader="path"))
    with pytest.raises(SAEError, match=r"sae.path=.*absent: no such folder or file"):
        local(tmp_path / "absent")
    with pytest.raises(SAEError, match=r"an/sae/cfg.json is neither cached nor reachable"):
        saexp.load_sae("an/sae")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        SAEError,
        match="empty is not an SAE in a format that saexp reads: expected cfg.json with "
        "sae_weights.safetensors, "
        "hyperparams.json with checkpoints/final.safetensors, or params.npz",
    ):
        local(tmp_path / "empty")
    filled = str(folder.parent / "{model_name}" / "layer_{layer}.width_{width}")
    (folder.parent / "m").mkdir()
    folder.rename(folder.parent / "m" / "layer_3.width_40")
    assert local(Path(filled), model_name="m", layer=3, width=40).hookpoint == AT


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    message = "which can run code when opened; saexp loads safetensors and npz, so convert it first"
    file = tmp_path / "old" / "ae.pt"
    file.parent.mkdir()
    torch.save({"W_enc": torch.ones(2)}, file)
    with pytest.raises(SAEError, match=rf"ae.pt is a pickle file, {message}"):
        saexp.load_sae(file)
    with pytest.raises(SAEError, match=rf"old holds only a pickle file \(ae.pt\), {message}"):
        saexp.load_sae(file.parent)
    objects = write_npz(tmp_path / "layer_3" / "params.npz", {})
    np.savez(objects, W_enc=np.array([{}], dtype=object))
    with pytest.raises(
        SAEError, match=r"params.npz is not an npz file of plain arrays \(Object arr"
    ):
        saexp.load_sae(objects.parent, layer=3, stream="resid_post")


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut off"])
def test_damaged_npz(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "params.npz").write_bytes(content)
    with pytest.raises(SAEError, match=r"params.npz is not an npz file of plain arrays \("):
        saexp.load_sae(tmp_path, layer=3, stream="resid_post")


def test_gemma_scope_outside_its_folders(tmp_path: Path) -> None:
    """The path says everything; where it does not, the user does."""
    p = parameters("jumprelu")
    lower = {f"w_{n[2:]}" if n.startswith("W_") else n: t for n, t in p.items()}
    write_npz(tmp_path / "moved" / "params.npz", lower)
    with pytest.raises(
        SAEError, match=r"does not say its layer and stream; set layer= and sae.stream=resid_post"
    ):
        saexp.load_sae(tmp_path / "moved")
    moved = saexp.load_sae(tmp_path / "moved" / "params.npz", layer=3, stream="resid_post")
    assert moved.hookpoint == AT
    torch.testing.assert_close(moved.W_dec, p["W_dec"])
    for kind, stream in {"res": "resid_post", "mlp": "mlp_out", "att": "attn_z"}.items():
        sae_folder = (
            tmp_path / f"gemma-scope-9b-pt-{kind}" / "layer_7" / "width_16k" / "average_l0_9"
        )
        write_npz(sae_folder / "params.npz", p)
        assert saexp.load_sae(sae_folder).hookpoint == Hookpoint(7, stream)
        with pytest.raises(SAEError, match=rf"was trained on layer_7.{stream}; type layer=7"):
            saexp.load_sae(sae_folder, layer=3)


def test_shipped() -> None:
    def tiny(**options: Any) -> SparseAutoencoder:
        return build("sae", saexp.compose([f"{k}={v}" for k, v in options.items()]).sae)

    sae = tiny(model="tiny", layer=2)
    assert (sae.hookpoint, sae.d_sae, sae.architecture) == (
        Hookpoint(2, "resid_post"),
        256,
        "jumprelu",
    )
    assert tiny(model="tiny", layer=2, width=512).d_sae == 512
    with pytest.raises(SAEError, match=r"sae=tiny has no layer=9; it has layers 0, 1, "):
        tiny(model="tiny", layer=9)
    with pytest.raises(SAEError, match=r"sae=tiny has no width=16k for tiny; it has 256, 512$"):
        tiny(model="tiny", layer=2, width="16k")
    with pytest.raises(
        SAEError,
        match="sae=tiny ships for model=tiny and tiny_control, not for openai-community/gpt2; ",
    ):
        tiny(model="gpt2", layer=2, sae="tiny")
    with pytest.raises(SAEError, match="not for smollm2; type e.g. sae=smollm2 or"):
        tiny(model="smollm2", layer=2)


def test_shipped_in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    def smollm2(*words: str) -> SparseAutoencoder:
        return build("sae", saexp.compose(["sae=smollm2", *words]).sae)

    for layer in (7, 15, 22):
        sae = smollm2("model=smollm2", f"layer={layer}")
        assert (sae.hookpoint, sae.d_in) == (Hookpoint(layer, "resid_post"), 576)
        assert (sae.d_sae, sae.architecture, sae.W_dec.dtype) == (4096, "jumprelu", torch.float32)
    hub = smollm2("model=hf", "model.name=HuggingFaceTB/SmolLM2-135M-Instruct", "layer=22")
    assert torch.equal(hub.W_dec, sae.W_dec)
    assert torch.equal(saexp.load_sae("smollm2", layer=22).W_enc, sae.W_enc)
    with pytest.raises(SAEError, match="needs a layer; type layer=15"):
        saexp.load_sae("smollm2")
    with pytest.raises(SAEError, match=r"sae=smollm2 has no layer=9; it has layers 7, 15, 22"):
        smollm2("model=smollm2", "layer=9")
    with pytest.raises(SAEError, match=r"sae=smollm2 has no width=16k for smollm2; it has 4k"):
        smollm2("model=smollm2", "layer=7", "width=16k")
    with pytest.raises(SAEError, match="sae=smollm2 ships for model=smollm2, not for tiny; "):
        smollm2("model=tiny", "layer=1")
    monkeypatch.setattr("saexp.saes.catalogue.PACKAGE", Path("/nowhere/saexp"))
    with pytest.raises(SAEError, match="in the repository of saexp and not in the installed"):
        smollm2("model=smollm2", "layer=15")


def test_fits_the_model() -> None:
    model = random_lm("llama")
    fitting = sae(hookpoint=Hookpoint(1, "resid_post"), metadata={"name": "mine"})
    assert fitting.d_in == D_IN != D_MODEL
    with pytest.raises(
        SAEError,
        match=rf"mine reads vectors of {D_IN} numbers, but .* has d_model={D_MODEL}; choose an SAE",
    ):
        check_fits(fitting, model)
    with pytest.raises(
        ModelError, match=r"layer=3 is out of range: .* has layers 0-2; try layer=2"
    ):
        check_fits(sae(), model)
    check_fits(sae(hookpoint=Hookpoint(1, "attn_z")), model)


def test_config() -> None:
    with pytest.raises(ConfigError, match="width=wide is not an SAE width"):
        SAEConfig(name="x", loader="path", width="wide")
    with pytest.raises(ConfigError, match="no sae is called 'relase'; did you mean release"):
        build("sae", SAEConfig(name="x", loader="relase"))
