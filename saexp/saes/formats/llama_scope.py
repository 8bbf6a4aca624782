"""Llama Scope folders: `hyperparams.json` and `checkpoints/final.safetensors` (He et al. 2024).

Scaled as the authors' own loader does (OpenMOSS Language-Model-SAEs, October 2024): the weights are
those of training, on inputs of norm sqrt(d); the threshold is of the model's own scale and of
unit-norm decoder rows. sae-lens compares it before the decoder's norm is taken in, which comes to
the same only where that norm is 1.
"""

from pathlib import Path
from typing import Any

import torch

from saexp.errors import SAEError
from saexp.saes.formats.files import (
    Config,
    check_matrices,
    lens_hookpoint,
    read_config,
    read_safetensors,
)
from saexp.saes.sae import SAESettings, SparseAutoencoder, check_values

CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
_NEEDED = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")


def is_llama_scope(folder: Path) -> bool:
    """Whether the folder looks like one."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def load_llama_scope(folder: Path, metadata: dict[str, Any]) -> SparseAutoencoder:
    """Read one; feature activations are those of unit-norm directions in the model's own scale."""
    label = str(metadata.get("name", folder))
    cfg = _config(folder)
    d_model = cfg.needed("d_model", cfg.integer("d_model"))
    threshold = cfg.needed("jump_relu_threshold", cfg.number("jump_relu_threshold"))
    scale_in, scale_out = (_factor(cfg, d_model, end) for end in ("in", "out"))
    name_in = cfg.needed("hook_point_in", cfg.text("hook_point_in"))
    hookpoint = lens_hookpoint(name_in, f"{cfg.file}: hook_point_in")
    if (name_out := cfg.text("hook_point_out") or name_in) != name_in:
        raise SAEError(f"{label} writes to {name_out}: saexp reads no transcoders of this format")
    tensors = {n: t.float() for n, t in read_safetensors(folder / WEIGHTS).items()}
    for name in _NEEDED:
        if name not in tensors:
            raise SAEError(f"{label}: a Llama Scope SAE needs '{name}', absent here")
    # Here, before norms are divided by, and what is bad spreads.
    check_values(tensors, str(folder / WEIGHTS))
    check_matrices(tensors, ("encoder.weight", "decoder.weight"), label)
    weight_in, weight_out = tensors["encoder.weight"].T, tensors["decoder.weight"].T
    bias_in = tensors["encoder.bias"] / scale_in
    weight_out = weight_out * (scale_in / scale_out)
    if cfg.boolean("sparsity_include_decoder_norm", absent=True):
        norm = weight_out.norm(dim=-1)
        if not norm.shape == bias_in.shape == weight_in.shape[-1:]:
            shapes = ", ".join(f"{n} {list(tensors[n].shape)}" for n in _NEEDED[:3])
            raise SAEError(f"{label}: these shapes do not fit together: {shapes}")
        # A decoder row of zeros is a dead latent's.
        norm = norm.where(norm > 0, 1.0)
        weight_out = weight_out / norm[:, None]
        weight_in, bias_in = weight_in * norm, bias_in * norm
    sae = SparseAutoencoder(
        {
            "W_enc": weight_in.contiguous(),
            "b_enc": bias_in,
            "W_dec": weight_out.contiguous(),
            "b_dec": tensors["decoder.bias"] / scale_out,
            "threshold": torch.full_like(bias_in, threshold),
        },
        SAESettings(
            architecture="jumprelu",
            hookpoint=hookpoint,
            apply_b_dec_to_input=bool(cfg.boolean("apply_decoder_bias_to_pre_encoder")),
        ),
        metadata={
            **metadata,
            "format": "Llama Scope",
            "architecture": "jumprelu",
            "expected_norm": d_model**0.5 / scale_in,
        },
    )
    cfg.check_sizes({"d_model": sae.d_in, "d_sae": sae.d_sae})
    return sae


def _config(folder: Path) -> Config:
    cfg = read_config(folder / CONFIG)
    act_fn = cfg.text("act_fn") or "jumprelu"
    if act_fn not in ("jumprelu", "topk") or cfg.boolean("use_glu_encoder"):
        raise SAEError(f"{cfg.file}: only Llama Scope's JumpReLU SAEs are supported")
    if (cfg.text("norm_activation") or "dataset-wise") != "dataset-wise":
        raise cfg.error("norm_activation", "dataset-wise")
    return cfg


def _factor(cfg: Config, d_model: int, end: str) -> float:
    """What training multiplied the stream by."""
    norms = cfg.section("dataset_average_activation_norm")
    return d_model**0.5 / norms.needed(end, norms.number(end, positive=True))
