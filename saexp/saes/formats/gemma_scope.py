"""Gemma Scope `params.npz` files: everything but the weights is in the path."""

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saexp.errors import SAEError
from saexp.models.hookpoints import Hookpoint
from saexp.saes.base import SparseAutoencoder
from saexp.saes.formats.saelens import drop_unit_scaling

WEIGHTS = "params.npz"
_STREAMS = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_z"}


def is_gemma_scope(repo: str) -> bool:
    """Whether the repository is one of these, and not of Gemma Scope 2."""
    return "gemma-scope" in repo and not re.search(r"gemma-scope-2-\d", repo)


def hookpoint_of(repo: str, path: str) -> Hookpoint:
    """From repository and path, such as gemma-scope-2b-pt-res and layer_12/width_16k/…

    Raises SAEError where they don't say it, and for transcoders, whose input is not collected.
    """
    if re.search(r"gemma-scope-[\w.-]+?-transcoders", f"{repo}/{path}"):
        raise SAEError(
            f"{repo}/{path}: these transcoders read the MLP's input before its norm's gain, "
            "which saexp does not collect; its mlp_in is after"
        )
    stream = re.search(r"gemma-scope-[\w.]+?-(?:pt|it)-(res|mlp|att)\b", f"{repo}/{path}")
    layer = re.search(r"(?:^|/)layer_(\d+)(?:/|$)", path)
    if "embedding" in path:
        return Hookpoint(0, "embed")
    if not stream or not layer:
        raise SAEError(
            f"{repo}/{path} does not say its layer and stream; set layer= and sae.stream=resid_post"
        )
    return Hookpoint(int(layer[1]), _STREAMS[stream[1]])


def load_gemma_scope(
    file: Path, hookpoint: Hookpoint, metadata: dict[str, Any]
) -> SparseAutoencoder:
    """Read one `params.npz`; JumpReLU, no b_dec subtracted at the input.

    SAEs of the embedding were trained on its rows as they are in the weights; block 0 reads them
    times sqrt(d_model).
    """
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            parameters = {n: torch.from_numpy(np.asarray(arrays[n], np.float32)) for n in arrays}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise SAEError(f"{file} is no npz file of plain arrays ({error})") from error
    parameters = {f"W_{n[2:]}" if n.startswith("w_") else n: p for n, p in parameters.items()}
    drop_unit_scaling(parameters)
    embedding = hookpoint.stream == "embed" and "b_dec" in parameters
    return SparseAutoencoder(
        parameters,
        architecture="jumprelu",
        hookpoint=hookpoint,
        metadata={**metadata, "format": "Gemma Scope", "architecture": "jumprelu"},
        apply_b_dec_to_input=False,
        normalize_activations="expected_average_only_in" if embedding else "none",
        norm_factor=len(parameters["b_dec"]) ** -0.5 if embedding else None,
    )
