"""Counts and means of sparse latents per group, without a dense matrix."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy import sparse


@dataclass(frozen=True)
class Moments:
    """Per latent over one set of rows; arrays `[d_sae]`, float64."""

    n: int
    """Number of rows."""
    active: Int[np.ndarray, " d_sae"]
    """Rows where the latent is above `threshold`."""
    total: Float[np.ndarray, " d_sae"]
    maximum: Float[np.ndarray, " d_sae"]

    @property
    def frequency(self) -> Float[np.ndarray, " d_sae"]:
        """Share of rows where it fires."""
        return self.active / max(self.n, 1)

    @property
    def mean(self) -> Float[np.ndarray, " d_sae"]:
        """Mean over all rows, zeros included."""
        return self.total / max(self.n, 1)


def moments(
    csr: sparse.csr_array, chosen: Bool[np.ndarray, " n_rows"], threshold: float = 1e-6
) -> Moments:
    """Moments over the chosen rows; a latent is active above `threshold` (Ferrando et al. 2024)."""
    part = csr[chosen]
    d_sae = part.shape[1]
    data = part.data.astype(np.float64)
    maximum = np.zeros(d_sae)
    np.maximum.at(maximum, part.indices, data)
    return Moments(
        n=part.shape[0],
        active=np.bincount(part.indices[data > threshold], minlength=d_sae),
        total=_summed(part.indices, data, d_sae),
        maximum=maximum,
    )


def _summed(latents: np.ndarray, weights: np.ndarray, d_sae: int) -> Float[np.ndarray, " d_sae"]:
    # Of no entries at all, bincount makes integers.
    return np.bincount(latents, weights=weights, minlength=d_sae).astype(np.float64)


def equal_rows(units: Shaped[np.ndarray, " n_rows"], seed: int) -> Int[np.ndarray, " n_chosen"]:
    """Sorted indices of m rows of every unit, m the number of rows of the unit that has fewest.

    A unit with more rows contributes a random choice of m, so that no statistic of a unit depends
    on how many rows it has.

    >>> equal_rows(np.array(["a", "a", "b", "b"]), seed=0)
    array([0, 1, 2, 3])
    """
    if not len(units):
        return np.zeros(0, dtype=np.int64)
    _, of_row, counts = np.unique(units, return_inverse=True, return_counts=True)
    order = np.lexsort((np.random.default_rng([seed, 29]).random(len(units)), of_row))
    position = np.arange(len(units)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(order[position < counts.min()])


def by_unit(
    csr: sparse.csr_array, units: np.ndarray
) -> tuple[sparse.csr_array, Int[np.ndarray, " n_units"]]:
    """Mean over the rows of each unit: (`[n_units, d_sae]`, first row of each unit), order kept."""
    _, first, inverse = np.unique(units, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    of_row = rank[inverse]
    counts = np.bincount(of_row)
    averaging = sparse.csr_array(
        (1 / counts[of_row], (of_row, np.arange(len(units)))), shape=(len(counts), len(units))
    )
    return sparse.csr_array(averaging @ csr), first[order]


def active_quantile(
    csr: sparse.csr_array, latents: np.ndarray, q: float
) -> Float[np.ndarray, " n"]:
    """Quantile of each latent's values where it is active; 0 for one that never is."""
    csc = sparse.csc_array(csr[:, latents])
    parts = [csc.data[csc.indptr[i] : csc.indptr[i + 1]] for i in range(len(latents))]
    return np.array([float(np.quantile(p, q)) if len(p) else 0.0 for p in parts])
