"""AUROC and accuracy of classifiers on labelled rows, with intervals, and of two compared."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Shaped
from scipy import sparse

from saexp.analysis.classifiers import Labelled
from saexp.stats.intervals import (
    Interval,
    auroc_p_value,
    mover,
    separation_interval,
    stratified_auroc_interval,
    wilson,
)
from saexp.stats.rank_tests import stratified_rank_test, stratum_weights

MEASURES = ("auroc", "accuracy", "balanced_accuracy", "f1")
WITHIN = "auroc_within"
MIN_UNITS = 10
"""Units of each group that the interval of a balanced accuracy or F1 needs."""
Numbers = dict[str, float | None]
_NONE = Interval(np.array(np.nan), np.array(np.nan))


class Judge:
    """Measures any number of probes on the same rows."""

    def __init__(self, rows: Labelled) -> None:
        self.rows = rows
        self.weights = rows.weights()
        self.unit = pd.factorize(rows.units)[0]
        first = rows.first
        self.n_units = len(np.unique(self.unit))
        self.n_first, self.n_second = (len(np.unique(self.unit[m])) for m in (first, ~first))
        self.independent = self.n_first + self.n_second == self.n_units
        """Whether no unit has rows of both groups."""

    def measure(self, scores: Float[np.ndarray, " n"], threshold: float) -> Numbers:
        """`MEASURES`, each with `_ci_low` and `_ci_high`, and `auroc_p`; F1 is of the first group.

        Intervals are 95 %, None where there are too few units: AUROC by Newcombe's method 5,
        accuracy by Wilson's method, balanced accuracy by Newcombe's hybrid of those of both groups'
        rates, F1 by Wilson's method for TP / (TP + FP + FN), of which it is a monotone function.
        `auroc_p` is the two-sided p-value of an AUROC of 0.5. Where rows have kinds also
        `auroc_within`: over pairs of rows of one kind, every pair of units counting once, so that
        what separates kinds does not help.
        """
        called = scores > threshold
        everyone = np.zeros(len(scores), dtype=np.int64)
        apart = everyone if self.rows.judged_apart is None else self.rows.judged_apart
        auroc, interval, p_value = self._auroc(scores, apart)
        found = {"auroc": (auroc, interval), **self._at_threshold(called)}
        if self.rows.kinds is not None:
            found[WITHIN] = self._auroc(scores, self.rows.kinds)[:2]
        numbers: Numbers = {"auroc_p": p_value if np.isfinite(p_value) else None}
        for name, (value, (low, high)) in found.items():
            numbers[name] = value
            for side, limit in (("low", low), ("high", high)):
                numbers[f"{name}_ci_{side}"] = float(limit) if np.isfinite(limit) else None
        return numbers

    def _at_threshold(self, called: Bool[np.ndarray, " n"]) -> dict[str, tuple[float, Interval]]:
        w, first = self.weights, self.rows.first
        # Numbers of units, in fractions where the rows of a unit are called differently.
        true, false = float(w[called & first].sum()), float(w[called & ~first].sum())
        missed = self.n_first - true
        rate, false_rate = true / max(self.n_first, 1), false / max(self.n_second, 1)
        right = float(w[called == first].sum() / w.sum())
        accuracy = wilson(right * self.n_units, self.n_units) if self.n_units > 1 else _NONE
        balanced, f1 = _NONE, _NONE
        # Next to 0 and 1 rounding would put a rate outside.
        mistaken = max(false + missed, 0.0)
        jaccard = true / (true + mistaken) if true + mistaken > 0 else np.nan
        if min(self.n_first, self.n_second) >= MIN_UNITS:
            balanced = self._balanced(min(rate, 1.0), min(false_rate, 1.0))
            if true + mistaken > 0:
                low, high = wilson(true, true + mistaken)
                f1 = Interval(2 * low / (1 + low), 2 * high / (1 + high))
        return {
            "accuracy": (right, accuracy),
            "balanced_accuracy": ((1 + rate - false_rate) / 2, balanced),
            "f1": (float(2 * jaccard / (1 + jaccard)), f1),
        }

    def _balanced(self, rate: float, false_rate: float) -> Interval:
        """Of (1 + true positive rate - false positive rate) / 2."""
        if self.independent:
            n_first, n_second = np.array([self.n_first]), np.array([self.n_second])
            low, high = separation_interval(
                np.array(rate), np.array(false_rate), n_first, n_second, np.ones(1)
            )
            return Interval((1 + low) / 2, (1 + high) / 2)
        # Both rates are of the same units, perhaps fully correlated: the limits' sums cover then.
        a, b = (
            wilson(rate * self.n_first, self.n_first),
            wilson(false_rate * self.n_second, self.n_second),
        )
        return Interval((1 + a.low - b.high) / 2, (1 + a.high - b.low) / 2)

    def _auroc(
        self, scores: Float[np.ndarray, " n"], strata: Int[np.ndarray, " n"]
    ) -> tuple[float, Interval, float]:
        """P(first > second) + P(equal)/2 over pairs of one stratum, its interval and p-value.

        NaN without a pair.
        """
        first, w = self.rows.first, self.weights
        sizes, aurocs, parts = [], [], []
        for stratum in np.unique(strata):
            of_stratum = np.flatnonzero(strata == stratum)
            of_first = first[of_stratum]
            if of_first.any() and not of_first.all():
                part = w[of_stratum]
                share = placements(scores[of_stratum], of_first, part)
                size = np.array([part[of_first].sum(), part[~of_first].sum()])
                aurocs.append(float(part[of_first] @ share[of_first] / size[0]))
                sizes.append(size)
                parts.append((of_stratum, share - aurocs[-1], size))
        if not parts:
            return float("nan"), _NONE, float("nan")
        n_first, n_second = np.array(sizes).T
        pairs = n_first * n_second / (n_first * n_second).sum()
        auroc = float(pairs @ aurocs)
        # What each unit adds to the deviation, over all strata that it is in (DeLong 1988, and
        # for units of several rows Obuchowski 1997).
        influence = np.zeros((2, self.n_units))
        for weight, (of_stratum, share, size) in zip(pairs, parts, strict=True):
            for group, mask in enumerate((first[of_stratum], ~first[of_stratum])):
                rows = of_stratum[mask]
                np.add.at(
                    influence[group], self.unit[rows], weight * w[rows] * share[mask] / size[group]
                )
        n = np.array([self.n_first, self.n_second])
        influence *= np.sqrt(n / np.maximum(n - 1, 1))[:, None]
        variance = float((influence.sum(0) ** 2).sum())
        about = (auroc, n_first, n_second, pairs, variance)
        return auroc, stratified_auroc_interval(*about), auroc_p_value(*about)


def placements(
    scores: Float[np.ndarray, " n"],
    first: Bool[np.ndarray, " n"],
    weights: Float[np.ndarray, " n"],
) -> Float[np.ndarray, " n"]:
    """Of each row, the weighted fraction of the other group's rows in the right order with it.

    Equal scores count half. The weighted mean over either group is the AUROC.
    """
    _, inverse = np.unique(scores, return_inverse=True)
    found = np.empty(len(scores))
    for mine, sign in ((first, 1.0), (~first, -1.0)):
        of_other = np.bincount(inverse[~mine], weights[~mine], minlength=inverse.max() + 1)
        below = (np.cumsum(of_other) - of_other / 2) / of_other.sum()
        found[mine] = below[inverse[mine]] if sign > 0 else 1 - below[inverse[mine]]
    return found


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
