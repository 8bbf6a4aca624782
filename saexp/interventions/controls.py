"""Latents that a condition is compared with: of like activation frequency, or any active ones.

The null hypothesis of a comparison is that the condition's latents are exchangeable with its
candidates: being selected for the direction makes no difference to what a latent does. Candidates
are therefore all latents that are active on the train split, significant ones and those selected
for the opposite direction among them, except the condition's own and the others selected (or
listed) for the same direction, which are under the same hypothesis as its own.
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from saexp.config.interventions import CONTROL_KINDS

__all__ = [
    "CONTROL_KINDS",
    "OWN_GROUP",
    "ControlSet",
    "any_active",
    "frequency_matched",
]

OWN_GROUP = "own_group"
"""Control kind of patches alone: the activations of other prompts of the prompt's own group."""


@dataclass(frozen=True)
class ControlSet:
    """As many latents as the condition has, one for each."""

    latents: tuple[int, ...]
    frequency_ratio: float
    """Control over own frequency, the geometric mean over members; NaN for an inactive own one."""
    matched: bool
    """Whether every member is within the caliper."""


class _Candidates:
    """Distances of candidates from each latent of a set, `[k, n]`, in log frequency."""

    def __init__(
        self, table: pd.DataFrame, latents: tuple[int, ...], avoid: Collection[int]
    ) -> None:
        usable = (table["frequency"] > 0) & ~table["latent"].isin([*latents, *avoid])
        self.latents: Int[np.ndarray, " n"] = table.loc[usable, "latent"].to_numpy(dtype=np.int64)
        frequency = table.loc[usable, "frequency"].to_numpy(dtype=float)
        own = table.set_index("latent").loc[list(latents), "frequency"].to_numpy(dtype=float)
        self.log_ratios: Float[np.ndarray, "k n"] = np.log(frequency) - np.log(
            own.clip(min=1e-12)
        ).reshape(-1, 1)
        self.own_active = bool((own > 0).all())

    def control_set(self, members: Sequence[int], caliper: float) -> ControlSet:
        """The set of these candidates, one for each latent in order."""
        logs = self.log_ratios[range(len(members)), list(members)]
        return ControlSet(
            latents=tuple(int(self.latents[i]) for i in members),
            frequency_ratio=float(np.exp(logs.mean())) if self.own_active else float("nan"),
            matched=bool((np.abs(logs) <= math.log(caliper) + 1e-9).all()),
        )


def frequency_matched(
    table: pd.DataFrame,
    latents: tuple[int, ...],
    n: int,
    *,
    n_least: int,
    caliper: float,
    seed: int,
    avoid: Collection[int] = (),
    uses: Counter[int] | None = None,
) -> list[ControlSet]:
    """At most `n` sets whose members' frequencies are within a factor `caliper` of the latents'.

    Inside the caliper, candidates that fewest conditions have used (`uses`, which is updated) come
    first, nearest ones for a single latent, in random order for several. Where the caliper has
    fewer than `n_least`, the nearest outside complete these, with `matched` false. `table` has
    latent and frequency. Decoder norms play no part: what is added is brought to equal norm.
    """
    found = _Candidates(table, latents, avoid)
    distance = np.abs(found.log_ratios)
    inside = distance <= math.log(caliper) + 1e-9
    used = np.array([(uses or {}).get(int(f), 0) for f in found.latents])
    ties = np.random.default_rng(seed).random(distance.shape)
    near = distance if len(latents) == 1 else np.where(inside, 0.0, distance)
    orders = [
        np.lexsort((tie, d, np.where(i, used, 0), ~i))
        for tie, d, i in zip(ties, near, inside, strict=True)
    ]
    sets = [found.control_set(m, caliper) for m in _one_of_each(orders, n)]
    matched = [s for s in sets if s.matched]
    others = [s for s in sets if not s.matched]
    if uses is not None:
        uses.update(f for s in matched for f in s.latents)
    return matched + others[: max(n_least - len(matched), 0)]


def any_active(
    table: pd.DataFrame,
    latents: tuple[int, ...],
    n: int,
    *,
    seed: int,
    avoid: Collection[int] = (),
) -> list[ControlSet]:
    """At most `n` sets of candidates of any frequency, a seeded choice."""
    found = _Candidates(table, latents, avoid)
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(found.latents)) for _ in latents]
    return [found.control_set(m, math.inf) for m in _one_of_each(orders, n)]


def _one_of_each(orders: Sequence[Int[np.ndarray, " n"]], n: int) -> list[tuple[int, ...]]:
    """At most `n` sets of different candidates, one from each order, the first ones first.

    No candidate is twice in the same position: else as many sets as share the member that
    dominates the mix would count as so many independent comparisons.
    """
    queues = [order.tolist() for order in orders]
    chosen: list[tuple[int, ...]] = []
    while len(chosen) < n:
        members: list[int] = []
        for queue in queues:
            usable = next((i for i in queue if i not in members), None)
            if usable is None:
                return chosen
            queue.remove(usable)
            members.append(usable)
        chosen.append(tuple(members))
    return chosen
