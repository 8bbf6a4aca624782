"""Latents that a condition is compared with: of like activation frequency, or any active ones.

The null hypothesis of a comparison is that the condition's latents are exchangeable with its
candidates: being selected for the direction makes no difference to what a latent does. Candidates
are therefore all latents that are active on the train split, significant ones and those selected
for the opposite direction among them, except the condition's own and the others selected (or
listed) for the same direction, which are under the same hypothesis as its own.
"""

import itertools
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
    "MIN_MATCHED",
    "OWN_GROUP",
    "ControlSet",
    "any_active",
    "frequency_matched",
]

OWN_GROUP = "own_group"
"""Control kind of patches alone: the activations of other prompts of the prompt's own group."""
MIN_MATCHED = 19
"""A kind is achieved where at least so many of its controls are matched: p can reach 0.05."""

_MOST_ENUMERATED = 20_000
"""Combinations that are listed; of more, some are drawn."""


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
    caliper: float,
    seed: int,
    avoid: Collection[int] = (),
    uses: Counter[int] | None = None,
) -> list[ControlSet]:
    """At most `n` different sets whose members' frequencies are within a factor `caliper`.

    For one latent, candidates inside the caliper come first: those that fewest conditions have
    used (`uses`, which is updated) before others, nearest first. For several, sets are a seeded
    choice of combinations inside the caliper, so that two sets can share members. Where there are
    fewer than `n`, the nearest outside complete them, with `matched` false. `table` has latent and
    frequency. Decoder norms play no part: what is added is brought to equal norm.
    """
    found = _Candidates(table, latents, avoid)
    rng = np.random.default_rng(seed)
    distance = np.abs(found.log_ratios)
    inside = distance <= math.log(caliper) + 1e-9
    ties = rng.random(len(found.latents))
    if len(latents) == 1:
        used = np.array([(uses or {}).get(int(f), 0) for f in found.latents])
        order = np.lexsort((ties, distance[0], np.where(inside[0], used, 0), ~inside[0]))
        members = [(int(i),) for i in order[:n]]
    else:
        nearest = [np.lexsort((ties, d)) for d in distance]
        members = _nearest_sets(nearest, inside.sum(axis=1).tolist(), n, rng)
    sets = [found.control_set(m, caliper) for m in members]
    if uses is not None and len(latents) == 1:
        uses.update(s.latents[0] for s in sets if s.matched)
    return sets


def any_active(
    table: pd.DataFrame,
    latents: tuple[int, ...],
    n: int,
    *,
    seed: int,
    avoid: Collection[int] = (),
) -> list[ControlSet]:
    """At most `n` different sets of candidates of any frequency, a seeded choice."""
    found = _Candidates(table, latents, avoid)
    everyone = [np.arange(len(found.latents))] * len(latents)
    members = _combinations(everyone, n, np.random.default_rng(seed), set())
    return [found.control_set(m, math.inf) for m in members]


def _nearest_sets(
    nearest: Sequence[Int[np.ndarray, " n"]], n_inside: list[int], n: int, rng: np.random.Generator
) -> list[tuple[int, ...]]:
    """Combinations of each member's candidates inside the caliper, then of ever wider ones."""
    seen: set[tuple[int, ...]] = set()
    n_candidates = len(nearest[0])
    width = 0
    chosen: list[tuple[int, ...]] = []
    while len(chosen) < n and width <= n_candidates:
        pools = [order[: max(k, width)] for order, k in zip(nearest, n_inside, strict=True)]
        chosen += _combinations(pools, n - len(chosen), rng, seen)
        width += 1
    return chosen


def _combinations(
    pools: Sequence[Int[np.ndarray, " n"]],
    n: int,
    rng: np.random.Generator,
    seen: set[tuple[int, ...]],
) -> list[tuple[int, ...]]:
    """At most `n` sets of one candidate from each pool, in random order; none twice (`seen`)."""
    chosen: list[tuple[int, ...]] = []

    def take(members: tuple[int, ...]) -> None:
        key = tuple(sorted(members))
        if len(set(members)) == len(members) and key not in seen:
            seen.add(key)
            chosen.append(members)

    if math.prod(map(len, pools)) <= _MOST_ENUMERATED:
        listed = list(itertools.product(*(p.tolist() for p in pools)))
        for i in rng.permutation(len(listed)):
            if len(chosen) == n:
                break
            take(listed[i])
        return chosen
    for _ in range(50 * n):
        if len(chosen) == n:
            break
        take(tuple(int(rng.choice(p)) for p in pools))
    return chosen
