"""Confidence intervals: bootstrap, Wilson, differences of rates and of means, AUROCs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num, Shaped
from scipy import special

MIN_N = 10
"""Smallest sample with an interval: for fewer values no method covers the mean of skewed data."""
N_RESAMPLES = 2000
_CHUNK_VALUES = 4_000_000
"""Values of one chunk of resamples."""

_ROUNDING = 1e-12
"""Relative differences below this are attributed to rounding."""

Limits = tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]
"""Lower and upper limits."""


def mean_interval(
    values: Float[np.ndarray, "n k"],
    seed: int,
    *,
    n_resamples: int = N_RESAMPLES,
    confidence: float = 0.95,
) -> Limits:
    """Bootstrap-t intervals of each column's mean (Efron and Tibshirani 1993, section 12.5).

    Rows are independent units. All columns share the resamples. NaN for fewer than `MIN_N` rows and
    for columns whose values are all equal: their spread is unknown, not zero. At n = 10 the
    coverage is 94% for exponential values and 91% for log-normal ones (sigma 1), where percentile
    intervals reach 87% and 81%. For a column that is 0 in most rows it is 84% to 90% with about 2
    nonzero rows, and at least 93% from about 5 nonzero rows on.
    """
    ones = np.ones((len(values), 1))
    return ratio_interval(values, ones, seed, n_resamples=n_resamples, confidence=confidence)


def difference_of_means(
    values: Float[np.ndarray, " n"],
    first: Shaped[np.ndarray, " n"],
    strata: Shaped[np.ndarray, " n"],
    weights: Mapping[Any, float],
    seed: int,
    *,
    n_resamples: int = N_RESAMPLES,
) -> tuple[float, float, float]:
    """Mean of the first group minus that of the second: (difference, 95% bootstrap-t limits).

    The difference is taken within each stratum in `weights` and averaged with these weights, which
    sum to 1; units of other strata are ignored. Each group of each stratum is resampled separately.
    The interval is NaN where a group has fewer than `MIN_N` units, a stratum has fewer than 2 units
    of a group, or the values do not vary within any group of a stratum.
    """
    used = np.array([stratum in weights for stratum in strata.tolist()], dtype=bool)
    values, first, strata = values[used], np.asarray(first[used], bool), strata[used]
    cells = np.zeros(len(values), dtype=np.int64)
    factors = np.zeros(len(values))
    for index, (name, weight) in enumerate(weights.items()):
        for side, sign in ((True, 1.0), (False, -1.0)):
            of_cell = (strata == name) & (first == side)
            cells[of_cell] = 2 * index + side
            factors[of_cell] = sign * weight / max(of_cell.sum(), 1)
    difference = float(factors @ values)
    largest = np.abs(values).max(initial=0.0)
    if abs(difference) <= _ROUNDING * largest:
        difference = 0.0
    by_cell = [values[cells == cell] for cell in range(2 * len(weights))]
    too_small = min(first.sum(), (~first).sum()) < MIN_N or min(map(len, by_cell)) < 2
    if too_small or max(map(np.ptp, by_cell)) <= _ROUNDING * largest:
        return difference, float("nan"), float("nan")
    n = len(values)
    low, high = ratio_interval(
        (factors * values)[:, None],
        np.full((n, 1), 1 / n),
        seed,
        cells=cells,
        n_resamples=n_resamples,
    )
    return difference, float(low[0]), float(high[0])


def ratio_interval(
    numerators: Float[np.ndarray, "n k"],
    denominators: Float[np.ndarray, "n k"] | Float[np.ndarray, "n 1"],
    seed: int,
    *,
    cells: Int[np.ndarray, " n"] | None = None,
    n_resamples: int = N_RESAMPLES,
    confidence: float = 0.95,
) -> Limits:
    """Bootstrap-t intervals of each column's sum of numerators over sum of denominators.

    Rows are independent units, each holding the sums over its dependent rows (such as the tokens of
    a text), so this is a cluster bootstrap. The standard error of a ratio R, in the sample and in
    each resample, is that of the linearised ratio, computed from the residuals
    numerator - R denominator (Davison and Hinkley 1997, sections 2.7.2 and 3.8). Units are
    resampled within their cell. NaN for fewer than `MIN_N` rows, without resamples, where all
    residuals are 0, and where the sum of the denominators is 0 in the sample, or is 0 or changes
    its sign in at least 5% of the resamples.
    """
    n, n_columns = numerators.shape
    low, high = np.full(n_columns, np.nan), np.full(n_columns, np.nan)
    total = np.broadcast_to(denominators.sum(0), n_columns)
    if n < MIN_N or not n_resamples:
        return low, high
    cells = np.zeros(n, dtype=np.int64) if cells is None else cells
    members = [np.flatnonzero(cells == cell) for cell in np.unique(cells)]
    counts = _resample_counts(members, n_resamples, np.random.default_rng([seed, 53, n]))
    varies = numerators.max(0) > numerators.min(0)
    varies = varies | (denominators.max(0) > denominators.min(0))
    usable = np.flatnonzero(varies & (total != 0) & np.isfinite(numerators.sum(0)))
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    step = max(1, _CHUNK_VALUES // n_resamples)
    for start in range(0, len(usable), step):
        columns = usable[start : start + step]
        x = denominators if denominators.shape[1] == 1 else denominators[:, columns]
        ratio = numerators[:, columns].sum(0) / total[columns]
        residuals = numerators[:, columns] - ratio * x
        error = np.sqrt(_variance(np.ones((1, n)), residuals, members)[0]) / np.abs(total[columns])
        sums = counts @ x
        sums = np.where(sums * total[columns] > 0, sums, np.nan)
        shift = counts @ residuals / sums
        # Subtracting the same number from all residuals does not change their variance.
        correction = None if x.shape[1] == 1 and np.ptp(x) == 0 else (x, shift)
        errors = np.sqrt(_variance(counts, residuals, members, correction)) / np.abs(sums)
        # A resample in which all residuals are equal has no t statistic and is left out.
        t = shift / np.where(errors > 1e-6 * error, errors, np.nan)
        defined = (np.isfinite(sums).mean(0) > 0.95) & (error > 1e-12 * np.abs(ratio))
        defined = defined & np.isfinite(t).any(0)
        with np.errstate(invalid="ignore"):
            upper, lower = np.nanquantile(np.where(defined, t, 0.0), tails, axis=0)
        low[columns] = np.where(defined, ratio - lower * error, np.nan)
        high[columns] = np.where(defined, ratio - upper * error, np.nan)
    return low, high


def _resample_counts(
    members: Sequence[Int[np.ndarray, " m"]], n_resamples: int, rng: np.random.Generator
) -> Float[np.ndarray, "b n"]:
    """How often each unit is drawn in each resample; the size of every cell is kept."""
    counts = np.zeros((n_resamples, sum(map(len, members))))
    for units in members:
        m = len(units)
        counts[:, units] = rng.multinomial(m, np.full(m, 1 / m), size=n_resamples)
    return counts


def _variance(
    counts: Float[np.ndarray, "b n"],
    residuals: Float[np.ndarray, "n k"],
    members: Sequence[Int[np.ndarray, " m"]],
    correction: tuple[Float[np.ndarray, "n j"], Float[np.ndarray, "b k"]] | None = None,
) -> Float[np.ndarray, "b k"]:
    """Variance of the sum of residuals in each resample; cells are independent.

    With `correction` (x, shift), the residuals are `residuals` - shift * x.
    """
    variance = np.zeros((len(counts), residuals.shape[1]))
    for units in members:
        m = len(units)
        d, e = counts[:, units], residuals[units]
        squares, total = d @ e**2, d @ e
        if correction is not None:
            x, shift = correction[0][units], correction[1]
            squares += shift**2 * (d @ x**2) - 2 * shift * (d @ (e * x))
            total -= shift * (d @ x)
        variance += (squares - total**2 / m) * (m / max(m - 1, 1))
    return np.maximum(variance, 0)


MIN_GROUP = 10
"""Smallest group with an interval of an AUROC or a separation: at 8 against 8 units the coverage is
only 85% for an AUROC of 0.99 of a latent that is inactive on most units."""
_BISECTIONS = 60
_LEVEL = 0.05
"""Level of the one-sided Poisson limits near 0 and 1."""
_TINY = 1e-9
_ONE_STRATUM = np.ones(1)


class Interval(NamedTuple):
    """Lower and upper limits, arrays of the inputs' broadcast shape."""

    low: np.ndarray
    high: np.ndarray


def _z(confidence: float) -> float:
    return float(special.ndtri(0.5 + confidence / 2))


def wilson(
    n_successes: Num[np.ndarray, "..."] | float,
    n: Num[np.ndarray, "..."] | float,
    confidence: float = 0.95,
) -> Interval:
    """Wilson score interval of a proportion (Wilson 1927); (0, 1) where n is 0.

    >>> low, high = wilson(0, 10)
    >>> float(low), round(float(high), 3)
    (0.0, 0.278)
    """
    k, n = np.broadcast_arrays(np.asarray(n_successes, float), np.asarray(n, float))
    size = np.maximum(n, 1)
    rate, square = k / size, _z(confidence) ** 2
    middle = (rate + square / (2 * size)) / (1 + square / size)
    half = np.sqrt(square) / (1 + square / size)
    half = half * np.sqrt(rate * (1 - rate) / size + square / (4 * size**2))
    # Include the rate itself, which rounding at 0 and 1 could leave out.
    low = np.clip(np.minimum(rate, middle - half), 0, 1)
    high = np.clip(np.maximum(rate, middle + half), 0, 1)
    return Interval(np.where(n > 0, low, 0.0)[()], np.where(n > 0, high, 1.0)[()])


def mover(
    first: Float[np.ndarray, "..."] | float,
    a: Interval,
    second: Float[np.ndarray, "..."] | float,
    b: Interval,
    correlation: float = 0.0,
) -> Interval:
    """Interval of first - second from the interval of each and the correlation of the estimates.

    This is the method of variance estimates recovery (MOVER: Zou 2007, Psychological Methods
    12:399). With Wilson intervals it is Newcombe's hybrid interval of a difference of proportions
    (1998a, Statistics in Medicine 17:873, method 10). Both quantities lie in [0, 1].
    """
    below, above = (
        np.sqrt(np.maximum(x**2 - 2 * correlation * x * y + y**2, 0.0))
        for x, y in ((first - a.low, b.high - second), (a.high - first, second - b.low))
    )
    difference = first - second
    return Interval(np.maximum(difference - below, -1.0), np.minimum(difference + above, 1.0))


def separation_interval(
    first: Float[np.ndarray, "..."],
    second: Float[np.ndarray, "..."],
    n_first: Num[np.ndarray, " n_strata"],
    n_second: Num[np.ndarray, " n_strata"],
    weights: Float[np.ndarray, " n_strata"],
    confidence: float = 0.95,
) -> Interval:
    """Interval of first - second, two means over units with values in [0, 1] and over strata.

    `first` and `second` are weighted means over the strata, with weights that sum to 1; `n_first`
    and `n_second` are numbers of units. Newcombe's hybrid (`mover`) of Wilson limits, each at the
    effective size 1 / sum(w^2 / n) of the group, which is n for one stratum. The limits are widened
    near 0 and 1 as by Brown, Cai and DasGupta (2001, Statistical Science 16:101, section 4.1.1);
    otherwise the coverage of a separation of 0.99 would be 90% at n = 10. With several strata, and
    for values other than 0 and 1, the variance is smaller than assumed and the interval wider than
    necessary. NaN where a group has fewer than `MIN_GROUP` units.
    """
    sizes = [1 / float((weights**2 / n).sum()) for n in (n_first, n_second)]
    limits = [
        _modified_wilson(rate, n, confidence)
        for rate, n in zip((first, second), sizes, strict=True)
    ]
    interval = mover(first, limits[0], second, limits[1])
    return _without_small_groups(interval, n_first, n_second)


def _modified_wilson(rate: Float[np.ndarray, "..."], n: float, confidence: float) -> Interval:
    """Wilson limits, near 0 and 1 replaced by Poisson limits where these are wider."""
    low, high = wilson(rate * n, n, confidence)
    max_count = 2 if n <= 50 else 3
    ends = []
    for fraction in (rate, 1 - rate):
        poisson = special.gammaincinv(np.maximum(fraction * n, _TINY), _LEVEL) / n
        near = (fraction > _TINY) & (fraction * n <= max_count * (1 + _TINY))
        ends.append(np.where(near, poisson, 1.0))
    return Interval(np.minimum(low, ends[0]), np.maximum(high, 1 - ends[1]))


def _without_small_groups(
    interval: Interval, n_first: Num[np.ndarray, "..."], n_second: Num[np.ndarray, "..."]
) -> Interval:
    if min(np.sum(n_first), np.sum(n_second)) >= MIN_GROUP:
        return interval
    return Interval(*(np.full_like(limit, np.nan) for limit in interval))


def paired_difference_interval(
    n_both: float,
    n_first_only: float,
    n_second_only: float,
    n_neither: float,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Interval of p_first - p_second in paired data, from the counts of the four outcomes.

    Newcombe's hybrid (`mover`) with the correlation of the two outcomes (1998b, Statistics in
    Medicine 17:2635, method 10, with continuity-corrected phi), from limits that are widened near
    0 and 1 as in `separation_interval`. (-1, 1) without pairs.
    """
    a, b, c, d = n_both, n_first_only, n_second_only, n_neither
    n = a + b + c + d
    if n == 0:
        return -1.0, 1.0
    first, second = (a + b) / n, (a + c) / n
    one, two = (_modified_wilson(np.asarray(rate), n, confidence) for rate in (first, second))
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    phi = 0.0
    if margins > 0:
        excess = a * d - b * c
        corrected = max(excess - n / 2, 0.0) if excess > 0 else excess
        phi = corrected / np.sqrt(margins)
    low, high = mover(first, one, second, two, phi)
    return float(low), float(high)


def paired_change_interval(
    before: Float[np.ndarray, " n"], after: Float[np.ndarray, " n"], confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of mean(after) - mean(before), with one pair of values in [0, 1] per unit.

    For outcomes 0 and 1 it equals `paired_difference_interval`. Fractions (means over several
    prompts) are added to the counts as fractions of a 1: because v^2 <= v, the variance implied by
    the counts is at least that of the values, so the interval is too wide rather than too narrow.

    >>> low, high = paired_change_interval(np.zeros(10), np.ones(10))
    >>> round(low, 2), high
    (0.61, 1.0)
    """
    both = float((after * before).sum())
    gained, lost = float(after.sum()) - both, float(before.sum()) - both
    n_neither = max(len(before) - both - gained - lost, 0.0)
    return paired_difference_interval(both, gained, lost, n_neither, confidence)


def auroc_interval(
    auroc: Float[np.ndarray, "..."] | float,
    n_first: Num[np.ndarray, " n_strata"] | int,
    n_second: Num[np.ndarray, " n_strata"] | int,
    weights: Float[np.ndarray, " n_strata"] = _ONE_STRATUM,
    variance: Float[np.ndarray, "..."] | float = 0.0,
    confidence: float = 0.95,
) -> Interval:
    """Interval of an AUROC, or of the mean of the strata's AUROCs with weights that sum to 1.

    Solves |a - t| = z sqrt(sum of w^2 V(t)) for t. V is Hanley and McNeil's variance of exponential
    groups in each stratum, with both n_first - 1 and n_second - 1 replaced by their mean (Newcombe
    2006, Statistics in Medicine 25:559, method 5). It assumes values without ties and with equal
    spread, and is too small where the smaller group spreads more (10 against 200 units: 83% of
    intervals cover). `variance` is DeLong's variance of the same estimate; where it is larger than
    V at a, V is scaled up to it. NaN where a group has fewer than `MIN_GROUP` units.

    >>> low, high = auroc_interval(1.0, 10, 10)
    >>> round(float(low), 2), float(high)
    (0.8, 1.0)
    """
    n_first, n_second = np.atleast_1d(n_first), np.atleast_1d(n_second)
    observed, z = np.asarray(auroc, float), _z(confidence)
    error = _auroc_error(observed, n_first, n_second, weights, variance)

    def solve(outside: np.ndarray, sign: float) -> np.ndarray:
        # `inside` satisfies the inequality, `outside` does not (or is the end of the range).
        inside = observed.copy()
        for _ in range(_BISECTIONS):
            middle = (inside + outside) / 2
            within = sign * (observed - middle) <= z * error(middle)
            inside = np.where(within, middle, inside)
            outside = np.where(within, outside, middle)
        return inside

    low = np.where(observed <= 0, 0.0, solve(np.zeros_like(observed), 1.0))
    high = np.where(observed >= 1, 1.0, solve(np.ones_like(observed), -1.0))
    return _without_small_groups(Interval(low, high), n_first, n_second)


def auroc_p_value(
    auroc: float,
    n_first: Num[np.ndarray, " n_strata"],
    n_second: Num[np.ndarray, " n_strata"],
    weights: Float[np.ndarray, " n_strata"],
    variance: float = 0.0,
) -> float:
    """Two-sided p-value of the hypothesis that an AUROC is 0.5, consistent with `auroc_interval`:
    the interval with confidence 1 - p has 0.5 as a limit. NaN for groups of fewer than `MIN_GROUP`.
    """
    if min(n_first.sum(), n_second.sum()) < MIN_GROUP:
        return float("nan")
    error = _auroc_error(np.array(auroc), n_first, n_second, weights, variance)
    return float(2 * special.ndtr(-abs(auroc - 0.5) / error(np.array(0.5))))


def _auroc_error(
    observed: Float[np.ndarray, "..."],
    n_first: Num[np.ndarray, " n_strata"],
    n_second: Num[np.ndarray, " n_strata"],
    weights: Float[np.ndarray, " n_strata"],
    variance: Float[np.ndarray, "..."] | float,
) -> Callable[[np.ndarray], np.ndarray]:
    """Standard error of a weighted mean of AUROCs, as a function of the true value."""
    per_pair = weights**2 / (n_first * n_second)
    plain = per_pair.sum()
    shared = (per_pair * ((n_first + n_second) / 2 - 1)).sum()

    def assumed(t: np.ndarray) -> np.ndarray:
        return t * (1 - t) * (plain + shared * ((1 - t) / (2 - t) + t / (1 + t)))

    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(assumed(observed) > 0, variance / assumed(observed), 1.0)
    scale = np.maximum(ratio, 1.0)
    return lambda t: np.sqrt(scale * assumed(t))
