"""Statistics of latents by group, and what an analyzer of corpora is given.

The latents of a corpus are encoded anew for every pass over them, so that none is held in memory.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from scipy import sparse

from saexp.activations import ActivationStore
from saexp.analysis import AnalysisInputs, Analyzer, unequal_types
from saexp.config import StatsConfig
from saexp.data.rows import CorpusRows
from saexp.errors import DataError, counted
from saexp.latents import Latents
from saexp.latents.statistics import Moments, Tally, encoded_rows, moments, tally_store, values_at
from saexp.results import Result
from saexp.saes import SAE
from saexp.stats import MIN_N, difference_of_means, mean_interval, ratio_interval
from saexp.stats.separation import stratum_weights

_BLOCK_ROWS = 2**18


@dataclass(frozen=True)
class StreamedLatents:
    """Latents at the ordinary positions of a corpus."""

    store: ActivationStore
    sae: SAE
    positions: CorpusRows
    ordinary: Bool[np.ndarray, " n_rows"]
    """False for rows of high norm, which are left out."""

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.sae.d_sae

    def __len__(self) -> int:
        return int(self.ordinary.sum())

    def chunks(self) -> Iterator[tuple[Int[np.ndarray, " m"], sparse.csr_array]]:
        """(row numbers, latents `[m, d_sae]`) in order; every call is a pass over the store."""
        with torch.inference_mode():
            yield from encoded_rows(self.store, self.sae, self.ordinary)

    def row_blocks(self) -> Iterator[Int[np.ndarray, " m"]]:
        """Row numbers in order, without encoding anything."""
        for first in range(0, len(self.ordinary), _BLOCK_ROWS):
            yield first + np.flatnonzero(self.ordinary[first : first + _BLOCK_ROWS])

    def moments(self) -> Moments:
        """Moments of all latents; one is active above 0."""
        active = np.zeros(self.d_sae, dtype=np.int64)
        total, maximum = np.zeros(self.d_sae), np.zeros(self.d_sae)
        for _, csr in self.chunks():
            data = csr.data.astype(np.float64)
            np.add.at(total, csr.indices, data)
            np.maximum.at(maximum, csr.indices, data)
            active += np.bincount(csr.indices[data > 0], minlength=self.d_sae)
        return Moments(n=len(self), active=active, total=total, maximum=maximum)

    def tally(self, latents: Int[np.ndarray, " n"], n_top: int) -> Tally:
        """The rows with the largest activations of these latents, `n_top` of different texts."""
        tally = Tally(latents, d_sae=self.d_sae, n_top=n_top, n_sample=1, correlate=False)
        text_ids = self.positions.text_ids
        return tally_store(self.store, self.sae, text_ids, np.zeros_like, tally, self.ordinary)

    def rows_of(self, text_id: int) -> Int[np.ndarray, " m"]:
        """The ordinary rows of a text."""
        rows = np.arange(*self.positions.bounds(text_id))
        return rows[self.ordinary[rows]]

    def values(self, rows_of: dict[int, Int[np.ndarray, " k"]]) -> dict[int, np.ndarray]:
        """Latent -> its activations at these rows."""
        return values_at(self.store, self.sae, rows_of)


@dataclass(frozen=True, kw_only=True)
class CorpusInputs:
    """Latents at the ordinary positions of a corpus, and neutral text for comparison."""

    latents: StreamedLatents
    layer: int
    background: Latents | None = None
    """Latents at random positions of neutral text."""


class CorpusAnalyzer(Analyzer):
    """Base class of analyzers that take `dataset=corpus` too."""

    @abstractmethod
    def analyze_corpus(self, inputs: CorpusInputs) -> Result:
        """As `analyze`, in passes over the latents; memory does not grow with the tokens."""


EVERYTHING = "all"
"""Name of the single group of a data set without groups."""
Numbers = dict[str, float | int | None]


@dataclass
class _Group:
    """One group's positions at one layer."""

    name: str
    l0_counts: Int[np.ndarray, " m"]
    """Entry i is the number of positions with i active latents."""
    moments: Moments
    """Counts and maxima over the positions of the group."""
    frequency: Float[np.ndarray, " d_sae"]
    """Fraction of a unit's positions at which a latent is active, averaged over units."""
    total: Float[np.ndarray, " d_sae"]
    """Mean activation over a unit's positions, averaged over units."""
    unit_l0: Float[np.ndarray, " n_units"]
    """Mean L0 of each unit's positions."""
    types: Shaped[np.ndarray, " n_units"]
    """Entity type of each unit, empty where it has none."""
    largest: float | None
    """The largest activation; None where no latent is active."""
    histogram: Callable[[Float[np.ndarray, " n_edges"]], Int[np.ndarray, " n_bins"]]
    """Numbers of activations that are not zero between these edges."""
    run_of_unit: Int[np.ndarray, " n_units"] | None = None
    """Of a corpus with very many units, the run of neighbours with which each is resampled."""


class StatsAnalyzer(CorpusAnalyzer):
    """Registry kind `analyzer`, name `stats`; takes several layers, one after another."""

    several_layers = True
    reads_acts = False
    ordinary_only = True

    def __init__(self, cfg: StatsConfig) -> None:
        super().__init__(cfg)
        self.top_k, self.n_bins = cfg.top_k, cfg.n_bins

    def analyze(self, inputs: AnalysisInputs) -> Result:
        """Metrics `stats/…` per group, tables `groups`, `counts`, `frequent`, `l0_histogram` and
        `value_histogram`.

        L0 is the number of nonzero latents at a position, `mean_active` the mean of their values.
        Means and frequencies are over units, after averaging the positions of each unit. Counts,
        maxima and `dead_fraction` are over positions and depend on how many there are. 95%
        intervals are by the studentised bootstrap over units, without correction for their number;
        None for fewer than `MIN_N` units. `l0_difference` is the L0 of the first group minus that
        of the second within entity types that both have, weighted as in van Elteren's test (over
        all units where they have none in common). All ordinary positions of all splits are used,
        since nothing is selected and tested. One group or no groups (`all`) are allowed. Raises
        DataError for a group without positions.
        """
        inputs = dataclasses.replace(inputs, latents=inputs.ordinary_latents, ordinary=None)
        return self._result(self._groups(inputs), inputs.layer)

    def analyze_corpus(self, inputs: CorpusInputs) -> Result:
        """As `analyze` of a single group; the units are contexts."""
        return self._result([_corpus_group(inputs.latents)], inputs.layer)

    def _result(self, groups: list[_Group], layer: int) -> Result:
        metrics: Numbers = {}
        for group in groups:
            metrics |= self._numbers(group)
        notes = _few_units(groups)
        frequent = [_frequent(g, self.top_k) for g in groups]
        if len(groups) == 2:
            metrics |= _overlap(*(set(f["latent"]) for f in frequent))
            difference, type_notes = self._difference(groups[0], groups[1])
            metrics |= difference
            notes += type_notes
        tables = {
            "groups": self._table(groups, metrics),
            "counts": _counts(groups),
            "frequent": _shared(frequent),
            "l0_histogram": pd.concat([_l0_histogram(g) for g in groups], ignore_index=True),
            "value_histogram": self._value_histogram(groups),
        }
        for table in tables.values():
            table.insert(0, "layer", layer)
        return Result(metrics=metrics, tables=tables, notes=notes)

    def _groups(self, inputs: AnalysisInputs) -> list[_Group]:
        csr, rows = inputs.latents.csr, inputs.latents.rows
        l0 = np.diff(csr.indptr).astype(np.float64)
        groups = []
        for name in inputs.groups or (EVERYTHING,):
            chosen = np.ones(len(rows), dtype=bool)
            if inputs.groups:
                chosen = (rows["group"] == name).fillna(False).to_numpy(dtype=bool)
            if not chosen.any():
                raise DataError(
                    f"group '{name}' has no positions because all its examples were skipped; see "
                    "skips.parquet for the reasons, or type another positions="
                )
            part = sparse.csr_array(csr[chosen])
            of_row, units = pd.factorize(rows["unit"].to_numpy()[chosen])
            weights = 1 / np.bincount(of_row)[of_row] / len(units)
            is_active = sparse.csr_array((part.data != 0, part.indices, part.indptr), part.shape)
            first_row = np.unique(of_row, return_index=True)[1]
            group = _Group(
                name,
                np.bincount(l0[chosen].astype(np.int64)),
                moments(csr, chosen, threshold=0.0),
                frequency=is_active.T @ weights,
                total=part.T @ weights,
                unit_l0=np.bincount(of_row, l0[chosen]) / np.bincount(of_row),
                types=rows["entity_type"].fillna("").to_numpy(dtype=str)[chosen][first_row],
                largest=float(part.data.max()) if part.nnz else None,
                histogram=partial(_histogram, part.data),
            )
            groups.append(group)
        return groups

    def _numbers(self, group: _Group) -> Numbers:
        n_dead = int((group.moments.active == 0).sum())
        g, l0 = group.name, float(group.unit_l0.mean())
        low, high = _l0_interval(group, self.cfg.seed, self.cfg.n_bootstrap)
        return {
            f"stats/n_positions_{g}": group.moments.n,
            f"stats/n_units_{g}": len(group.unit_l0),
            f"stats/l0_{g}": l0,
            f"stats/l0_{g}_ci_low": _number(low[0]),
            f"stats/l0_{g}_ci_high": _number(high[0]),
            f"stats/mean_active_{g}": float(group.total.sum()) / l0 if l0 else None,
            f"stats/max_active_{g}": group.largest,
            f"stats/dead_fraction_{g}": n_dead / len(group.moments.active),
            f"stats/n_dead_{g}": n_dead,
        }

    def _difference(self, first: _Group, second: _Group) -> tuple[Numbers, list[str]]:
        """L0 of the first group minus that of the second within types, and notes on the types."""
        of_first = np.repeat([True, False], [len(first.unit_l0), len(second.unit_l0)])
        types = np.concatenate([first.types, second.types])
        weights: dict[Any, float] = stratum_weights(of_first, types)
        notes = _type_notes(first, second, set(weights))
        if not weights:
            types, weights = np.full(len(types), ""), {"": 1.0}
        value, low, high = difference_of_means(
            np.concatenate([first.unit_l0, second.unit_l0]),
            of_first,
            types,
            weights,
            self.cfg.seed,
            n_resamples=self.cfg.n_bootstrap,
        )
        smallest = min(len(first.unit_l0), len(second.unit_l0))
        if not np.isfinite(low) and smallest >= MIN_N and self.cfg.n_bootstrap:
            notes.append(
                "l0_difference has no interval: the types that both groups have need at least "
                f"{MIN_N} units of each group (2 in each type) and an L0 that varies"
            )
        name = "stats/l0_difference"
        limits = {f"{name}_ci_low": _number(low), f"{name}_ci_high": _number(high)}
        return {name: value, **limits}, notes

    def _table(self, groups: list[_Group], metrics: Numbers) -> pd.DataFrame:
        names = ("n_positions", "n_units", "l0", "mean_active", "max_active", "dead_fraction")
        rows = []
        for group in groups:
            row: dict[str, object] = {"group": group.name}
            row |= {name: metrics[f"stats/{name}_{group.name}"] for name in (*names, "n_dead")}
            row["l0_ci_low"] = metrics[f"stats/l0_{group.name}_ci_low"]
            row["l0_ci_high"] = metrics[f"stats/l0_{group.name}_ci_high"]
            rows.append(row)
        floats = ("l0_ci_low", "l0_ci_high", "mean_active", "max_active")
        return pd.DataFrame(rows).astype(dict.fromkeys(floats, float))

    def _value_histogram(self, groups: list[_Group]) -> pd.DataFrame:
        """Equal bins from 0 to the largest value of all groups."""
        top = max((g.largest for g in groups if g.largest is not None), default=1.0)
        edges = np.linspace(0, top, self.n_bins + 1)
        parts = [
            pd.DataFrame(
                {
                    "group": g.name,
                    "low": edges[:-1],
                    "high": edges[1:],
                    "n": g.histogram(edges),
                }
            )
            for g in groups
        ]
        return pd.concat(parts, ignore_index=True)


def _frequent(group: _Group, top_k: int) -> pd.DataFrame:
    """The latents with the highest frequency, ties by the lower index."""
    n_active, frequency = group.moments.active, group.frequency
    active = np.flatnonzero(n_active)
    # Rounding makes frequencies equal that differ only by floating-point error.
    top = active[np.argsort(-frequency[active].round(12), kind="stable")][:top_k]
    return pd.DataFrame(
        {
            "group": group.name,
            "rank": np.arange(1, len(top) + 1),
            "latent": top,
            "n_active": n_active[top],
            "frequency": frequency[top],
            "mean_active": group.total[top] / frequency[top],
        }
    )


def _shared(frequent: list[pd.DataFrame]) -> pd.DataFrame:
    table = pd.concat(frequent, ignore_index=True)
    table["n_lists"] = table.groupby("latent")["latent"].transform("size")
    return table


def _overlap(first: set[int], second: set[int]) -> Numbers:
    both = first & second
    union = len(first | second)
    return {
        "stats/n_frequent_in_both": len(both),
        "stats/frequent_jaccard": len(both) / union if union else None,
    }


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _few_units(groups: list[_Group]) -> list[str]:
    return [
        f"the L0 of {g.name} has no interval: it has {counted(len(g.unit_l0), 'unit')}, and "
        f"{MIN_N} are needed"
        for g in groups
        if len(g.unit_l0) < MIN_N
    ]


def _type_notes(first: _Group, second: _Group, shared: set[Any]) -> list[str]:
    """Notes on how entity types affect the difference of the groups."""
    groups, names = (first, second), f"{first.name} and {second.name}"
    if not shared:
        return [
            f"{names} have no entity type in common, so l0_difference is over all units, and "
            "differences between types count as differences between the groups"
        ]
    notes = []
    n_unshared = sum(kind not in shared for g in groups for kind in g.types.tolist())
    if n_unshared:
        notes.append(
            f"l0_difference leaves out {counted(n_unshared, 'unit')} of entity types that only one "
            "group has; the statistics of each group include them"
        )
    units = pd.DataFrame(
        {
            "entity_type": np.concatenate([g.types for g in groups]),
            "group": np.repeat([g.name for g in groups], [len(g.types) for g in groups]),
        }
    )
    consequence = "l0_difference compares units of the same type; the groups' statistics do not"
    return notes + unequal_types(units, (first.name, second.name), consequence)


def _counts(groups: list[_Group]) -> pd.DataFrame:
    """Active positions and frequency in each group, for every latent that is active at all."""
    active = np.flatnonzero(np.sum([g.moments.active for g in groups], axis=0))
    table = pd.DataFrame({"latent": active})
    for group in groups:
        table[f"n_active_{group.name}"] = group.moments.active[active]
    for group in groups:
        table[f"freq_{group.name}"] = group.frequency[active]
    if len(groups) == 2:
        a, b = (table[f"freq_{g.name}"] for g in groups)
        table["freq_difference"] = a - b
    return table


def _l0_histogram(group: _Group) -> pd.DataFrame:
    n_active = np.flatnonzero(group.l0_counts)
    n = group.l0_counts[n_active]
    return pd.DataFrame({"group": group.name, "n_active": n_active, "n_positions": n})


def _histogram(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.histogram(values, bins=edges)[0]


_MOST_UNITS = 4096
"""Contexts of a corpus that are resampled one by one; of more, runs of neighbours are."""


def _l0_interval(group: _Group, seed: int, n_resamples: int) -> tuple[np.ndarray, np.ndarray]:
    """95% interval of the mean L0 of a unit."""
    if group.run_of_unit is None:
        return mean_interval(group.unit_l0[:, None], seed, n_resamples=n_resamples)
    sums = np.bincount(group.run_of_unit, group.unit_l0)[:, None]
    sizes = np.bincount(group.run_of_unit).astype(np.float64)[:, None]
    return ratio_interval(sums, sizes, seed, n_resamples=n_resamples)


def _corpus_group(latents: StreamedLatents) -> _Group:
    """The group of all positions of a corpus, in two passes over the latents."""
    text_ids, d_sae = latents.positions.text_ids, latents.d_sae
    n_rows = np.zeros(latents.positions.n_texts, dtype=np.int64)
    for rows in latents.row_blocks():
        np.add.at(n_rows, text_ids(rows), 1)
    weight_of_text = 1 / np.maximum(n_rows, 1) / np.count_nonzero(n_rows)
    l0_of_text, l0_counts = np.zeros(len(n_rows)), np.zeros(d_sae + 1, dtype=np.int64)
    active, total, maximum = np.zeros(d_sae, dtype=np.int64), np.zeros(d_sae), np.zeros(d_sae)
    frequency, mean = np.zeros(d_sae), np.zeros(d_sae)
    for rows, csr in latents.chunks():
        l0, texts, data = np.diff(csr.indptr), text_ids(rows), csr.data.astype(np.float64)
        np.add.at(l0_of_text, texts, l0)
        l0_counts += np.bincount(l0, minlength=d_sae + 1)
        weights = np.repeat(weight_of_text[texts], l0)
        active += np.bincount(csr.indices, minlength=d_sae)
        np.add.at(total, csr.indices, data)
        np.maximum.at(maximum, csr.indices, data)
        np.add.at(frequency, csr.indices, weights)
        np.add.at(mean, csr.indices, weights * data)
    read = n_rows > 0
    unit_l0 = l0_of_text[read] / n_rows[read]
    n_units, units = len(unit_l0), np.arange(len(unit_l0))
    many = n_units > _MOST_UNITS
    return _Group(
        EVERYTHING,
        l0_counts,
        Moments(n=len(latents), active=active, total=total, maximum=maximum),
        frequency=frequency,
        total=mean,
        unit_l0=unit_l0,
        types=np.full(n_units, ""),
        largest=float(maximum.max()) if active.any() else None,
        histogram=lambda edges: np.sum(
            [_histogram(csr.data, edges) for _, csr in latents.chunks()], axis=0
        ),
        run_of_unit=units * _MOST_UNITS // n_units if many else None,
    )
