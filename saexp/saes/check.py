"""Whether an SAE fits the stream it is about to read, and if not, what is most likely wrong.

Judged on neutral text: the SAE there reconstructs the stream it was trained on, whatever the run's
own texts are. What its catalogue and files say of it is compared in `expected`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saexp.models.hookpoints import Hookpoint
from saexp.saes.base import SparseAutoencoder
from saexp.saes.expected import Compared, Seen, compared, measured, ordinary, problems

POOR = 0.4
"""Explained variance below which an SAE is said not to fit."""
BETTER = 0.1
"""By how much another reading must be better to be named as the cause."""
N_ROWS = 1024


Pair = tuple[Tensor, Tensor]
"""(what a transcoder reads, what it predicts)."""


@dataclass(frozen=True)
class Fit:
    """What was measured, and what it says."""

    l0: float
    explained_variance: float
    others: dict[str, float] = field(default_factory=dict)
    """Explained variance under other readings: neighbouring layers, scaled, centred, no BOS."""
    problems: list[str] = field(default_factory=list)
    """One line each; empty where the SAE fits."""
    seen: Seen | None = None
    """What its catalogue and files are compared with: the same without special tokens."""
    compared: list[Compared] = field(default_factory=list)
    """Beside what they say."""


@torch.inference_mode()
def check_fit(
    sae: SparseAutoencoder,
    acts: Float[Tensor, "n d"],
    special: Bool[Tensor, " n"],
    neighbours: Mapping[Hookpoint, Float[Tensor, "_ d"] | Pair],
    target: Float[Tensor, "n d_out"] | None = None,
) -> Fit:
    """Compare the SAE's reading of `acts` with its reading of what may have been meant instead.

    `special`: which rows are special tokens. `neighbours`: ordinary rows one layer down and up; of
    a transcoder both streams there, and `target` is the stream that it predicts at its own.
    Explained variance as in REFERENCE.md, section 3.
    """
    step = max(1, len(acts) // N_ROWS)

    def some(rows: Tensor) -> Tensor:
        return rows[::step].to(sae.device, torch.float32)

    x, mark = some(acts), special[::step].to(sae.device)
    aim = x if target is None else some(target)
    features, own = _read(sae, x, aim)
    l0 = float((features != 0).sum(-1).float().mean())
    plain, plain_aim = ordinary(x, mark), ordinary(aim, mark)
    active = ordinary(features, mark)
    seen = measured(sae, plain, plain_aim, active, sae.decode(active, plain).float())
    found = compared(sae, seen)
    others = {}
    for hookpoint, near in neighbours.items():
        there = (near, near) if isinstance(near, Tensor) else near
        others[f"at {hookpoint.name}"] = _read(sae, *map(some, there))[1]
    if bool(mark.any()) and not bool(mark.all()):
        others["without special tokens"] = _read(sae, x[~mark], aim[~mark])[1]
    if sae.is_transcoder:
        told = [*_problems(sae, own, others), *problems(found)]
        return Fit(l0, own, others, told, seen, found)
    if sae.normalize_activations == "none":
        factor = sae.d_in**0.5 / float(x.norm(dim=-1).mean())
        others["scaled to norm sqrt(d_in)"] = _changed(
            sae, x, lambda v: v * factor, lambda v: v / factor
        )
    if not sae.centre:
        mean = x.mean(-1, keepdim=True)
        others["centred"] = _changed(sae, x, lambda v: v - mean, lambda v: v + mean)
    told = [*_problems(sae, own, others), *problems(found)]
    return Fit(l0, own, others, told, seen, found)


def _read(sae: SparseAutoencoder, x: Tensor, target: Tensor) -> tuple[Tensor, float]:
    features = sae.encode(x)
    return features, _explained(target, sae.decode(features, x).float())


def _changed(
    sae: SparseAutoencoder,
    x: Tensor,
    there: Callable[[Tensor], Tensor],
    back: Callable[[Tensor], Tensor],
) -> float:
    changed = there(x)
    return _explained(x, back(sae.decode(sae.encode(changed), changed).float()))


def _explained(x: Tensor, reconstruction: Tensor) -> float:
    x, reconstruction = x.double(), reconstruction.double()
    spread = (x - x.mean(0)).square().sum()
    return float(1 - (x - reconstruction).square().sum() / spread)


_REMEDIES = {
    "without special tokens": "special tokens such as BOS were let in and it was not trained on "
    "them; leave positions.include_special=false",
    "scaled to norm sqrt(d_in)": "its inputs were scaled in training and its files do not say so; "
    "type sae.norm_factor=estimate, or give the factor as a number (norm_scaling_factor in its "
    "config)",
    "centred": "it was trained on vectors minus their mean (TransformerLens' centred weights), "
    "which its files do not say",
}


def _problems(sae: SparseAutoencoder, own: float, others: Mapping[str, float]) -> list[str]:
    name = sae.metadata.get("name", "the SAE")
    if not sae.metadata.get("reconstructs", True):
        return [
            f"{name} is one layer of a cross-layer transcoder, whose latents write to later layers "
            "too: its numbers of reconstruction say nothing; activations and directions are right"
        ]
    # What it reconstructs, or a transcoder predicts.
    at = (sae.hookpoint_out or sae.hookpoint).name
    found = []
    cause = max(others, key=lambda k: others[k], default=None)
    if cause is not None and others[cause] >= max(POOR, own + BETTER):
        remedy = _REMEDIES.get(
            cause, "it looks trained on that layer; check its metadata against the model's blocks"
        )
        found.append(
            f"{name} explains {own:.2f} of the variance at {at} on neutral text, and "
            f"{others[cause]:.2f} {cause}: {remedy}"
        )
    elif own < POOR:
        found.append(
            f"{name} explains only {own:.2f} of the variance at {at} on neutral text, and no more "
            f"under any other reading tried: is it {_kind(sae)} of this very model and stream "
            "(base or chat, resid_post or mlp_out), trained on texts like these?"
        )
    return found


def _kind(sae: SparseAutoencoder) -> str:
    return "a transcoder" if sae.is_transcoder else "an SAE"
