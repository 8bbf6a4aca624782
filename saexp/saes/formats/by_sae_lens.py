"""Formats saexp has no reader of its own for: sae-lens loads, the weights are taken over."""

import warnings
from typing import Any

from saexp.errors import SAEError
from saexp.hub import hub, why_absent
from saexp.saes.base import SparseAutoencoder
from saexp.saes.catalogue import Entry
from saexp.saes.formats import saelens
from saexp.saes.formats.files import lens_hookpoint


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
