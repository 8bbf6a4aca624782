"""encode and decode equal sae-lens' own, from the folders that sae-lens itself writes."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import saexp
from saexp.digests import read_sha256
from tests.unit.saes.make import D_IN, D_SAE, HOOK_NAME, K, parameters, points, write_saelens

NAMES = {"standard": "Standard", "jumprelu": "JumpReLU", "topk": "TopK", "gated": "Gated"}
SCALINGS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")
FACTOR = 0.37


def lens_sae(lens: ModuleType, architecture: str, **options: Any) -> Any:
    """sae-lens' inference class with our random parameters."""
    if architecture == "topk":
        options["k"] = K
    metadata = options.pop("metadata", {"hook_name": HOOK_NAME, "model_name": "gpt2"})
    cfg = getattr(lens, f"{NAMES[architecture]}SAEConfig")(
        d_in=D_IN, d_sae=D_SAE, metadata=lens.saes.sae.SAEMetadata(**metadata), **options
    )
    lens_model = getattr(lens, f"{NAMES[architecture]}SAE")(cfg)
    lens_model.load_state_dict(parameters(architecture))
    return lens_model


def assert_same(ours: Any, theirs: Any, x: torch.Tensor) -> None:
    """Activations and reconstructions; sae-lens' decode relies on the encode just before."""
    with torch.no_grad():
        acts = theirs.encode(x)
        reconstruction = theirs.decode(acts)
    assert 0 < (acts != 0).float().mean() < 1
    torch.testing.assert_close(ours.encode(x), acts)
    torch.testing.assert_close(ours.decode(acts, x), reconstruction)


@pytest.mark.parametrize("subtract", [True, False], ids=["b_dec subtracted", "not subtracted"])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("architecture", NAMES)
def test_saved_by_sae_lens(
    lens: ModuleType, tmp_path: Path, architecture: str, scaling: str, subtract: bool
) -> None:
    theirs = lens_sae(
        lens, architecture, normalize_activations=scaling, apply_b_dec_to_input=subtract
    )
    theirs.save_model(tmp_path)
    if scaling == "expected_average_only_in":
        cfg = json.loads((tmp_path / "cfg.json").read_text())
        (tmp_path / "cfg.json").write_text(json.dumps({**cfg, "norm_scaling_factor": FACTOR}))
        theirs.fold_activation_norm_scaling_factor(FACTOR)
    ours = saexp.load_sae(tmp_path)
    assert (ours.architecture, ours.hookpoint.name) == (architecture, "layer_3.resid_post")
    assert (ours.d_in, ours.d_sae) == (D_IN, D_SAE)
    assert_same(ours, theirs, points(4, 7, D_IN))


@pytest.mark.parametrize("scaling", ["none", "layer_norm"])
def test_topk_rescaled_by_decoder_norm(lens: ModuleType, tmp_path: Path, scaling: str) -> None:
    theirs = lens_sae(
        lens, "topk", rescale_acts_by_decoder_norm=True, normalize_activations=scaling
    )
    theirs.save_model(tmp_path)
    assert_same(saexp.load_sae(tmp_path), theirs, points(30, D_IN))


def test_hook_z_flattens_heads(lens: ModuleType, tmp_path: Path) -> None:
    theirs = lens_sae(
        lens,
        "standard",
        reshape_activations="hook_z",
        metadata={"hook_name": "blocks.3.attn.hook_z"},
    )
    theirs.save_model(tmp_path)
    ours = saexp.load_sae(tmp_path)
    by_head = points(5, 3, D_IN // 3)
    with torch.no_grad():
        acts = theirs.encode(by_head)
        reconstruction = theirs.decode(acts)
    assert ours.hookpoint.name == "layer_3.attn_z"
    torch.testing.assert_close(ours.encode(by_head), acts)
    torch.testing.assert_close(ours.encode(by_head.flatten(1)), acts)
    torch.testing.assert_close(ours.decode(acts).view_as(reconstruction), reconstruction)


TRAINED = [*((name, False) for name in NAMES), ("topk", True), ("batchtopk", False)]
TRAINED += [("batchtopk", True)]


@pytest.mark.parametrize("kind", ["save_model", "save_inference_model"])
@pytest.mark.parametrize(("architecture", "rescale"), TRAINED)
def test_trained_by_sae_lens(
    lens: ModuleType, tmp_path: Path, architecture: str, kind: str, rescale: bool
) -> None:
    """Training classes; a BatchTopK one becomes JumpReLU, by its running threshold."""
    options: dict[str, Any] = {}
    if "topk" in architecture:
        options = {"k": K, "rescale_acts_by_decoder_norm": rescale}
    name = {**NAMES, "batchtopk": "BatchTopK"}[architecture]
    cfg = getattr(lens, f"{name}TrainingSAEConfig")(
        d_in=D_IN,
        d_sae=D_SAE,
        metadata=lens.saes.sae.SAEMetadata(hook_name=HOOK_NAME),
        **options,
    )
    training = getattr(lens, f"{name}TrainingSAE")(cfg)
    values = parameters("topk" if architecture == "batchtopk" else architecture)
    if architecture == "batchtopk":
        values["topk_threshold"] = torch.tensor(2.5, dtype=torch.float64)
    training.load_state_dict(values)
    training.save_inference_model(tmp_path / "save_inference_model")
    training.save_model(tmp_path / "save_model")
    x = points(30, D_IN)
    theirs = lens.SAE.load_from_disk(tmp_path / "save_inference_model")
    ours = saexp.load_sae(tmp_path / kind)
    # A BatchTopK inference file has the norms folded in, which leaves the activations as they are.
    folded = architecture == "batchtopk" and kind == "save_inference_model"
    assert ours.settings.rescale_acts_by_decoder_norm == (rescale and not folded)
    assert_same(ours, theirs, x)


def test_a_folded_factor_is_not_applied_again(lens: ModuleType, tmp_path: Path) -> None:
    theirs = lens_sae(lens, "standard", normalize_activations="expected_average_only_in")
    theirs.fold_activation_norm_scaling_factor(FACTOR)
    theirs.save_model(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**cfg, "norm_scaling_factor": FACTOR}))
    assert_same(saexp.load_sae(tmp_path), theirs, points(30, D_IN))


OLD = {
    "d_in": D_IN,
    "d_sae": D_SAE,
    "dtype": "float32",
    "model_name": "gpt2-small",
    "hook_point": HOOK_NAME,
    "hook_point_layer": 3,
    "hook_point_head_index": None,
    "prepend_bos": True,
}


@pytest.mark.parametrize(
    ("architecture", "cfg"),
    [
        ("standard", {"activation_fn_str": "relu"}),
        ("standard", {"normalize_activations": False}),
        ("standard", {"normalize_activations": None, "apply_b_dec_to_input": False}),
        ("topk", {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}),
        ("topk", {"activation_fn": "topk", "activation_fn_kwargs": {"k": K}, "hook_point": None}),
        ("gated", {"architecture": "gated", "activation_fn_str": "relu"}),
    ],
)
def test_configs_before_6_0(
    lens: ModuleType, tmp_path: Path, architecture: str, cfg: dict[str, Any]
) -> None:
    old = {**OLD, **cfg}
    if old["hook_point"] is None:
        old = {**old, "hook_name": HOOK_NAME}
        del old["hook_point"]
    # Files of that time hold a scaling factor of ones.
    tensors = {**parameters(architecture), "scaling_factor": torch.ones(D_SAE)}
    if architecture == "gated":
        del tensors["scaling_factor"]
    write_saelens(tmp_path, old, tensors)
    ours = saexp.load_sae(tmp_path)
    assert (ours.architecture, ours.hookpoint.name) == (architecture, "layer_3.resid_post")
    assert_same(ours, lens.SAE.load_from_disk(tmp_path), points(30, D_IN))


def test_shipped_for_smollm2(lens: ModuleType) -> None:
    """The vectors are sums of eight decoder rows, at a length like that of the stream."""
    folder = Path(saexp.__file__).parents[1] / "experiments/real_model/saes"
    shipped = json.loads((folder / "shipped.json").read_text("utf-8"))["saes"]
    for layer in (7, 15, 22):
        files = folder / f"layer_{layer}" / "width_4096"
        weights = files / "sae_weights.safetensors"
        assert weights.stat().st_size < 10**7
        assert read_sha256(weights) == shipped[f"layer_{layer}"]["sha256"]
        theirs = lens.SAE.load_from_disk(files)
        ours = saexp.load_sae("smollm2", layer=layer, device="cpu")
        generator = torch.Generator().manual_seed(layer)
        some = ours.W_dec[torch.randint(4096, (16, 8), generator=generator)].sum(1)
        assert_same(ours, theirs, ours.b_dec + 60 * some)
