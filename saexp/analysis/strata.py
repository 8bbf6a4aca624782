"""A split of a contrast's observations, its entity types as strata, and means within them."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse

from saexp.analysis.contrast_notes import unshared
from saexp.analysis.observations import Observations
from saexp.analysis.statistics import stratum_weights
from saexp.errors import DataError
from saexp.stats.proportions import MIN_GROUP
from saexp.wording import brief, counted

_DIGITS = 12
"""Decimal places to which differences of means are exact."""


@dataclass
class Split:
    """Units of one split, of the entity types that both groups have."""

    csr: sparse.csr_array
    """`[n_units, d_sae]`: mean activation over a unit's rows."""
    active: sparse.csr_array
    """`[n_units, d_sae]`: fraction of a unit's rows on which a latent is active."""
    units: pd.DataFrame
    first: np.ndarray
    """Whether a unit is of the first group."""
    strata: np.ndarray
    """Entity type of each unit ("" where it has none); "" throughout where no type has both
    groups."""


@dataclass(frozen=True)
class StratumMeans:
    """Means of a split's strata, of the first group and of the second."""

    weights: np.ndarray
    """`[n_strata]`: van Elteren's, summing to 1."""
    n_first: np.ndarray
    """`[n_strata]`: units of the first group."""
    n_second: np.ndarray
    values: np.ndarray
    """`[2, n_strata, n_latents]`: activation."""
    active: np.ndarray
    """`[2, n_strata, n_latents]`: fraction of rows on which a latent is active."""

    @classmethod
    def of(cls, split: Split, latents: np.ndarray) -> "StratumMeans":
        weights = stratum_weights(split.first, split.strata)
        cells = [
            [np.flatnonzero((split.strata == name) & mask) for name in weights]
            for mask in (split.first, ~split.first)
        ]
        values, active = (
            np.array([[column_means(csr, rows) for rows in group] for group in cells])
            for csr in (split.csr[:, latents], split.active[:, latents])
        )
        n_first, n_second = (np.array([len(rows) for rows in group]) for group in cells)
        return cls(np.array(list(weights.values())), n_first, n_second, values, active)

    def pooled(self, means: np.ndarray) -> np.ndarray:
        """`[2, n_latents]`: weighted means over the strata."""
        return np.einsum("s,gsl->gl", self.weights, means)


def column_means(csr: sparse.csr_array, rows: np.ndarray) -> np.ndarray:
    """Mean of every column over the rows at these indices."""
    return np.asarray(csr[rows].sum(axis=0)) / len(rows)


def difference(pair: np.ndarray) -> np.ndarray:
    """First less second; what rounding alone makes of equal means is 0."""
    return np.round(pair[0] - pair[1], _DIGITS)


def split_of(
    observed: Observations, groups: tuple[str, ...], name: str, dropped: int
) -> tuple[Split, list[str]]:
    """One split and notes; `dropped` entities of all were left out to match token counts.

    Raises DataError where a group has fewer than 2 units.
    """
    part = observed.where((observed.units["split"] == name).to_numpy(dtype=bool))
    matched = (
        f" after {dropped} were dropped to match the groups' token counts; type "
        "analyzer.match_tokens=false to keep them"
        if dropped
        else ""
    )
    _check_sizes(part.units, groups, name, matched)
    types = part.units["entity_type"].fillna("").to_numpy(dtype=object)
    first = (part.units["group"] == groups[0]).to_numpy(dtype=bool)
    shared = sorted(set(types[first]) & set(types[~first]))
    notes = unshared(part.units, shared, groups, name)
    if shared:
        keep = np.isin(types, shared)
        part, types, first = part.where(keep), types[keep], first[keep]
        named = brief(", ".join(k or "none" for k in shared), 60)
        why = f" of the entity types that both groups have ({named})"
        _check_sizes(part.units, groups, name, why)
    else:
        types = np.full(len(types), "", dtype=object)
    smallest = min(int(first.sum()), int((~first).sum()))
    if smallest < MIN_GROUP:
        notes.append(
            f"split {name}: a group has {counted(smallest, 'entity', 'entities')}; intervals "
            f"are not computed for fewer than {MIN_GROUP}"
        )
    return Split(part.csr, part.active, part.units, first, types), notes


def _check_sizes(units: pd.DataFrame, groups: tuple[str, ...], split: str, why: str) -> None:
    """Raise DataError where a group has fewer than 2 units; `why` says what left them out."""
    for group in groups:
        size = int((units["group"] == group).sum())
        if size < 2:
            raise DataError(
                f"split {split} has {counted(size, 'entity', 'entities')} of group '{group}'"
                f"{why}; a contrast needs at least 2: add rows, or change dataset.split"
            )
