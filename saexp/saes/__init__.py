"""Sparse autoencoders and transcoders for inference, and the validation of their parameters."""

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from saexp.errors import SAEError
from saexp.models import Hookpoint
from saexp.results import html_table
from saexp.saes.formats import check_type, check_values

NEEDED = {
    "standard": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "topk": ("b_enc",),
    "batchtopk": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
    "groupmax": ("b_enc",),
    "abstopk": ("b_enc",),
    "matching_pursuit": (),
}
"""Architecture -> its parameters of shape `[d_sae]`."""
ARCHITECTURES = tuple(NEEDED)
_NEED_K = ("topk", "abstopk", "groupmax")
COMPETING = (*_NEED_K, "matching_pursuit")
"""Architectures in which one latent's activation depends on the others'."""
NORMALIZATIONS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")


class Pursuit(NamedTuple):
    """When matching pursuit stops: where the norm of what is left of the input is below a threshold
    (0: never), after so many selections (None: d_in), where an active latent is selected again."""

    residual_threshold: float = 1e-2
    max_iterations: int | None = None
    stop_on_duplicate_support: bool = True


@dataclass(frozen=True, kw_only=True)
class SAESettings:
    """The computation and hookpoint of an SAE."""

    architecture: str
    """One of `ARCHITECTURES`."""
    hookpoint: Hookpoint
    """The stream that is encoded."""
    hookpoint_out: Hookpoint | None = None
    """The stream that a transcoder predicts; None for an SAE, which reconstructs `hookpoint`."""
    k: int | None = None
    """Number of active latents of (abs)topk, number of groups of groupmax."""
    apply_b_dec_to_input: bool | None = None
    """Whether b_dec is subtracted from the input; None: yes for an SAE, no for a transcoder."""
    normalize_activations: str = "none"
    """How inputs are scaled, one of `NORMALIZATIONS`."""
    norm_factor: float | None = None
    """The factor of `expected_average_only_in`; None where it is not known yet."""
    rescale_acts_by_decoder_norm: bool = False
    """Whether activations are multiplied by the norm of their decoder rows."""
    centre: bool = False
    """Whether each input vector's mean is subtracted first."""
    pursuit: Pursuit = Pursuit()
    """Of matching_pursuit."""

    @property
    def is_transcoder(self) -> bool:
        """Whether the predicted stream differs from the stream that is read."""
        return self.hookpoint_out is not None


def check(parameters: Mapping[str, Tensor], settings: SAESettings, label: str, file: str) -> None:
    """Raise SAEError for missing, unused or invalid parameters, and for invalid settings.

    The message begins with `label`, or with `file` where it is about a tensor's type or values.
    """
    _check_names(parameters, settings, label)
    for name, tensor in parameters.items():
        check_type(name, tensor, file)
    _check_shapes(parameters, settings, label)
    _check_options(parameters, settings, label)
    check_values(parameters, file)


def _check_names(parameters: Mapping[str, Tensor], settings: SAESettings, label: str) -> None:
    architecture = settings.architecture
    if architecture not in NEEDED:
        raise SAEError(
            f"{label}: architecture '{architecture}' is not supported; "
            f"saexp reads {', '.join(ARCHITECTURES)}"
        )
    kind = f"{architecture} {'transcoder' if settings.is_transcoder else 'SAE'}"
    needed = ("W_enc", "W_dec", "b_dec", *NEEDED[architecture])
    for name in needed:
        if name not in parameters:
            raise SAEError(f"{label}: a {kind} needs '{name}', which is missing")
    known = {*needed, "W_skip"} if settings.is_transcoder else {*needed}
    if unused := sorted(parameters.keys() - known):
        raise SAEError(
            f"{label}: its files hold '{unused[0]}', which saexp cannot apply in a {kind}"
        )


def _check_shapes(parameters: Mapping[str, Tensor], settings: SAESettings, label: str) -> None:
    for name, axes in (("W_enc", "[d_in, d_sae]"), ("W_dec", "[d_sae, d_out]")):
        shape = list(parameters[name].shape)
        if len(shape) != 2:
            raise SAEError(f"{label}: {name} has shape {shape}, not {axes}")
        if 0 in shape:
            raise SAEError(f"{label}: {name} has shape {shape}: no values")
    d_in, d_sae = parameters["W_enc"].shape
    d_out = parameters["W_dec"].shape[1] if settings.is_transcoder else d_in
    shapes: dict[str, tuple[int, ...]] = {"W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    shapes |= dict.fromkeys(NEEDED[settings.architecture], (d_sae,))
    if "W_skip" in parameters:
        shapes["W_skip"] = (d_out, d_in)
    for name, axes in shapes.items():
        if (shape := parameters[name].shape) != axes:
            raise SAEError(f"{label}: {name} has shape {list(shape)}, not {list(axes)}")


def _check_options(parameters: Mapping[str, Tensor], settings: SAESettings, label: str) -> None:
    d_sae = parameters["W_enc"].shape[1]
    if settings.architecture in _NEED_K and not settings.k:
        raise SAEError(f"{label}: a {settings.architecture} SAE needs k, which its config lacks")
    if settings.k is not None and not 0 <= settings.k <= d_sae:
        raise SAEError(f"{label}: k={settings.k} is not between 1 and its {d_sae} latents")
    factor = settings.norm_factor
    if factor is not None and not 0 < factor < math.inf:
        raise SAEError(f"{label}: its inputs' scaling factor is {factor:g}, not a positive number")
    if settings.architecture == "groupmax" and d_sae % (settings.k or 1):
        raise SAEError(f"{label}: {d_sae} latents do not make k={settings.k} groups of equal size")
    scaling = settings.normalize_activations
    if scaling not in NORMALIZATIONS:
        raise SAEError(
            f"{label}: input scaling '{scaling}' is not supported; "
            f"saexp knows {', '.join(NORMALIZATIONS)}"
        )
    if not settings.is_transcoder:
        return
    if settings.apply_b_dec_to_input:
        raise SAEError(
            f"{label}: a transcoder's b_dec belongs to its output; its config subtracts it from "
            "the input"
        )
    if scaling != "none" or settings.centre:
        what = "centred streams" if settings.centre else f"input scaling '{scaling}'"
        raise SAEError(f"{label}: {what} is not supported for transcoders")


_EPS = 1e-5


def matching_pursuit(
    x: Float[Tensor, "... d"], rows: Float[Tensor, "d_sae d"], stop: Pursuit
) -> Float[Tensor, "... d_sae"]:
    """Select, again and again, the row with the largest product with what is left of x: the product
    is added to its activation, and taken times the row off x (Costa et al. 2025)."""
    rest = x.reshape(-1, x.shape[-1])
    acts = rest.new_zeros(len(rest), len(rows))
    active = torch.arange(len(rest), device=x.device)  # Rows of `acts` that `rest` has.
    for _ in range(rows.shape[1] if stop.max_iterations is None else stop.max_iterations):
        best = (rest.detach() @ rows.detach().T).argmax(dim=1)
        products = (rest * rows[best]).sum(dim=-1).relu()
        is_new = (acts[active, best] == 0) & (products > 0)
        acts.index_put_((active, best), products, accumulate=True)
        rest = rest - products[:, None] * rows[best]
        goes_on = rest.norm(dim=-1) >= stop.residual_threshold
        if stop.stop_on_duplicate_support:
            goes_on &= is_new
        active, rest = active[goes_on], rest[goes_on]
        if not len(active):
            break
    return acts.view(*x.shape[:-1], len(rows))


@runtime_checkable
class SAE(Protocol):
    """The interface of sparse autoencoders that saexp relies on."""

    d_in: int
    d_sae: int
    W_dec: Tensor
    """`[d_sae, d_in]`, a transcoder's `[d_sae, d_out]`."""

    @property
    def hookpoint(self) -> Hookpoint:
        """The stream that it reads."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Name, path, fingerprint and further values of its files."""
        ...

    def encode(self, x: Tensor) -> Tensor:
        """`[..., d_in]` -> `[..., d_sae]`."""
        ...

    def decode(self, feature_acts: Tensor, x: Tensor | None = None) -> Tensor:
        """`[..., d_sae]` -> `[..., d_in]` (a transcoder's d_out), in the model's own scale."""
        ...

    def encode_latents(self, x: Tensor, latents: Sequence[int]) -> Tensor:
        """`[..., d_in]` -> `[..., n]`, the given latents only."""
        ...


class SparseAutoencoder(nn.Module):
    """A sparse autoencoder or transcoder.

    Architectures: standard (ReLU), jumprelu, topk, abstopk (the `k` largest magnitudes), gated,
    batchtopk (with its threshold), groupmax (largest latent of `k` groups of consecutive latents),
    matching_pursuit (over the columns of W_enc, which is W_dec transposed).

    With `hookpoint_out` it is a transcoder: it reads `hookpoint`, and `decode` predicts
    `hookpoint_out`, adding `W_skip [d_out, d_in]` times the input where there is one. The inputs of
    transcoders are not scaled.

    `encode` and `decode` include the input scaling: none; `expected_average_only_in`, x times a
    fixed factor; `constant_norm_rescale`, x to norm sqrt(d_in); `layer_norm`, x to mean 0 and
    standard deviation 1. The last two depend on the row, so `decode` then needs the input `x` as
    well, and so does `centre`, which first subtracts each vector's mean.

    Parameters have the names of SAELens: `W_enc [d_in, d_sae]`, `W_dec [d_sae, d_out]`, `b_enc`,
    `b_dec [d_out]`, `threshold`, `b_gate`, `b_mag`, `r_mag`, `W_skip`. Their dtype is that of all
    computations. Raises SAEError for invalid shapes and types, NaN and infinities, a matrix of
    zeros, parameters that the architecture does not use, an unknown architecture, and the use of a
    scaling that lacks its factor.
    """

    W_enc: Tensor
    b_enc: Tensor
    b_gate: Tensor
    b_mag: Tensor
    r_mag: Tensor
    threshold: Tensor
    W_dec: Tensor
    b_dec: Tensor
    W_skip: Tensor | None

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        settings: SAESettings,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if settings.apply_b_dec_to_input is None:
            settings = replace(settings, apply_b_dec_to_input=not settings.is_transcoder)
        self.settings = settings
        self.metadata: Mapping[str, Any] = dict(metadata or {})
        check(parameters, settings, self.name, str(self.metadata.get("path", self.name)))
        self.register_buffer("W_skip", None)
        for name, value in parameters.items():
            self.register_buffer(name, value)
        self.d_in, self.d_sae = self.W_enc.shape
        self.d_out = self.W_dec.shape[1]

    @property
    def architecture(self) -> str:
        """One of `ARCHITECTURES`."""
        return self.settings.architecture

    @property
    def hookpoint(self) -> Hookpoint:
        """The stream that is encoded."""
        return self.settings.hookpoint

    @property
    def hookpoint_out(self) -> Hookpoint | None:
        """The stream that a transcoder predicts; None for an SAE."""
        return self.settings.hookpoint_out

    def with_metadata(self, **metadata: Any) -> "SparseAutoencoder":
        """The same SAE, sharing its weights, with these entries of `metadata` set."""
        return self._with(self.settings, metadata)

    def with_factor(self, factor: float | None) -> "SparseAutoencoder":
        """The same SAE, sharing its weights, with inputs multiplied by `factor`.

        None is a factor that is not known yet. Raises SAEError unless it is positive.
        """
        settings = replace(
            self.settings, normalize_activations="expected_average_only_in", norm_factor=factor
        )
        _check_options(dict(self.named_buffers()), settings, self.name)
        return self._with(settings, {} if factor is None else {"norm_factor": factor})

    def _with(self, settings: SAESettings, metadata: Mapping[str, Any]) -> "SparseAutoencoder":
        new = copy(self)
        # A shallow copy of a module shares the dictionary that holds its tensors.
        new._buffers = dict(self._buffers)
        new.settings, new.metadata = settings, {**self.metadata, **metadata}
        return new

    @property
    def name(self) -> str:
        """The name in messages."""
        return str(self.metadata.get("name", "the SAE"))

    def extra_repr(self) -> str:
        """The description in `repr`."""
        at = " to ".join(h.name for h in self.hookpoints)
        return (
            f"{self.metadata.get('name', 'unnamed')}: {self.architecture}, {at}, d_in={self.d_in}, "
            f"d_sae={self.d_sae}, {str(self.W_enc.dtype).removeprefix('torch.')}, "
            f"normalize_activations={self.settings.normalize_activations}"
        )

    def _repr_html_(self) -> str:
        rows = {
            "architecture": self.architecture,
            "reads": self.hookpoint.name,
            **({"predicts": self.hookpoint_out.name} if self.hookpoint_out else {}),
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "dtype": str(self.W_enc.dtype).removeprefix("torch."),
            "input scaling": self.settings.normalize_activations,
        }
        return html_table(str(self.metadata.get("name", "sparse autoencoder")), rows)

    @property
    def hookpoints(self) -> list[Hookpoint]:
        """The streams to collect: the one that is read, and the one that a transcoder predicts."""
        return [h for h in (self.hookpoint, self.hookpoint_out) if h is not None]

    @property
    def is_transcoder(self) -> bool:
        """Whether the predicted stream differs from the stream that is read."""
        return self.hookpoint_out is not None

    def check_reconstructs(self) -> None:
        """Raise SAEError for one layer of a cross-layer transcoder.

        Its latents write to other layers too, so `decode` does not reconstruct `hookpoint_out`.
        """
        if self.metadata.get("reconstructs", True):
            return
        raise SAEError(
            f"{self.name} is one layer of a cross-layer transcoder: its "
            "latents and directions can be analysed and steered, but it reconstructs no stream"
        )

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.W_dec.device

    @property
    def lacks_factor(self) -> bool:
        """Whether its inputs are scaled by a factor that is not known (yet)."""
        scaled = self.settings.normalize_activations == "expected_average_only_in"
        return scaled and self.settings.norm_factor is None

    def _factor(self) -> float:
        if self.settings.norm_factor is None:
            raise SAEError(
                f"{self.name}: its inputs are scaled by a factor that "
                "its files do not give; type sae.norm_factor=<number> (with task=analyze, also "
                "sae.norm_factor=estimate)"
            )
        return self.settings.norm_factor

    def _scaled(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """(scaled x, scale, shift) with x = scaled * scale + shift."""
        scaling = self.settings.normalize_activations
        if scaling == "none":
            return x, 1.0, 0.0
        if scaling == "expected_average_only_in":
            return x * (factor := self._factor()), 1 / factor, 0.0
        if scaling == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True) / self.d_in**0.5
            return x / scale, scale, 0.0
        shift = x.mean(dim=-1, keepdim=True)
        scale = x.std(dim=-1, keepdim=True)
        return (x - shift) / (scale + _EPS), scale, shift

    def _flat(self, x: Tensor) -> Tensor:
        """`[..., heads, d_head]` becomes `[..., d_in]` for SAEs on attention heads' outputs."""
        if x.shape[-1] == self.d_in:
            return x
        by_head = self.hookpoint.stream == "attn_z" and x.ndim >= 2
        if by_head and x.shape[-1] * x.shape[-2] == self.d_in:
            return rearrange(x, "... heads d_head -> ... (heads d_head)")
        raise SAEError(
            f"the SAE reads vectors of {self.d_in} numbers, not of {x.shape[-1]}; "
            "is it an SAE of this model and hookpoint?"
        )

    def _vectors(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        """(vectors in the SAE's dtype, the mean subtracted from them or 0)."""
        flat = self._flat(x).to(self.W_enc.dtype)
        mean = flat.mean(dim=-1, keepdim=True) if self.settings.centre else 0.0
        return flat - mean if self.settings.centre else flat, mean

    def _input(self, x: Tensor) -> Tensor:
        scaled = self._scaled(self._vectors(x)[0])[0]
        return scaled - self.b_dec if self.settings.apply_b_dec_to_input else scaled

    def _activate(self, x: Tensor, chosen: Tensor | slice) -> Tensor:
        """The `chosen` latents of a scaled input; not for architectures in `COMPETING`."""
        if self.architecture == "gated":
            # (x W) exp(r) instead of x (W exp(r)) needs one product and no second encoder.
            pre = x @ self.W_enc[:, chosen]
            inactive = pre <= -self.b_gate[chosen]
            magnitude = torch.addcmul(self.b_mag[chosen], pre, self.r_mag[chosen].exp())
            return magnitude.masked_fill_(inactive, 0).relu_()
        pre = self._pre(x, chosen)
        if self.architecture == "standard":
            return pre.relu_()
        # In place of relu(pre) where pre is above the threshold, 0 elsewhere.
        return pre.masked_fill_(pre <= self.threshold[chosen].clamp(min=0), 0)

    def _pre(self, x: Tensor, chosen: Tensor | slice) -> Tensor:
        """Latents before their activation function, in a new tensor."""
        pre = functional.linear(x, self.W_enc[:, chosen].T, self.b_enc[chosen])
        if self.settings.rescale_acts_by_decoder_norm:
            pre.mul_(self.W_dec[chosen].norm(dim=-1))
        return pre

    def row_scale(self, x: Float[Tensor, "... d_in"]) -> Tensor | float:
        """Factor of `directions` at these inputs, `[..., 1]`; 1 for most SAEs."""
        if self.settings.normalize_activations in ("none", "expected_average_only_in"):
            return 1.0
        return self._scaled(self._vectors(x)[0])[1]

    def encode(self, x: Float[Tensor, "..."]) -> Float[Tensor, "... d_sae"]:
        """Activations of the latents for `[..., d_in]` (or `[..., heads, d_head]`)."""
        inputs = self._input(x)
        if self.architecture not in COMPETING:
            return self._activate(inputs, slice(None))
        if self.architecture == "matching_pursuit":
            return matching_pursuit(inputs, self.W_enc.T, self.settings.pursuit)
        pre = self._pre(inputs, slice(None))
        assert self.settings.k is not None
        if self.architecture == "topk":
            top = pre.topk(self.settings.k, dim=-1, sorted=False)
            return pre.zero_().scatter_(-1, top.indices, top.values.relu())
        if self.architecture == "abstopk":
            chosen = pre.abs().topk(self.settings.k, dim=-1, sorted=False).indices
            return torch.zeros_like(pre).scatter(-1, chosen, pre.gather(-1, chosen))
        groups = rearrange(pre, "... (k members) -> ... k members", k=self.settings.k)
        best = groups.max(dim=-1, keepdim=True)
        acts = groups.zero_().scatter_(-1, best.indices, best.values.relu())
        return rearrange(acts, "... k members -> ... (k members)")

    def encode_latents(
        self, x: Float[Tensor, "..."], latents: Sequence[int]
    ) -> Float[Tensor, "... n"]:
        """The given latents' activations, from their encoder columns only unless they compete."""
        chosen = torch.as_tensor(latents, device=self.device)
        if self.architecture in COMPETING:
            return self.encode(x)[..., chosen]
        return self._activate(self._input(x), chosen)

    def decode(
        self, feature_acts: Float[Tensor, "... d_sae"], x: Tensor | None = None
    ) -> Float[Tensor, "... d_out"]:
        """Reconstruction in the model's own scale; a transcoder's prediction of `hookpoint_out`.

        `x`, the encoded input, is needed where the scaling depends on it or a skip connection reads
        it; otherwise it is ignored.
        """
        acts = feature_acts.to(self.W_dec.dtype)
        if self.settings.rescale_acts_by_decoder_norm:
            acts = acts / self.W_dec.norm(dim=-1)
        out = acts @ self.W_dec + self.b_dec
        fixed = self.settings.normalize_activations in ("none", "expected_average_only_in")
        if fixed and not self.settings.centre and self.W_skip is None:
            return out * self._scaled(self.b_dec)[1]
        if x is None:
            reason = "scales or centres each input by itself"
            if self.W_skip is not None:
                reason = "has a skip connection"
            raise SAEError(f"{self.name} {reason}; decode(feature_acts, x) needs the input too")
        vectors, mean = self._vectors(x)
        if self.W_skip is not None:
            return out + vectors @ self.W_skip.T
        _, scale, shift = self._scaled(vectors)
        return out * scale + shift + mean

    def directions(self, latents: Sequence[int]) -> Float[Tensor, "n d_out"]:
        """The vector that one unit of each latent adds to the stream, in the model's own scale.

        Where the scaling depends on the row, `decode` adds this vector times `row_scale`.
        """
        chosen = torch.as_tensor(latents, device=self.device)
        rows = self.W_dec[chosen]
        if self.settings.rescale_acts_by_decoder_norm:
            rows = rows / rows.norm(dim=-1, keepdim=True)
        if self.settings.normalize_activations == "expected_average_only_in":
            rows = rows / self._factor()
        return rows
