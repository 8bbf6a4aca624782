"""Is one item unlike its controls? Inference over items that are exchangeable under the null."""

import numpy as np
from jaxtyping import Float
from scipy import special

MIN_CONTROLS = 19
"""With fewer controls no rank p-value can reach 0.05."""


def rank_p_value(own: float, controls: Float[np.ndarray, " k"]) -> float:
    """Two-sided rank p-value: (1 + number of controls at least as extreme) / (k + 1).

    Extreme is far from the median of all k + 1 values, which treats them alike, so that the p-value
    is valid whatever their distribution (Phipson and Smyth 2010). It is never below 1 / (k + 1),
    and NaN without controls.

    >>> rank_p_value(0.9, np.array([0.1, 0.0, -0.1, 0.05]))
    0.2
    """
    if not len(controls):
        return float("nan")
    values = np.append(controls, own)
    distance = np.abs(values - np.median(values))
    # Distances that differ by rounding alone are equal.
    as_extreme = distance[:-1] >= distance[-1] - 1e-12
    return float((1 + as_extreme.sum()) / len(values))


def prediction_p_value(own: float, controls: Float[np.ndarray, " k"]) -> float:
    """Two-sided p-value of one more draw from the controls' distribution, taken as normal.

    t = (own - mean) / (s sqrt(1 + 1/k)) with k - 1 degrees of freedom (Crawford and Howell 1998).
    NaN for fewer than 3 controls, or controls that are all equal.
    """
    k = len(controls)
    spread = float(controls.std(ddof=1)) if k > 2 else 0.0
    if spread <= 0:
        return float("nan")
    t = (own - controls.mean()) / (spread * np.sqrt(1 + 1 / k))
    return float(2 * special.stdtr(k - 1, -abs(t)))
