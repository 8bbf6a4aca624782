"""P-values: permutation, sign-flip and exact tests, corrections; power, shares of variance."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Shaped
from scipy import optimize, special, stats
from torch import Tensor

from saexp.errors import DataError
from saexp.stats import Interval, mean_interval, wilson

FEW = 10
"""Latents active in fewer rows than this (and inactive in more) are tested exactly."""


def derived_seed(seed: int, *purpose: object) -> int:
    """A seed for one purpose, such as ("controls", layer, stream); equal for equal arguments."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def random_directions(n: int, d: int, seed: int, *purpose: object) -> Float[Tensor, "n d"]:
    """Unit vectors, uniform on the sphere, float32 on the CPU and so equal on every device.

    Directions are independent where `seed` or `purpose` (such as the name of the stream) differ, so
    that controls at two layers are unrelated. The first rows are the same for any `n`.

    >>> random_directions(2, 64, 0, "layer_1.resid_post").norm(dim=-1)
    tensor([1., 1.])
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, d, *purpose))
    rows = [torch.randn(d, generator=generator) for _ in range(n)]
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1) if n else torch.empty(0, d)


MIN_CONTROLS = 19
"""Smallest number of controls with which a rank p-value can reach 0.05."""


def rank_p_value(value: float, controls: Float[np.ndarray, " k"]) -> float:
    """Two-sided rank p-value of `value`: (1 + number of controls as extreme) / (k + 1).

    Extremeness is the distance from the median of all k + 1 values. It treats the value and the
    controls alike, so the p-value is valid for any distribution (Phipson and Smyth 2010). It is at
    least 1 / (k + 1), and NaN without controls.

    >>> rank_p_value(0.9, np.array([0.1, 0.0, -0.1, 0.05]))
    0.2
    """
    if not len(controls):
        return float("nan")
    values = np.append(controls, value)
    distance = np.abs(values - np.median(values))
    # The tolerance makes distances equal that differ only by rounding.
    as_extreme = distance[:-1] >= distance[-1] - 1e-12
    return float((1 + as_extreme.sum()) / len(values))


def prediction_p_value(value: float, controls: Float[np.ndarray, " k"]) -> float:
    """Two-sided p-value of `value` as another draw from the normal distribution of the controls.

    t = (value - mean) / (s sqrt(1 + 1/k)) with k - 1 degrees of freedom (Crawford and Howell 1998).
    NaN for fewer than 3 controls, or controls that are all equal.
    """
    k = len(controls)
    spread = float(controls.std(ddof=1)) if k > 2 else 0.0
    if spread <= 0:
        return float("nan")
    t = (value - controls.mean()) / (spread * np.sqrt(1 + 1 / k))
    return float(2 * special.stdtr(k - 1, -abs(t)))


N_FLIPS = 10_000
ROUNDING = 1e-12
"""Statistics that differ by less, relative to the mean absolute difference, count as equal."""
_CHUNK_VALUES = 4_000_000
"""Values of one chunk of flips."""


def sign_flip_p_values(
    differences: Float[np.ndarray, "n k"], seed: int, n_flips: int = N_FLIPS
) -> Float[np.ndarray, " k"]:
    """Two-sided sign-flip test that each column's mean is 0 (Fisher 1935); rows are units.

    All 2^n sign flips are enumerated where there are at most `n_flips` of them. Otherwise random
    flips, the same for all columns, give p = (1 + number with as large a statistic) / (1 + n_flips)
    (Phipson and Smyth 2010).
    """
    n, n_columns = differences.shape
    limit = np.abs(differences.mean(0)) - ROUNDING * np.abs(differences).mean(0)
    as_large, total = np.zeros(n_columns), 0
    for signs in flips(n, n_columns, n_flips, seed):
        as_large += (np.abs(signs @ differences) / n >= limit).sum(0)
        total += len(signs)
    return flip_p_values(as_large, total, n, n_flips)


def flip_p_values(
    as_large: Float[np.ndarray, " k"], n_evaluated: int, n_units: int, n_flips: int
) -> Float[np.ndarray, " k"]:
    """p-values from how many of `n_evaluated` flips have a statistic as large as the observed."""
    if _is_exhaustive(n_units, n_flips):
        return as_large / n_evaluated
    return (1 + as_large) / (1 + n_evaluated)


def flips(
    n_units: int, n_columns: int, n_flips: int, seed: int
) -> Iterator[Float[np.ndarray, "m n_units"]]:
    """Chunks of sign flips: all of them, or `n_flips` random ones where there are more."""
    step = max(1, _CHUNK_VALUES // max(n_units, n_columns))
    if _is_exhaustive(n_units, n_flips):
        bits = np.arange(n_units)
        for start in range(0, 2**n_units, step):
            numbers = np.arange(start, min(start + step, 2**n_units))[:, None]
            yield (((numbers >> bits) & 1) * 2 - 1).astype(np.float64)
        return
    rng = np.random.default_rng([seed, 29])
    for start in range(0, n_flips, step):
        m = min(step, n_flips - start)
        yield rng.integers(2, size=(m, n_units), dtype=np.int8) * 2.0 - 1


def _is_exhaustive(n_units: int, n_flips: int) -> bool:
    return n_units < 63 and 2**n_units <= n_flips


@dataclass(frozen=True)
class PairedDifference:
    """Mean over units of second - first, with its interval and test."""

    n_units: int
    mean_first: float
    mean_second: float
    difference: float
    ci_low: float
    """Bootstrap-t over units; NaN for fewer than 10 units or where all differences are equal."""
    ci_high: float
    p_value: float
    """Two-sided sign-flip permutation test of a mean difference of 0."""


@dataclass(frozen=True)
class PairedHeads:
    """Differences of attention heads, and their tests."""

    overall: PairedDifference
    """Of the mean over all heads."""
    difference: Float[np.ndarray, " h"]
    """Mean over units."""
    p_value: Float[np.ndarray, " h"]
    """Sign-flip test of each head, uncorrected."""
    p_corrected: Float[np.ndarray, " h"]
    """Corrected for testing all heads (familywise error rate)."""


def paired_difference(
    first: Float[np.ndarray, " n"],
    second: Float[np.ndarray, " n"],
    units: Sequence[object] | np.ndarray,
    *,
    n_permutations: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """Mean over units of `second - first`, whose rows are paired; rows of a unit are averaged.

    See `sign_flip_p_values` for the p-value and `mean_interval` for the interval. Raises DataError
    for unequal lengths, no rows, and values that are not finite.
    """
    a, b = (_by_unit(_checked(v, units)[:, None], units)[:, 0] for v in (first, second))
    return _paired(a, b, n_permutations, confidence, seed)


def paired_head_test(
    original: Float[np.ndarray, "n h"],
    edited: Float[np.ndarray, "n h"],
    units: Sequence[object] | np.ndarray,
    n_permutations: int = 10_000,
    seed: int = 0,
    *,
    confidence: float = 0.95,
) -> PairedHeads:
    """Test `edited - original` of every head, and of the mean over heads; units are independent.

    The statistic of a head is the mean divided by the root mean square of the units' differences,
    which increases with Student's t and is on the same scale for all heads. Corrected p-values use
    Westfall and Young's step-down maxT method (1993, algorithm 4.1): each flip applies to all heads
    of a unit, which preserves the correlation of heads. They control the familywise error rate
    whichever heads changed. Raises DataError as `paired_difference` does.
    """
    if original.shape != edited.shape:
        raise DataError(f"shapes {original.shape} and {edited.shape} of paired values differ")
    a, b = (_by_unit(_checked(v, units), units) for v in (original, edited))
    overall = _paired(a.mean(1), b.mean(1), n_permutations, confidence, seed)
    differences = b - a
    size = np.sqrt((differences**2).mean(0))
    scaled = np.divide(differences, size, out=np.zeros_like(differences), where=size > 0)
    observed = np.abs(scaled.mean(0))
    order = np.argsort(-observed, kind="stable")
    ranked = observed[order]
    limit = ranked - ROUNDING
    n_single = np.zeros(len(order))
    n_largest = np.zeros(len(order))
    total = 0
    for signs in flips(len(scaled), len(order), n_permutations, seed):
        flipped = np.abs(signs @ scaled[:, order]) / len(scaled)
        n_single += (flipped >= limit).sum(0)
        # Maximum over each head and the heads with a smaller observed statistic.
        maxima = np.maximum.accumulate(flipped[:, ::-1], axis=1)[:, ::-1]
        n_largest += (maxima >= limit).sum(0)
        total += len(signs)
    p_value, corrected = np.empty(len(order)), np.empty(len(order))
    p_value[order] = flip_p_values(n_single, total, len(scaled), n_permutations)
    corrected[order] = np.maximum.accumulate(
        flip_p_values(n_largest, total, len(scaled), n_permutations)
    )
    return PairedHeads(overall, differences.mean(0), p_value, corrected)


def _checked(values: np.ndarray, units: Sequence[object] | np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if len(values) != len(units):
        raise DataError(f"{len(values)} values for {len(units)} units; pass one unit per row")
    if not values.size:
        raise DataError("there are no pairs to compare: no row of the data set is left")
    if not np.isfinite(values).all():
        row = int(np.argwhere(~np.isfinite(values))[0, 0])
        raise DataError(f"row {row} has a value that is not finite; leave this row out")
    return values


def _by_unit(values: np.ndarray, units: Sequence[object] | np.ndarray) -> np.ndarray:
    """`[n, h]` -> means `[u, h]`, units in order of first appearance."""
    index: dict[object, int] = {}
    of_row = np.array([index.setdefault(unit, len(index)) for unit in units])
    sums = np.zeros((len(index), values.shape[1]))
    np.add.at(sums, of_row, values)
    return sums / np.bincount(of_row)[:, None]


def _paired(
    first: np.ndarray,
    second: np.ndarray,
    n_permutations: int,
    confidence: float,
    seed: int,
) -> PairedDifference:
    """The paired difference of one value per unit."""
    differences = second - first
    low, high = mean_interval(differences[:, None], seed, confidence=confidence)
    return PairedDifference(
        n_units=len(differences),
        mean_first=float(first.mean()),
        mean_second=float(second.mean()),
        difference=float(differences.mean()),
        ci_low=float(low[0]),
        ci_high=float(high[0]),
        p_value=float(sign_flip_p_values(differences[:, None], seed, n_permutations)[0]),
    )


def claim_fraction(name: str, n_claims: int, n: int) -> dict[str, float | int | None]:
    """Metric `name` = n_claims / n with its Wilson interval, and `<name>_n`; null where n is 0."""
    low, high = wilson(n_claims, n)
    values = (n_claims / n, float(low), float(high)) if n else (None, None, None)
    names = (name, f"{name}_ci_low", f"{name}_ci_high")
    return {f"{name}_n": n, **dict(zip(names, values, strict=True))}


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


def fisher_exact(
    strata: Sequence[tuple[np.ndarray, np.ndarray, int, int]],
) -> Float[np.ndarray, " n_latents"]:
    """Fisher's exact test, two-sided (the smaller tail doubled), conditional on each stratum.

    A stratum is (active rows of the first group, active rows, rows of the first group, rows). The
    statistic is the number of active rows of the first group over all strata.
    """
    active_first = sum(s[0] for s in strata)
    probability: np.ndarray | None = None
    for _, active, n_first, n in strata:
        of_stratum = stats.hypergeom.pmf(np.arange(FEW)[:, None], n, active, n_first)
        probability = of_stratum if probability is None else _convolved(probability, of_stratum)
    assert probability is not None
    k = np.arange(FEW)[:, None]
    tails = (k <= active_first, k >= active_first)
    below, above = (np.where(tail, probability, 0).sum(0) for tail in tails)
    return np.minimum(1, 2 * np.minimum(below, above))


def _convolved(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Distribution of the sum of two independent counts, truncated at FEW."""
    out = np.zeros_like(first)
    for k in range(len(first)):
        out[k:] += first[k] * second[: len(second) - k]
    return out


def log_choose(n: int, k: int) -> float:
    """Logarithm of the binomial coefficient, 0 <= k <= n."""
    return float(special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1))


def difference_p_value(difference: float, interval: Interval) -> float:
    """Two-sided p-value of no difference, from its 95% interval; NaN where that has no limits.

    The limit on the side of 0 is taken to be 1.96 standard errors away, so that p < 0.05 exactly
    where the interval excludes 0. In large samples it is DeLong's test (1988, Biometrics 44:837).
    """
    low, high = float(interval.low), float(interval.high)
    if np.isnan(low) or np.isnan(high):
        return float("nan")
    towards_zero = difference - low if difference > 0 else high - difference
    if difference == 0:
        return 1.0
    if towards_zero == 0:
        return 0.0
    z = special.ndtri(0.975) * abs(difference) / towards_zero
    return float(2 * special.ndtr(-z))


def main_effect_shares(
    factors: Sequence[Shaped[np.ndarray, " n"]], values: Float[np.ndarray, " n"]
) -> list[float]:
    """For each factor the share of the values' variance that its main effect explains.

    That is sum_v n_v (mean_v - mean)^2 / sum_i (y_i - mean)^2 over the levels v of the factor. On
    a grid in which every combination of levels occurs equally often this is the first-order term
    of the functional ANOVA (Sobol 1993; Hutter, Hoos and Leyton-Brown 2014, for hyperparameters):
    the shares add up to at most 1, and what is left are interactions. On other grids the shares of
    factors overlap. NaN where all values are equal.
    """
    deviations = values - values.mean()
    total = float((deviations**2).sum())
    # Rounding of the mean alone leaves about this much.
    if total <= len(values) * (1e-12 * float(np.abs(values).max(initial=0))) ** 2:
        return [float("nan")] * len(factors)
    shares = []
    for factor in factors:
        _, level = np.unique(factor, return_inverse=True)
        sums, counts = np.bincount(level, deviations), np.bincount(level)
        shares.append(float((sums**2 / counts).sum()) / total)
    return shares
