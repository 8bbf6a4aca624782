"""Score intervals of proportions, of their differences and of an AUROC.

They stay inside their range and keep their coverage near 0 and 1, where the percentile bootstrap
has intervals of no width.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Num
from scipy import special

_BISECTIONS = 60


class Interval(NamedTuple):
    """Lower and upper limits, arrays of the inputs' broadcast shape."""

    low: np.ndarray
    high: np.ndarray


def _z(confidence: float) -> float:
    return float(special.ndtri(0.5 + confidence / 2))


def wilson(
    n_successes: Num[np.ndarray, "..."] | float,
    n: Num[np.ndarray, "..."] | float,
    confidence: float = 0.95,
) -> Interval:
    """Wilson score interval of a proportion (Wilson 1927); (0, 1) where n is 0.

    >>> low, high = wilson(0, 10)
    >>> float(low), round(float(high), 3)
    (0.0, 0.278)
    """
    k, n = np.broadcast_arrays(np.asarray(n_successes, float), np.asarray(n, float))
    size = np.maximum(n, 1)
    rate, square = k / size, _z(confidence) ** 2
    middle = (rate + square / (2 * size)) / (1 + square / size)
    half = np.sqrt(square) / (1 + square / size)
    half = half * np.sqrt(rate * (1 - rate) / size + square / (4 * size**2))
    # The rate itself is inside, also where rounding at 0 and 1 would leave it out.
    low = np.clip(np.minimum(rate, middle - half), 0, 1)
    high = np.clip(np.maximum(rate, middle + half), 0, 1)
    return Interval(np.where(n > 0, low, 0.0)[()], np.where(n > 0, high, 1.0)[()])


def difference_interval(
    k_first: Num[np.ndarray, "..."] | float,
    n_first: Num[np.ndarray, "..."] | float,
    k_second: Num[np.ndarray, "..."] | float,
    n_second: Num[np.ndarray, "..."] | float,
    confidence: float = 0.95,
) -> Interval:
    """Interval of p_first - p_second of independent samples.

    Newcombe's hybrid of the two Wilson intervals (Newcombe 1998a, Statistics in Medicine 17:873,
    method 10).
    """
    a, b = wilson(k_first, n_first, confidence), wilson(k_second, n_second, confidence)
    first = np.asarray(k_first, float) / np.maximum(n_first, 1)
    second = np.asarray(k_second, float) / np.maximum(n_second, 1)
    difference = first - second
    below = np.hypot(first - a.low, b.high - second)
    above = np.hypot(a.high - first, second - b.low)
    return Interval(np.maximum(difference - below, -1.0), np.minimum(difference + above, 1.0))


def paired_difference_interval(
    n_both: float,
    n_first_only: float,
    n_second_only: float,
    n_neither: float,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Interval of p_first - p_second of pairs, from the counts of the four outcomes of a pair.

    The hybrid of `difference_interval` with the correlation of the two outcomes taken into account
    (Newcombe 1998b, Statistics in Medicine 17:2635, method 10, with its continuity-corrected phi).
    (-1, 1) without pairs.
    """
    a, b, c, d = n_both, n_first_only, n_second_only, n_neither
    n = a + b + c + d
    if n == 0:
        return -1.0, 1.0
    first, second = (a + b) / n, (a + c) / n
    one, two = wilson(a + b, n, confidence), wilson(a + c, n, confidence)
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    phi = 0.0
    if margins > 0:
        excess = a * d - b * c
        corrected = max(excess - n / 2, 0.0) if excess > 0 else excess
        phi = corrected / np.sqrt(margins)
    low_1, high_1 = first - float(one.low), float(one.high) - first
    low_2, high_2 = second - float(two.low), float(two.high) - second
    below = np.sqrt(max(low_1**2 - 2 * phi * low_1 * high_2 + high_2**2, 0.0))
    above = np.sqrt(max(high_1**2 - 2 * phi * high_1 * low_2 + low_2**2, 0.0))
    difference = first - second
    return float(max(difference - below, -1.0)), float(min(difference + above, 1.0))


def paired_change_interval(
    before: Float[np.ndarray, " n"], after: Float[np.ndarray, " n"], confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of mean(after) - mean(before), one pair of values in [0, 1] per unit.

    Of outcomes 0 and 1 it is `paired_difference_interval`. A fraction (the mean of several
    prompts) is counted as so much of a 1: as v^2 <= v, the variance that the counts imply is at
    least that of the values, so the interval is then too wide rather than too narrow.

    >>> low, high = paired_change_interval(np.zeros(10), np.ones(10))
    >>> round(low, 2), high
    (0.61, 1.0)
    """
    both = float((after * before).sum())
    gained, lost = float(after.sum()) - both, float(before.sum()) - both
    n_neither = max(len(before) - both - gained - lost, 0.0)
    return paired_difference_interval(both, gained, lost, n_neither, confidence)


def auroc_interval(
    auroc: Float[np.ndarray, "..."] | float,
    n_first: int,
    n_second: int,
    confidence: float = 0.95,
) -> Interval:
    """Interval of an AUROC from its value and the group sizes alone.

    Solves |a - t| = z sqrt(V(t)) for t, with Hanley and McNeil's variance of exponential groups at
    t and both n_first - 1 and n_second - 1 replaced by their mean (Newcombe 2006, Statistics in
    Medicine 25:559, method 5). V is that of values without ties; ties make it smaller, so with
    latents that are inactive on many rows the interval is too wide rather than too narrow.

    >>> low, high = auroc_interval(1.0, 10, 10)
    >>> round(float(low), 2), float(high)
    (0.79, 1.0)
    """
    observed = np.asarray(auroc, float)
    z = _z(confidence)
    extra = (n_first + n_second) / 2 - 1

    def spread(t: np.ndarray) -> np.ndarray:
        inner = 1 + extra * ((1 - t) / (2 - t) + t / (1 + t))
        return z * np.sqrt(t * (1 - t) * inner / (n_first * n_second))

    def solve(outside: np.ndarray, sign: float) -> np.ndarray:
        # `inside` satisfies the inequality, `outside` does not (or is the end of the range).
        inside = observed.copy()
        for _ in range(_BISECTIONS):
            middle = (inside + outside) / 2
            within = sign * (observed - middle) <= spread(middle)
            inside = np.where(within, middle, inside)
            outside = np.where(within, outside, middle)
        return inside

    low = np.where(observed <= 0, 0.0, solve(np.zeros_like(observed), 1.0))
    high = np.where(observed >= 1, 1.0, solve(np.ones_like(observed), -1.0))
    return Interval(low, high)
