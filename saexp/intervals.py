"""Confidence intervals of shares and of means."""

from collections.abc import Sequence
from typing import cast

import numpy as np
from jaxtyping import Float
from scipy import sparse, special

_NUMBERS = 4_000_000
"""Resampled means held at once."""


def wilson(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of k successes in n trials (Wilson 1927); (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    z = float(special.ndtri(0.5 + confidence / 2))
    share = k / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * float(np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)))
    # The share itself is inside, also where rounding at 0 and 1 would leave it out.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


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
