"""Gemma Scope `params.npz` files: everything but the weights is in the path."""

import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saexp.errors import SAEError
from saexp.models.hookpoints import Hookpoint
from saexp.saes.formats.saelens import drop_unit_scaling
from saexp.saes.sae import SAESettings, SparseAutoencoder, check_type
from saexp.wording import brief

WEIGHTS = "params.npz"
Ends = tuple[Hookpoint, Hookpoint | None]
"""(what it reads, what a transcoder predicts)."""
_UNREADABLE = (
    *(ValueError, OSError, EOFError, TypeError, LookupError, NotImplementedError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error),
)
"""What numpy, zipfile and torch raise for files that are damaged or hold other arrays."""
_STREAMS = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_z"}


def is_gemma_scope(repo: str) -> bool:
    """Whether the repository is one of these, and not of Gemma Scope 2."""
    return "gemma-scope" in repo and not re.search(r"gemma-scope-2-\d", repo)


def ends_of(repo: str, path: str) -> Ends:
    """From repository and path, such as gemma-scope-2b-pt-res and layer_12/width_16k/…

    Transcoders were trained with the norm's gain folded into the MLP, so they read the norm's
    output before it (Lieberum et al. 2024, section 3.4). Raises SAEError where they don't say it.
    """
    place = f"{repo}/{path}"
    stream = re.search(r"gemma-scope-[\w.]+?-(?:pt|it)-(res|mlp|att|transcoders)\b", place)
    layer = re.search(r"(?:^|/)layer_(\d+)(?:/|$)", path)
    if "embedding" in path:
        return Hookpoint(0, "embed"), None
    if not stream or not layer:
        raise SAEError(
            f"{place} does not say its layer and stream; set layer= and sae.stream=resid_post"
        )
    at = int(layer[1])
    if stream[1] == "transcoders":
        return Hookpoint(at, "mlp_in_normalized"), Hookpoint(at, "mlp_out")
    return Hookpoint(at, _STREAMS[stream[1]]), None


def load_gemma_scope(file: Path, ends: Ends, metadata: dict[str, Any]) -> SparseAutoencoder:
    """Read one `params.npz`; JumpReLU, no b_dec subtracted at the input.

    SAEs of the embedding were trained on its rows as they are in the weights; block 0 reads them
    times sqrt(d_model).
    """
    hookpoint, hookpoint_out = ends
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            parameters = {n: torch.from_numpy(np.asarray(arrays[n])) for n in arrays}
    except _UNREADABLE as error:
        reason = brief(str(error), 120)
        raise SAEError(f"{file} is no npz file of plain arrays ({reason})") from error
    for name, tensor in parameters.items():
        check_type(name, tensor, str(file))
    parameters = {name: tensor.float() for name, tensor in parameters.items()}
    parameters = {f"W_{n[2:]}" if n.startswith("w_") else n: p for n, p in parameters.items()}
    drop_unit_scaling(parameters)
    # The number of values in b_dec, which is d_model, or what is wrong with it is reported later.
    d_model = parameters["b_dec"].numel() if "b_dec" in parameters else 0
    embedding = hookpoint.stream == "embed" and d_model > 0
    return SparseAutoencoder(
        parameters,
        SAESettings(
            architecture="jumprelu",
            hookpoint=hookpoint,
            hookpoint_out=hookpoint_out,
            apply_b_dec_to_input=False,
            normalize_activations="expected_average_only_in" if embedding else "none",
            norm_factor=d_model**-0.5 if embedding else None,
        ),
        metadata={**metadata, "format": "Gemma Scope", "architecture": "jumprelu"},
    )
