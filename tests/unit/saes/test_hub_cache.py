"""Releases read offline from a hub cache, each against its own formula written out."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import saexp
from saexp.config import SAEConfig
from saexp.errors import SAEError
from saexp.models import Hookpoint
from saexp.registry import build
from saexp.saes.catalogue import catalogue, find_entry
from tests.unit.saes.make import parameters, points, publish, write_npz, write_saelens

GEMMA = "google/gemma-scope-2b-pt-res"


def release(name: str, sae_id: str) -> tuple[str, dict[str, Any]]:
    """(repository, catalogue's record of one SAE)."""
    [record] = [s for s in catalogue()[name]["saes"] if s["id"] == sae_id]
    return catalogue()[name]["repo_id"], record


def jumprelu(p: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Gemma Scope's own formula (Lieberum et al. 2024): nothing subtracted at the input."""
    pre = x.double() @ p["W_enc"].double() + p["b_enc"].double()
    acts = torch.where(pre > p["threshold"].double(), pre.clamp(min=0), 0.0)
    return acts, acts @ p["W_dec"].double() + p["b_dec"].double()


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("width", "d_sae"), [("16k", 2**14), ("65k", 2**16)])
def test_gemma_scope(tmp_path: Path, hub_cache: Path, width: str, d_sae: int) -> None:
    cfg = saexp.compose(["model=gemma2b", "sae=gemmascope", "layer=12", f"width={width}"]).sae
    with pytest.raises(SAEError, match=r"params.npz is neither cached nor reachable .*go online"):
        build("sae", cfg)
    _, record = release("gemma-scope-2b-pt-res-canonical", f"layer_12/width_{width}/canonical")
    p = parameters("jumprelu", 8, d_sae)
    write_npz(tmp_path / "made" / record["path"] / "params.npz", p)
    publish(hub_cache, GEMMA, tmp_path / "made")
    sae, x = build("sae", cfg), points(5, 8)
    acts, reconstruction = jumprelu(p, x)
    assert_near(sae.encode(x), acts)
    assert_near(sae.decode(sae.encode(x)), reconstruction)
    assert sae.hookpoint == Hookpoint(12, "resid_post")
    assert (sae.d_in, sae.d_sae, sae.W_dec.dtype) == (8, d_sae, torch.float32)
    about = sae.metadata
    assert about["name"] == f"gemma-scope-2b-pt-res-canonical/layer_12/width_{width}/canonical"
    assert about["neuronpedia_id"] == record["neuronpedia"]
    assert about["fingerprint"] == Path(about["path"]).resolve().name
    by_path = saexp.load_sae(f"{GEMMA}/{record['path']}")
    assert by_path.hookpoint == sae.hookpoint
    assert torch.equal(by_path.encode(x), sae.encode(x))


def test_gemma_scope_embedding(tmp_path: Path, hub_cache: Path) -> None:
    """Trained on unscaled embeddings, while Gemma's block 0 reads them times sqrt(d_model)."""
    path = "embedding/width_4k/average_l0_6"
    p = parameters("jumprelu", 16, 4096)
    write_npz(tmp_path / "made" / path / "params.npz", p)
    publish(hub_cache, GEMMA, tmp_path / "made")
    cfg = SAEConfig(name="e", loader="release", release="gemma-scope-2b-pt-res", id=path)
    sae, x = build("sae", cfg), points(5, 16)
    acts, reconstruction = jumprelu(p, x / 4)
    assert sae.hookpoint == Hookpoint(0, "embed")
    assert_near(sae.encode(x), acts)
    assert_near(sae.decode(sae.encode(x)), reconstruction * 4)


def llama_scope_files(
    folder: Path, path: str, d: int, norm: float, *, unit: bool
) -> dict[str, Any]:
    """A folder of the published layout; returns its arrays and settings."""
    p = parameters("standard", d, 32768)
    if unit:
        p["W_dec"] = torch.nn.functional.normalize(p["W_dec"], dim=-1)
    sae_folder = folder / path
    (sae_folder / "checkpoints").mkdir(parents=True)
    tensors = {
        "encoder.weight": p["W_enc"].T,
        "encoder.bias": p["b_enc"],
        "decoder.weight": p["W_dec"].T,
        "decoder.bias": p["b_dec"],
    }
    file = sae_folder / "checkpoints" / "final.safetensors"
    save_file({n: t.contiguous() for n, t in tensors.items()}, file)
    cfg = {
        "d_model": d,
        "d_sae": 32768,
        "hook_point_in": "blocks.7.hook_resid_post",
        "hook_point_out": "blocks.7.hook_resid_post",
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.3,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": norm, "out": norm},
        "sparsity_include_decoder_norm": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "use_decoder_bias": True,
        "use_glu_encoder": False,
    }
    (sae_folder / "hyperparams.json").write_text(json.dumps(cfg), encoding="utf-8")
    return {name: t.double().numpy() for name, t in p.items()}


@pytest.mark.parametrize("unit", [True, False], ids=["unit-norm decoder", "any decoder"])
def test_llama_scope(lens: ModuleType, tmp_path: Path, hub_cache: Path, unit: bool) -> None:
    """Inputs times f = sqrt(d) / average norm; the threshold is of the model's own scale.

    The formula is that of the authors' inference code (OpenMOSS Language-Model-SAEs, October 2024).
    sae-lens leaves the decoder's norm out of the threshold, so it agrees where that norm is 1.
    """
    repo, record = release("llama_scope_lxr_8x", "l7r_8x")
    d, f = 8, record["norm_scaling_factor"]
    p = llama_scope_files(tmp_path / "made", record["path"], d, d**0.5 / f, unit=unit)
    publish(hub_cache, repo, tmp_path / "made")
    sae = build("sae", saexp.compose(["model=llama8b", "sae=llamascope", "layer=7"]).sae)
    x = points(20, d) / 10
    pre = f * x.double().numpy() @ p["W_enc"] + p["b_enc"]
    norms = np.linalg.norm(p["W_dec"], axis=-1)
    fires = pre * norms / f > 0.3
    assert 0.01 < fires.mean() < 0.9
    acts, reconstruction = pre * fires, ((pre * fires) @ p["W_dec"] + p["b_dec"]) / f
    assert_near(sae.encode(x), torch.from_numpy(acts * norms / f))
    torch.testing.assert_close(
        sae.decode(sae.encode(x)).double(), torch.from_numpy(reconstruction), rtol=1e-3, atol=1e-2
    )
    torch.testing.assert_close(sae.directions([5, 9]).norm(dim=-1), torch.ones(2))
    assert (sae.hookpoint, sae.d_sae) == (Hookpoint(7, "resid_post"), 32768)
    theirs = lens.SAE.from_pretrained("llama_scope_lxr_8x", "l7r_8x")
    with torch.no_grad():
        agree = torch.equal(theirs.encode(x) > 0, sae.encode(x) > 0)
    assert agree == unit
    if unit:
        torch.testing.assert_close(theirs(x), sae.decode(sae.encode(x)), rtol=1e-3, atol=1e-3)


def test_gpt2_jb(lens: ModuleType, tmp_path: Path, hub_cache: Path) -> None:
    """An old config, centred by the catalogue's word; sae-lens leaves centring to the model."""
    p = {**parameters("standard"), "scaling_factor": torch.ones(40)}
    hook_name = "blocks.8.hook_resid_pre"
    old = {"d_in": 12, "d_sae": 40, "dtype": "float32", "hook_point": hook_name}
    write_saelens(tmp_path / "made" / hook_name, old, p)
    publish(hub_cache, "jbloom/GPT2-Small-SAEs-Reformatted", tmp_path / "made")
    sae = build("sae", saexp.compose(["model=gpt2", "sae=gpt2_jb", "layer=8"]).sae)
    [folder] = hub_cache.glob(f"models--*/snapshots/*/{hook_name}")
    theirs = lens.SAE.load_from_disk(folder)
    x = points(6, 12)
    mean = x.mean(dim=-1, keepdim=True)
    with torch.no_grad():
        acts = theirs.encode(x - mean)
        reconstruction = theirs.decode(acts) + mean
    assert sae.hookpoint == Hookpoint(8, "resid_pre")
    assert sae.hookpoint.stored == Hookpoint(7, "resid_post")
    torch.testing.assert_close(sae.encode(x), acts)
    torch.testing.assert_close(sae.decode(acts, x), reconstruction)
    assert sae.metadata["neuronpedia_id"] == "gpt2-small/8-res-jb"


@pytest.mark.parametrize("asks", [True, False], ids=["config asks for it", "config does not"])
def test_a_catalogue_factor_counts_as_in_sae_lens(
    lens: ModuleType, tmp_path: Path, hub_cache: Path, asks: bool
) -> None:
    repo, record = release("gemma-2b-res-jb", "blocks.12.hook_resid_post")
    cfg = {"d_in": 12, "d_sae": 40, "dtype": "float32", "hook_name": record["id"]}
    if asks:
        cfg["normalize_activations"] = "expected_average_only_in"
    write_saelens(tmp_path / "made" / record["path"], cfg, parameters("standard"))
    # from_pretrained looks for this one too and takes its absence offline for an error.
    save_file(
        {"sparsity": torch.zeros(40)}, tmp_path / "made" / record["path"] / "sparsity.safetensors"
    )
    publish(hub_cache, repo, tmp_path / "made")
    ours = build(
        "sae", SAEConfig(name="g", loader="release", release="gemma-2b-res-jb", id=record["id"])
    )
    theirs = lens.SAE.from_pretrained("gemma-2b-res-jb", record["id"])
    x = points(6, 12)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x), theirs.encode(x))
        torch.testing.assert_close(ours.decode(ours.encode(x)), theirs(x))
    assert (ours.settings.norm_factor is not None) == asks


def test_formats_that_sae_lens_reads(lens: ModuleType, tmp_path: Path, hub_cache: Path) -> None:
    """An SAE of the dictionary_learning format, through sae-lens' own loader."""
    name, sae_id = (
        "sae_bench_pythia70m_sweep_topk_ctx128_0730",
        "blocks.3.hook_resid_post__trainer_0",
    )
    repo, record = release(name, sae_id)
    sae_folder = tmp_path / "made" / record["path"]
    sae_folder.mkdir(parents=True)
    trainer = {
        "layer": 3,
        "dict_class": "AutoEncoderTopK",
        "k": 5,
        "activation_dim": 12,
        "dict_size": 40,
        "lm_name": "EleutherAI/pythia-70m-deduped",
    }
    about = {"trainer": trainer, "buffer": {"ctx_len": 128}}
    (sae_folder / "config.json").write_text(json.dumps(about), encoding="utf-8")
    p = parameters("topk")
    tensors = {
        "encoder.weight": p["W_enc"].T,
        "encoder.bias": p["b_enc"],
        "decoder.weight": p["W_dec"].T,
        "b_dec": p["b_dec"],
    }
    torch.save({n: t.contiguous() for n, t in tensors.items()}, sae_folder / "ae.pt")
    publish(hub_cache, repo, tmp_path / "made")
    ours = build("sae", SAEConfig(name="d", loader="release", release=name, id=sae_id))
    theirs = lens.SAE.from_pretrained(name, sae_id)
    x = points(6, 12)
    assert (ours.architecture, ours.settings.k) == ("topk", 5)
    assert ours.hookpoint == Hookpoint(3, "resid_post")
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x), theirs.encode(x))
        torch.testing.assert_close(ours.decode(ours.encode(x)), theirs(x))


def test_a_factor_folded_by_sae_lens_is_kept(
    lens: ModuleType, tmp_path: Path, hub_cache: Path
) -> None:
    """Llama Scope R1: sae-lens folds the input scaling into the weights that are taken over."""
    name, sae_id = "llama_scope_r1_distill", "l0r_800m_slimpajama"
    del lens  # imported by the fixture, without its warnings
    repo, record = release(name, sae_id)
    sae_folder = tmp_path / "made" / record["path"]
    sae_folder.mkdir(parents=True)
    about = {"d_model": 12, "expansion_factor": 4, "hook_point_in": "blocks.0.hook_resid_post"}
    (sae_folder / "config.json").write_text(json.dumps(about), encoding="utf-8")
    p = parameters("jumprelu", 12, 48)
    tensors = {
        "encoder.weight": p["W_enc"].T,
        "encoder.bias": p["b_enc"],
        "decoder.weight": p["W_dec"].T,
        "decoder.bias": p["b_dec"],
        "log_jumprelu_threshold": p["threshold"].log(),
    }
    file = sae_folder / "sae_weights.safetensors"
    save_file({n: t.contiguous() for n, t in tensors.items()}, file)
    publish(hub_cache, repo, tmp_path / "made")
    ours = build("sae", SAEConfig(name="r", loader="release", release=name, id=sae_id))
    factor, x = record["norm_scaling_factor"], points(9, 12) / 20
    acts, reconstruction = jumprelu(p, x * factor)
    assert_near(ours.encode(x), acts)
    assert_near(ours.decode(ours.encode(x)), reconstruction / factor)


def test_not_in_the_cache(lens: ModuleType, hub_cache: Path) -> None:
    del lens, hub_cache  # imported without its warnings; empty
    cfg = SAEConfig(name="g", loader="release", release="goodfire-llama-3.1-8b-instruct", layer=19)
    assert find_entry(cfg).loader == "goodfire"
    with pytest.raises(
        SAEError, match="^goodfire-llama-3.1-8b-instruct/layer_19 cannot be loaded"
    ) as caught:
        build("sae", cfg)
    assert "\n" not in str(caught.value)
