"""The base class of analyzers, their inputs, and the units that they compare."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int, Shaped
from scipy import sparse
from torch import Tensor

from saexp.activations.shard_files import StoredValues
from saexp.config import AnalyzerConfig
from saexp.context import ObjectCache
from saexp.data import Example
from saexp.data.tokenization import TokenizedText
from saexp.errors import DataError, brief, counted
from saexp.latents import Latents
from saexp.latents.statistics import by_unit, equal_rows
from saexp.models import Hookpoint
from saexp.models.loading import LanguageModel
from saexp.results import Result
from saexp.saes import SparseAutoencoder
from saexp.stats import MIN_GROUP
from saexp.stats.separation import Ranked, stratum_weights


@dataclass(kw_only=True)
class AnalysisInputs:
    """Latents of the analysed rows, the groups, and neutral text for comparison.

    `latents.rows` has the columns unit, group, split, entity_type and n_entity_tokens.
    """

    latents: Latents
    groups: tuple[str, ...]
    """Labels contrasted, first against second."""
    layer: int
    background: Latents | None = None
    """Latents at random positions of neutral text, for the background filter."""
    acts: StoredValues | Tensor | None = None
    """`[n_rows, d_in]`: stored activations of the rows of `latents`; `acts[rows]` is a tensor."""
    texts: Sequence[TokenizedText] = ()
    """As the model read them; the column `text_id` of `latents.rows` counts them."""
    neutral_texts: Sequence[TokenizedText] = ()
    """Neutral text as the model read it, for token frequencies."""
    examples: Sequence[Example] = ()
    model: LanguageModel | None = None
    sae: SparseAutoencoder | None = None
    max_length: int = 512
    """Longest text in tokens."""
    ordinary: Bool[np.ndarray, " n_rows"] | None = None
    """False for rows of high norm (`activations.norms`); None: every row is ordinary."""
    norm_limits: Mapping[Hookpoint, float] = field(default_factory=dict)
    """The largest norm of an ordinary position, at each stream that the SAE reads or predicts."""
    transfer: "AnalysisInputs | None" = None
    """The analyzer's second data set, where it names one (`Analyzer.transfer`)."""
    objects: ObjectCache | None = None
    """Results shared with other runs, which depend on nothing that a run has of its own."""

    @property
    def ordinary_latents(self) -> Latents:
        """The latents of ordinary rows."""
        return self.latents if self.ordinary is None else self.latents.where(self.ordinary)

    def check_splits(self) -> None:
        """Raise DataError where an entity of the groups is in several splits.

        What is chosen on its train rows would be tested on the same entity.
        """
        rows = self.latents.rows
        pairs = rows.loc[rows["group"].isin(self.groups), ["unit", "split"]]
        pairs = pairs.dropna().drop_duplicates()
        several = pairs[pairs["unit"].duplicated(keep=False)]
        if len(several):
            unit = several["unit"].iloc[0]
            splits = sorted(several.loc[several["unit"] == unit, "split"])
            n_units = several["unit"].nunique()
            raise DataError(
                f"{counted(n_units, 'entity has', 'entities have')} rows in several splits, "
                f"such as {str(unit).lstrip(':')} in {' and '.join(splits)}; an entity belongs to "
                "one: give all its rows the same split, or none"
            )


class Analyzer:
    """Base class of analyzers (registry kind `analyzer`).

    Class attributes declare what the analyzer needs; an analyzer may set them per instance.

    Example:
        >>> @saexp.register("analyzer", "loudest")
        ... class Loudest(Analyzer):
        ...     def analyze(self, inputs):
        ...         return Result(metrics={"loudest/max": float(inputs.latents.csr.max())})
    """

    several_layers: bool = False
    """Whether `layer` may be a list. Tables then get a column `layer`, and the metrics of several
    layers end in `_layer_<n>`."""
    reads_acts: bool = True
    """Whether `inputs.acts` holds the stored activations."""
    ordinary_only: bool = False
    """Whether the analyzer leaves out the high-norm rows (`inputs.ordinary`); the notes say so."""
    selects_latents: bool = False
    """Whether its table `latents` has the columns of the contrast, so that an intervention can
    change the latents that it selects."""
    runs_model: bool = False
    """Whether `analyze` runs `inputs.model`. The run is then refused before anything is collected
    where imported activations come without the model's weights."""
    transfer: str | None = None
    """Path of a second data set with the same groups, given to `analyze` as `inputs.transfer`."""

    def __init__(self, cfg: AnalyzerConfig) -> None:
        self.cfg = cfg

    def analyze(self, inputs: AnalysisInputs) -> Result:
        """Metrics, tables, figures and notes of one layer."""
        raise NotImplementedError


class UndeclaredAnalyzer(Analyzer):
    """A component with an `analyze` method that is not derived from `Analyzer`.

    Attributes that it does not declare have the defaults of `Analyzer`. Its `inputs.acts` is a
    memory-mapped tensor of all rows, as before there was a base class.
    """

    def __init__(self, component: Any) -> None:
        self.component = component
        for name in Analyzer.__annotations__:
            if hasattr(component, name):
                setattr(self, name, getattr(component, name))

    def analyze(self, inputs: AnalysisInputs) -> Any:
        """The component's method; the run checks what it returns."""
        if isinstance(inputs.acts, StoredValues):
            inputs = replace(inputs, acts=inputs.acts.as_tensor())
        return self.component.analyze(inputs)


def as_analyzer(component: Any) -> Analyzer:
    """The component, or one with the defaults of `Analyzer` where it is not derived from it."""
    return component if isinstance(component, Analyzer) else UndeclaredAnalyzer(component)


THRESHOLD = 1e-6
"""A latent is active above this value (Ferrando et al. 2024)."""
CONFOUNDED = 1.5
"""Ratio of the groups' mean numbers of rows per entity above which a note reports it."""


@dataclass
class Observations:
    """One observation per entity, or per entity and group where an entity has rows of both."""

    csr: sparse.csr_array
    """`[n_units, d_sae]`: mean activation over the observation's rows."""
    active: sparse.csr_array
    """`[n_units, d_sae]`: fraction of those rows on which a latent is active."""
    units: pd.DataFrame
    """Columns of each observation's first row, and the observation's name in `observation`."""
    rows: pd.DataFrame
    """The rows that were averaged, each with the name of its `observation`."""

    def where(self, keep: np.ndarray) -> "Observations":
        """The observations selected by the boolean mask `keep`."""
        units = self.units[keep].reset_index(drop=True)
        rows = self.rows[self.rows["observation"].isin(units["observation"])]
        return Observations(self.csr[keep], self.active[keep], units, rows)


def observations(
    latents: Latents, groups: tuple[str, ...], seed: int
) -> tuple[Observations, list[str]]:
    """Observations of the rows that belong to one of the groups and to a split, and notes.

    Every observation has as many rows as the one with the fewest, drawn with `seed`: with more
    rows, a latent would be active on more of them, or vary less, whatever the group.
    """
    used, names, notes = equally_observed(latents.rows, groups, seed)
    n_each = len(used) // max(len(np.unique(names)), 1)
    part = latents.csr[used]
    is_active = part.copy()
    is_active.data = (part.data > THRESHOLD).astype(np.float64)
    values, first_row = by_unit(part, names)
    active, _ = by_unit(is_active, names)
    active.data = np.rint(active.data * n_each) / n_each
    rows = latents.rows.iloc[used].assign(observation=names)
    units = rows.iloc[first_row].reset_index(drop=True)
    return Observations(values, active, units, rows.reset_index(drop=True)), notes


def equally_observed(
    all_rows: pd.DataFrame, groups: tuple[str, ...], seed: int
) -> tuple[Int[np.ndarray, " n_used"], Shaped[np.ndarray, " n_used"], list[str]]:
    """Equally many rows of every observation: (row indices, names of their observations, notes).

    The rows are drawn from those that belong to one of the groups and to any split.
    """
    chosen = np.flatnonzero(all_rows["group"].isin(groups) & all_rows["split"].notna())
    rows = all_rows.iloc[chosen].reset_index(drop=True)
    names, n_both = _observation_names(rows)
    used = equal_rows(names, seed)
    n_each = len(used) // max(len(np.unique(names)), 1)
    notes = _row_notes(rows, names, n_each, groups) if len(used) < len(rows) else []
    if n_both:
        notes.append(
            f"{counted(n_both, 'entity has', 'entities have')} rows of both groups: these count "
            "once in each group, although the two observations are not independent"
        )
    return chosen[used], names[used], notes


def used_rows(rows: pd.DataFrame, groups: tuple[str, ...], seed: int) -> np.ndarray:
    """Sorted indices of those `rows` that `observations` uses."""
    return equally_observed(rows, groups, seed)[0]


def _row_notes(
    rows: pd.DataFrame, names: np.ndarray, n_each: int, groups: tuple[str, ...]
) -> list[str]:
    """Notes on rows left out where each observation has `n_each`, and on unequal row counts."""
    per_unit = rows.groupby(names, sort=False)["group"].agg(["first", "size"])
    notes = [
        f"{len(rows) - n_each * len(per_unit):,} of {counted(len(rows), 'row')} left out: every "
        f"entity contributes {counted(n_each, 'row')} (drawn at random), as many as the entity "
        "with the fewest rows"
    ]
    means = per_unit.groupby("first")["size"].mean().reindex(list(groups)).dropna()
    if len(means) == len(groups) and means.max() > CONFOUNDED * means.min():
        listed = " and ".join(f"{means[g]:.1f} ({g})" for g in groups)
        notes.append(
            f"before that, the mean number of rows per entity was {listed}; an effect of the "
            "number of rows cannot be separated from an effect of the group"
        )
    return notes


def _observation_names(rows: pd.DataFrame) -> tuple[np.ndarray, int]:
    """(name of each row's observation, number of entities with rows of both groups)."""
    both = rows.groupby("unit")["group"].transform("nunique") > 1
    units = rows["unit"]
    if not both.any():
        return units.to_numpy(), 0
    names = units.astype(str).where(~both, units.astype(str) + "\n" + rows["group"])
    return names.to_numpy(), int(rows.loc[both, "unit"].nunique())


LEVEL = 0.05
"""p-value below which token counts, or entity types, are reported as different."""

_EXACT = 8
"""Up to this size of the smaller group the exact test is used for counts without ties, because
the normal approximation is not accurate."""


@dataclass(frozen=True)
class Matching:
    """Units left after matching the groups' token counts."""

    keep: np.ndarray
    """Boolean per unit."""
    p_value: float | None
    """Mann-Whitney test of the token counts: the smallest p-value over the entity types, times
    their number; None where token counts are unknown."""
    notes: list[str]


def match_token_counts(
    units: pd.DataFrame, groups: tuple[str, str], seed: int, *, resample: bool
) -> Matching:
    """Compare token counts within entity types, and match them where they differ.

    Matching (`resample`) drops units at random, so that both groups have equally many in each
    stratum of type, split and token count. Where no stratum has units of both groups, nothing is
    dropped and a note says that length is not controlled for.
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
    finding = f"token counts of {groups[0]} and {groups[1]} differ (p = {p_value:.2g})"
    if not resample:
        note = f"{finding} and were not matched (analyzer.match_tokens=false)"
        return Matching(keep, p_value, [note])
    rng = np.random.default_rng([seed, 23])
    keep[:] = False
    strata = [units[c].astype("string").fillna("") for c in ("entity_type", "split")]
    for _, members in units.groupby([*strata, counts.astype(int)]).indices.items():
        of_group = [members[(units["group"].to_numpy()[members] == g)] for g in groups]
        n = min(map(len, of_group))
        for of_one in of_group:
            keep[rng.permutation(of_one)[:n]] = True
    if not keep.any():
        keep[:] = True
        note = (
            f"{finding} and do not overlap, so this contrast cannot separate recognition from "
            "the length of names"
        )
        return Matching(keep, p_value, [note])
    dropped = int((~keep).sum())
    note = f"{finding}; {dropped} of {len(keep)} entities were dropped to match them"
    return Matching(keep, p_value, [note])


def _mann_whitney(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sided p-value; exact for small groups without ties."""
    both = np.concatenate([a, b])
    if min(len(a), len(b)) <= _EXACT and len(np.unique(both)) == len(both):
        from scipy import stats

        return float(stats.mannwhitneyu(a, b, method="exact").pvalue)
    first = np.arange(len(both)) < len(a)
    # Token counts are positive, so none is mistaken for a zero of the sparse matrix.
    return float(Ranked(sparse.csr_array(both[:, None]), first).mann_whitney().p_normal[0])


_N_LISTED = 3
"""Entity types listed in a note."""
_UNEQUAL = 0.1
"""Difference of a type's fraction between the groups below which no note is made."""


def _unshared_types(
    units: pd.DataFrame, shared: list[str], groups: tuple[str, ...], split: str
) -> list[str]:
    """Notes on units left out because only one group has their type, or on no shared type."""
    first, second = groups
    types = units["entity_type"].fillna("")
    if not shared:
        return [
            f"split {split}: {first} and {second} have no entity type in common, so all entities "
            "are compared together and differences between types count as differences between the "
            "groups; min_separation and min_auroc are computed over all entities"
        ]
    unshared = units[~types.isin(shared)]
    if unshared.empty:
        return []
    pairs = unshared.assign(entity_type=types[unshared.index].replace("", "no type"))
    counts = pairs.groupby(["entity_type", "group"], sort=True).size()
    keys = counts.index.to_frame(index=False).assign(n=counts.to_numpy()).head(_N_LISTED)
    listed = [f"{r['n']} of {r['entity_type']} ({r['group']})" for r in keys.to_dict("records")]
    more = f" and {len(counts) - _N_LISTED} more types" if len(counts) > _N_LISTED else ""
    return [
        f"split {split}: {counted(len(unshared), 'entity', 'entities')} left out because only one "
        f"group has their entity type: {', '.join(listed)}{more}"
    ]


def unequal_types(units: pd.DataFrame, groups: tuple[str, str], consequence: str) -> list[str]:
    """A note where shared entity types make up different fractions of the two groups.

    `consequence` ends the note and says which numbers this affects.
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
    differences = np.abs(fractions[:, 0] - fractions[:, 1])
    p_value = float(stats.chi2_contingency(counts).pvalue)  # pyright: ignore[reportAttributeAccessIssue]
    if p_value >= LEVEL or differences.max() < _UNEQUAL:
        return []
    largest = int(differences.argmax())
    return [
        f"entity types differ between the groups (p = {p_value:.2g}): "
        f"{table.index[largest] or 'no type'} is {fractions[largest, 0]:.0%} of {first} and "
        f"{fractions[largest, 1]:.0%} of {second}; {consequence}"
    ]


_DIGITS = 12
"""Decimal places to which differences of means are rounded."""


@dataclass
class Split:
    """Units of one split whose entity type both groups have."""

    csr: sparse.csr_array
    """`[n_units, d_sae]`: mean activation over a unit's rows."""
    active: sparse.csr_array
    """`[n_units, d_sae]`: fraction of a unit's rows on which a latent is active."""
    units: pd.DataFrame
    first: np.ndarray
    """Whether a unit belongs to the first group."""
    strata: np.ndarray
    """Entity type of each unit ("" where it has none); "" for all units where the groups have no
    type in common."""


@dataclass(frozen=True)
class StratumMeans:
    """Means of both groups in each stratum of a split."""

    weights: np.ndarray
    """`[n_strata]`: van Elteren's weights, which sum to 1."""
    n_first: np.ndarray
    """`[n_strata]`: units of the first group."""
    n_second: np.ndarray
    values: np.ndarray
    """`[2, n_strata, n_latents]`: activation."""
    active: np.ndarray
    """`[2, n_strata, n_latents]`: fraction of rows on which a latent is active."""

    @classmethod
    def of(cls, split: Split, latents: np.ndarray) -> "StratumMeans":
        """Means of these latents."""
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
    """First minus second, rounded so that equal means give exactly 0."""
    return np.round(pair[0] - pair[1], _DIGITS)


def split_of(
    observed: Observations, groups: tuple[str, ...], name: str, dropped: int
) -> tuple[Split, list[str]]:
    """One split, and notes; `dropped` is the number of entities dropped to match token counts.

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
    notes = _unshared_types(part.units, shared, groups, name)
    if shared:
        keep = np.isin(types, shared)
        part, types, first = part.where(keep), types[keep], first[keep]
        listed = brief(", ".join(k or "none" for k in shared), 60)
        detail = f" of the entity types that both groups have ({listed})"
        _check_sizes(part.units, groups, name, detail)
    else:
        types = np.full(len(types), "", dtype=object)
    smallest = min(int(first.sum()), int((~first).sum()))
    if smallest < MIN_GROUP:
        notes.append(
            f"split {name}: a group has only {counted(smallest, 'entity', 'entities')}; intervals "
            f"need at least {MIN_GROUP}"
        )
    return Split(part.csr, part.active, part.units, first, types), notes


def _check_sizes(units: pd.DataFrame, groups: tuple[str, ...], split: str, detail: str) -> None:
    """Raise DataError where a group has fewer than 2 units; `detail` says which are counted."""
    for group in groups:
        size = int((units["group"] == group).sum())
        if size < 2:
            raise DataError(
                f"split {split} has {counted(size, 'entity', 'entities')} of group '{group}'"
                f"{detail}; a contrast needs at least 2: add rows, or change dataset.split"
            )
