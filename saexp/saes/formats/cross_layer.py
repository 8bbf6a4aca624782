"""One layer of a cross-layer transcoder in circuit-tracer's files, as sae-lens reads it.

`config.yaml` and, for each layer i, `W_enc_{i}.safetensors` (`W_enc_{i} [d_sae, d_model]`,
`b_enc_{i}`, `b_dec_{i}`, JumpReLU's `threshold_{i}`) and `W_dec_{i}.safetensors`
(`W_dec_{i} [d_sae, n_layers - i, d_model]`: what a latent adds at its own and each later layer).

The latents' activations are those of the whole transcoder. Its decoder is the sum over the layers
that it writes to (sae-lens' convention), so that a direction is all that a latent adds to the
stream, and a reconstruction is none of the layer's own MLP output.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from saexp.errors import SAEError
from saexp.saes.base import SparseAutoencoder
from saexp.saes.formats.files import lens_hookpoint, read_safetensors

CONFIG = "config.yaml"


@dataclass(frozen=True)
class Files:
    """Of one layer."""

    config: Path
    encoder: Path
    decoder: Path


def weights(layer: int) -> tuple[str, str]:
    """Names of (encoder file, decoder file)."""
    return f"W_enc_{layer}.safetensors", f"W_dec_{layer}.safetensors"


def load_layer(files: Files, layer: int, metadata: dict[str, Any]) -> SparseAutoencoder:
    """Raises SAEError where a file lacks something."""
    label = str(metadata.get("name", files.encoder))
    cfg = _config(files.config, label)
    tensors = {**read_safetensors(files.encoder), **read_safetensors(files.decoder)}
    found: dict[str, Tensor] = {}
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
        if f"{name}_{layer}" in tensors:
            found[name] = tensors[f"{name}_{layer}"].float()
        elif name != "threshold":
            raise SAEError(f"{label}: a cross-layer transcoder needs '{name}_{layer}', absent here")
    if found["W_dec"].ndim != 3:
        shape = list(found["W_dec"].shape)
        raise SAEError(f"{label}: W_dec_{layer} has shape {shape}, not [d_sae, n_layers, d_model]")
    found["W_enc"] = found["W_enc"].T.contiguous()
    found["W_dec"] = found["W_dec"].sum(dim=1)
    at, out = (
        lens_hookpoint(f"blocks.{layer}.{cfg[f'feature_{end}_hook']}", f"{label}: {CONFIG}")
        for end in ("input", "output")
    )
    architecture = "jumprelu" if "threshold" in found else "standard"
    return SparseAutoencoder(
        found,
        architecture=architecture,
        hookpoint=at,
        hookpoint_out=out,
        metadata={
            "model": cfg.get("model_name"),
            **metadata,
            "format": "cross-layer transcoder, one layer",
            "architecture": architecture,
            "reconstructs": False,
        },
    )


def _config(file: Path, label: str) -> dict[str, Any]:
    try:
        cfg = yaml.safe_load(file.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise SAEError(f"{label}: {file} is no YAML ({' '.join(str(error).split())})") from error
    lacking = [
        name
        for name in ("feature_input_hook", "feature_output_hook")
        if not isinstance(cfg, dict) or name not in cfg
    ]
    if lacking:
        raise SAEError(f"{label}: {CONFIG} lacks '{lacking[0]}'")
    return cfg
