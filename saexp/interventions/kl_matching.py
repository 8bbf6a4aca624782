"""Scales at which edits disrupt neutral text as much as another edit does."""

import math
from collections.abc import Callable, Sequence
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


@dataclass(frozen=True)
class Scales:
    """Per edit the scale whose KL came nearest to its target."""

    scales: Float[np.ndarray, " n"]
    kl: Float[np.ndarray, " n"]
    matched: Bool[np.ndarray, " n"]
    """Whether KL and target differ by at most the caliper's factor."""


def equal_kl_scales(
    measure: Callable[[Sequence[int], Sequence[float]], Float[np.ndarray, " m"]],
    target: Float[np.ndarray, " n"],
    caliper: float,
) -> Scales:
    """Scales at which the KL of each of n edits is its target, within a factor `caliper`.

    `measure(which, scales)` is the KL of some edits, by index. All edits that are not matched yet
    are measured together: first at scale 1, then where the secant of log KL against log scale
    (slope 2 at first, as for small edits) meets the target, inside the bracket found so far. An
    edit whose target is 0, or that does not reach it, stays unmatched.
    """
    n = len(target)
    with np.errstate(divide="ignore"):
        goal = np.log(target)
    usable = np.isfinite(goal)
    at, slope = np.zeros(n), np.full(n, 2.0)
    low, high = np.full(n, -_LARGEST_SCALE), np.full(n, _LARGEST_SCALE)
    best_at, best_kl, best_gap = np.zeros(n), np.full(n, np.nan), np.full(n, np.inf)
    last_at, last_log = np.full(n, np.nan), np.full(n, np.nan)
    open_to = np.flatnonzero(usable)
    for _ in range(_MOST_ROUNDS):
        if not len(open_to):
            break
        kl = measure(open_to.tolist(), np.exp(at[open_to]).tolist())
        for i, value in zip(open_to, kl, strict=True):
            here = math.log(max(float(value), 1e-12))
            gap = here - goal[i]
            if abs(gap) < best_gap[i]:
                best_at[i], best_kl[i], best_gap[i] = at[i], value, abs(gap)
            if gap < 0:
                low[i] = max(low[i], at[i])
            else:
                high[i] = min(high[i], at[i])
            if last_at[i] != at[i] and not math.isnan(last_at[i]):
                slope[i] = max((here - last_log[i]) / (at[i] - last_at[i]), _FLAT)
            last_at[i], last_log[i] = at[i], here
            step = float(np.clip(-gap / slope[i], -_LARGEST_STEP, _LARGEST_STEP))
            wanted = at[i] + step
            if not low[i] < wanted < high[i]:
                wanted = (low[i] + high[i]) / 2
            at[i] = wanted
        open_to = open_to[best_gap[open_to] > math.log(caliper)]
    return Scales(np.exp(best_at), best_kl, best_gap <= math.log(caliper))
