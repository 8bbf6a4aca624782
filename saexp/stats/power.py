"""Multiple testing, and what a sample of this size could have detected."""

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

    `sizes` are the two groups' observations in each stratum, with at least one of both; one stratum
    is the Mann-Whitney test. The variance under no effect is that of U without ties (Noether 1987,
    Journal of the American Statistical Association 82:645), under the effect Hanley and McNeil's
    (1982, Radiology 143:29), which is smaller. Ties, which latents that are rarely active have many
    of, make both smaller, so for those a smaller AUROC is detectable. None where even a perfect
    separation would not pass.
    """
    n1, n2 = np.array(sizes, dtype=float).T
    w = 1 / (n1 + n2 + 1)
    pairs = w * n1 * n2
    null = w**2 * n1 * n2 * (n1 + n2 + 1) / 12
    # Half a step of U; of strata that differ in weight, their mean step by share of the variance.
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

    Exact: the number of units that change is binomial, with the two outcomes of a unit taken as
    independent (more change than with outcomes that agree, so this is the conservative case: Connor
    1987, Biometrics 43:207); given that number the test is the exact McNemar test, which equals the
    sign-flip test of 0/1 outcomes. Positive for an increase, which is what is looked for from a
    baseline up to a half, negative for a decrease from a higher one. None where no change would be
    detected.
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
    """Probability that the exact McNemar test finds an increase of the rate by `change`.

    `smallest` is per number of units that change the smallest number of increases that is
    significant.
    """
    up, down = (rate + change) * (1 - rate), rate * (1 - rate - change)
    changed = np.arange(n + 1)
    of_those = up / (up + down)
    passes = stats.binom.sf(smallest - 1, changed, of_those)
    return float(stats.binom.pmf(changed, n, up + down) @ passes)


def _smallest_majority(n: int, alpha: float) -> np.ndarray:
    """`[n + 1]`: per number m of changes, the smallest number of increases with p <= alpha; m + 1
    where none has."""
    m = np.arange(n + 1)
    # P(X >= k) = sf(k - 1) <= alpha / 2; k = m - (largest j with P(X <= j) <= alpha / 2).
    j = stats.binom.ppf(alpha / 2, m, 0.5)
    j = np.where(stats.binom.cdf(j, m, 0.5) <= alpha / 2, j, j - 1)
    return m - j


ALPHA = 0.05
"""Level at which effects, adjusted by `holm`, are called one."""


def holm(p_values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Adjusted p-values that bound the chance of one false finding in the family (Holm 1979).

    Valid however the tests depend on each other. NaN stays NaN and is not counted as a test.

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
    """Adjusted p-values that bound the false discovery rate (Benjamini and Hochberg 1995)."""
    return stats.false_discovery_control(p_values, method="bh")
