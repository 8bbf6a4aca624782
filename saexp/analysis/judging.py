"""A probe's AUROC, accuracy, balanced accuracy and F1 on labelled rows, with intervals.

Rows of a unit (an entity) are not independent. Each unit of a group has weight 1, shared by its
rows, so that no number depends on how many rows the units have; and the number of units is the
sample size of every interval. That is exact where a unit's rows agree. Where they do not, a unit's
mean varies less than a single row, so the interval is wider than necessary, never too narrow.

Shapes: n rows.
"""

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from saexp.analysis.probe_rows import Labelled
from saexp.stats.proportions import (
    Interval,
    auroc_p_value,
    separation_interval,
    stratified_auroc_interval,
    wilson,
)

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
