"""SAELens folders: `cfg.json` and `sae_weights.safetensors`, before and after version 6."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saexp.errors import SAEError
from saexp.models.hookpoints import NOT_ADDED, Hookpoint
from saexp.saes.base import SparseAutoencoder
from saexp.saes.formats.files import lens_hookpoint, read_json, read_safetensors

CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
TRANSCODERS = {
    "transcoder": "standard",
    "skip_transcoder": "standard",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
"""SAELens' architectures that predict another stream -> how their latents are computed."""


def is_saelens(folder: Path) -> bool:
    """Whether the folder looks like one."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def load_saelens(
    folder: Path, metadata: dict[str, Any], overrides: dict[str, Any] | None = None
) -> SparseAutoencoder:
    """Read one; `overrides` are config values its release is known by.

    The hookpoint comes from the config (`hook_name`, before 6.0 `hook_point`).
    """
    cfg = read_json(folder / CONFIG)
    cfg.update(overrides or {})
    about = {**cfg, **(cfg.get("metadata") or {})}
    hook_name = about.get("hook_name") or about.get("hook_point")
    if not hook_name:
        raise SAEError(f"{folder / CONFIG} names no hook_name, so where it belongs is unknown")
    label = f"{folder / CONFIG}: hook_name"
    hookpoint = lens_hookpoint(hook_name, label, about.get("hf_hook_name"))
    named, k = _architecture(cfg, folder / CONFIG)
    hookpoint_out = transcoder_output(named, about, f"{folder / CONFIG}")
    architecture = inference_architecture(named)
    scaling, factor = _scaling(cfg, about)
    parameters = _parameters(folder / WEIGHTS)
    if "skip" in named and "W_skip" not in parameters:
        raise SAEError(f"{folder / WEIGHTS}: a {named} needs 'W_skip', absent here")
    return SparseAutoencoder(
        parameters,
        architecture=architecture,
        hookpoint=hookpoint,
        hookpoint_out=hookpoint_out,
        metadata={
            "model": about.get("model_name"),
            "neuronpedia_id": about.get("neuronpedia_id"),
            "prepend_bos": _prepend_bos(about),
            "frequencies": _beside(folder),
            **metadata,
            "format": "SAELens",
            "architecture": named,
        },
        k=k,
        apply_b_dec_to_input=bool(cfg.get("apply_b_dec_to_input", hookpoint_out is None)),
        normalize_activations=scaling,
        norm_factor=factor,
        centre=expects_centred(about, hookpoint_out or hookpoint),
        rescale_acts_by_decoder_norm=architecture in ("topk", "batchtopk")
        and bool(cfg.get("rescale_acts_by_decoder_norm", False)),
    )


def _prepend_bos(about: dict[str, Any]) -> bool | None:
    """Whether it was trained on texts that begin with BOS, None where the config does not say.

    A config before 6.0 that does not say means yes, as SAELens reads it.
    """
    said = about.get("prepend_bos")
    if said is None:
        major = str(about.get("sae_lens_version") or "0").partition(".")[0]
        return True if major.isdigit() and int(major) < 6 else None
    return bool(said)


def _beside(folder: Path) -> str | None:
    """The file with the latents' recorded frequencies, where there is one."""
    file = folder / SPARSITY
    return str(file) if file.is_file() else None


def recorded_frequencies(file: str | Path) -> Tensor:
    """`[d_sae]`, how often each latent fired in training; the file holds log10(frequency + 1e-10).

    Raises SAEError where the file holds no such list.
    """
    found = list(read_safetensors(Path(file)).values())
    if len(found) != 1 or found[0].ndim != 1:
        raise SAEError(f"{file} holds no list of log10 frequencies, one per latent")
    return (10 ** found[0].double() - 1e-10).clamp(min=0, max=1)


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


def inference_architecture(named: str) -> str:
    """saexp's name for how SAELens' architecture computes latents once trained."""
    return "batchtopk" if named == "matryoshka_batchtopk" else TRANSCODERS.get(named, named)


def transcoder_output(named: str, about: dict[str, Any], label: str) -> Hookpoint | None:
    """What a transcoder predicts, None for an SAE. Raises SAEError where its config lacks it."""
    if named not in TRANSCODERS:
        return None
    if not about.get("hook_name_out"):
        raise SAEError(
            f"{label} names no hook_name_out, so what the transcoder predicts is unknown"
        )
    return lens_hookpoint(str(about["hook_name_out"]), f"{label}: hook_name_out")


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
    writes = hookpoint.stream not in NOT_ADDED
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
