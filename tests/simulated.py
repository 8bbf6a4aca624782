"""Simulated data that unit tests and simulations of error rates draw from."""

from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from saexp.analysis import Split


def heads(rng: np.random.Generator, n: int, h: int, common: float) -> tuple[Any, Any]:
    """Heads of a prompt share `common` of their variance, and have very different scales."""
    size = np.exp(rng.normal(0, 2, h))
    noise = common**0.5 * rng.normal(size=(n, 1)) + (1 - common) ** 0.5 * rng.normal(size=(n, h))
    original = rng.random((n, h))
    return original, original + size * noise


def labels(n_first: int, n_second: int, n_rows: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(first, units) of so many rows for each unit."""
    first = np.repeat([True, False], [n_first, n_second]).repeat(n_rows)
    return first, np.arange(n_first + n_second).astype(object).repeat(n_rows)


def split(seed: int, effect: float = 0.0) -> Split:
    """20 latents of 60 units in two strata of unlike values and group sizes."""
    rng = np.random.default_rng(seed)
    strata = np.repeat(["a", "b"], [40, 20])
    first = rng.random(60) < np.where(strata == "a", 0.7, 0.3)
    values = np.exp(rng.normal(size=(60, 20)) + (strata == "a")[:, None] + effect * first[:, None])
    csr = sparse.csr_array(values)
    return Split(csr, csr, pd.DataFrame({"unit": range(60)}), first, strata)
