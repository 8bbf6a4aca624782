"""A reconstruction in place of the activation: edits for `models.hooks.edit`.

Shapes: b batch, t tokens, d the stream's width, n true positions of a mask.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saexp.models.hookpoints import Hookpoint
from saexp.models.hooks import EditFunction
from saexp.saes.base import SparseAutoencoder

ChangeLatents = Callable[[Tensor], Tensor]
"""`[n, d_sae]` -> `[n, d_sae]`."""


def replaced(values: Float[Tensor, "... d"], mask: Bool[Tensor, "b t"]) -> EditFunction:
    """Puts `values` where `mask` is true: `[n, d]`, row by row in order, or `[d]` at all of them.

    Positions outside the mask keep every bit.
    """

    def write(stream: Tensor) -> Tensor:
        new = stream.clone()
        new[mask.to(stream.device)] = values.to(stream.device, stream.dtype)
        return new

    return write


def spliced(
    sae: SparseAutoencoder,
    mask: Bool[Tensor, "b t"] | None = None,
    *,
    error: bool = False,
    change: ChangeLatents | None = None,
    limits: Mapping[Hookpoint, float] | None = None,
    excluded: Callable[[int], None] | None = None,
) -> dict[Hookpoint, EditFunction]:
    """Edits that put the SAE's reconstruction where `mask` is true (everywhere without one).

    A transcoder reads its own hookpoint and writes `hookpoint_out`. `change` is applied to the
    latents before decoding; with `error` what the reconstruction misses is added back, so that
    nothing changes where the latents don't. Positions outside the mask keep every bit, and so do
    those with a norm above its limit at a stream that the SAE reads or predicts; `excluded` is
    called with their number.
    """
    seen: list[Tensor] = []

    def read(stream: Tensor) -> Tensor:
        seen[:] = [stream]
        return stream

    def write(stream: Tensor) -> Tensor:
        source = seen.pop() if sae.is_transcoder else stream
        where = torch.ones(stream.shape[:2], dtype=torch.bool) if mask is None else mask
        where = where.to(stream.device)
        if limits:
            kept = where & _within(source, limits[sae.hookpoint]).to(where.device)
            if sae.hookpoint_out is not None:
                kept &= _within(stream, limits[sae.hookpoint_out])
            if excluded is not None:
                excluded(int((where & ~kept).sum()))
            where = kept
        x = source[where.to(source.device)].to(sae.device)
        acts = sae.encode(x)
        out = sae.decode(acts if change is None else change(acts), x).to(stream.device)
        if error:
            out = stream[where] + (out - sae.decode(acts, x).to(stream.device))
        return replaced(out, where)(stream)

    if sae.hookpoint_out is None:
        return {sae.hookpoint: write}
    return {sae.hookpoint: read, sae.hookpoint_out: write}


def _within(stream: Float[Tensor, "b t d"], limit: float) -> Bool[Tensor, "b t"]:
    return stream.double().norm(dim=-1) <= limit
