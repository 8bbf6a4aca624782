"""Reads the files of SAEs: downloads, configs, safetensors, hook names of other tools."""

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saexp.digests import content_name
from saexp.errors import ModelError, SAEError, brief, counted
from saexp.hub import hub, why_absent
from saexp.models import Hookpoint

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Accepted dtypes of weights."""
_COUNTS = ("k", "group_sizes")
"""Tensors of integers that some formats store with the weights."""


def download(repo: str, path: str) -> Path:
    """A file of a hub repository, from the cache if possible. Raises SAEError."""
    try:
        with hub():
            return Path(hf_hub_download(repo, path))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise SAEError(
            f"{repo}/{path} is neither cached nor reachable ({why_absent(error)}); go online "
            "once, or point HF_HOME to a cache that holds it"
        ) from error


def download_if_present(repo: str, path: str) -> Path | None:
    """A file of a hub repository; None where it does not exist or cannot be reached."""
    try:
        return download(repo, path)
    except SAEError:
        return None


def file_metadata(file: Path, config: Path | None = None) -> dict[str, Any]:
    """Path and fingerprint of the weights, and the fingerprint of a config that exists."""
    metadata = {"path": str(file), "fingerprint": content_name(file)}
    if config is not None and config.is_file():
        metadata["config_fingerprint"] = content_name(config)
    return metadata


Streams = tuple[Hookpoint, Hookpoint | None]
"""(the stream that is read, the stream that a transcoder predicts or None)."""
_Value = TypeVar("_Value")
_LARGEST = sys.float_info.max
_LONGEST = 1000
_UNREADABLE = (SafetensorError, OSError, ValueError, LookupError, RuntimeError, AttributeError)
"""What safetensors and torch raise for files that are damaged, or of types that torch lacks."""

_NORM_OUTPUT = "pre_feedforward_layernorm.output"
_MLP_IN = re.compile(r"blocks\.(\d+)\.(?:ln2\.hook_normalized|hook_mlp_in)")


class Config:
    """Settings of a config file, each read by name with its type.

    `values` are those of the file. Absent settings and null are None. The methods raise SAEError,
    one line with the file, the setting and what is expected, for values of another type and for
    invalid values.
    """

    def __init__(self, values: Mapping[str, Any], file: Path, within: str = "") -> None:
        self.values, self.file, self.within = values, file, within

    def error(self, key: str, expected: str) -> SAEError:
        """The error for a setting whose value is not as expected."""
        try:
            shown = json.dumps(self.values.get(key))
        except (TypeError, ValueError):
            # YAML has dates and the like.
            shown = ascii(self.values.get(key))
        return SAEError(f"{self.file}: {self.within}{key} is {brief(shown, 40)}, not {expected}")

    def needed(self, key: str, value: _Value | None) -> _Value:
        """The value of the required setting `key`. Raises SAEError where it is None."""
        if value is None:
            raise SAEError(f"{self.file}: '{self.within}{key}' is missing")
        return value

    def _read(self, key: str, kinds: tuple[type, ...], expected: str) -> Any:
        value = self.values.get(key)
        # A boolean is an int to Python.
        if value is not None and type(value) not in kinds:
            raise self.error(key, expected)
        return value

    def text(self, key: str) -> str | None:
        """One line of text."""
        value = self._read(key, (str,), "text")
        if value is not None and not (value.isprintable() and len(value) <= _LONGEST):
            raise self.error(key, f"one line of at most {_LONGEST} printable characters")
        return value

    def boolean(self, key: str, absent: bool | None = None) -> bool | None:
        """`true` or `false`; `absent` where the file does not have the setting."""
        if key not in self.values:
            return absent
        return self._read(key, (bool,), "true or false")

    def integer(self, key: str, least: int = 1) -> int | None:
        """An integer that is at least `least`."""
        expected = "a positive integer" if least == 1 else f"an integer of at least {least}"
        value = self._read(key, (int,), expected)
        if value is not None and value < least:
            raise self.error(key, expected)
        return value

    def number(self, key: str, *, positive: bool = False) -> float | None:
        """A finite number."""
        expected = f"a {'positive ' if positive else ''}number"
        value = self._read(key, (int, float), expected)
        if value is None:
            return None
        if not -_LARGEST <= value <= _LARGEST or (positive and value <= 0):
            raise self.error(key, expected)
        return float(value)

    def section(self, key: str) -> "Config":
        """The settings of a nested object; none where it is absent."""
        values = self._read(key, (dict,), "an object of settings")
        return Config(values or {}, self.file, f"{self.within}{key}.")

    def check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Raise SAEError where the config has another size than the weights."""
        for key, size in sizes.items():
            configured = self.integer(key)
            if configured is not None and configured != size:
                raise self.error(key, f"{size} as in the weights")


def read_config(file: Path) -> Config:
    """The settings in a JSON file. Raises SAEError where it is damaged or not an object."""
    try:
        values = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SAEError(f"{file} is not valid JSON ({brief(str(error), 120)})") from error
    if not isinstance(values, dict):
        raise SAEError(f"{file} is not a JSON object")
    return Config(values, file)


def read_yaml(file: Path) -> Config:
    """The settings in a YAML file. Raises SAEError where it is damaged or not a mapping."""
    try:
        values = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise SAEError(f"{file} is not valid YAML ({brief(str(error), 120)})") from error
    if not isinstance(values, dict):
        raise SAEError(f"{file} is not a YAML mapping")
    return Config(values, file)


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a file. Raises SAEError where it is damaged, or has tensors of other types."""
    try:
        tensors = load_file(file)
    except _UNREADABLE as error:
        raise SAEError(f"{file} is not a safetensors file ({brief(str(error), 120)})") from error
    for name, tensor in tensors.items():
        check_type(name, tensor, str(file))
    return tensors


def check_matrices(tensors: Mapping[str, Tensor], names: Iterable[str], label: str) -> None:
    """Raise SAEError where one of these tensors exists and does not have two axes."""
    for name in names:
        if name in tensors and tensors[name].ndim != 2:
            shape = list(tensors[name].shape)
            raise SAEError(f"{label}: {name} has shape {shape}, not two axes")


def lens_hookpoint(name: str, label: str, module: object = None) -> Hookpoint:
    """The hookpoint of a TransformerLens hook name.

    `hook_mlp_in` and `ln2.hook_normalized` stand for mlp_in where `module`, the Hugging Face name
    in the same config, is the output of the norm. Raises SAEError, beginning with `label`, for
    other names.
    """
    match = _MLP_IN.fullmatch(name)
    if match and str(module).endswith(_NORM_OUTPUT):
        return Hookpoint(int(match[1]), "mlp_in")
    try:
        return Hookpoint.parse(name)
    except ModelError as error:
        raise SAEError(f"{label}: {error}") from error


def check_raw_output(hookpoint: Hookpoint, model: str | None, label: str) -> None:
    """Raise SAEError for SAEs of a module's output in models that normalise it once more.

    Tools that hook modules store what Gemma's attention and MLP return; the streams attn_out and
    mlp_out are taken after the norm that follows.
    """
    norms_again = re.search(r"gemma-?[23]", (model or "").lower())
    if norms_again and hookpoint.stream in ("attn_out", "mlp_out"):
        raise SAEError(
            f"{label} was trained on the output of the module of {hookpoint.name}, but {model} "
            "applies a norm to it; saexp collects the stream only after that norm"
        )


def drop_unit_scaling(parameters: dict[str, Tensor]) -> None:
    """Remove the unused `scaling_factor` of ones that old files have; other factors stay errors."""
    factor = parameters.get("scaling_factor")
    if factor is not None and torch.equal(factor, torch.ones_like(factor)):
        del parameters["scaling_factor"]


def check_type(name: str, tensor: Tensor, file: str) -> None:
    """Raise SAEError unless the tensor has floating-point numbers of at least 16 bits."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise SAEError(f"{file}: {name} is sparse or quantized, not a plain tensor")
    counts = name in _COUNTS and not tensor.is_floating_point() and not tensor.is_complex()
    if tensor.dtype not in DTYPES and not counts:
        accepted = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise SAEError(f"{file}: {name} is stored as {dtype}; saexp reads {accepted}")


def check_values(parameters: Mapping[str, Tensor], file: str) -> None:
    """Raise SAEError for NaN and infinities, and for an encoder or decoder that is all zeros."""
    for name, tensor in parameters.items():
        # One pass: the sum is not finite if a value is not; it may overflow without any, too.
        total = float(tensor.detach().sum(dtype=torch.promote_types(tensor.dtype, torch.float32)))
        if not math.isfinite(total):
            _check_finite(name, tensor, file)
        if total == 0 and name in ("W_enc", "W_dec") and not bool(tensor.any()):
            raise SAEError(f"{file}: all {tensor.numel():,} values of {name} are 0")


def _check_finite(name: str, tensor: Tensor, file: str) -> None:
    n_nan, n_inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    bad = [f"{n:,} {what}" for n, what in ((n_nan, "NaN"), (n_inf, "Inf")) if n]
    if bad:
        raise SAEError(
            f"{file}: {name} holds {' and '.join(bad)} of {counted(tensor.numel(), 'value')}"
        )
