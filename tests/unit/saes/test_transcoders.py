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
from saexp.interventions.stream_edits import BatchEdit, Move, Row
from saexp.latents import splice_edits
from saexp.models import Hookpoint
from saexp.models.hooks import edit, run_truncated
from saexp.registry import build
from saexp.saes import ARCHITECTURES, SAESettings, SparseAutoencoder
from saexp.saes.catalogue import catalogue, entries
from saexp.saes.loading import check_fits
from tests.random_models import D_MODEL, random_lm
from tests.unit.saes.make import (
    D_IN,
    D_OUT,
    D_SAE,
    parameters,
    points,
    publish,
    sae,
    skip,
    transcoder,
    write_npz,
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
    tensors = parameters(LENS[architecture][1], d_out=D_OUT)
    return {**tensors, "W_skip": skip()} if "skip" in architecture else tensors


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_identities(architecture: str) -> None:
    """Encodes as an SAE of the same encoder; a unit of a latent adds its direction."""
    autoencoder, x = transcoder(architecture), points(3, 4, D_IN)
    twin = sae(architecture, apply_b_dec_to_input=False)
    for name in set(dict(twin.named_buffers())) - {"W_dec", "b_dec"}:
        setattr(twin, name, getattr(autoencoder, name))
    acts = autoencoder.encode(x)
    assert (autoencoder.d_in, autoencoder.d_sae, autoencoder.d_out) == (D_IN, D_SAE, D_OUT)
    assert (autoencoder.is_transcoder, twin.is_transcoder) == (True, False)
    torch.testing.assert_close(acts, twin.encode(x))
    torch.testing.assert_close(autoencoder.encode_latents(x, [7, 0, 7]), acts[..., [7, 0, 7]])
    raised = acts.clone()
    raised[..., 11] += 1
    added = autoencoder.decode(raised, x) - autoencoder.decode(acts, x)
    torch.testing.assert_close(
        added, autoencoder.directions([11])[0].expand(3, 4, D_OUT), rtol=1e-4, atol=1e-4
    )
    without = autoencoder.decode(acts, torch.zeros_like(x))
    torch.testing.assert_close(
        autoencoder.decode(acts, x) - without, x @ skip().T, rtol=1e-4, atol=1e-4
    )
    with pytest.raises(
        SAEError, match=r"the SAE has a skip connection; decode.feature_acts, x. needs"
    ):
        autoencoder.decode(acts)


def test_without_a_skip_connection_the_input_is_not_needed() -> None:
    p = parameters("standard", d_out=D_OUT)
    settings = SAESettings(architecture="standard", hookpoint=IN, hookpoint_out=OUT)
    autoencoder = SparseAutoencoder(p, settings)
    acts = autoencoder.encode(points(5, D_IN))
    torch.testing.assert_close(autoencoder.decode(acts), acts @ p["W_dec"] + p["b_dec"])
    assert autoencoder.W_skip is None


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
    tensors = {**parameters("standard", d_out=D_OUT), **changed}
    with pytest.raises(SAEError, match=message):
        SparseAutoencoder(
            tensors,
            SAESettings(architecture="standard", hookpoint=IN, hookpoint_out=OUT, **options),
            metadata={"name": "mine"},
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
            "cfg.json has no hook_name_out, so the stream that the trans",
        ),
        (
            "transcoder",
            {"hook_name_out": "there"},
            "cfg.json: hook_name_out: 'there' is not a hookpoint",
        ),
        (
            "skip_transcoder",
            {},
            "sae_weights.safetensors: a skip_transcoder needs 'W_skip', which",
        ),
        ("jumprelu_transcoder", {}, "a jumprelu transcoder needs 'threshold', which is missing"),
        (
            "transcoder",
            {"hook_name": "blocks.3.hook_mlp_in"},
            "blocks.3.hook_mlp_in is the MLP's input before its norm in TransformerLens, and after",
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
    repo, folder = catalogue()[name]["repo_id"], tmp_path / "made"
    folder.mkdir()
    p = parameters("standard")
    stored = {**p, "W_enc": p["W_enc"].T.contiguous()}
    save_file(stored, folder / "layer_3.safetensors")
    facts = {"d_model": D_IN, "d_feature": D_SAE, "batch_size": 64}
    about = {k: {"value": v} for k, v in facts.items()}
    (folder / "wandb-config.yaml").write_text(yaml.safe_dump(about))
    (folder / "config.yaml").write_text(yaml.safe_dump({"model_name": "Qwen/Qwen3-0.6B"}))
    publish(hub_cache, repo, folder)
    ours = build("sae", SAEConfig(name="q", loader="release", release=name, id="layer_3"))
    with pytest.warns(UserWarning, match="non-empty model_from_pretrained_kwargs"):
        theirs = lens.SAE.from_pretrained(name, "layer_3")
    x = points(30, D_IN)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x), theirs.encode(x))
        torch.testing.assert_close(ours.decode(ours.encode(x), x), theirs(x))
    assert (ours.hookpoint, ours.hookpoint_out) == (IN, OUT)


def test_qwen_scope_read_by_sae_lens(
    lens: ModuleType, tmp_path: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Qwen 3.5, whose blocks alternate attention and linear attention."""
    name, folder = "qwen-scope-3.5-2b-base-w32k-l50", tmp_path / "made"
    folder.mkdir()
    p = parameters("topk", d_sae=32 * 1024)
    stored = {**p, "W_enc": p["W_enc"].T.contiguous(), "W_dec": p["W_dec"].T.contiguous()}
    torch.save(stored, folder / "layer3.sae.pt")
    publish(hub_cache, catalogue()[name]["repo_id"], folder)
    known = lens.loading.pretrained_sae_loaders.QWEN_SCOPE_MODEL_INFO
    monkeypatch.setitem(known, "Qwen3.5-2B-Base", ("Qwen/Qwen3.5-2B-Base", D_IN))
    ours = build("sae", SAEConfig(name="q", loader="release", release=name, layer=3))
    x = points(4, D_IN)
    pre = x.double() @ p["W_enc"].double() + p["b_enc"].double()
    at_least = pre.sort(descending=True).values[:, 49:50]
    acts = torch.where(pre >= at_least, pre.clamp(min=0), 0)
    torch.testing.assert_close(ours.encode(x).double(), acts, rtol=1e-4, atol=1e-4)
    made_of = acts @ p["W_dec"].double() + p["b_dec"].double()
    torch.testing.assert_close(ours.decode(acts.float()).double(), made_of, rtol=1e-4, atol=1e-3)
    assert (ours.hookpoint, ours.settings.k) == (Hookpoint(3, "resid_post"), 50)
    assert ours.metadata["model"] == "Qwen/Qwen3.5-2B-Base"


TRANSCODERS = "gemma-scope-2b-pt-transcoders"


@pytest.fixture
def gemma_transcoder(tmp_path: Path, hub_cache: Path) -> tuple[SAEConfig, dict[str, torch.Tensor]]:
    """A small one in the hub's layout, of a layer of the random Gemma 2; and its parameters."""
    [entry] = [e for e in entries(TRANSCODERS) if e.layer == 1]
    p = parameters("jumprelu", d_in=D_MODEL, d_sae=16384, d_out=D_MODEL)
    write_npz(tmp_path / "made" / entry.path / "params.npz", p)
    publish(hub_cache, entry.repo, tmp_path / "made")
    return SAEConfig(name="g", loader="release", release=TRANSCODERS, layer=1), p


def test_gemma_scope_transcoders_are_those_of_sae_lens(
    lens: ModuleType, gemma_transcoder: tuple[SAEConfig, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_lens.loading import pretrained_sae_loaders as loaders

    ours = build("sae", gemma_transcoder[0])
    getter = loaders.get_gemma_2_transcoder_config_from_hf

    def small(*args: Any, **options: Any) -> dict[str, Any]:
        return {**getter(*args, **options), "d_in": D_MODEL, "d_out": D_MODEL}

    monkeypatch.setattr(loaders, "get_gemma_2_transcoder_config_from_hf", small)
    theirs = lens.SAE.from_pretrained(TRANSCODERS, ours.metadata["id"])
    assert ours.hookpoint == Hookpoint.parse(theirs.cfg.metadata.hook_name)
    assert ours.hookpoint_out == Hookpoint.parse(theirs.cfg.metadata.hook_name_out)
    x = points(30, D_MODEL)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x), theirs.encode(x))
        torch.testing.assert_close(ours.decode(ours.encode(x), x), theirs(x))
    by_path = saexp.load_sae(f"google/{TRANSCODERS}/{ours.metadata['id']}")
    assert by_path.hookpoints == ours.hookpoints


def test_gemma_scope_transcoders_read_the_norms_output_before_its_gain(
    gemma_transcoder: tuple[SAEConfig, dict[str, torch.Tensor]],
) -> None:
    """On the random Gemma 2, whose norms have noisy weights: what the MLP reads / (1 + weight)."""
    cfg, p = gemma_transcoder
    model, sae = random_lm("gemma2"), build("sae", cfg)
    norm = model.blocks[1].pre_feedforward_layernorm
    seen: dict[str, torch.Tensor] = {}
    handles = [
        model.blocks[1].mlp.register_forward_pre_hook(lambda _m, a: seen.update(x=a[0])),
        model.blocks[1].post_feedforward_layernorm.register_forward_hook(
            lambda _m, _a, out: seen.update(y=out)
        ),
    ]
    tokens = model.tokenizer("The city of New Bresk").input_ids
    ids = torch.tensor([tokens])
    with torch.no_grad():
        logits = model.hf(ids).logits
    for handle in handles:
        handle.remove()
    x = (seen["x"] / (1 + norm.weight))[0].double()
    pre = x @ p["W_enc"].double() + p["b_enc"].double()
    acts = torch.where(pre > p["threshold"].double(), pre.clamp(min=0), 0)
    assert (acts > 0).any()
    at = sae.hookpoint
    read = run_truncated(model, ids, torch.ones_like(ids), [at])[at][0]
    torch.testing.assert_close(sae.encode(read).double(), acts, rtol=1e-3, atol=1e-3)
    # Steering (here: ablating) writes to the MLP's output.
    latent = int((acts > 0).sum(0).argmax())
    off = Move(at, (latent,), (latent,), (0.0,), 1.0)
    row = Row(tuple(tokens), (off,), tuple(range(len(tokens))), generated=False)
    program = BatchEdit([row], len(tokens), {at: sae}, torch.device("cpu"))
    with torch.no_grad(), edit(model, program.functions(len(tokens))):
        ablated = model.hf(ids).logits[0]
    wanted = (seen["y"][0].double() - acts[:, latent, None] * p["W_dec"][latent].double()).float()

    def by_hand(_m: Any, _a: Any, _out: torch.Tensor) -> torch.Tensor:
        return wanted[None]

    handle = model.blocks[1].post_feedforward_layernorm.register_forward_hook(by_hand)
    with torch.no_grad():
        expected = model.hf(ids).logits[0]
    handle.remove()
    torch.testing.assert_close(ablated, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(expected, logits[0], atol=1e-3)
    # Spliced with its error and no change, it changes nothing.
    with torch.no_grad(), edit(model, splice_edits(sae, error=True)):
        torch.testing.assert_close(model.hf(ids).logits, logits, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), edit(model, splice_edits(sae)):
        replaced_by_ours = model.hf(ids).logits[0]
    output = (acts @ p["W_dec"].double() + p["b_dec"].double()).float()
    wanted.copy_(output)
    handle = model.blocks[1].post_feedforward_layernorm.register_forward_hook(by_hand)
    with torch.no_grad():
        torch.testing.assert_close(replaced_by_ours, model.hf(ids).logits[0], rtol=1e-3, atol=1e-3)
    handle.remove()


def test_one_layer_of_a_cross_layer_transcoder(
    lens: ModuleType, tmp_path: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_lens.loading import pretrained_sae_loaders as loaders

    release, folder, layer, n_layers = CLT, tmp_path / "made", 3, 7
    repo = catalogue()[release]["repo_id"]
    folder.mkdir()
    p, later = parameters("standard"), n_layers - layer
    decoder = torch.randn(D_SAE, later, D_IN, generator=torch.Generator().manual_seed(1))
    encoder = {f"W_enc_{layer}": p["W_enc"].T, f"b_enc_{layer}": p["b_enc"]}
    encoder[f"b_dec_{layer}"] = p["b_dec"]
    files = {f"W_enc_{layer}": encoder, f"W_dec_{layer}": {f"W_dec_{layer}": decoder}}
    for name, tensors in files.items():
        whole = {n: t.contiguous() for n, t in tensors.items()}
        save_file(whole, folder / f"{name}.safetensors")
    about = {
        "model_name": "google/gemma-2-2b",
        "model_kind": "cross_layer_transcoder",
        "feature_input_hook": "hook_resid_mid",
        "feature_output_hook": "hook_mlp_out",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(about))
    publish(hub_cache, repo, folder)
    ours = build("sae", SAEConfig(name="c", loader="release", release=release, layer=layer))
    # It asks the hub for shapes.
    shapes = {n: list(t.shape) for n, t in encoder.items()}
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", lambda *_: shapes)
    with pytest.warns(UserWarning):
        theirs = lens.SAE.from_pretrained(release, f"layer_{layer}")
    x = points(30, D_IN)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x), theirs.encode(x))
        torch.testing.assert_close(ours.W_dec, theirs.W_dec)
    assert ours.hookpoints == [Hookpoint(3, "resid_mid"), Hookpoint(3, "mlp_out")]
    with pytest.raises(SAEError, match="one layer of a cross-layer transcoder: its latents and di"):
        ours.check_reconstructs()
    from saexp.saes.validation import check_fit

    fit = check_fit(ours, x, torch.zeros(30, dtype=torch.bool), {}, points(30, D_IN))
    assert [
        p for p in fit.problems if "reconstruction metrics have no meaning" in p
    ] == fit.problems[:1]


CLT = "mntss-gemma-2-2b-2.5m-clt-as-per-layer"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config.yaml": "model_kind: x"}, "config.yaml: 'feature_input_hook' is missing"),
        ({"config.yaml": "a: ["}, "is not valid YAML"),
        ({"config.yaml": "- a"}, "config.yaml is not a YAML mapping"),
        (
            {"config.yaml": "feature_input_hook: [3]\nfeature_output_hook: hook_mlp_out"},
            r"config.yaml: feature_input_hook is \[3\], not text",
        ),
        (
            {"W_dec_3": {"W_dec_3": torch.full((D_SAE, 2, D_IN), torch.inf)}},
            "W_dec_3.safetensors: W_dec holds 960 Inf of 960 values",
        ),
        ({"W_dec_3": {"W_dec_3": torch.ones(4, 5)}}, r"W_dec_3 has shape \[4, 5\], not \[d_sae"),
        ({"W_enc_3": {"W_enc_3": torch.ones(5, 4)}}, "needs 'b_enc_3', which is missing"),
    ],
)
def test_files_of_a_cross_layer_transcoder_that_do_not_fit(
    tmp_path: Path, hub_cache: Path, change: dict[str, Any], message: str
) -> None:
    p, folder = parameters("standard"), tmp_path / "made"
    folder.mkdir()
    files: dict[str, Any] = {
        "config.yaml": "feature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out",
        "W_enc_3": {"W_enc_3": p["W_enc"].T, "b_enc_3": p["b_enc"], "b_dec_3": p["b_dec"]},
        "W_dec_3": {"W_dec_3": torch.ones(D_SAE, 2, D_IN)},
    }
    for name, content in {**files, **change}.items():
        if isinstance(content, str):
            (folder / name).write_text(content)
        else:
            whole = {n: t.contiguous() for n, t in content.items()}
            save_file(whole, folder / f"{name}.safetensors")
    publish(hub_cache, catalogue()[CLT]["repo_id"], folder)
    with pytest.raises(SAEError, match=message) as caught:
        build("sae", SAEConfig(name="c", loader="release", release=CLT, layer=3))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("d_in", "d_out", "what"),
    [(8, D_MODEL, "reads vectors of 8"), (D_MODEL, 9, "predicts vectors of 9")],
)
def test_of_another_models_size(d_in: int, d_out: int, what: str) -> None:
    autoencoder = SparseAutoencoder(
        parameters("standard", d_in=d_in, d_out=d_out),
        SAESettings(
            architecture="standard",
            hookpoint=Hookpoint(1, "mlp_in"),
            hookpoint_out=Hookpoint(1, "mlp_out"),
        ),
        metadata={"name": "mine"},
    )
    assert autoencoder.hookpoints == [Hookpoint(1, "mlp_in"), Hookpoint(1, "mlp_out")]
    with pytest.raises(
        SAEError, match=f"^mine {what} numbers, but .* has d_model={D_MODEL}; choose"
    ):
        check_fits(autoencoder, random_lm("llama"))


def test_of_a_layer_the_model_lacks() -> None:
    autoencoder = SparseAutoencoder(
        parameters("standard", d_in=D_MODEL, d_out=D_MODEL),
        SAESettings(
            architecture="standard",
            hookpoint=Hookpoint(1, "mlp_in"),
            hookpoint_out=Hookpoint(30, "mlp_out"),
        ),
    )
    with pytest.raises(ModelError, match="layer=30"):
        check_fits(autoencoder, random_lm("llama"))
