"""What each architecture needs in its files, and whether what is there fits together."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from saexp.errors import SAEError
from saexp.wording import counted

NEEDED = {
    "standard": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "topk": ("b_enc",),
    "batchtopk": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
    "groupmax": ("b_enc",),
}
"""Architecture -> its parameters of shape `[d_sae]`."""
ARCHITECTURES = tuple(NEEDED)
COMPETING = ("topk", "groupmax")
"""Architectures in which one latent's activation depends on the others'."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What weights may be stored as."""
_COUNTS = ("k", "group_sizes")
"""Tensors of integers that some formats keep beside the weights."""
NORMALIZATIONS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the parameters are used; the fields are those of SparseAutoencoder."""

    architecture: str
    k: int | None
    transcoder: bool
    apply_b_dec_to_input: bool
    normalize_activations: str
    norm_factor: float | None
    centre: bool


def check(parameters: dict[str, Tensor], options: Options, label: str, file: str) -> None:
    """Raise SAEError for what is missing, unused, of another type, does not fit or has no use.

    The line begins with `label`, or, where it is about a tensor's type or values, with `file`.
    """
    _check_names(parameters, options, label)
    for name, tensor in parameters.items():
        check_type(name, tensor, file)
    _check_shapes(parameters, options, label)
    _check_options(parameters, options, label)
    check_values(parameters, file)


def check_type(name: str, tensor: Tensor, file: str) -> None:
    """Raise SAEError for a tensor that holds no floating-point numbers of at least 16 bits."""
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
        # One pass: NaN and infinities stay in a sum, which may overflow without them too.
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


def _check_names(parameters: dict[str, Tensor], options: Options, label: str) -> None:
    architecture = options.architecture
    if architecture not in NEEDED:
        raise SAEError(
            f"{label}: architecture '{architecture}' is not supported; "
            f"saexp reads {', '.join(ARCHITECTURES)}"
        )
    kind = f"{architecture} {'transcoder' if options.transcoder else 'SAE'}"
    needed = {"W_enc", "W_dec", "b_dec", *NEEDED[architecture]}
    for name in ("W_enc", "W_dec", "b_dec", *NEEDED[architecture]):
        if name not in parameters:
            raise SAEError(f"{label}: a {kind} needs '{name}', absent here")
    known = needed | ({"W_skip"} if options.transcoder else set())
    unused = sorted(parameters.keys() - known)
    if unused:
        raise SAEError(
            f"{label}: its files hold '{unused[0]}', which saexp cannot apply in a {kind}"
        )


def _check_shapes(parameters: dict[str, Tensor], options: Options, label: str) -> None:
    for name, axes in (("W_enc", "[d_in, d_sae]"), ("W_dec", "[d_sae, d_out]")):
        if parameters[name].ndim != 2:
            found = list(parameters[name].shape)
            raise SAEError(f"{label}: {name} has shape {found}, not {axes}")
    for name in ("W_enc", "W_dec"):
        if not parameters[name].numel():
            raise SAEError(f"{label}: {name} has shape {list(parameters[name].shape)}: no values")
    d_in, d_sae = parameters["W_enc"].shape
    d_out = parameters["W_dec"].shape[1] if options.transcoder else d_in
    shapes: dict[str, tuple[int, ...]] = {"W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    shapes |= dict.fromkeys(NEEDED[options.architecture], (d_sae,))
    if "W_skip" in parameters:
        shapes["W_skip"] = (d_out, d_in)
    for name, shape in shapes.items():
        if tuple(parameters[name].shape) != shape:
            found = list(parameters[name].shape)
            raise SAEError(f"{label}: {name} has shape {found}, not {list(shape)}")


def _check_options(parameters: dict[str, Tensor], options: Options, label: str) -> None:
    d_sae = parameters["W_enc"].shape[1]
    if options.architecture in COMPETING and not options.k:
        raise SAEError(f"{label}: a {options.architecture} SAE needs k, which its config lacks")
    if options.k is not None and not 0 <= options.k <= d_sae:
        raise SAEError(f"{label}: k={options.k} is not between 1 and its {d_sae} latents")
    factor = options.norm_factor
    if factor is not None and not 0 < factor < math.inf:
        raise SAEError(f"{label}: its inputs' scaling factor is {factor:g}, not a positive number")
    if options.architecture == "groupmax" and d_sae % (options.k or 1):
        raise SAEError(f"{label}: {d_sae} latents do not make k={options.k} groups of equal size")
    scaling = options.normalize_activations
    if scaling not in NORMALIZATIONS:
        raise SAEError(
            f"{label}: input scaling '{scaling}' is not supported; "
            f"saexp knows {', '.join(NORMALIZATIONS)}"
        )
    if not options.transcoder:
        return
    if options.apply_b_dec_to_input:
        raise SAEError(
            f"{label}: a transcoder's b_dec belongs to its output; its config subtracts it from "
            "the input"
        )
    if scaling != "none" or options.centre:
        what = "centred streams" if options.centre else f"input scaling '{scaling}'"
        raise SAEError(f"{label}: {what} is not supported for transcoders")
