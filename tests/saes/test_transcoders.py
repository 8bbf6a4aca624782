"""Transcoders: identities, SAELens' folders and catalogue, what is said where they don't fit."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

import saexp
from saexp.config import SAEConfig
from saexp.errors import ModelError, SAEError
from saexp.models.hookpoints import Hookpoint
from saexp.registry import build
from saexp.saes.base import ARCHITECTURES, SparseAutoencoder
from saexp.saes.catalogue import catalogue
from saexp.saes.loading import check_fits
from tests.random_models import D_MODEL, random_lm
from tests.saes.make import (
    D_IN,
    D_OUT,
    D_SAE,
    parameters,
    points,
    publish,
    sae,
    skip,
    transcoder,
    write_saelens,
)

IN, OUT = Hookpoint(3, "mlp_in"), Hookpoint(3, "mlp_out")
HOOKS = {"hook_name": "blocks.3.mlp.hook_in", "hook_name_out": "blocks.3.hook_mlp_out"}
LENS = {
    "transcoder": ("Transcoder", "standard"),
    "skip_transcoder": ("SkipTranscoder", "standard"),
    "jumprelu_transcoder": ("JumpReLUTranscoder", "jumprelu"),
    "jumprelu_skip_transcoder": ("JumpReLUSkipTranscoder", "jumprelu"),
}


def weights(architecture: str) -> dict[str, torch.Tensor]:
    found = parameters(LENS[architecture][1], d_out=D_OUT)
    return {**found, "W_skip": skip()} if "skip" in architecture else found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_identities(architecture: str) -> None:
    """Encodes as an SAE of the same encoder; a unit of a latent adds its direction."""
    made, x = transcoder(architecture), points(3, 4, D_IN)
    twin = sae(architecture, apply_b_dec_to_input=False)
    for name in set(dict(twin.named_buffers())) - {"W_dec", "b_dec"}:
        setattr(twin, name, getattr(made, name))
    acts = made.encode(x)
    assert (made.d_in, made.d_sae, made.d_out) == (D_IN, D_SAE, D_OUT)
    assert (made.is_transcoder, twin.is_transcoder) == (True, False)
    torch.testing.assert_close(acts, twin.encode(x))
    torch.testing.assert_close(made.encode_latents(x, [7, 0, 7]), acts[..., [7, 0, 7]])
    raised = acts.clone()
    raised[..., 11] += 1
    added = made.decode(raised, x) - made.decode(acts, x)
    torch.testing.assert_close(
        added, made.directions([11])[0].expand(3, 4, D_OUT), rtol=1e-4, atol=1e-4
    )
    without = made.decode(acts, torch.zeros_like(x))
    torch.testing.assert_close(made.decode(acts, x) - without, x @ skip().T, rtol=1e-4, atol=1e-4)
    with pytest.raises(
        SAEError, match=r"the SAE has a skip connection; decode.feature_acts, x. needs"
    ):
        made.decode(acts)


def test_without_a_skip_connection_the_input_is_not_needed() -> None:
    p = parameters("standard", d_out=D_OUT)
    made = type(sae())(p, architecture="standard", hookpoint=IN, hookpoint_out=OUT)
    acts = made.encode(points(5, D_IN))
    torch.testing.assert_close(made.decode(acts), acts @ p["W_dec"] + p["b_dec"])
    assert made.W_skip is None


@pytest.mark.parametrize(
    ("options", "changed", "message"),
    [
        (
            {"apply_b_dec_to_input": True},
            {},
            "a transcoder's b_dec belongs to its output; its config",
        ),
        ({"centre": True}, {}, "mine: centred streams is not supported for transcoders"),
        (
            {"normalize_activations": "layer_norm"},
            {},
            "mine: input scaling 'layer_norm' is not supported for transcoders",
        ),
        ({}, {"W_skip": skip().T}, r"mine: W_skip has shape \[12, 9\], not \[9, 12\]"),
        ({}, {"b_dec": torch.ones(12)}, r"mine: b_dec has shape \[12\], not \[9\]"),
        ({}, {"W_dec": torch.ones(3)}, r"mine: W_dec has shape \[3\], not \[d_sae, d_out\]"),
        (
            {},
            {"more": torch.ones(3)},
            "its files hold 'more', which saexp cannot apply in a standard t",
        ),
    ],
)
def test_what_does_not_fit(options: dict[str, Any], changed: dict[str, Any], message: str) -> None:
    found = {**parameters("standard", d_out=D_OUT), **changed}
    with pytest.raises(SAEError, match=message):
        type(sae())(
            found,
            architecture="standard",
            hookpoint=IN,
            hookpoint_out=OUT,
            metadata={"name": "mine"},
            **options,
        )


@pytest.mark.parametrize("architecture", LENS)
def test_saved_by_sae_lens(lens: ModuleType, tmp_path: Path, architecture: str) -> None:
    import sae_lens.saes.transcoder as module

    name, _ = LENS[architecture]
    cfg = getattr(module, f"{name}Config")(
        d_in=D_IN,
        d_sae=D_SAE,
        d_out=D_OUT,
        apply_b_dec_to_input=False,
        metadata=lens.saes.sae.SAEMetadata(**HOOKS),
    )
    theirs = getattr(module, name)(cfg)
    theirs.load_state_dict(weights(architecture))
    theirs.save_model(tmp_path)
    ours, x = saexp.load_sae(tmp_path), points(30, D_IN)
    with torch.no_grad():
        acts = theirs.encode(x)
        assert 0 < (acts != 0).float().mean() < 1
        torch.testing.assert_close(ours.encode(x), acts)
        torch.testing.assert_close(ours.decode(acts, x), theirs(x))
    assert (ours.hookpoint, ours.hookpoint_out) == (IN, OUT)
    assert ours.metadata["architecture"] == architecture


def saelens_folder(folder: Path, architecture: str, **changed: Any) -> Path:
    metadata = {k: v for k, v in {**HOOKS, **changed}.items() if v is not None}
    return write_saelens(
        folder, {"architecture": architecture, "metadata": metadata}, weights("transcoder")
    )


@pytest.mark.parametrize(
    ("architecture", "changed", "message"),
    [
        (
            "transcoder",
            {"hook_name_out": None},
            "cfg.json names no hook_name_out, so what the trans",
        ),
        (
            "transcoder",
            {"hook_name_out": "there"},
            "cfg.json: hook_name_out: 'there' names no hookp",
        ),
        (
            "skip_transcoder",
            {},
            "sae_weights.safetensors: a skip_transcoder needs 'W_skip', absent",
        ),
        ("jumprelu_transcoder", {}, "a jumprelu transcoder needs 'threshold', absent here"),
        (
            "transcoder",
            {"hook_name": "blocks.3.ln2.hook_normalized"},
            "ln2.hook_normalized is the MLP's input before its norm's gain, which saexp does not c",
        ),
        (
            "transcoder",
            {"hook_name": "blocks.3.hook_mlp_in"},
            "blocks.3.hook_mlp_in is the MLP's input before its norm, which saexp does not collect",
        ),
        (
            "transcoder",
            {"model_from_pretrained_kwargs": {"center_writing_weights": True}},
            "centred streams is not supported for transcoders",
        ),
    ],
)
def test_saelens_folders_that_do_not_fit(
    tmp_path: Path, architecture: str, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(SAEError, match=message) as caught:
        saexp.load_sae(saelens_folder(tmp_path, architecture, **changed))
    assert "\n" not in str(caught.value)


def test_a_name_that_sae_lens_gives_to_the_norms_output(tmp_path: Path) -> None:
    hf = "model.layers.3.pre_feedforward_layernorm.output"
    folder = saelens_folder(
        tmp_path, "transcoder", hook_name="blocks.3.hook_mlp_in", hf_hook_name=hf
    )
    assert saexp.load_sae(folder).hookpoint == IN


@pytest.mark.parametrize("kind", ["save_model", "save_inference_model"])
def test_matryoshka(lens: ModuleType, tmp_path: Path, kind: str) -> None:
    """Used as BatchTopK with its running threshold, as sae-lens' inference file is."""
    cfg = lens.MatryoshkaBatchTopKTrainingSAEConfig(
        d_in=D_IN,
        d_sae=D_SAE,
        k=5,
        matryoshka_widths=[10, D_SAE],
        metadata=lens.saes.sae.SAEMetadata(hook_name="blocks.3.hook_resid_post"),
    )
    training = lens.MatryoshkaBatchTopKTrainingSAE(cfg)
    threshold = torch.tensor(2.5, dtype=torch.float64)
    training.load_state_dict({**parameters("topk"), "topk_threshold": threshold})
    training.save_model(tmp_path / "save_model")
    training.save_inference_model(tmp_path / "save_inference_model")
    theirs = lens.SAE.load_from_disk(tmp_path / "save_inference_model")
    ours, x = saexp.load_sae(tmp_path / kind), points(30, D_IN)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x), theirs.encode(x))
        torch.testing.assert_close(ours.decode(ours.encode(x)), theirs(x), rtol=1e-4, atol=1e-4)
    assert ours.hookpoint == Hookpoint(3, "resid_post")


def test_read_by_sae_lens(lens: ModuleType, tmp_path: Path, hub_cache: Path) -> None:
    """A release whose format saexp has no reader for."""
    name = "mwhanna-qwen3-0.6b-transcoders-lowl0"
    repo, made = catalogue()[name]["repo_id"], tmp_path / "made"
    made.mkdir()
    p = parameters("standard")
    stored = {**p, "W_enc": p["W_enc"].T.contiguous()}
    save_file(stored, made / "layer_3.safetensors")
    facts = {"d_model": D_IN, "d_feature": D_SAE, "batch_size": 64}
    about = {k: {"value": v} for k, v in facts.items()}
    (made / "wandb-config.yaml").write_text(yaml.safe_dump(about))
    (made / "config.yaml").write_text(yaml.safe_dump({"model_name": "Qwen/Qwen3-0.6B"}))
    publish(hub_cache, repo, made)
    ours = build("sae", SAEConfig(name="q", loader="release", release=name, id="layer_3"))
    with pytest.warns(UserWarning, match="non-empty model_from_pretrained_kwargs"):
        theirs = lens.SAE.from_pretrained(name, "layer_3")
    x = points(30, D_IN)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x), theirs.encode(x))
        torch.testing.assert_close(ours.decode(ours.encode(x), x), theirs(x))
    assert (ours.hookpoint, ours.hookpoint_out) == (IN, OUT)


def test_gemma_scope_transcoders_read_what_is_not_collected() -> None:
    """Trained with the norm's gain folded into the MLP (Lieberum et al. 2024)."""
    message = "these transcoders read the MLP's input before its norm's gain, which saexp does not"
    name = "gemma-scope-2b-pt-transcoders"
    with pytest.raises(SAEError, match=message):
        build("sae", SAEConfig(name="g", loader="release", release=name, layer=5))
    with pytest.raises(SAEError, match=message):
        saexp.load_sae(f"google/{name}/layer_5/width_16k/average_l0_70")


@pytest.mark.parametrize(
    ("d_in", "d_out", "what"),
    [(8, D_MODEL, "reads vectors of 8"), (D_MODEL, 9, "predicts vectors of 9")],
)
def test_of_another_models_size(d_in: int, d_out: int, what: str) -> None:
    made = SparseAutoencoder(
        parameters("standard", d_in=d_in, d_out=d_out),
        architecture="standard",
        hookpoint=Hookpoint(1, "mlp_in"),
        hookpoint_out=Hookpoint(1, "mlp_out"),
        metadata={"name": "mine"},
    )
    assert made.hookpoints == [Hookpoint(1, "mlp_in"), Hookpoint(1, "mlp_out")]
    with pytest.raises(
        SAEError, match=f"^mine {what} numbers, but .* has d_model={D_MODEL}; choose"
    ):
        check_fits(made, random_lm("llama"))


def test_of_a_layer_the_model_lacks() -> None:
    made = SparseAutoencoder(
        parameters("standard", d_in=D_MODEL, d_out=D_MODEL),
        architecture="standard",
        hookpoint=Hookpoint(1, "mlp_in"),
        hookpoint_out=Hookpoint(30, "mlp_out"),
    )
    with pytest.raises(ModelError, match="layer=30"):
        check_fits(made, random_lm("llama"))
