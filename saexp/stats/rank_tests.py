"""Rank tests for all latents at once on sparse columns, where zeros are ties."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy import sparse, special, stats

from saexp.stats.intervals import Interval, auroc_interval, mover

FEW = 10
"""A latent active in fewer rows than this, and off in more, is tested exactly."""


@dataclass(frozen=True)
class RankTest:
    """Per latent, `[n_latents]`."""

    auroc: Float[np.ndarray, " n"]
    """P(first > second) + P(equal)/2."""
    p_normal: Float[np.ndarray, " n"]
    """Two-sided Mann-Whitney U, normal approximation with tie and continuity correction."""
    p_value: Float[np.ndarray, " n"]
    """`p_normal`, raised where that approximation is too small: by orders of magnitude for rare
    latents when groups are unequal. It is at least the tail of the Pearson type III curve that has
    the permutation distribution's own skewness, the chance of the rarest of all arrangements
    (doubled), and, for latents with fewer than `FEW` active rows, Fisher's exact p-value of active
    against not (its smaller tail doubled)."""
    variance: Float[np.ndarray, " n"]
    """Estimated variance of `auroc` (DeLong, DeLong and Clarke-Pearson 1988), whatever the
    groups."""


class Ranked:
    """Stored entries sorted by (latent, value), with their ties; made once per set of rows."""

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
        new = np.ones(len(data), dtype=bool)
        new[1:] = (data[1:] != data[:-1]) | (self.column[1:] != self.column[:-1])
        self.tie_start = np.flatnonzero(new)
        """First entry of each group of equal values in one latent."""
        self.tie_column = self.column[self.tie_start]
        filled = np.unique(self.tie_column, return_index=True)
        self.filled, self.first_tie = filled
        """Latents with entries, and the first tie group of each."""

    def _per_latent(self, of_tie: np.ndarray) -> np.ndarray:
        """Sum over the tie groups of each latent: `[n_ties, ...]` -> `[n_latents, ...]`."""
        out = np.zeros((self.n_latents, *of_tie.shape[1:]))
        if len(of_tie):
            out[self.filled] = np.add.reduceat(of_tie, self.first_tie, axis=0)
        return out

    def auroc(self, w_first: np.ndarray, w_second: np.ndarray) -> np.ndarray:
        """AUROC with row weights `[n_rows, B]`: `[n_latents, B]`."""
        n_first, n_second = w_first.sum(0), w_second.sum(0)
        if not len(self.row):
            return np.full((self.n_latents, w_first.shape[1]), 0.5)
        of_first = np.add.reduceat(w_first[self.row], self.tie_start, axis=0)
        of_second = np.add.reduceat(w_second[self.row], self.tie_start, axis=0)
        zero_first = n_first - self._per_latent(of_first)
        zero_second = n_second - self._per_latent(of_second)
        wins = self._per_latent(of_first * self._passed(of_second, zero_second))
        return (wins + zero_first * zero_second / 2) / (n_first * n_second)

    def _passed(self, of_tie: np.ndarray, zeros: np.ndarray) -> np.ndarray:
        """Rows of a group below a tie group and half of those in it, `[n_ties, ...]`.

        `of_tie` counts the group's rows in each tie group and `zeros` its zeros in each latent.
        """
        cumulated = np.cumsum(of_tie, axis=0) - of_tie
        base = np.zeros_like(zeros)
        base[self.filled] = cumulated[self.first_tie]
        return cumulated - base[self.tie_column] + zeros[self.tie_column] + of_tie / 2

    def observed(self) -> Float[np.ndarray, " n"]:
        """AUROC of every latent, of the rows as they are."""
        first = self.first.astype(np.float64)[:, None]
        return self.auroc(first, 1 - first)[:, 0]

    def delong(self) -> Float[np.ndarray, " n"]:
        """DeLong's variance of every latent's AUROC; a group of one row adds nothing to it."""
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
        for own, other in ((0, 1), (1, 0)):
            # Share of the other group's rows that a row is above, ties as halves.
            above = self._passed(counts[other], zeros[other]) / n[other]
            at_zero = zeros[other] / 2 / n[other]
            mean = self._per_latent(counts[own] * above) + zeros[own] * at_zero
            square = self._per_latent(counts[own] * above**2) + zeros[own] * at_zero**2
            spread = np.maximum(square - mean**2 / n[own], 0)
            total += spread / (max(n[own] - 1, 1) * n[own])
        return total

    def mann_whitney(self) -> RankTest:
        """AUROC and p-values of every latent."""
        return _rank_test([self._moments()], [1.0])

    def _moments(self) -> "_Moments":
        """Of the permutation distribution of U, the count of pairs in which the first is larger."""
        n1 = int(self.first.sum())
        n2 = self.n_rows - n1
        n = n1 + n2
        sizes = np.diff(np.append(self.tie_start, len(self.row))).astype(np.float64)
        active = np.bincount(self.column, minlength=self.n_latents).astype(np.float64)
        zeros = n - active
        before = np.cumsum(sizes) - sizes
        base = np.zeros(self.n_latents)
        base[self.filled] = before[self.first_tie]
        # Midranks less their mean; the zeros are one group of ties below all others.
        rank = zeros[self.tie_column] + before - base[self.tie_column] + (sizes - n) / 2
        squares = self._per_latent(sizes * rank**2) + zeros * (active / 2) ** 2
        cubes = self._per_latent(sizes * rank**3) - zeros * (active / 2) ** 3
        return _Moments(
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
class _Moments:
    """Per latent, `[n_latents]`, in one stratum."""

    n_first: int
    n: int
    auroc: np.ndarray
    delong: np.ndarray
    """Estimated variance of the AUROC."""
    variance: np.ndarray
    """Of U, in permutations."""
    third: np.ndarray
    """Third central moment of U."""
    active: np.ndarray
    """Rows with a value above 0."""
    active_first: np.ndarray
    """Those of the first group."""

    @property
    def n_pairs(self) -> int:
        return self.n_first * (self.n - self.n_first)


def stratified_rank_test(
    values: sparse.csr_array,
    first: Bool[np.ndarray, " n_rows"],
    strata: Shaped[np.ndarray, " n_rows"],
) -> RankTest:
    """Van Elteren's test (1960): Mann-Whitney within strata, combined with weights 1 / (n + 1).

    A stratum in which a group has no row has no say. The AUROC is the mean over strata weighted as
    the test weights them, n_first n_second / (n + 1); p-values are corrected as in RankTest, with
    the exact test of active against inactive made within strata. One stratum gives `mann_whitney`.
    Raises ValueError where no stratum has rows of both groups.
    """
    moments, weights = [], []
    for name in dict.fromkeys(strata.tolist()):
        chosen = strata == name
        of_first = first[chosen]
        if of_first.any() and not of_first.all():
            moments.append(Ranked(values[chosen], of_first)._moments())
            weights.append(1 / (len(of_first) + 1))
    if not moments:
        raise ValueError("no stratum has rows of both groups")
    return _rank_test(moments, weights)


def stratum_weights(
    first: Bool[np.ndarray, " n_rows"], strata: Shaped[np.ndarray, " n_rows"]
) -> dict[object, float]:
    """Weight of each stratum in van Elteren's test, n_first n_second / (n + 1), summing to 1.

    Strata in which a group has no row are left out.
    """
    found = {}
    for name in dict.fromkeys(strata.tolist()):
        of_first = first[strata == name]
        n, n_first = len(of_first), int(of_first.sum())
        if 0 < n_first < n:
            found[name] = n_first * (n - n_first) / (n + 1)
    total = sum(found.values())
    return {name: weight / total for name, weight in found.items()}


def _rank_test(moments: Sequence[_Moments], weights: Sequence[float]) -> RankTest:
    """From strata: the weighted sum of their U, which are independent."""
    w = np.asarray(weights) / max(weights)
    pairs = w * [m.n_pairs for m in moments]
    aurocs = np.stack([m.auroc for m in moments])
    shares = pairs / pairs.sum()
    auroc = aurocs[0] if len(moments) == 1 else np.tensordot(shares, aurocs, 1)
    delong = np.tensordot(shares**2, np.stack([m.delong for m in moments]), 1)
    variance = sum(a**2 * m.variance for a, m in zip(w, moments, strict=True))
    third = sum(a**3 * m.third for a, m in zip(w, moments, strict=True))
    deviation = sum(p * (m.auroc - 0.5) for p, m in zip(pairs, moments, strict=True))
    steps = sum(a**3 * m.variance for a, m in zip(w, moments, strict=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        # Half a step of U, where strata differ in weight their mean step by share of the variance.
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
        p_value[few] = np.maximum(p_value[few], _fisher([_chosen(m, few) for m in moments]))
    return RankTest(auroc, p_normal, p_value, delong)


def _chosen(m: _Moments, few: np.ndarray) -> tuple[np.ndarray, np.ndarray, int, int]:
    return m.active_first[few], m.active[few], m.n_first, m.n


def _fisher(
    strata: Sequence[tuple[np.ndarray, np.ndarray, int, int]],
) -> Float[np.ndarray, " n_latents"]:
    """Fisher's exact test, two-sided (the smaller tail doubled), conditional on each stratum.

    A stratum is (active rows of the first group, active rows, rows of the first group, rows); the
    statistic is the number of active rows of the first group in all strata.
    """
    on_first = sum(s[0] for s in strata)
    chance: np.ndarray | None = None
    for _, active, n_first, n in strata:
        of_stratum = stats.hypergeom.pmf(np.arange(FEW)[:, None], n, active, n_first)
        chance = of_stratum if chance is None else _convolved(chance, of_stratum)
    assert chance is not None
    k = np.arange(FEW)[:, None]
    below, above = (np.where(part, chance, 0).sum(0) for part in (k <= on_first, k >= on_first))
    return np.minimum(1, 2 * np.minimum(below, above))


def _convolved(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Distribution of the sum of two independent counts, cut at FEW."""
    out = np.zeros_like(first)
    for k in range(len(first)):
        out[k:] += first[k] * second[: len(second) - k]
    return out


def log_choose(n: int, k: int) -> float:
    """Logarithm of the binomial coefficient, 0 <= k <= n."""
    return float(special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1))


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
    """Newcombe's method 5; NaN for small groups (see `auroc_interval`)."""


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
    interval = auroc_interval(
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
