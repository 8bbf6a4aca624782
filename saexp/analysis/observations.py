"""Observations of a contrast: entities with equal rows, in strata of entity type."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Int, Shaped
from scipy import sparse

from saexp.errors import DataError
from saexp.latents.encode import Latents
from saexp.latents.statistics import by_unit, equal_rows
from saexp.stats.intervals import MIN_GROUP
from saexp.stats.rank_tests import Ranked, stratum_weights
from saexp.wording import brief, counted

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
    used, observed, notes = equally_observed(latents.rows, groups, seed)
    n_each = len(used) // max(len(np.unique(observed)), 1)
    part = latents.csr[used]
    is_active = part.copy()
    is_active.data = (part.data > THRESHOLD).astype(np.float64)
    values, first_row = by_unit(part, observed)
    active, _ = by_unit(is_active, observed)
    active.data = np.rint(active.data * n_each) / n_each
    rows = latents.rows.iloc[used].assign(observation=observed)
    units = rows.iloc[first_row].reset_index(drop=True)
    return Observations(values, active, units, rows.reset_index(drop=True)), notes


def equally_observed(
    all_rows: pd.DataFrame, groups: tuple[str, ...], seed: int
) -> tuple[Int[np.ndarray, " n_used"], Shaped[np.ndarray, " n_used"], list[str]]:
    """(numbers of the rows used, as many of every observation; their observations; notes).

    Rows are those of one of the groups and of any split.
    """
    chosen = _labelled(all_rows, groups)
    rows = all_rows.iloc[chosen].reset_index(drop=True)
    observed, n_both = _observed(rows)
    used = equal_rows(observed, seed)
    n_each = len(used) // max(len(np.unique(observed)), 1)
    notes = _row_notes(rows, observed, n_each, groups) if len(used) < len(rows) else []
    if n_both:
        notes.append(
            f"{counted(n_both, 'entity has', 'entities have')} rows of both groups; each counts "
            "once in either, though the two are not independent"
        )
    return chosen[used], observed[used], notes


def used_rows(rows: pd.DataFrame, groups: tuple[str, ...], seed: int) -> np.ndarray:
    """Sorted indices of the rows that `observations` of all `rows` takes."""
    return equally_observed(rows, groups, seed)[0]


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


LEVEL = 0.05
"""p-value below which token counts count as different."""

_EXACT = 8
"""Where the smaller group has no more, and no tie, the normal approximation is not good enough."""


@dataclass(frozen=True)
class Matching:
    """Units kept, and what was found."""

    keep: np.ndarray
    """Boolean per unit."""
    p_value: float | None
    """Mann-Whitney on token counts, the smallest over entity types times their number; None where
    counts are not known."""
    notes: list[str]


def match_token_counts(
    units: pd.DataFrame, groups: tuple[str, str], seed: int, *, resample: bool
) -> Matching:
    """Compare token counts within entity types; keep equally many per (type, split, count).

    Resampling drops, by a seeded choice, units of the group that has more in a stratum. Where no
    stratum has both groups, nothing is dropped and a note says that length is not controlled.
    """
    keep = np.ones(len(units), dtype=bool)
    counts = units["n_entity_tokens"]
    if counts.isna().any():
        return Matching(keep, None, [])
    p_values = []
    for _, part in units.groupby(units["entity_type"].fillna("")):
        a, b = (part.loc[part["group"] == g, "n_entity_tokens"].astype(float) for g in groups)
        if len(a) and len(b):
            p_values.append(_mann_whitney(a.to_numpy(), b.to_numpy()))
    if not p_values:
        return Matching(keep, None, [])
    p_value = min(1.0, min(p_values) * len(p_values))
    if p_value >= LEVEL:
        return Matching(keep, p_value, [])
    found = f"token counts of {groups[0]} and {groups[1]} differ (p = {p_value:.2g})"
    if not resample:
        return Matching(keep, p_value, [f"{found} and were not matched (analyzer.match_tokens)"])
    rng = np.random.default_rng([seed, 23])
    keep[:] = False
    strata = [units[c].astype("string").fillna("") for c in ("entity_type", "split")]
    for _, places in units.groupby([*strata, counts.astype(int)]).indices.items():
        of_group = [places[(units["group"].to_numpy()[places] == g)] for g in groups]
        n = min(map(len, of_group))
        for members in of_group:
            keep[rng.permutation(members)[:n]] = True
    if not keep.any():
        keep[:] = True
        note = f"{found} and do not overlap, so this contrast cannot tell recognition from length"
        return Matching(keep, p_value, [note])
    dropped = int((~keep).sum())
    return Matching(keep, p_value, [f"{found}: {dropped} of {len(keep)} dropped to match them"])


def _mann_whitney(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sided p-value of counts, with ties; exact for a few counts that all differ."""
    both = np.concatenate([a, b])
    if min(len(a), len(b)) <= _EXACT and len(np.unique(both)) == len(both):
        from scipy import stats

        return float(stats.mannwhitneyu(a, b, method="exact").pvalue)
    first = np.arange(len(both)) < len(a)
    # Every count is above 0, the value that is not stored.
    return float(Ranked(sparse.csr_array(both[:, None]), first).mann_whitney().p_normal[0])


_NAMED = 3
"""Latents or types named in a note."""
_UNEQUAL = 0.1
"""A difference in a type's fraction of either group below which no note is made."""


def unshared(
    units: pd.DataFrame, shared: list[str], groups: tuple[str, ...], split: str
) -> list[str]:
    """Units of a split left out because one group alone has their type, or that none is shared."""
    first, second = groups
    types = units["entity_type"].fillna("")
    if not shared:
        return [
            f"split {split}: {first} and {second} share no entity type, so all entities are "
            "compared at once and a difference between types counts as one between the groups; "
            "min_separation and min_auroc are over all entities"
        ]
    alone = units[~types.isin(shared)]
    if alone.empty:
        return []
    pairs = alone.assign(entity_type=types[alone.index].replace("", "no type"))
    counts = pairs.groupby(["entity_type", "group"], sort=True).size()
    keys = counts.index.to_frame(index=False).assign(n=counts.to_numpy()).head(_NAMED)
    named = [f"{r['n']} of {r['entity_type']} ({r['group']})" for r in keys.to_dict("records")]
    more = f" and {len(counts) - _NAMED} more types" if len(counts) > _NAMED else ""
    return [
        f"split {split}: {counted(len(alone), 'entity', 'entities')} left out, of entity types "
        f"that only one group has: {', '.join(named)}{more}"
    ]


def unequal_types(units: pd.DataFrame, groups: tuple[str, str], what_follows: str) -> list[str]:
    """That the groups are made up of types in different proportions, of those both have.

    `what_follows` says in words which numbers that affects.
    """
    first, second = groups
    types = units["entity_type"].fillna("")
    table = pd.crosstab(types, units["group"]).reindex(columns=list(groups), fill_value=0)
    table = table[(table > 0).all(axis=1)]
    if len(table) < 2:
        return []
    from scipy import stats

    counts = table.to_numpy()
    fractions = counts / counts.sum(axis=0)
    difference = np.abs(fractions[:, 0] - fractions[:, 1])
    p_value = float(stats.chi2_contingency(counts).pvalue)  # pyright: ignore[reportAttributeAccessIssue]
    if p_value >= LEVEL or difference.max() < _UNEQUAL:
        return []
    place = int(difference.argmax())
    return [
        f"entity types differ between the groups (p = {p_value:.2g}): "
        f"{table.index[place] or 'no type'} is {fractions[place, 0]:.0%} of {first} and "
        f"{fractions[place, 1]:.0%} of {second}; {what_follows}"
    ]


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
