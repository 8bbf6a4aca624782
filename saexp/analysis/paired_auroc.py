"""AUROC of two scores on the same observations, and the interval of their difference."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy import sparse

from saexp.analysis.judging import placements
from saexp.analysis.statistics import stratified_rank_test, stratum_weights
from saexp.stats.proportions import Interval, mover, stratified_auroc_interval


@dataclass(frozen=True)
class Auroc:
    """P(first > second) + P(equal)/2, the mean over strata by van Elteren's weights."""

    value: float
    interval: Interval
    """Newcombe's method 5; NaN for small groups (see `stratified_auroc_interval`)."""


def auroc_of(
    scores: Float[np.ndarray, " n"],
    first: Bool[np.ndarray, " n"],
    strata: Shaped[np.ndarray, " n"],
) -> Auroc:
    """AUROC of one score of any sign, as the contrast takes it."""
    ranks = 1.0 + np.unique(scores, return_inverse=True)[1]
    test = stratified_rank_test(sparse.csr_array(ranks[:, None]), first, strata)
    weights = stratum_weights(first, strata)
    chosen = [strata == name for name in weights]
    interval = stratified_auroc_interval(
        float(test.auroc[0]),
        np.array([(first & c).sum() for c in chosen]),
        np.array([(~first & c).sum() for c in chosen]),
        np.array(list(weights.values())),
        float(test.variance[0]),
    )
    return Auroc(float(test.auroc[0]), interval)


def auroc_difference(
    own: Float[np.ndarray, " n"],
    other: Float[np.ndarray, " n"],
    first: Bool[np.ndarray, " n"],
    strata: Shaped[np.ndarray, " n"],
) -> Auroc:
    """AUROC of `own` less that of `other` with its interval; NaN limits for small groups."""
    a, b = (auroc_of(scores, first, strata) for scores in (own, other))
    correlation = auroc_correlation(own, other, first, strata)
    return Auroc(a.value - b.value, difference_of_aurocs(a, b, correlation))


def difference_of_aurocs(own: Auroc, other: Auroc, correlation: float) -> Interval:
    """Interval of own - other from each AUROC with its interval, and their correlation.

    It keeps the asymmetry of the two intervals near 0 and 1, where DeLong's variance is 0.
    """
    return mover(own.value, own.interval, other.value, other.interval, correlation)


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
        equal = np.ones(len(of_first))
        pair = np.stack([placements(s[chosen], of_first, equal) for s in (own, other)])
        for group in (of_first, ~of_first):
            covariance += weight**2 * np.cov(pair[:, group]) / group.sum()
    scale = np.sqrt(covariance[0, 0] * covariance[1, 1])
    return float(np.clip(covariance[0, 1] / scale, -1, 1)) if scale > 0 else 0.0
