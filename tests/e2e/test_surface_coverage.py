"""Coverage of the interval of a latent's AUROC less the surface baseline's, by simulation."""

import numpy as np
import pytest
from scipy import sparse, stats

from saexp.stats import Interval, auroc_interval
from saexp.stats.separation import (
    Auroc,
    auroc_correlation,
    auroc_difference,
    difference_of_aurocs,
    stratified_rank_test,
    stratum_weights,
)

RUNS = 300
SIZES = [5, 15, 100]
"""Of a group in one of the two strata."""
VALUES = [(0.5, 0.5), (0.8, 0.8), (0.97, 0.8), (0.97, 0.97), (0.99, 0.5), (0.99, 0.97)]
LAWS = [(0.0, "normal"), (0.6, "sparse"), (0.0, "sparse"), (0.6, "normal")]
"""Correlation of the two scores, and the law of the latent."""
CASES = [
    (n, values, *LAWS[(i + j) % len(LAWS)])
    for i, n in enumerate(SIZES)
    for j, values in enumerate(VALUES)
]
"""Every pair of AUROCs at every size; each size under every law, and each pair of AUROCs under
either law and at either correlation."""


def coverage(n: int, values: tuple[float, float], correlation: float, law: str) -> float:
    """Fraction of samples, n of each group in each of two strata of unlike level, that cover.

    `normal`: both scores normal. `sparse`: the latent is active (1) or not, more often in the
    first group; its AUROC is then 1/2 + (p_first - p_second) / 2.
    """
    rng = np.random.default_rng([n, round(100 * correlation)])
    first, strata = np.tile(np.arange(2 * n) < n, 2), np.repeat([0, 1], 2 * n)
    own, other = values
    truth = own - other
    shifts = np.sqrt(2) * stats.norm.ppf(values)
    noise = rng.multivariate_normal([0, 0], [[1, correlation], [correlation, 1]], (RUNS, 4 * n))
    scores = noise + shifts * first[:, None] + 2.0 * strata[:, None]
    latent = scores[..., 0]
    if law == "sparse":
        rate = np.where(first, min(1.0, 0.01 + 2 * (own - 0.5)), 0.01)
        latent = (stats.norm.cdf(noise[..., 0]) > 1 - rate).astype(float)
        truth = 0.5 + (rate[0] - 0.01) / 2 - other
    runs = list(zip(latent, scores[..., 1], strict=True))
    pairs = zip(*(aurocs(s, first, strata) for s in (latent, scores[..., 1])), strict=True)
    differences = [
        Auroc(a.value - b.value, difference_of_aurocs(a, b, auroc_correlation(*run, first, strata)))
        for (a, b), run in zip(pairs, runs, strict=True)
    ]
    for i in (0, RUNS - 1):
        assert_same(differences[i], auroc_difference(*runs[i], first, strata))
    return float(np.mean([f.interval.low <= truth <= f.interval.high for f in differences]))


def aurocs(scores: np.ndarray, first: np.ndarray, strata: np.ndarray) -> list[Auroc]:
    """`auroc_of` of each sample, a row of `scores`, at once."""
    ranks = stats.rankdata(scores.T, method="dense", axis=0).astype(float)
    test = stratified_rank_test(sparse.csr_array(ranks), first, strata)
    n = np.full(2, first.sum() // 2)
    weights = np.array(list(stratum_weights(first, strata).values()))
    low, high = auroc_interval(test.auroc, n, n, weights, test.variance)
    columns = zip(test.auroc.tolist(), low, high, strict=True)
    return [Auroc(value, Interval(*limits)) for value, *limits in columns]


def assert_same(one: Auroc, other: Auroc) -> None:
    assert (one.value, *one.interval) == pytest.approx((other.value, *other.interval), abs=1e-12)


@pytest.mark.parametrize(("n", "values", "correlation", "law"), CASES)
def test_the_difference_of_two_aurocs_is_covered(
    n: int, values: tuple[float, float], correlation: float, law: str
) -> None:
    assert coverage(n, values, correlation, law) >= 0.92
