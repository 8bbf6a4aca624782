"""Sign-flip tests: under the null each unit's difference is as likely as its negative."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

N_FLIPS = 10_000
ROUNDING = 1e-12
"""Statistics that differ by less, on the scale of one unit's difference, are equal."""
_NUMBERS = 4_000_000
"""Numbers held at once."""


def sign_flip_p_values(
    differences: Float[np.ndarray, "n k"], seed: int, n_flips: int = N_FLIPS
) -> Float[np.ndarray, " k"]:
    """Two-sided p-value of each column's mean being 0 (Fisher 1935); rows are independent units.

    All 2^n sign flips are taken where they are no more than `n_flips`; else p = (1 + those as
    large) / (1 + n_flips) over random ones (Phipson and Smyth 2010), which all columns share.
    """
    n, n_columns = differences.shape
    limit = np.abs(differences.mean(0)) - ROUNDING * np.abs(differences).mean(0)
    as_large, total = np.zeros(n_columns), 0
    for signs in flips(n, n_columns, n_flips, seed):
        as_large += (np.abs(signs @ differences) / n >= limit).sum(0)
        total += len(signs)
    return flip_p_values(as_large, total, n, n_flips)


def flip_p_values(
    as_large: Float[np.ndarray, " k"], n_made: int, n_units: int, n_flips: int
) -> Float[np.ndarray, " k"]:
    """From counts of flips with a statistic as large as the observed one, out of `n_made`."""
    return as_large / n_made if _all(n_units, n_flips) else (1 + as_large) / (1 + n_made)


def flips(
    n_units: int, n_columns: int, n_flips: int, seed: int
) -> Iterator[Float[np.ndarray, "m n_units"]]:
    """Signs, all of them or random ones, as many at once as memory allows."""
    step = max(1, _NUMBERS // max(n_units, n_columns))
    if _all(n_units, n_flips):
        bits = np.arange(n_units)
        for start in range(0, 2**n_units, step):
            numbers = np.arange(start, min(start + step, 2**n_units))[:, None]
            yield (((numbers >> bits) & 1) * 2 - 1).astype(np.float64)
        return
    rng = np.random.default_rng([seed, 29])
    for start in range(0, n_flips, step):
        m = min(step, n_flips - start)
        yield rng.integers(2, size=(m, n_units), dtype=np.int8) * 2.0 - 1


def _all(n_units: int, n_flips: int) -> bool:
    return n_units < 63 and 2**n_units <= n_flips
