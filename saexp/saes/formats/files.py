"""Reading what several formats share: JSON configs, safetensors, names of other tools' hooks."""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saexp.errors import ModelError, SAEError
from saexp.models.hookpoints import Hookpoint

_BEHIND_THE_NORM = "pre_feedforward_layernorm.output"
_MLP_IN = re.compile(r"blocks\.(\d+)\.(?:ln2\.hook_normalized|hook_mlp_in)")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file. Raises SAEError where it is damaged or none."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise SAEError(f"{file} is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise SAEError(f"{file} is no JSON object")
    return found


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a file. Raises SAEError where it is damaged."""
    try:
        return load_file(file)
    except SafetensorError as error:
        raise SAEError(f"{file} is no safetensors file ({error})") from error


def lens_hookpoint(name: str, label: str, module: object = None) -> Hookpoint:
    """From a TransformerLens name. Raises SAEError, beginning with `label`, for no hookpoint.

    Its names of places before the MLP's norm or gain mean mlp_in where `module`, the Hugging Face
    name beside them, is the norm's output.
    """
    match = _MLP_IN.fullmatch(name)
    if match and str(module).endswith(_BEHIND_THE_NORM):
        return Hookpoint(int(match[1]), "mlp_in")
    try:
        return Hookpoint.parse(name)
    except ModelError as error:
        raise SAEError(f"{label}: {error}") from error


def check_raw_output(hookpoint: Hookpoint, model: str | None, label: str) -> None:
    """Raise SAEError for a module's own output in models that norm it once more.

    Tools that hook modules store what Gemma's attention and MLP return; the streams attn_out and
    mlp_out are after the norm that follows.
    """
    norms_again = re.search(r"gemma-?[23]", (model or "").lower())
    if norms_again and hookpoint.stream in ("attn_out", "mlp_out"):
        raise SAEError(
            f"{label} was trained on what the module of {hookpoint.name} returns, but {model} "
            "norms that once more; saexp collects it after that norm only"
        )
