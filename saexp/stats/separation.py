"""How well values separate two groups: AUROCs, rank tests, logistic probes."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy import sparse, special, stats

from saexp.errors import DataError
from saexp.stats import Interval, auroc_interval, mover
from saexp.stats.significance import FEW, fisher_exact, log_choose


@dataclass(frozen=True)
class RankTest:
    """Test results, one per latent."""

    auroc: Float[np.ndarray, " n"]
    """P(first > second) + P(equal)/2."""
    p_normal: Float[np.ndarray, " n"]
    """Two-sided Mann-Whitney U, normal approximation with tie and continuity correction."""
    p_value: Float[np.ndarray, " n"]
    """`p_normal`, raised where the normal approximation is too small (by orders of magnitude for
    rare latents and unequal groups). It is at least the tail of the Pearson type III distribution
    with the skewness of the permutation distribution, at least twice the probability of the rarest
    arrangement and, for latents with fewer than `FEW` active rows, at least the p-value of Fisher's
    exact test of active against inactive (the smaller tail doubled)."""
    variance: Float[np.ndarray, " n"]
    """Estimated variance of `auroc` under the alternative (DeLong, DeLong and Clarke-Pearson
    1988)."""


class Ranked:
    """Nonzero entries sorted by latent and value, with their ties, for tests on one set of rows."""

    def __init__(self, values: sparse.csr_array, first: Bool[np.ndarray, " n_rows"]) -> None:
        csc = sparse.csc_array(values)
        csc.eliminate_zeros()
        if csc.nnz and csc.data.min() < 0:
            raise ValueError("latent activations must not be negative")
        self.n_rows, self.n_latents = len(first), len(csc.indptr) - 1
        self.first = first
        column = np.repeat(np.arange(self.n_latents), np.diff(csc.indptr))
        order = np.lexsort((csc.data, column))
        self.column, self.row = column[order], csc.indices[order]
        data = csc.data[order]
        starts_tie = np.ones(len(data), dtype=bool)
        starts_tie[1:] = (data[1:] != data[:-1]) | (self.column[1:] != self.column[:-1])
        self.tie_start = np.flatnonzero(starts_tie)
        """First entry of each group of equal values of a latent."""
        self.tie_column = self.column[self.tie_start]
        self.filled, self.first_tie = np.unique(self.tie_column, return_index=True)
        """Latents with entries, and the first tie group of each."""

    def _per_latent(self, of_tie: np.ndarray) -> np.ndarray:
        """Sum over the tie groups of each latent: `[n_ties, ...]` -> `[n_latents, ...]`."""
        out = np.zeros((self.n_latents, *of_tie.shape[1:]))
        if len(of_tie):
            out[self.filled] = np.add.reduceat(of_tie, self.first_tie, axis=0)
        return out

    def auroc(self, w_first: np.ndarray, w_second: np.ndarray) -> np.ndarray:
        """AUROC `[n_latents, B]` with the row weights `[n_rows, B]` of each group."""
        n_first, n_second = w_first.sum(0), w_second.sum(0)
        if not len(self.row):
            return np.full((self.n_latents, w_first.shape[1]), 0.5)
        of_first = np.add.reduceat(w_first[self.row], self.tie_start, axis=0)
        of_second = np.add.reduceat(w_second[self.row], self.tie_start, axis=0)
        zero_first = n_first - self._per_latent(of_first)
        zero_second = n_second - self._per_latent(of_second)
        wins = self._per_latent(of_first * self._n_below(of_second, zero_second))
        return (wins + zero_first * zero_second / 2) / (n_first * n_second)

    def _n_below(self, of_tie: np.ndarray, zeros: np.ndarray) -> np.ndarray:
        """Number of a group's rows below each tie group, plus half of those in it `[n_ties, ...]`.

        `of_tie` counts the group's rows in each tie group, `zeros` those with value 0 per latent.
        """
        cumulated = np.cumsum(of_tie, axis=0) - of_tie
        base = np.zeros_like(zeros)
        base[self.filled] = cumulated[self.first_tie]
        return cumulated - base[self.tie_column] + zeros[self.tie_column] + of_tie / 2

    def observed(self) -> Float[np.ndarray, " n"]:
        """AUROC of every latent, with every row counted once."""
        first = self.first.astype(np.float64)[:, None]
        return self.auroc(first, 1 - first)[:, 0]

    def delong(self) -> Float[np.ndarray, " n"]:
        """DeLong's variance of every latent's AUROC; a group of one row contributes 0."""
        masks = (self.first, ~self.first)
        n = [float(mask.sum()) for mask in masks]
        counts = [
            np.add.reduceat(mask[self.row].astype(float), self.tie_start)
            if len(self.row)
            else np.zeros(0)
            for mask in masks
        ]
        zeros = [n[i] - self._per_latent(counts[i]) for i in (0, 1)]
        total = np.zeros(self.n_latents)
        for group, other in ((0, 1), (1, 0)):
            # Fraction of the other group's rows below a row, ties counted as halves.
            above = self._n_below(counts[other], zeros[other]) / n[other]
            at_zero = zeros[other] / 2 / n[other]
            mean = self._per_latent(counts[group] * above) + zeros[group] * at_zero
            square = self._per_latent(counts[group] * above**2) + zeros[group] * at_zero**2
            spread = np.maximum(square - mean**2 / n[group], 0)
            total += spread / (max(n[group] - 1, 1) * n[group])
        return total

    def mann_whitney(self) -> RankTest:
        """AUROC and p-values of every latent."""
        return _rank_test([self.moments()], [1.0])

    def moments(self) -> "UMoments":
        """Moments of the permutation distribution of U, the number of pairs with first > second."""
        n1 = int(self.first.sum())
        n2 = self.n_rows - n1
        n = n1 + n2
        sizes = np.diff(np.append(self.tie_start, len(self.row))).astype(np.float64)
        active = np.bincount(self.column, minlength=self.n_latents).astype(np.float64)
        zeros = n - active
        before = np.cumsum(sizes) - sizes
        base = np.zeros(self.n_latents)
        base[self.filled] = before[self.first_tie]
        # Midranks minus their mean; zeros are one group of ties below all others.
        rank = zeros[self.tie_column] + before - base[self.tie_column] + (sizes - n) / 2
        squares = self._per_latent(sizes * rank**2) + zeros * (active / 2) ** 2
        cubes = self._per_latent(sizes * rank**3) - zeros * (active / 2) ** 3
        return UMoments(
            n_first=n1,
            n=n,
            auroc=self.observed(),
            delong=self.delong(),
            variance=n1 * n2 / (n * max(n - 1, 1)) * squares,
            third=n1 * n2 * (n2 - n1) / (n * max(n - 1, 1) * max(n - 2, 1)) * cubes,
            active=active,
            active_first=np.bincount(
                self.column[self.first[self.row]], minlength=self.n_latents
            ).astype(np.float64),
        )


@dataclass(frozen=True)
class UMoments:
    """Mann-Whitney's U in one stratum, arrays `[n_latents]`."""

    n_first: int
    n: int
    auroc: np.ndarray
    delong: np.ndarray
    """Estimated variance of the AUROC."""
    variance: np.ndarray
    """Variance of U over permutations of the labels."""
    third: np.ndarray
    """Third central moment of U over permutations."""
    active: np.ndarray
    """Number of rows with a value above 0."""
    active_first: np.ndarray
    """Number of those rows in the first group."""

    @property
    def n_pairs(self) -> int:
        return self.n_first * (self.n - self.n_first)


def stratified_rank_test(
    values: sparse.csr_array,
    first: Bool[np.ndarray, " n_rows"],
    strata: Shaped[np.ndarray, " n_rows"],
) -> RankTest:
    """Van Elteren's test (1960): Mann-Whitney within strata, combined with weights 1 / (n + 1).

    Strata without rows of both groups are ignored. The AUROC is the mean over strata with the
    test's weights n_first n_second / (n + 1). p-values are corrected as in RankTest, with the exact
    test of active against inactive conditional on the strata. With one stratum the result is that
    of `mann_whitney`. Raises ValueError where no stratum has rows of both groups.
    """
    return _rank_test(*_stratum_moments(values, first, strata))


def _stratum_moments(
    values: sparse.csr_array,
    first: Bool[np.ndarray, " n_rows"],
    strata: Shaped[np.ndarray, " n_rows"],
) -> tuple[list[UMoments], list[float]]:
    """Moments and weight 1 / (n + 1) of each stratum with rows of both groups."""
    moments, weights = [], []
    for name in dict.fromkeys(strata.tolist()):
        chosen = strata == name
        of_first = first[chosen]
        if of_first.any() and not of_first.all():
            moments.append(Ranked(values[chosen], of_first).moments())
            weights.append(1 / (len(of_first) + 1))
    if not moments:
        raise ValueError("no stratum has rows of both groups")
    return moments, weights


def stratum_weights(
    first: Bool[np.ndarray, " n_rows"], strata: Shaped[np.ndarray, " n_rows"]
) -> dict[object, float]:
    """Weights of the strata in van Elteren's test, proportional to n_first n_second / (n + 1).

    They sum to 1. Strata without rows of both groups are left out.
    """
    weights = {}
    for name in dict.fromkeys(strata.tolist()):
        of_first = first[strata == name]
        n, n_first = len(of_first), int(of_first.sum())
        if 0 < n_first < n:
            weights[name] = n_first * (n - n_first) / (n + 1)
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _rank_test(moments: Sequence[UMoments], weights: Sequence[float]) -> RankTest:
    """Test of the weighted sum of the strata's U statistics, which are independent."""
    w = np.asarray(weights) / max(weights)
    pairs = w * [m.n_pairs for m in moments]
    auroc, delong = _mean_auroc(moments, pairs / pairs.sum())
    variance = sum(a**2 * m.variance for a, m in zip(w, moments, strict=True))
    third = sum(a**3 * m.third for a, m in zip(w, moments, strict=True))
    deviation = sum(p * (m.auroc - 0.5) for p, m in zip(pairs, moments, strict=True))
    steps = sum(a**3 * m.variance for a, m in zip(w, moments, strict=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        # Half a step of U. Where strata differ in weight, steps are averaged with their
        # contributions to the variance.
        correction = steps / variance / 2
        z = np.where(variance > 0, (np.abs(deviation) - correction) / np.sqrt(variance), -np.inf)
        skew = np.where(variance > 0, np.sign(deviation) * third / variance**1.5, 0.0)
    p_normal = np.clip(2 * special.ndtr(-z), 0, 1)
    finite = np.isfinite(z)
    tail = stats.pearson3.sf(np.where(finite, z, 0.0), skew)
    skewed = np.where(finite, 2 * tail, 1.0)
    rarest = 2 * np.exp(-sum(log_choose(m.n, m.n_first) for m in moments))
    p_value = np.maximum(p_normal, np.minimum(np.maximum(skewed, rarest), 1))
    active = np.sum([m.active for m in moments], axis=0)
    few = (active < FEW) & (active < sum(m.n for m in moments) - active)
    if few.any():
        strata = [(m.active_first[few], m.active[few], m.n_first, m.n) for m in moments]
        p_value[few] = np.maximum(p_value[few], fisher_exact(strata))
    return RankTest(auroc, p_normal, p_value, delong)


def _mean_auroc(
    moments: Sequence[UMoments], shares: Float[np.ndarray, " n_strata"]
) -> tuple[Float[np.ndarray, " n_latents"], Float[np.ndarray, " n_latents"]]:
    """Mean AUROC over strata with these weights, and its variance by DeLong."""
    aurocs = np.stack([m.auroc for m in moments])
    auroc = aurocs[0] if len(moments) == 1 else np.tensordot(shares, aurocs, 1)
    return auroc, np.tensordot(shares**2, np.stack([m.delong for m in moments]), 1)


def placements(
    scores: Float[np.ndarray, " n"],
    first: Bool[np.ndarray, " n"],
    weights: Float[np.ndarray, " n"],
) -> Float[np.ndarray, " n"]:
    """For each row, the weighted fraction of the other group's rows that it is ordered correctly
    with (first above second); equal scores count half.

    The weighted mean over either group is the AUROC.
    """
    _, inverse = np.unique(scores, return_inverse=True)
    fractions = np.empty(len(scores))
    for group, sign in ((first, 1.0), (~first, -1.0)):
        of_other = np.bincount(inverse[~group], weights[~group], minlength=inverse.max() + 1)
        below = (np.cumsum(of_other) - of_other / 2) / of_other.sum()
        fractions[group] = below[inverse[group]] if sign > 0 else 1 - below[inverse[group]]
    return fractions


@dataclass(frozen=True)
class Auroc:
    """P(first > second) + P(equal)/2, averaged over strata with van Elteren's weights."""

    value: float
    interval: Interval
    """Newcombe's method 5; NaN for small groups (see `auroc_interval`)."""


def auroc_of(
    scores: Float[np.ndarray, " n"],
    first: Bool[np.ndarray, " n"],
    strata: Shaped[np.ndarray, " n"],
) -> Auroc:
    """AUROC of one score, which may be negative, with its interval."""
    ranks = stats.rankdata(scores, method="dense").astype(np.float64)
    moments, per_row = _stratum_moments(sparse.csr_array(ranks[:, None]), first, strata)
    pairs = np.asarray(per_row) / max(per_row) * [m.n_pairs for m in moments]
    (auroc,), (variance,) = _mean_auroc(moments, pairs / pairs.sum())
    weights = stratum_weights(first, strata)
    chosen = [strata == name for name in weights]
    interval = auroc_interval(
        float(auroc),
        np.array([(first & c).sum() for c in chosen]),
        np.array([(~first & c).sum() for c in chosen]),
        np.array(list(weights.values())),
        float(variance),
    )
    return Auroc(float(auroc), interval)


def auroc_difference(
    scores: Float[np.ndarray, " n"],
    other: Float[np.ndarray, " n"],
    first: Bool[np.ndarray, " n"],
    strata: Shaped[np.ndarray, " n"],
) -> Auroc:
    """AUROC of `scores` minus that of `other`, with its interval; NaN limits for small groups."""
    a, b = (auroc_of(s, first, strata) for s in (scores, other))
    correlation = auroc_correlation(scores, other, first, strata)
    return Auroc(a.value - b.value, difference_of_aurocs(a, b, correlation))


def difference_of_aurocs(first: Auroc, second: Auroc, correlation: float) -> Interval:
    """Interval of first - second from the interval of each AUROC and their correlation.

    It preserves the asymmetry of the two intervals near 0 and 1, where DeLong's variance is 0.
    """
    return mover(first.value, first.interval, second.value, second.interval, correlation)


def auroc_correlation(
    scores: Float[np.ndarray, " n"],
    other: Float[np.ndarray, " n"],
    first: Bool[np.ndarray, " n"],
    strata: Shaped[np.ndarray, " n"],
) -> float:
    """Correlation of the AUROCs of two scores of the same observations.

    Computed from the covariance of the observations' placements in the other group (DeLong, DeLong
    and Clarke-Pearson 1988, Biometrics 44:837), summed over strata with the squared weights. 0
    where a variance is 0. Strata with a single observation of a group are ignored.
    """
    covariance = np.zeros((2, 2))
    for stratum, weight in stratum_weights(first, strata).items():
        chosen = strata == stratum
        of_first = first[chosen]
        if min(of_first.sum(), (~of_first).sum()) < 2:
            continue
        equal = np.ones(len(of_first))
        pair = np.stack([placements(s[chosen], of_first, equal) for s in (scores, other)])
        for group in (of_first, ~of_first):
            covariance += weight**2 * np.cov(pair[:, group]) / group.sum()
    scale = np.sqrt(covariance[0, 0] * covariance[1, 1])
    return float(np.clip(covariance[0, 1] / scale, -1, 1)) if scale > 0 else 0.0


STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
"""Default inverse L2 penalties among which cross-validation chooses."""
MAX_TRAIN = 20_000
"""Default limit on the number of rows that a probe is fitted on."""
MAX_ITERATIONS = 2000
N_FOLDS = 5

Folds = list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Fitted:
    """A linear probe; rows with a score above 0 are classified as the first group."""

    score: Callable[[Any], np.ndarray]
    """`[n, d]` (sparse if the training inputs were sparse) -> `[n]`."""
    weights: np.ndarray
    """`[d]`, per standard deviation of each input on the train rows."""
    direction: np.ndarray
    """`[d]`, per unit of each input: the gradient of the score."""
    c: float
    """Inverse L2 penalty chosen by cross-validation."""
    cv_log_loss: float
    cv_auroc: float
    """Mean AUROC over the validation sides of the folds, with the penalty `c`."""
    converged: bool


def folds(first: Bool[np.ndarray, " n"], units: Shaped[np.ndarray, " n"], seed: int) -> Folds:
    """Up to N_FOLDS pairs of (train, validation) indices; all rows of a unit are on one side.

    Raises DataError where even two folds would not have both groups on both sides.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    fewest = min(len(np.unique(units[first == g])) for g in (True, False))
    for n in range(min(N_FOLDS, fewest), 1, -1):
        splitter = StratifiedGroupKFold(n, shuffle=True, random_state=seed)
        pairs = list(splitter.split(np.zeros(len(first)), first, units))
        if all(len(np.unique(first[i])) == 2 for pair in pairs for i in pair):
            return pairs
    raise DataError(
        "too few units to cross-validate a probe: the smaller group has "
        f"{fewest} on the train split; add rows, or change dataset.split"
    )


def fit_logistic(
    x: Float[np.ndarray, "n d"] | sparse.csr_array,
    first: Bool[np.ndarray, " n"],
    strengths: Sequence[float],
    pairs: Folds,
    *,
    standardise: bool = True,
) -> Fitted:
    """Logistic regression with an L2 penalty.

    Inputs are standardised unless `standardise` is false, in which case sparse inputs stay sparse.
    The penalty is the one with the smallest log loss on the validation sides of `pairs`.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.pipeline import make_pipeline

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        c, loss, auroc = _cross_validated(x, first, sorted(strengths), pairs, standardise)
        best: Any = make_pipeline(_scaler(standardise), _regression(c)).fit(x, first)
    warned = any(issubclass(w.category, ConvergenceWarning) for w in caught)
    weights = best[-1].coef_[0]
    return Fitted(
        score=best.decision_function,
        weights=weights,
        direction=weights if best[0].scale_ is None else weights / best[0].scale_,
        c=float(c),
        cv_log_loss=loss,
        cv_auroc=auroc,
        converged=not warned,
    )


def _cross_validated(
    x: Float[np.ndarray, "n d"] | sparse.csr_array,
    first: Bool[np.ndarray, " n"],
    strengths: Sequence[float],
    pairs: Folds,
    standardise: bool,
) -> tuple[float, float, float]:
    """The inverse penalty with the smallest mean log loss on the validation sides, this loss, and
    the mean AUROC there.

    As of GridSearchCV, which takes twice as long for few rows: it fits the scaler for every
    penalty, and clones and checks all that it calls.
    """
    losses, aurocs = np.empty((2, len(strengths), len(pairs)))
    for fold, (train, validation) in enumerate(pairs):
        scaler = _scaler(standardise)
        of_train, of_validation = scaler.fit_transform(x[train]), scaler.transform(x[validation])
        is_first = first[validation]
        for i, c in enumerate(strengths):
            fitted = _regression(c).fit(of_train, first[train])
            scores = fitted.decision_function(of_validation)
            losses[i, fold] = _log_loss(special.expit(scores), is_first)
            aurocs[i, fold] = _auroc(scores, is_first)
    best = int(losses.mean(1).argmin())
    return strengths[best], float(losses[best].mean()), float(aurocs[best].mean())


def _auroc(scores: Float[np.ndarray, " n"], first: Bool[np.ndarray, " n"]) -> float:
    n_first = int(first.sum())
    u = stats.rankdata(scores)[first].sum() - n_first * (n_first + 1) / 2
    return float(u / (n_first * (len(first) - n_first)))


def _log_loss(probability: Float[np.ndarray, " n"], first: Bool[np.ndarray, " n"]) -> float:
    """Mean of -log of the probability of the right group, at least a rounding error from 0."""
    rounding = np.finfo(probability.dtype).eps
    right = np.where(first, probability, 1 - probability)
    return float(-np.log(np.clip(right, rounding, 1 - rounding)).mean())


def _scaler(standardise: bool) -> Any:
    from sklearn.preprocessing import StandardScaler

    return StandardScaler(with_mean=standardise, with_std=standardise)


def _regression(c: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=c, max_iter=MAX_ITERATIONS)


def limited(rows: Int[np.ndarray, " n"], most: int, seed: int) -> Int[np.ndarray, " m"]:
    """`rows`, or a random sample of `most` of them, in order, where there are more."""
    if len(rows) <= most:
        return rows
    return np.sort(np.random.default_rng([seed, 23]).choice(rows, most, replace=False))
