"""Statistics of latents by group, and the latents that are most active."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Shaped
from scipy import sparse

from saexp.analysis.base import AnalysisInputs, Analyzer, unequal_types
from saexp.config import StatsConfig, TopFeaturesConfig
from saexp.data.tokenization import token_pieces
from saexp.errors import DataError, counted
from saexp.latents.statistics import Moments, moments
from saexp.results import Result
from saexp.stats.intervals import MIN_N, difference_of_means, mean_interval
from saexp.stats.rank_tests import stratum_weights


class TopFeaturesAnalyzer(Analyzer):
    """Registry kind `analyzer`, name `top_features`; takes several layers, one after another."""

    several_layers = True
    reads_acts = False
    ordinary_only = True

    def __init__(self, cfg: TopFeaturesConfig) -> None:
        super().__init__(cfg)
        self.top_k, self.n_texts, self.by = cfg.top_k, cfg.n_texts, cfg.by

    def analyze(self, inputs: AnalysisInputs) -> Result:
        """Metrics `top_features/…`, tables `top_features` and `tokens`.

        Statistics are over all ordinary positions, whatever their group: `max`, `mean` (including
        zeros), `frequency` (fraction of positions where a latent is active) and `background_freq`
        (the same on neutral text). Only active latents are ranked, ties by the lower index.
        `tokens` holds all positions of the `n_texts` texts with the largest activation of each top
        latent.
        """
        inputs = dataclasses.replace(inputs, latents=inputs.ordinary_latents, ordinary=None)
        rows = inputs.latents.rows
        csr = inputs.latents.csr
        of_rows = moments(csr, np.ones(len(rows), dtype=bool), threshold=0.0)
        rankings = {"max": of_rows.maximum, "mean": of_rows.mean, "frequency": of_rows.frequency}
        key = rankings[self.by]
        active = np.flatnonzero(of_rows.active)
        top = active[np.argsort(-key[active], kind="stable")][: self.top_k]
        table = pd.DataFrame(
            {
                "layer": inputs.layer,
                "rank": np.arange(1, len(top) + 1),
                "latent": top,
                "max": of_rows.maximum[top],
                "mean": of_rows.mean[top],
                "frequency": of_rows.frequency[top],
                "n_active": of_rows.active[top],
                "background_freq": _background(inputs)[top],
            }
        )
        columns = sparse.csc_array(csr[:, top])
        strongest, tokens = [], []
        examples = rows["example_id"].to_numpy()
        rows = rows.assign(token=_token_texts(inputs))
        for column, latent in enumerate(top.tolist()):
            values = np.asarray(columns[:, [column]].todense()).ravel()
            strongest.append(int(values.argmax()))
            tokens.append(self._tokens(rows, examples, values, latent, inputs.layer))
        table["example"] = examples[strongest]
        table["token"] = [_token_text(inputs, row) for row in strongest]
        empty = self._tokens(rows.iloc[:0], examples[:0], np.zeros(0), 0, inputs.layer)
        metrics: dict[str, float | int | None] = {
            "top_features/n_positions": len(rows),
            "top_features/n_fired": len(active),
            "top_features/best_latent": int(top[0]) if len(top) else None,
            f"top_features/best_{self.by}": float(key[top[0]]) if len(top) else None,
        }
        notes = []
        if len(top) < self.top_k:
            n = counted(len(top), "latent is", "latents are") if len(top) else "no latent is"
            only = "only " if len(top) else ""
            notes.append(f"layer {inputs.layer}: {only}{n} active at the analysed positions")
        return Result(
            metrics=metrics,
            tables={"top_features": table, "tokens": pd.concat(tokens or [empty])},
            notes=notes,
        )

    def _tokens(
        self,
        rows: pd.DataFrame,
        examples: np.ndarray,
        values: np.ndarray,
        latent: int,
        layer: int,
    ) -> pd.DataFrame:
        """Activations of one latent at all positions of the texts with its largest maxima."""
        codes, names = pd.factorize(examples)
        highest = np.zeros(len(names))
        np.maximum.at(highest, codes, values)
        order = np.argsort(-highest, kind="stable")[: self.n_texts]
        texts = order[highest[order] > 0]
        rank = np.full(len(names), -1)
        rank[texts] = np.arange(len(texts))
        chosen = np.flatnonzero(rank[codes] >= 0) if len(names) else np.zeros(0, dtype=int)
        chosen = chosen[np.argsort(rank[codes[chosen]], kind="stable")]
        part: dict[str, Any] = {
            "layer": layer,
            "latent": latent,
            "example": examples[chosen],
            "token": rows["token"].to_numpy()[chosen],
            "token_index": rows["token_index"].to_numpy()[chosen],
            "value": values[chosen].astype(np.float64),
        }
        return pd.DataFrame(part)


def _token_texts(inputs: AnalysisInputs) -> pd.Series:
    """Each position's part of its text; without texts, the token as the vocabulary spells it."""
    rows = inputs.latents.rows
    if inputs.model is None or not inputs.texts:
        return rows["token"]
    texts = np.empty(len(rows), dtype=object)
    indices = rows["token_index"].to_numpy()
    text_ids = rows["text_id"].to_numpy()
    for group in rows.groupby(["text_id", "example_id"], sort=False).indices.values():
        of_text = np.asarray(group)
        chosen, which = np.unique(indices[of_text], return_inverse=True)
        text = inputs.texts[int(text_ids[of_text[0]])]
        parts = token_pieces(text, inputs.model.tokenizer, chosen.tolist())
        texts[of_text] = np.array(parts, dtype=object)[which]
    return pd.Series(texts, index=rows.index)


def _token_text(inputs: AnalysisInputs, row: int) -> str:
    """One position's part of its text; a part of a character is shown as the whole character."""
    position = inputs.latents.rows.iloc[row]
    if inputs.model is None or not inputs.texts:
        return str(position["token"])
    text = inputs.texts[int(position["text_id"])]
    return token_pieces(text, inputs.model.tokenizer, [int(position["token_index"])])[0]


def _background(inputs: AnalysisInputs) -> np.ndarray:
    """Fraction of neutral tokens on which each latent is active; NaN without neutral text."""
    neutral = inputs.background
    if neutral is None:
        return np.full(inputs.latents.d_sae, np.nan)
    return moments(neutral.csr, np.ones(len(neutral), dtype=bool), threshold=0.0).frequency


EVERYTHING = "all"
"""Name of the single group of a data set without groups."""
Numbers = dict[str, float | int | None]


@dataclass
class _Group:
    """One group's positions at one layer."""

    name: str
    chosen: Bool[np.ndarray, " n_rows"]
    l0: Float[np.ndarray, " n_rows"]
    """Number of active latents of every row, including rows of other groups."""
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
    values: np.ndarray
    """Activations that are not zero."""


class StatsAnalyzer(Analyzer):
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
        groups = self._groups(inputs)
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
            table.insert(0, "layer", inputs.layer)
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
                chosen,
                l0,
                moments(csr, chosen, threshold=0.0),
                frequency=is_active.T @ weights,
                total=part.T @ weights,
                unit_l0=np.bincount(of_row, l0[chosen]) / np.bincount(of_row),
                types=rows["entity_type"].fillna("").to_numpy(dtype=str)[chosen][first_row],
                values=part.data,
            )
            groups.append(group)
        return groups

    def _numbers(self, group: _Group) -> Numbers:
        n_dead = int((group.moments.active == 0).sum())
        g, l0 = group.name, float(group.unit_l0.mean())
        low, high = mean_interval(
            group.unit_l0[:, None], self.cfg.seed, n_resamples=self.cfg.n_bootstrap
        )
        return {
            f"stats/n_positions_{g}": group.moments.n,
            f"stats/n_units_{g}": len(group.unit_l0),
            f"stats/l0_{g}": l0,
            f"stats/l0_{g}_ci_low": _number(low[0]),
            f"stats/l0_{g}_ci_high": _number(high[0]),
            f"stats/mean_active_{g}": float(group.total.sum()) / l0 if l0 else None,
            f"stats/max_active_{g}": float(group.values.max()) if len(group.values) else None,
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
        top = max((float(g.values.max()) for g in groups if len(g.values)), default=1.0)
        edges = np.linspace(0, top, self.n_bins + 1)
        parts = [
            pd.DataFrame(
                {
                    "group": g.name,
                    "low": edges[:-1],
                    "high": edges[1:],
                    "n": np.histogram(g.values, bins=edges)[0],
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
    n_active, n = np.unique(group.l0[group.chosen].astype(int), return_counts=True)
    return pd.DataFrame({"group": group.name, "n_active": n_active, "n_positions": n})
