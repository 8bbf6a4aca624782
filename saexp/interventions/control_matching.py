"""Matched controls: latents of equal frequency, and edits of equal KL on neutral text."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class ControlSet:
    """Control latents, one for each latent of the condition."""

    latents: tuple[int, ...]
    frequency_ratio: float
    """Geometric mean of the members' frequencies over those of the latents; NaN where a latent is
    never active."""
    matched: bool
    """Whether every member is within the caliper."""


class _Candidates:
    """Log ratios of frequencies, `[k, n]`, of candidates to each latent of a set."""

    def __init__(
        self, table: pd.DataFrame, latents: tuple[int, ...], avoid: Collection[int]
    ) -> None:
        usable = (table["frequency"] > 0) & ~table["latent"].isin([*latents, *avoid])
        self.latents: Int[np.ndarray, " n"] = table.loc[usable, "latent"].to_numpy(dtype=np.int64)
        frequency = table.loc[usable, "frequency"].to_numpy(dtype=float)
        target_frequency = (
            table.set_index("latent").loc[list(latents), "frequency"].to_numpy(dtype=float)
        )
        self.log_ratios: Float[np.ndarray, "k n"] = np.log(frequency) - np.log(
            target_frequency.clip(min=1e-12)
        ).reshape(-1, 1)
        self.own_active = bool((target_frequency > 0).all())

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

    Within the caliper, candidates that the fewest conditions use (`uses`, which is updated) come
    first; among these the nearest for a single latent, a random order for several. If there are
    fewer than `n_least` sets, the nearest ones outside the caliper are added with `matched` false.
    `table` has the columns latent and frequency. Decoder norms are not matched, because added
    vectors are rescaled to equal norm.
    """
    candidates = _Candidates(table, latents, avoid)
    distance = np.abs(candidates.log_ratios)
    inside = distance <= math.log(caliper) + 1e-9
    used = np.array([(uses or {}).get(int(f), 0) for f in candidates.latents])
    ties = np.random.default_rng(seed).random(distance.shape)
    near = distance if len(latents) == 1 else np.where(inside, 0.0, distance)
    orders = [
        np.lexsort((tie, d, np.where(i, used, 0), ~i))
        for tie, d, i in zip(ties, near, inside, strict=True)
    ]
    sets = [candidates.control_set(m, caliper) for m in _one_of_each(orders, n)]
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
    """A seeded choice of at most `n` sets of candidates of any frequency."""
    candidates = _Candidates(table, latents, avoid)
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(candidates.latents)) for _ in latents]
    return [candidates.control_set(m, math.inf) for m in _one_of_each(orders, n)]


def _one_of_each(orders: Sequence[Int[np.ndarray, " n"]], n: int) -> list[tuple[int, ...]]:
    """At most `n` sets of different candidates, one from each order, the first candidates first.

    No candidate occurs twice in the same position; otherwise sets that share the member with the
    largest weight would count as independent comparisons.
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


_MOST_ROUNDS = 8
"""Maximum number of measurements of an edit; it ends once the edit is within the caliper."""
_LARGEST_STEP = math.log(6)
"""Largest step of one round, of the log scale."""
_LARGEST_SCALE = math.log(1000)
_FLAT = 0.25
"""Lower bound of the slope of log KL against log scale; for small edits the slope is 2."""
_N_FIRST = 6
"""Edits of a kind whose scales are determined first, as starting points for the others."""
Measure = Callable[[Sequence[int], Sequence[float]], Float[np.ndarray, " m"]]
"""(indices of edits, scales) -> KL of each."""


@dataclass(frozen=True)
class Scales:
    """Per edit the scale whose KL is nearest to its target."""

    scales: Float[np.ndarray, " n"]
    kl: Float[np.ndarray, " n"]
    matched: Bool[np.ndarray, " n"]
    """Whether KL and target differ by at most the caliper's factor."""


def equal_kl_scales(
    measure: Measure,
    target: Float[np.ndarray, " n"],
    caliper: float,
    alike: Sequence[Hashable] = (),
) -> Scales:
    """Scales at which the KL of each of n edits is its target, within a factor `caliper`.

    `measure(which, scales)` gives the KL of some edits, by index. All unmatched edits are measured
    together: first at scale 1, then where the secant of log KL against log scale (initial slope 2,
    as for small edits) meets the target, within the current bracket. Among edits with equal
    `alike`, a few are solved first, and the others start from their median scale and slope. An edit
    whose target is 0, or that cannot reach it, stays unmatched.
    """
    search = _Search(measure, target, caliper)
    families: dict[Hashable, list[int]] = {}
    for i in np.flatnonzero(np.isfinite(search.goal)).tolist():
        families.setdefault(alike[i] if alike else i, []).append(i)
    search.run([i for some in families.values() for i in some[:_N_FIRST]])
    for some in families.values():
        search.start_from(some[:_N_FIRST], some[_N_FIRST:])
    search.run([i for some in families.values() for i in some[_N_FIRST:]])
    return Scales(np.exp(search.best_at), search.best_kl, search.best_gap <= math.log(caliper))


class _Search:
    """The search of every edit; positions and goals are logarithms."""

    def __init__(self, measure: Measure, target: Float[np.ndarray, " n"], caliper: float) -> None:
        n = len(target)
        self.measure, self.within = measure, math.log(caliper)
        with np.errstate(divide="ignore"):
            self.goal = np.log(target)
        self.at, self.slope = np.zeros(n), np.full(n, 2.0)
        self.low, self.high = np.full(n, -_LARGEST_SCALE), np.full(n, _LARGEST_SCALE)
        self.last_at, self.last_log = np.full(n, np.nan), np.full(n, np.nan)
        self.best_at, self.best_kl = np.zeros(n), np.full(n, np.nan)
        self.best_gap = np.full(n, np.inf)

    def start_from(self, first: Sequence[int], others: Sequence[int]) -> None:
        """Start other edits from the medians of those that were solved first."""
        if others:
            self.at[others] = np.median(self.best_at[first])
            self.slope[others] = np.median(self.slope[first])

    def run(self, which: Sequence[int]) -> None:
        """Measure edits until each is matched, at most _MOST_ROUNDS times."""
        for _ in range(_MOST_ROUNDS):
            if not which:
                return
            kl = self.measure(which, np.exp(self.at[which]).tolist())
            for i, value in zip(which, kl.tolist(), strict=True):
                self._take(i, value)
            which = [i for i in which if self.best_gap[i] > self.within]

    def _take(self, i: int, kl: float) -> None:
        """Record a measured KL and determine the next scale of the edit."""
        at, log_kl = self.at[i], math.log(max(kl, 1e-12))
        gap = log_kl - self.goal[i]
        if abs(gap) < self.best_gap[i]:
            self.best_at[i], self.best_kl[i], self.best_gap[i] = at, kl, abs(gap)
        if gap < 0:
            self.low[i] = max(self.low[i], at)
        else:
            self.high[i] = min(self.high[i], at)
        if abs(at - self.last_at[i]) > 1e-9:
            slope = (log_kl - self.last_log[i]) / (at - self.last_at[i])
            self.slope[i] = max(slope, _FLAT)
        self.last_at[i], self.last_log[i] = at, log_kl
        following = at + float(np.clip(-gap / self.slope[i], -_LARGEST_STEP, _LARGEST_STEP))
        if not self.low[i] < following < self.high[i]:
            following = (self.low[i] + self.high[i]) / 2
        self.at[i] = following
