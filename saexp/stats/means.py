"""Intervals of means and of ratios of sums: the studentised bootstrap over independent units."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

MIN_N = 10
"""Fewer values have no interval: none of the methods in use covers a skewed mean there."""
N_RESAMPLES = 2000
_NUMBERS = 4_000_000
"""Numbers held at once."""

_ROUNDING = 1e-12
"""Differences that are smaller, relative to the values, are due to rounding."""

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
    for a column whose values are all equal: its spread is unknown, not zero. At n = 10 it covers
    the mean of exponential values in 94 % and of log-normal ones (sigma 1) in 91 % of samples,
    where percentile intervals reach 87 and 81 %. A column that is 0 in most rows is covered in
    84 to 90 % while about 2 rows are not 0, and in 93 % or more from about 5 on.
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
    """Mean of the first group less that of the second, and its 95 % bootstrap-t interval.

    The difference is taken within every stratum in `weights` and averaged with these weights, which
    sum to 1; units of other strata do not count. Each group of each stratum is resampled by itself.
    The interval is NaN where a group has fewer than `MIN_N` units in all, a stratum has fewer than
    2 of one, or the values do not vary within any group of a stratum.
    """
    counted = np.array([stratum in weights for stratum in strata.tolist()], dtype=bool)
    values, first, strata = values[counted], np.asarray(first[counted], bool), strata[counted]
    cells = np.zeros(len(values), dtype=np.int64)
    factors = np.zeros(len(values))
    for number, (name, weight) in enumerate(weights.items()):
        for side, sign in ((True, 1.0), (False, -1.0)):
            of_cell = (strata == name) & (first == side)
            cells[of_cell] = 2 * number + side
            factors[of_cell] = sign * weight / max(of_cell.sum(), 1)
    difference = float(factors @ values)
    largest = np.abs(values).max(initial=0.0)
    if abs(difference) <= _ROUNDING * largest:
        difference = 0.0
    by_cell = [values[cells == cell] for cell in range(2 * len(weights))]
    small = min(first.sum(), (~first).sum()) < MIN_N or min(map(len, by_cell)) < 2
    if small or max(map(np.ptp, by_cell)) <= _ROUNDING * largest:
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

    Rows are independent units, each with its sums over dependent rows (a text's tokens), so that
    this is a cluster bootstrap. The standard error of ratio R, of the sample and of each resample,
    is that of the linearised ratio, from the residuals numerator - R denominator (Davison and
    Hinkley 1997, sections 2.7.2 and 3.8). Units of one of `cells` are resampled among themselves.
    NaN for fewer than `MIN_N` rows, without resamples, where all residuals are 0, and where the
    denominators' sum is 0 in the sample, or 0 or of the other sign in 5 % of the resamples.
    """
    n, n_columns = numerators.shape
    low, high = np.full(n_columns, np.nan), np.full(n_columns, np.nan)
    total = np.broadcast_to(denominators.sum(0), n_columns)
    if n < MIN_N or not n_resamples:
        return low, high
    cells = np.zeros(n, dtype=np.int64) if cells is None else cells
    members = [np.flatnonzero(cells == cell) for cell in np.unique(cells)]
    drawn = _draws(members, n_resamples, np.random.default_rng([seed, 53, n]))
    varies = numerators.max(0) > numerators.min(0)
    varies = varies | (denominators.max(0) > denominators.min(0))
    usable = np.flatnonzero(varies & (total != 0) & np.isfinite(numerators.sum(0)))
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    step = max(1, _NUMBERS // n_resamples)
    for start in range(0, len(usable), step):
        some = usable[start : start + step]
        x = denominators if denominators.shape[1] == 1 else denominators[:, some]
        ratio = numerators[:, some].sum(0) / total[some]
        residuals = numerators[:, some] - ratio * x
        error = np.sqrt(_variance(np.ones((1, n)), residuals, members)[0]) / np.abs(total[some])
        sums = drawn @ x
        sums = np.where(sums * total[some] > 0, sums, np.nan)
        shift = drawn @ residuals / sums
        # A shift by the same number everywhere changes no variance.
        moved = None if x.shape[1] == 1 and np.ptp(x) == 0 else (x, shift)
        errors = np.sqrt(_variance(drawn, residuals, members, moved)) / np.abs(sums)
        # A resample of equal residuals has no t; it is left out.
        t = shift / np.where(errors > 1e-6 * error, errors, np.nan)
        defined = (np.isfinite(sums).mean(0) > 0.95) & (error > 1e-12 * np.abs(ratio))
        defined = defined & np.isfinite(t).any(0)
        with np.errstate(invalid="ignore"):
            upper, lower = np.nanquantile(np.where(defined, t, 0.0), tails, axis=0)
        low[some] = np.where(defined, ratio - lower * error, np.nan)
        high[some] = np.where(defined, ratio - upper * error, np.nan)
    return low, high


def _draws(
    members: Sequence[Int[np.ndarray, " m"]], n_resamples: int, rng: np.random.Generator
) -> Float[np.ndarray, "b n"]:
    """How often each unit is drawn, its cell's number of units kept."""
    drawn = np.zeros((n_resamples, sum(map(len, members))))
    for units in members:
        m = len(units)
        drawn[:, units] = rng.multinomial(m, np.full(m, 1 / m), size=n_resamples)
    return drawn


def _variance(
    drawn: Float[np.ndarray, "b n"],
    residuals: Float[np.ndarray, "n k"],
    members: Sequence[Int[np.ndarray, " m"]],
    moved: tuple[Float[np.ndarray, "n j"], Float[np.ndarray, "b k"]] | None = None,
) -> Float[np.ndarray, "b k"]:
    """Variance of the sum of residuals over each resample, cells being independent.

    `moved` is (x, shift): the residuals are those less shift * x.
    """
    variance = np.zeros((len(drawn), residuals.shape[1]))
    for units in members:
        m = len(units)
        d, e = drawn[:, units], residuals[units]
        squares, total = d @ e**2, d @ e
        if moved is not None:
            x, shift = moved[0][units], moved[1]
            squares += shift**2 * (d @ x**2) - 2 * shift * (d @ (e * x))
            total -= shift * (d @ x)
        variance += (squares - total**2 / m) * (m / max(m - 1, 1))
    return np.maximum(variance, 0)
