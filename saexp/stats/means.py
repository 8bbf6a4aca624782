"""Intervals of means: the studentised bootstrap, and the cluster bootstrap."""

from collections.abc import Sequence
from typing import cast

import numpy as np
from jaxtyping import Float
from scipy import sparse

MIN_N = 10
"""Fewer values have no interval: none of the methods in use covers a skewed mean there."""
N_RESAMPLES = 2000
_NUMBERS = 4_000_000
"""Numbers held at once."""


def mean_interval(
    values: Float[np.ndarray, "n k"],
    seed: int,
    *,
    n_resamples: int = N_RESAMPLES,
    confidence: float = 0.95,
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Bootstrap-t intervals of each column's mean (Efron and Tibshirani 1993, section 12.5).

    Rows are independent units. All columns share the resamples. NaN for fewer than `MIN_N` rows and
    for a column whose values are all equal: its spread is unknown, not zero. At n = 10 it covers
    the mean of exponential values in 94 % and of log-normal ones (sigma 1) in 91 % of samples,
    where percentile intervals reach 87 and 81 %.
    """
    n, n_columns = values.shape
    low, high = np.full(n_columns, np.nan), np.full(n_columns, np.nan)
    if n < MIN_N:
        return low, high
    drawn = np.random.default_rng([seed, 53, n]).multinomial(n, np.full(n, 1 / n), size=n_resamples)
    varies = np.flatnonzero(values.max(0) > values.min(0))
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    step = max(1, _NUMBERS // n_resamples)
    for start in range(0, len(varies), step):
        some = varies[start : start + step]
        mean, error = values[:, some].mean(0), values[:, some].std(0, ddof=1) / np.sqrt(n)
        centred = values[:, some] - mean
        shift = drawn @ centred / n
        square = drawn @ centred**2 / n - shift**2
        # A resample of equal values has no t; it is left out.
        errors = np.sqrt(np.where(square > 1e-12 * error**2, square, np.nan) / (n - 1))
        upper, lower = np.nanquantile(shift / errors, tails, axis=0)
        low[some], high[some] = mean - lower * error, mean - upper * error
    return low, high


def bootstrap_means(
    values: Float[np.ndarray, "n k"] | sparse.csr_array,
    units: Sequence[object],
    *,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Percentile bootstrap intervals of each column's mean over rows, units resampled whole.

    Rows of one unit (an entity's prompts) are not independent, so a resample draws units with all
    their rows (cluster bootstrap: Davison and Hinkley 1997, section 3.8). All columns share the
    resamples. NaN where there is but one unit: nothing tells how much units differ.
    """
    place: dict[object, int] = {}
    of_row = np.array([place.setdefault(unit, len(place)) for unit in units])
    matrix = sparse.csr_array(values)
    n_units, n_columns = len(place), cast(tuple[int, int], matrix.shape)[1]
    if n_units < 2:
        return np.full(n_columns, np.nan), np.full(n_columns, np.nan)
    member = sparse.csr_array((np.ones(len(of_row)), (of_row, np.arange(len(of_row)))))
    sums, sizes = sparse.csc_array(member @ matrix), np.bincount(of_row)
    drawn = np.random.default_rng([seed, 47]).multinomial(
        n_units, np.full(n_units, 1 / n_units), size=n_resamples
    )
    totals = (drawn @ sizes)[:, None]
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    step = max(1, _NUMBERS // n_resamples)
    low, high = np.empty(n_columns), np.empty(n_columns)
    for start in range(0, n_columns, step):
        some = slice(start, start + step)
        means = drawn @ sums[:, some].toarray() / totals
        low[some], high[some] = np.quantile(means, tails, axis=0)
    return low, high
