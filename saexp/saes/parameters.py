"""What each architecture needs in its files, and whether what is there fits together."""

from dataclasses import dataclass

from torch import Tensor

from saexp.errors import SAEError

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


def check(parameters: dict[str, Tensor], options: Options, label: str) -> None:
    """Raise SAEError, beginning with `label`, for what is missing, unused or does not fit."""
    _check_names(parameters, options, label)
    _check_shapes(parameters, options, label)
    _check_options(parameters, options, label)


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
