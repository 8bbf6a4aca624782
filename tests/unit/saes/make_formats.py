"""Small folders laid out as the hub's, one writer per format, and their formulas written out."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.unit.saes.make import D_IN, D_SAE, K, parameters

GEMMA_CFG: dict[str, Any] = {
    "architecture": "jump_relu",
    "model_name": "google/gemma-3-1b-pt",
    "hf_hook_point_in": "model.layers.3.output",
    "hf_hook_point_out": "model.layers.3.output",
    "width": D_SAE,
    "l0": 7,
    "affine_connection": False,
    "type": "sae",
}
LLAMA_CFG: dict[str, Any] = {
    "d_model": D_IN,
    "hook_point_in": "blocks.3.hook_attn_out",
    "hook_point_out": "blocks.3.hook_attn_out",
    "act_fn": "topk",
    "jump_relu_threshold": 0.7,
    "norm_activation": "dataset-wise",
    "dataset_average_activation_norm": {"in": 1.9, "out": 2.3},
    "sparsity_include_decoder_norm": False,
    "apply_decoder_bias_to_pre_encoder": True,
}
TRAINER: dict[str, Any] = {
    "layer": 3,
    "k": K,
    "activation_dim": D_IN,
    "dict_size": D_SAE,
    "lm_name": "EleutherAI/pythia-70m-deduped",
    "submodule_name": "resid_post_layer_3",
}
SPARSIFY_CFG: dict[str, Any] = {
    "activation": "topk",
    "expansion_factor": 32,
    "normalize_decoder": True,
    "num_latents": D_SAE,
    "k": K,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
    "d_in": D_IN,
}
_LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
_MATRICES = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
CLASSES: dict[str, tuple[str, dict[str, str]]] = {
    "AutoEncoder": ("standard", {**_LINEAR, "bias": "b_dec"}),
    "AutoEncoderNew": ("standard", {**_LINEAR, "decoder.bias": "b_dec"}),
    "GatedAutoEncoder": (
        "gated",
        {
            "encoder.weight": "W_enc",
            "decoder.weight": "W_dec",
            "decoder_bias": "b_dec",
            "gate_bias": "b_gate",
            "mag_bias": "b_mag",
            "r_mag": "r_mag",
        },
    ),
    "AutoEncoderTopK": ("topk", {**_LINEAR, "b_dec": "b_dec"}),
    "BatchTopKSAE": ("standard", {**_LINEAR, "b_dec": "b_dec"}),
    "MatryoshkaBatchTopKSAE": ("standard", _MATRICES),
    "JumpReluAutoEncoder": ("jumprelu", {**_MATRICES, "threshold": "threshold"}),
}
"""Class -> (architecture of its random parameters, its names -> ours)."""
THRESHOLD = 1.7


def _save(folder: Path, tensors: dict[str, Tensor], file: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / file)


def write_gemma2(
    folder: Path,
    p: dict[str, Tensor],
    *,
    config: dict[str, Any] | None = None,
    without: str | None = None,
    **changed: Any,
) -> Path:
    """A Gemma Scope 2 folder; `config={}` leaves config.json out, `without` a tensor."""
    renamed = {("w_" + n[2:] if n.startswith("W_") else n): t for n, t in p.items()}
    if "w_skip" in renamed:
        renamed["affine_skip_connection"] = renamed.pop("w_skip").T
    _save(folder, {n: t for n, t in renamed.items() if n != without}, "params.safetensors")
    cfg = {**GEMMA_CFG, **changed} if config is None else config
    if cfg:
        (folder / "config.json").write_text(json.dumps(cfg), encoding="utf-8")
    return folder


def dictionary(kind: str) -> dict[str, Tensor]:
    """The state dict of one of dictionary_learning's classes, our random parameters in it."""
    architecture, names = CLASSES[kind]
    p = parameters(architecture)
    tensors = {
        n: (p[ours].T if n.endswith("coder.weight") else p[ours]).contiguous()
        for n, ours in names.items()
    }
    if "TopK" in kind:
        tensors |= {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(THRESHOLD)}
    if kind == "MatryoshkaBatchTopKSAE":
        tensors["group_sizes"] = torch.tensor([10, 30])
    return tensors


def write_dictionary(
    folder: Path, kind: str, *, tensors: Any = None, buffer: Any = None, **changed: Any
) -> Path:
    """A dictionary_learning folder; a change to None leaves the setting out."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer = {**TRAINER, "dict_class": kind, **changed}
    if "TopK" not in kind:
        del trainer["k"]
    trainer = {k: v for k, v in trainer.items() if v is not None}
    about = {
        "trainer": trainer,
        "buffer": buffer or {"ctx_len": 128, "io": "out", "d_submodule": 1},
    }
    (folder / "config.json").write_text(json.dumps(about), encoding="utf-8")
    torch.save(dictionary(kind) if tensors is None else tensors, folder / "ae.pt")
    return folder


def write_sparsify(
    folder: Path, p: dict[str, Tensor], *, without: str | None = None, **changed: Any
) -> Path:
    """A sparsify folder; its name is the module's."""
    tensors = {
        "encoder.weight": p["W_enc"].T,
        "encoder.bias": p["b_enc"],
        **{n: p[n] for n in ("W_dec", "b_dec", "W_skip") if n in p},
    }
    _save(folder, {n: t for n, t in tensors.items() if n != without}, "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({**SPARSIFY_CFG, **changed}), encoding="utf-8")
    return folder


def write_llama(
    folder: Path, p: dict[str, Tensor] | None = None, *, without: str | None = None, **changed: Any
) -> Path:
    """A Llama Scope folder; `without` leaves a tensor or a setting out."""
    p = parameters("standard") if p is None else p
    tensors = {
        "encoder.weight": p["W_enc"].T,
        "encoder.bias": p["b_enc"],
        "decoder.weight": p["W_dec"].T,
        "decoder.bias": p["b_dec"],
    }
    (folder / "checkpoints").mkdir(parents=True)
    stored = {n: t.contiguous() for n, t in tensors.items() if n != without}
    save_file(stored, folder / "checkpoints" / "final.safetensors")
    cfg = {k: v for k, v in {**LLAMA_CFG, **changed}.items() if k != without}
    (folder / "hyperparams.json").write_text(json.dumps(cfg), encoding="utf-8")
    return folder


def double(p: dict[str, Tensor]) -> dict[str, Tensor]:
    """In float64, in which the formulas are written out."""
    return {n: t.double() for n, t in p.items()}


def jump(pre: Tensor, threshold: Tensor | float) -> Tensor:
    """JumpReLU."""
    return torch.where(pre > threshold, pre.clamp(min=0), 0.0)


def largest(pre: Tensor, k: int) -> Tensor:
    """The k largest of each row, negative ones off; by sorting, unlike the code under test."""
    at_least = pre.sort(dim=-1, descending=True).values[..., k - 1 : k]
    return torch.where(pre >= at_least, pre.clamp(min=0), 0.0)


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    """Of float32 against float64, or of two orders of the same sum."""
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-4, atol=1e-4)
