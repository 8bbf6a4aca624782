"""AUROC of two scores on the same observations, and the interval of their difference."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy import sparse, stats

from saexp.analysis.statistics import stratified_rank_test, stratum_weights
from saexp.stats.proportions import Interval

MIN_N = 10
"""Fewer observations of a group have no interval of the difference."""


@dataclass(frozen=True)
class PairedAuroc:
    """AUROCs are P(first > second) + P(equal)/2, means over strata by van Elteren's weights."""

    own: float
    other: float
    low: float | None
    """Interval of own - other; None where a group has fewer than `MIN_N` observations."""
    high: float | None

    @property
    def difference(self) -> float:
        """Own less other."""
        return self.own - self.other


def auroc_of(
    scores: Float[np.ndarray, " n"],
    first: Bool[np.ndarray, " n"],
    strata: Shaped[np.ndarray, " n"],
) -> float:
    """AUROC of one score of any sign, the mean over strata as the contrast takes it."""
    ranks = 1.0 + np.unique(scores, return_inverse=True)[1]
    return float(stratified_rank_test(sparse.csr_array(ranks[:, None]), first, strata).auroc[0])


def difference_of_aurocs(
    own: tuple[float, Interval],
    other: tuple[float, Interval],
    correlation: float,
) -> tuple[float, float]:
    """Interval of own - other from each AUROC with its interval, and their correlation.

    MOVER, the method of variance estimates recovery (Zou 2007, Psychological Methods 12:399): keeps
    the asymmetry of the two intervals near 0 and 1, where DeLong's variance is 0.
    """
    (a, (low_a, high_a)), (b, (low_b, high_b)) = own, other
    below, above = (
        x**2 - 2 * correlation * x * y + y**2
        for x, y in ((a - low_a, high_b - b), (high_a - a, b - low_b))
    )
    return (
        float(max(a - b - np.sqrt(max(below, 0.0)), -1.0)),
        float(min(a - b + np.sqrt(max(above, 0.0)), 1.0)),
    )


def auroc_correlation(
    own: Float[np.ndarray, " n"],
    other: Float[np.ndarray, " n"],
    first: Bool[np.ndarray, " n"],
    strata: Shaped[np.ndarray, " n"],
) -> float:
    """Correlation of two AUROCs of the same observations.

    From the placements of each observation among the other group (DeLong, DeLong and Clarke-Pearson
    1988, Biometrics 44:837), their covariances summed over strata by the squared weights. 0 where a
    variance is 0 or a group of a stratum has one observation.
    """
    covariance = np.zeros((2, 2))
    for stratum, weight in stratum_weights(first, strata).items():
        chosen = strata == stratum
        of_first = first[chosen]
        if min(of_first.sum(), (~of_first).sum()) < 2:
            continue
        pair = np.stack([_placements(scores[chosen], of_first) for scores in (own, other)])
        for group in (of_first, ~of_first):
            covariance += weight**2 * np.cov(pair[:, group]) / group.sum()
    scale = np.sqrt(covariance[0, 0] * covariance[1, 1])
    return float(np.clip(covariance[0, 1] / scale, -1, 1)) if scale > 0 else 0.0


def _placements(scores: np.ndarray, first: Bool[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Fraction of the other group that an observation is right of: below for the first group, above
    for the second, ties half."""
    ranks = stats.rankdata(scores)
    placed = np.empty(len(scores))
    n_first, n_second = int(first.sum()), int((~first).sum())
    placed[first] = (ranks[first] - stats.rankdata(scores[first])) / n_second
    placed[~first] = 1 - (ranks[~first] - stats.rankdata(scores[~first])) / n_first
    return placed
