"""P-values adjusted for the number of tests made: familywise error, and false discovery rate."""

import numpy as np
from jaxtyping import Float

ALPHA = 0.05
"""Level at which effects, adjusted by `holm`, are called one."""


def holm(p_values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Adjusted p-values that bound the chance of one false finding in the family (Holm 1979).

    Valid however the tests depend on each other. NaN stays NaN and is not counted as a test.

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
    """Adjusted p-values that bound the false discovery rate (Benjamini and Hochberg 1995)."""
    n = len(p_values)
    order = np.argsort(p_values)[::-1]
    scaled = p_values[order] * n / np.arange(n, 0, -1)
    adjusted = np.empty(n)
    adjusted[order] = np.minimum(np.minimum.accumulate(scaled), 1.0)
    return adjusted
