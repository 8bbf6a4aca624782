"""The observations of a contrast: entities, each with the same number of rows."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse

from saexp.latents.encode import Latents
from saexp.latents.summary import by_unit, equal_rows
from saexp.wording import counted

THRESHOLD = 1e-6
"""A latent is active above it (Ferrando et al. 2024)."""
CONFOUNDED = 1.5
"""Ratio of the groups' mean numbers of rows per entity above which a note says so."""


@dataclass
class Observations:
    """One observation is an entity, or an entity in one group where it has rows of both."""

    csr: sparse.csr_array
    """`[n_units, d_sae]`: mean activation over the observation's rows."""
    active: sparse.csr_array
    """`[n_units, d_sae]`: fraction of those rows on which a latent is active."""
    units: pd.DataFrame
    """Columns of the observation's first row, and its name in `observation`."""
    rows: pd.DataFrame
    """The rows that they are means of, with the name of each one's `observation`."""

    def where(self, keep: np.ndarray) -> "Observations":
        """The observations for which the boolean `keep` holds."""
        units = self.units[keep].reset_index(drop=True)
        rows = self.rows[self.rows["observation"].isin(units["observation"])]
        return Observations(self.csr[keep], self.active[keep], units, rows)


def observations(
    latents: Latents, groups: tuple[str, ...], seed: int
) -> tuple[Observations, list[str]]:
    """Observations of rows that are of one of the groups and of a split, and notes on them.

    Each contributes as many rows as the one that has fewest, chosen by `seed`: with more rows a
    latent would be active on more of them, or vary less, whatever the group.
    """
    chosen = _labelled(latents.rows, groups)
    rows, csr = latents.rows.iloc[chosen].reset_index(drop=True), latents.csr[chosen]
    observed, n_both = _observed(rows)
    used = equal_rows(observed, seed)
    n_each = len(used) // max(len(np.unique(observed)), 1)
    notes = _row_notes(rows, observed, n_each, groups) if len(used) < len(rows) else []
    if n_both:
        notes.append(
            f"{counted(n_both, 'entity has', 'entities have')} rows of both groups; each counts "
            "once in either, though the two are not independent"
        )
    part = csr[used]
    is_active = part.copy()
    is_active.data = (part.data > THRESHOLD).astype(np.float64)
    values, first_row = by_unit(part, observed[used])
    active, _ = by_unit(is_active, observed[used])
    active.data = np.rint(active.data * n_each) / n_each
    rows = rows.assign(observation=observed)
    units = rows.iloc[used[first_row]].reset_index(drop=True)
    return Observations(values, active, units, rows.iloc[used]), notes


def used_rows(rows: pd.DataFrame, groups: tuple[str, ...], seed: int) -> np.ndarray:
    """Sorted indices of the rows that `observations` of all `rows` takes."""
    chosen = _labelled(rows, groups)
    return chosen[equal_rows(_observed(rows.iloc[chosen])[0], seed)]


def _labelled(rows: pd.DataFrame, groups: tuple[str, ...]) -> np.ndarray:
    return np.flatnonzero(rows["group"].isin(groups) & rows["split"].notna())


def _row_notes(
    rows: pd.DataFrame, observed: np.ndarray, n_each: int, groups: tuple[str, ...]
) -> list[str]:
    """Rows left out where each observation contributes `n_each`, and unequal groups' repeats."""
    per_unit = rows.groupby(observed, sort=False)["group"].agg(["first", "size"])
    notes = [
        f"{len(rows) - n_each * len(per_unit):,} of {counted(len(rows), 'row')} left out: every "
        f"entity contributes {counted(n_each, 'row')} (chosen by seed), as many as the entity that "
        "has fewest"
    ]
    means = per_unit.groupby("first")["size"].mean().reindex(list(groups)).dropna()
    if len(means) == len(groups) and means.max() > CONFOUNDED * means.min():
        shown = " and ".join(f"{g} {means[g]:.1f}" for g in groups)
        notes.append(
            f"mean number of rows per entity before that: {shown}; what depends on "
            "that number cannot be separated from the group"
        )
    return notes


def _observed(rows: pd.DataFrame) -> tuple[np.ndarray, int]:
    """(observation of each row, number of entities with rows of both groups)."""
    both = rows.groupby("unit")["group"].transform("nunique") > 1
    if not both.any():
        return rows["unit"].to_numpy(), 0
    parted = rows["unit"].astype(str).where(~both, rows["unit"].astype(str) + "\n" + rows["group"])
    return parted.to_numpy(), int(rows.loc[both, "unit"].nunique())
