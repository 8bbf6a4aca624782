"""Formats that sae-lens reads, cross-layer transcoders among them."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from saexp.errors import SAEError
from saexp.hub import hub, why_absent
from saexp.models.hookpoints import Hookpoint
from saexp.saes.catalogue import Entry
from saexp.saes.formats import saelens
from saexp.saes.formats.files import (
    Config,
    check_matrices,
    lens_hookpoint,
    read_safetensors,
    read_yaml,
)
from saexp.saes.sae import SparseAutoencoder, check_values


def load_by_sae_lens(entry: Entry, metadata: dict[str, Any]) -> SparseAutoencoder:
    """An SAE or transcoder of sae-lens' catalogue."""
    from sae_lens import SAE as LensSAE

    label = f"{entry.release}/{entry.id}"
    try:
        with hub(), warnings.catch_warnings():
            # Advice on loading the model with TransformerLens, which saexp does not use.
            warnings.filterwarnings("ignore", message=r"\s*This SAE has non-empty model_from_pre")
            lens = LensSAE.from_pretrained(entry.release, entry.id, device="cpu")
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise SAEError(f"{label} cannot be loaded ({why_absent(error)})") from error
    cfg, about = lens.cfg, lens.cfg.metadata.to_dict()
    hookpoint = lens_hookpoint(str(about.get("hook_name")), label, about.get("hf_hook_name"))
    named, options = cfg.architecture(), about.get("model_from_pretrained_kwargs") or {}
    hookpoint_out = saelens.transcoder_output(named, about.get("hook_name_out"), label)
    return SparseAutoencoder(
        {n: p.detach().float().clone() for n, p in lens.named_parameters()},
        architecture=saelens.inference_architecture(named),
        hookpoint=hookpoint,
        hookpoint_out=hookpoint_out,
        metadata={
            "model": about.get("model_name"),
            "prepend_bos": about.get("prepend_bos"),
            **metadata,
            "format": "sae-lens loader",
            "architecture": named,
        },
        k=getattr(cfg, "k", None),
        apply_b_dec_to_input=cfg.apply_b_dec_to_input,
        normalize_activations=getattr(cfg, "normalize_activations", "none"),
        centre=saelens.expects_centred(
            options.get("center_writing_weights"), hookpoint_out or hookpoint
        ),
        rescale_acts_by_decoder_norm=getattr(cfg, "rescale_acts_by_decoder_norm", False),
    )


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
