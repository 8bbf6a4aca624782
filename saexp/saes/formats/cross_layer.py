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

from torch import Tensor

from saexp.errors import SAEError
from saexp.models.hookpoints import Hookpoint
from saexp.saes.base import SparseAutoencoder
from saexp.saes.formats.files import (
    Config,
    check_matrices,
    lens_hookpoint,
    read_safetensors,
    read_yaml,
)
from saexp.saes.parameters import check_values

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
    cfg = read_yaml(files.config)
    at, out = (_hookpoint(cfg, f"feature_{end}_hook", layer) for end in ("input", "output"))
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
    check_matrices(found, ("W_enc",), label)
    found["W_enc"] = found["W_enc"].T.contiguous()
    # Here, before layers are summed.
    check_values(found, str(files.decoder))
    found["W_dec"] = found["W_dec"].sum(dim=1)
    architecture = "jumprelu" if "threshold" in found else "standard"
    return SparseAutoencoder(
        found,
        architecture=architecture,
        hookpoint=at,
        hookpoint_out=out,
        metadata={
            "model": cfg.text("model_name"),
            **metadata,
            "format": "cross-layer transcoder, one layer",
            "architecture": architecture,
            "reconstructs": False,
        },
    )


def _hookpoint(cfg: Config, key: str, layer: int) -> Hookpoint:
    name = cfg.needed(key, cfg.text(key))
    return lens_hookpoint(f"blocks.{layer}.{name}", f"{cfg.file}: {key}")
