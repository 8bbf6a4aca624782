"""Llama Scope folders: `hyperparams.json` and `checkpoints/final.safetensors` (He et al. 2024).

Scaled as the authors' own loader does (OpenMOSS Language-Model-SAEs, October 2024): the weights are
those of training, on inputs of norm sqrt(d); the threshold is of the model's own scale and of
unit-norm decoder rows. sae-lens compares it before the decoder's norm is taken in, which comes to
the same only where that norm is 1.
"""

import json
from pathlib import Path
from typing import Any

import torch

from saexp.errors import ModelError, SAEError
from saexp.models.hookpoints import Hookpoint
from saexp.saes.base import SparseAutoencoder
from saexp.saes.formats.files import read_safetensors

CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
_NEEDED = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")


def is_llama_scope(folder: Path) -> bool:
    """Whether the folder looks like one."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def load_llama_scope(folder: Path, metadata: dict[str, Any]) -> SparseAutoencoder:
    """Read one; feature activations are those of unit-norm directions in the model's own scale."""
    label = metadata.get("name", str(folder))
    cfg = _config(folder)
    tensors = {n: t.float() for n, t in read_safetensors(folder / WEIGHTS).items()}
    for name in _NEEDED:
        if name not in tensors:
            raise SAEError(f"{label}: a Llama Scope SAE needs '{name}', absent here")
    try:
        hookpoint = Hookpoint.parse(str(cfg["hook_point_in"]))
        scale_in, scale_out = (_factor(cfg, end) for end in ("in", "out"))
        threshold = float(cfg["jump_relu_threshold"])
    except ModelError as error:
        raise SAEError(f"{folder / CONFIG}: hook_point_in: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise SAEError(f"{folder / CONFIG}: {error} is missing or cannot be read") from error
    if cfg.get("hook_point_out", cfg["hook_point_in"]) != cfg["hook_point_in"]:
        raise SAEError(
            f"{label} writes to {cfg['hook_point_out']}: saexp reads no transcoders of this format"
        )
    weight_in, weight_out = tensors["encoder.weight"].T, tensors["decoder.weight"].T
    bias_in = tensors["encoder.bias"] / scale_in
    weight_out = weight_out * (scale_in / scale_out)
    if cfg.get("sparsity_include_decoder_norm", True):
        norm = weight_out.norm(dim=-1)
        weight_out = weight_out / norm[:, None]
        weight_in, bias_in = weight_in * norm, bias_in * norm
    before = bool(cfg.get("apply_decoder_bias_to_pre_encoder", False))
    return SparseAutoencoder(
        {
            "W_enc": weight_in.contiguous(),
            "b_enc": bias_in,
            "W_dec": weight_out.contiguous(),
            "b_dec": tensors["decoder.bias"] / scale_out,
            "threshold": torch.full_like(bias_in, threshold),
        },
        architecture="jumprelu",
        hookpoint=hookpoint,
        metadata={
            **metadata,
            "format": "Llama Scope",
            "architecture": "jumprelu",
            "expected_norm": float(cfg["d_model"]) ** 0.5 / scale_in,
        },
        apply_b_dec_to_input=before,
    )


def _config(folder: Path) -> dict[str, Any]:
    try:
        cfg = json.loads((folder / CONFIG).read_text("utf-8"))
    except ValueError as error:
        raise SAEError(f"{folder / CONFIG} is no JSON ({error})") from error
    if cfg.get("act_fn", "jumprelu") not in ("jumprelu", "topk") or cfg.get("use_glu_encoder"):
        raise SAEError(f"{folder / CONFIG}: only Llama Scope's JumpReLU SAEs are supported")
    return cfg


def _factor(cfg: dict[str, Any], end: str) -> float:
    """What training multiplied the stream by."""
    if cfg.get("norm_activation", "dataset-wise") != "dataset-wise":
        raise ValueError("norm_activation")
    return float(cfg["d_model"]) ** 0.5 / float(cfg["dataset_average_activation_norm"][end])
