"""Scales at which edits disrupt neutral text as much as another edit does."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

_MOST_ROUNDS = 8
"""Times that edits are measured, those within the caliper no more."""
_LARGEST_STEP = math.log(6)
"""Of one round, in log scale."""
_LARGEST_SCALE = math.log(1000)
_FLAT = 0.25
"""Smallest slope of log KL against log scale that a step trusts; near 0 KL grows as its square."""

_N_FIRST = 6
"""Edits of a kind whose scales are found first, to start the others near theirs."""

Measure = Callable[[Sequence[int], Sequence[float]], Float[np.ndarray, " m"]]
"""(indices of edits, scales) -> KL of each."""


@dataclass(frozen=True)
class Scales:
    """Per edit the scale whose KL came nearest to its target."""

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

    `measure(which, scales)` is the KL of some edits, by index. All edits that are not matched yet
    are measured together: first at scale 1, then where the secant of log KL against log scale
    (slope 2 at first, as for small edits) meets the target, inside the bracket found so far. Of
    edits that are `alike` (equal values), the first few come first, and the others start from their
    median scale and slope. An edit whose target is 0, or that does not reach it, stays unmatched.
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
    """The state of every edit's search; positions and goals are logarithms."""

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
        """Let others begin where the first ended."""
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
        """Note a measured value, and where the edit is measured next."""
        at, here = self.at[i], math.log(max(kl, 1e-12))
        gap = here - self.goal[i]
        if abs(gap) < self.best_gap[i]:
            self.best_at[i], self.best_kl[i], self.best_gap[i] = at, kl, abs(gap)
        if gap < 0:
            self.low[i] = max(self.low[i], at)
        else:
            self.high[i] = min(self.high[i], at)
        if abs(at - self.last_at[i]) > 1e-9:
            slope = (here - self.last_log[i]) / (at - self.last_at[i])
            self.slope[i] = max(slope, _FLAT)
        self.last_at[i], self.last_log[i] = at, here
        wanted = at + float(np.clip(-gap / self.slope[i], -_LARGEST_STEP, _LARGEST_STEP))
        if not self.low[i] < wanted < self.high[i]:
            wanted = (self.low[i] + self.high[i]) / 2
        self.at[i] = wanted
