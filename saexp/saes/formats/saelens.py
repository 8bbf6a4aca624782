"""SAELens folders: `cfg.json` and `sae_weights.safetensors`, before and after version 6."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

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
    if not isinstance(cfg, dict):
        raise SAEError(f"{folder / CONFIG} is no JSON object")
    cfg.update(overrides or {})
    about = {**cfg, **(cfg.get("metadata") or {})}
    hook_name = about.get("hook_name") or about.get("hook_point")
    if not hook_name:
        raise SAEError(f"{folder / CONFIG} names no hook_name, so where it belongs is unknown")
    try:
        hookpoint = Hookpoint.parse(hook_name)
    except ModelError as error:
        raise SAEError(f"{folder / CONFIG}: hook_name: {error}") from error
    architecture, k = _architecture(cfg, folder / CONFIG)
    scaling, factor = _scaling(cfg, about)
    return SparseAutoencoder(
        _parameters(folder / WEIGHTS),
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
        centre=expects_centred(about, hookpoint),
        rescale_acts_by_decoder_norm=architecture in ("topk", "batchtopk")
        and bool(cfg.get("rescale_acts_by_decoder_norm", False)),
    )


def _parameters(file: Path) -> dict[str, Tensor]:
    """Tensors under the names SparseAutoencoder knows."""
    parameters = read_safetensors(file)
    d_sae = parameters["W_enc"].shape[-1] if "W_enc" in parameters else 0
    if "log_threshold" in parameters:
        parameters["threshold"] = parameters.pop("log_threshold").exp()
    if "topk_threshold" in parameters:
        parameters["threshold"] = parameters.pop("topk_threshold").repeat(d_sae)
    drop_unit_scaling(parameters)
    return parameters


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a file. Raises SAEError where it is damaged."""
    try:
        return load_file(file)
    except SafetensorError as error:
        raise SAEError(f"{file} is no safetensors file ({error})") from error


def drop_unit_scaling(parameters: dict[str, Tensor]) -> None:
    """Old files hold a `scaling_factor` of ones that nothing uses; any other stays, an error."""
    factor = parameters.get("scaling_factor")
    if factor is not None and torch.equal(factor, torch.ones_like(factor)):
        del parameters["scaling_factor"]


def _scaling(cfg: dict[str, Any], about: dict[str, Any]) -> tuple[str, float | None]:
    """(scaling, factor); before 6.0 a boolean said whether inputs are scaled by a factor.

    As in SAELens, a factor that a release is known by counts only where the config asks for it.
    """
    scaling = cfg.get("normalize_activations") or "none"
    scaling = "expected_average_only_in" if scaling is True else str(scaling)
    factor = cfg.get("norm_scaling_factor", about.get("norm_scaling_factor"))
    return scaling, factor if scaling == "expected_average_only_in" else None


def expects_centred(about: dict[str, Any], hookpoint: Hookpoint) -> bool:
    """Whether it was trained on TransformerLens' centred streams (each vector minus its mean)."""
    options = about.get("model_from_pretrained_kwargs") or {}
    writes = hookpoint.stream not in ("attn_z", "mlp_in")
    return bool(options.get("center_writing_weights")) and writes


def _architecture(cfg: dict[str, Any], file: Path) -> tuple[str, int | None]:
    """(architecture, k): configs before 6.0 say topk by their activation function."""
    architecture = cfg.get("architecture", "standard")
    k = cfg.get("k")
    activation = cfg.get("activation_fn_str", cfg.get("activation_fn")) or "relu"
    if activation not in ("relu", "topk"):
        raise SAEError(
            f"{file}: activation_fn '{activation}' is not supported; saexp reads relu, topk"
        )
    if activation == "topk":
        architecture = "topk"
        k = k or (cfg.get("activation_fn_kwargs") or {}).get("k")
    return architecture, int(k) if k else None
