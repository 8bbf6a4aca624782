"""Sparse autoencoders for inference: one class for the architectures, formats fill it.

Shapes: `d_in` the stream's width, `d_sae` the number of latents.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from saexp.errors import SAEError
from saexp.models.hookpoints import Hookpoint

ARCHITECTURES = ("standard", "jumprelu", "topk", "batchtopk", "gated")
NORMALIZATIONS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")
_EPS = 1e-5


@runtime_checkable
class SAE(Protocol):
    """What the rest of saexp needs of a sparse autoencoder."""

    d_in: int
    d_sae: int
    hookpoint: Hookpoint
    metadata: dict[str, Any]
    W_dec: Tensor
    """`[d_sae, d_in]`."""

    def encode(self, x: Tensor) -> Tensor:
        """`[..., d_in]` -> `[..., d_sae]`."""
        ...

    def decode(self, feature_acts: Tensor, x: Tensor | None = None) -> Tensor:
        """`[..., d_sae]` -> `[..., d_in]`, in the model's own scale."""
        ...

    def encode_latents(self, x: Tensor, latents: Sequence[int]) -> Tensor:
        """`[..., d_in]` -> `[..., n]`, these latents only."""
        ...


class SparseAutoencoder(nn.Module):
    """standard (ReLU), jumprelu, topk, batchtopk (with its inference threshold) or gated.

    Input scaling is inside `encode` and `decode`: none; `expected_average_only_in`, x times a fixed
    factor; `constant_norm_rescale`, x to norm sqrt(d_in); `layer_norm`, x to mean 0 and standard
    deviation 1. The last two depend on the row, so `decode` then needs the input `x` as well, and
    so does `centre`, which subtracts each vector's mean first.

    Parameters named as SAELens names them: `W_enc [d_in, d_sae]`, `W_dec [d_sae, d_in]`, `b_enc`,
    `b_dec`, `threshold`, `b_gate`, `b_mag`, `r_mag`. Raises SAEError for shapes that do not fit,
    parameters the architecture has no use for, an unknown architecture, or a scaling that lacks its
    factor.
    """

    W_enc: Tensor
    b_enc: Tensor
    b_gate: Tensor
    b_mag: Tensor
    r_mag: Tensor
    threshold: Tensor
    W_dec: Tensor
    b_dec: Tensor

    def __init__(
        self,
        parameters: dict[str, Tensor],
        *,
        architecture: str,
        hookpoint: Hookpoint,
        metadata: dict[str, Any] | None = None,
        k: int | None = None,
        apply_b_dec_to_input: bool = True,
        normalize_activations: str = "none",
        norm_factor: float | None = None,
        rescale_acts_by_decoder_norm: bool = False,
        centre: bool = False,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.hookpoint = hookpoint
        self.metadata: dict[str, Any] = metadata or {}
        self.k = k
        self.apply_b_dec_to_input = apply_b_dec_to_input
        self.normalize_activations = normalize_activations
        self.norm_factor = norm_factor
        self.centre = centre
        self.rescale_acts_by_decoder_norm = rescale_acts_by_decoder_norm
        self._check(parameters)
        for name, value in parameters.items():
            self.register_buffer(name, value)
        self.d_in, self.d_sae = self.W_enc.shape

    def _check(self, parameters: dict[str, Tensor]) -> None:
        label = self.metadata.get("name", "the SAE")
        needed = {
            "standard": ("b_enc",),
            "jumprelu": ("b_enc", "threshold"),
            "topk": ("b_enc",),
            "batchtopk": ("b_enc", "threshold"),
            "gated": ("b_gate", "b_mag", "r_mag"),
        }.get(self.architecture)
        if needed is None:
            raise SAEError(
                f"{label}: architecture '{self.architecture}' is not supported; "
                f"saexp reads {', '.join(ARCHITECTURES)}"
            )
        for name in ("W_enc", "W_dec", "b_dec", *needed):
            if name not in parameters:
                raise SAEError(f"{label}: a {self.architecture} SAE needs '{name}', absent here")
        unused = sorted(parameters.keys() - {"W_enc", "W_dec", "b_dec", *needed})
        if unused:
            raise SAEError(
                f"{label}: its files hold '{unused[0]}', which saexp cannot apply in a "
                f"{self.architecture} SAE"
            )
        if parameters["W_enc"].ndim != 2:
            found = list(parameters["W_enc"].shape)
            raise SAEError(f"{label}: W_enc has shape {found}, not [d_in, d_sae]")
        d_in, d_sae = parameters["W_enc"].shape
        shapes = {"W_dec": (d_sae, d_in), "b_dec": (d_in,), **dict.fromkeys(needed, (d_sae,))}
        for name, shape in shapes.items():
            if tuple(parameters[name].shape) != shape:
                found = list(parameters[name].shape)
                raise SAEError(f"{label}: {name} has shape {found}, not {list(shape)}")
        if self.architecture == "topk" and not self.k:
            raise SAEError(f"{label}: a topk SAE needs k, which its config lacks")
        if self.normalize_activations not in NORMALIZATIONS:
            raise SAEError(
                f"{label}: input scaling '{self.normalize_activations}' is not supported; "
                f"saexp knows {', '.join(NORMALIZATIONS)}"
            )
        if self.normalize_activations == "expected_average_only_in" and self.norm_factor is None:
            raise SAEError(f"{label}: its inputs are scaled by a factor that its files do not give")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_dec.device

    def _scaled(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """(scaled x, scale, shift) with x = scaled * scale + shift."""
        if self.normalize_activations == "none":
            return x, 1.0, 0.0
        if self.normalize_activations == "expected_average_only_in":
            assert self.norm_factor is not None
            return x * self.norm_factor, 1 / self.norm_factor, 0.0
        if self.normalize_activations == "constant_norm_rescale":
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
            f"the SAE reads vectors of {self.d_in} numbers and was given {x.shape[-1]}; "
            "is it an SAE of this model and hookpoint?"
        )

    def _vectors(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        """(vectors in the SAE's dtype, mean that was subtracted)."""
        flat = self._flat(x).to(self.W_enc.dtype)
        mean = flat.mean(dim=-1, keepdim=True) if self.centre else 0.0
        return flat - mean if self.centre else flat, mean

    def _input(self, x: Tensor) -> Tensor:
        scaled = self._scaled(self._vectors(x)[0])[0]
        return scaled - self.b_dec if self.apply_b_dec_to_input else scaled

    def _activate(self, x: Tensor, chosen: Tensor | slice) -> Tensor:
        """Latents `chosen` from a scaled input; not for topk, whose latents compete."""
        weights = self.W_enc[:, chosen]
        if self.architecture == "gated":
            gate = x @ weights + self.b_gate[chosen]
            magnitude = x @ (weights * self.r_mag[chosen].exp()) + self.b_mag[chosen]
            return (gate > 0).to(x.dtype) * magnitude.relu()
        pre = x @ weights + self.b_enc[chosen]
        if self.rescale_acts_by_decoder_norm:
            pre = pre * self.W_dec[chosen].norm(dim=-1)
        if self.architecture == "standard":
            return pre.relu()
        return pre.relu() * (pre > self.threshold[chosen])

    def encode(self, x: Float[Tensor, "..."]) -> Float[Tensor, "... d_sae"]:
        """Activations of the latents for `[..., d_in]` (or `[..., heads, d_head]`)."""
        inputs = self._input(x)
        if self.architecture != "topk":
            return self._activate(inputs, slice(None))
        pre = inputs @ self.W_enc + self.b_enc
        if self.rescale_acts_by_decoder_norm:
            pre = pre * self.W_dec.norm(dim=-1)
        assert self.k is not None
        top = pre.topk(min(self.k, self.d_sae), dim=-1)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())

    def encode_latents(
        self, x: Float[Tensor, "..."], latents: Sequence[int]
    ) -> Float[Tensor, "... n"]:
        """These latents' activations; touches their encoder columns only, but for topk."""
        chosen = torch.as_tensor(latents, device=self.device)
        if self.architecture == "topk":
            return self.encode(x)[..., chosen]
        return self._activate(self._input(x), chosen)

    def decode(
        self, feature_acts: Float[Tensor, "... d_sae"], x: Tensor | None = None
    ) -> Float[Tensor, "... d_in"]:
        """Reconstruction in the model's own scale.

        `x`, the encoded input, is needed where the scaling depends on it; else it is ignored.
        """
        acts = feature_acts
        if self.rescale_acts_by_decoder_norm:
            acts = acts / self.W_dec.norm(dim=-1)
        out = acts @ self.W_dec + self.b_dec
        fixed = self.normalize_activations in ("none", "expected_average_only_in")
        if fixed and not self.centre:
            return out * self._scaled(self.b_dec)[1]
        if x is None:
            raise SAEError(
                f"{self.metadata.get('name', 'the SAE')} scales or centres each input by itself; "
                "decode(feature_acts, x) needs the input too"
            )
        vectors, mean = self._vectors(x)
        _, scale, shift = self._scaled(vectors)
        return out * scale + shift + mean

    def directions(self, latents: Sequence[int]) -> Float[Tensor, "n d_in"]:
        """What one unit of each latent adds to the stream, in the model's own scale.

        Where the scaling depends on the row, `decode` adds this times the row's own scale.
        """
        chosen = torch.as_tensor(latents, device=self.device)
        rows = self.W_dec[chosen]
        if self.rescale_acts_by_decoder_norm:
            rows = rows / rows.norm(dim=-1, keepdim=True)
        if self.normalize_activations == "expected_average_only_in":
            assert self.norm_factor is not None
            rows = rows / self.norm_factor
        return rows
