"""SAELens folders: `cfg.json` and `sae_weights.safetensors`, before and after version 6."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from saexp.errors import ModelError, SAEError
from saexp.models.hookpoints import Hookpoint
from saexp.saes.base import SparseAutoencoder

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"


def is_saelens(folder: Path) -> bool:
    """Whether the folder looks like one."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def load_saelens(
    folder: Path, metadata: dict[str, Any], overrides: dict[str, Any] | None = None
) -> SparseAutoencoder:
    """Read one; `overrides` are config values its release is known by.

    The hookpoint comes from the config (`hook_name`, before 6.0 `hook_point`).
    """
    try:
        cfg = json.loads((folder / CONFIG).read_text("utf-8"))
    except ValueError as error:
        raise SAEError(f"{folder / CONFIG} is no JSON ({error})") from error
    cfg.update(overrides or {})
    about = {**cfg, **(cfg.get("metadata") or {})}
    hook_name = about.get("hook_name") or about.get("hook_point")
    if not hook_name:
        raise SAEError(f"{folder / CONFIG} names no hook_name, so where it belongs is unknown")
    try:
        hookpoint = Hookpoint.parse(hook_name)
    except ModelError as error:
        raise SAEError(f"{folder / CONFIG}: hook_name: {error}") from error
    architecture, k = _architecture(cfg)
    parameters = load_file(folder / WEIGHTS)
    scaling = cfg.get("normalize_activations", "none") or "none"
    factor = cfg.get("norm_scaling_factor", about.get("norm_scaling_factor"))
    if scaling == "none" and factor is not None:
        scaling = "expected_average_only_in"
    return SparseAutoencoder(
        parameters,
        architecture=architecture,
        hookpoint=hookpoint,
        metadata={
            "model": about.get("model_name"),
            "neuronpedia_id": about.get("neuronpedia_id"),
            **metadata,
            "format": "SAELens",
            "architecture": architecture,
        },
        k=k,
        apply_b_dec_to_input=bool(cfg.get("apply_b_dec_to_input", True)),
        normalize_activations=scaling,
        norm_factor=factor,
        centre=_expects_centred(about, hookpoint),
        rescale_acts_by_decoder_norm=bool(cfg.get("rescale_acts_by_decoder_norm", False)),
    )


def _expects_centred(about: dict[str, Any], hookpoint: Hookpoint) -> bool:
    """Whether it was trained on TransformerLens' centred streams (each vector minus its mean)."""
    options = about.get("model_from_pretrained_kwargs") or {}
    writes = hookpoint.stream not in ("attn_z", "mlp_in")
    return bool(options.get("center_writing_weights")) and writes


def _architecture(cfg: dict[str, Any]) -> tuple[str, int | None]:
    """(architecture, k): configs before 6.0 say topk by their activation function."""
    architecture = cfg.get("architecture", "standard")
    k = cfg.get("k")
    if cfg.get("activation_fn_str", cfg.get("activation_fn")) == "topk":
        architecture = "topk"
        k = k or (cfg.get("activation_fn_kwargs") or {}).get("k")
    return architecture, int(k) if k else None
