"""Corrections for multiple testing, and the smallest effects that a sample can detect."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy import optimize, special, stats

from saexp.stats.rank_tests import log_choose

POWER = 0.8
_MOST = 1 - 1e-9


def detectable_auroc(
    sizes: Sequence[tuple[int, int]], alpha: float, power: float = POWER
) -> float | None:
    """Smallest AUROC above 0.5 that van Elteren's two-sided test detects with this power.

    `sizes` are the numbers of observations of both groups (each at least 1) in every stratum; with
    one stratum the test is Mann and Whitney's. The variance under the null hypothesis is that of U
    without ties (Noether 1987, Journal of the American Statistical Association 82:645), under the
    alternative Hanley and McNeil's (1982, Radiology 143:29), which is smaller. Ties reduce both, so
    a smaller AUROC is detectable for latents that are rarely active. None where even a perfect
    separation would not be significant.
    """
    n1, n2 = np.array(sizes, dtype=float).T
    w = 1 / (n1 + n2 + 1)
    pairs = w * n1 * n2
    null = w**2 * n1 * n2 * (n1 + n2 + 1) / 12
    # Continuity correction: half a step of U. Where strata differ in weight, steps are averaged
    # with their contributions to the variance.
    step = (w * null).sum() / null.sum() / 2
    critical = (-special.ndtri(alpha / 2) * np.sqrt(null.sum()) + step) / pairs.sum()
    rarest = 2 * np.exp(-sum(log_choose(a + b, a) for a, b in sizes))
    if critical >= 0.5 or rarest > alpha:
        return None

    def excess(auroc: float) -> float:
        spread = np.sqrt((pairs**2 * _variance(auroc, n1, n2)).sum()) / pairs.sum()
        return float(special.ndtr((auroc - 0.5 - critical) / spread)) - power

    return float(optimize.root_scalar(excess, bracket=(0.5, _MOST)).root)


def _variance(auroc: float, n1: np.ndarray, n2: np.ndarray) -> np.ndarray:
    first, second = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    square = auroc**2
    inner = auroc - square + (n1 - 1) * (first - square) + (n2 - 1) * (second - square)
    return inner / (n1 * n2)


def detectable_change(n: int, baseline: float, alpha: float, power: float = POWER) -> float | None:
    """Smallest change of a rate from `baseline` that a paired test of n units detects.

    The calculation is exact. The number of units that change is binomial, assuming that the two
    outcomes of a unit are independent, which is conservative because more units change than with
    correlated outcomes (Connor 1987, Biometrics 43:207). Given this number, the test is McNemar's
    exact test, which equals the sign-flip test of 0/1 outcomes. The change is an increase (above 0)
    from a baseline of at most 0.5 and a decrease (below 0) from a higher one. None where no change
    can be detected.
    """
    sign = 1 if baseline <= 0.5 else -1
    low = min(baseline, 1 - baseline)
    smallest = _smallest_majority(n, alpha)

    def excess(change: float) -> float:
        return paired_power(n, low, change, smallest) - power

    largest = 1 - low
    if excess(largest) < 0:
        return None
    return sign * float(optimize.root_scalar(excess, bracket=(1e-9, largest)).root)


def paired_power(n: int, rate: float, change: float, smallest: np.ndarray) -> float:
    """Probability that McNemar's exact test detects an increase of the rate by `change`.

    `smallest[m]` is the smallest significant number of increases among m units that change.
    """
    up, down = (rate + change) * (1 - rate), rate * (1 - rate - change)
    changed = np.arange(n + 1)
    of_those = up / (up + down)
    passes = stats.binom.sf(smallest - 1, changed, of_those)
    return float(stats.binom.pmf(changed, n, up + down) @ passes)


def _smallest_majority(n: int, alpha: float) -> np.ndarray:
    """`[n + 1]`: for each number m of changes, the smallest number of increases with p <= alpha, or
    m + 1 where there is none."""
    m = np.arange(n + 1)
    # P(X >= k) = sf(k - 1) <= alpha / 2; k = m - (largest j with P(X <= j) <= alpha / 2).
    j = stats.binom.ppf(alpha / 2, m, 0.5)
    j = np.where(stats.binom.cdf(j, m, 0.5) <= alpha / 2, j, j - 1)
    return m - j


ALPHA = 0.05
"""Significance level of effects, for p-values adjusted by `holm`."""


def holm(p_values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Adjusted p-values that control the familywise error rate (Holm 1979).

    Valid for any dependence between the tests. NaN stays NaN and does not count as a test.

    >>> holm(np.array([0.01, 0.04, np.nan])).tolist()
    [0.02, 0.04, nan]
    """
    adjusted = np.full(len(p_values), np.nan)
    tested = np.flatnonzero(~np.isnan(p_values))
    n = len(tested)
    order = tested[np.argsort(p_values[tested], kind="stable")]
    scaled = p_values[order] * np.arange(n, 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted


def benjamini_hochberg(p_values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Adjusted p-values that control the false discovery rate (Benjamini and Hochberg 1995)."""
    return stats.false_discovery_control(p_values, method="bh")
