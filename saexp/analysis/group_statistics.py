"""Statistics of latents by group, and the latents that are most active."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Shaped
from scipy import sparse

from saexp.analysis.base import AnalysisInputs, Analyzer, read_options, whole
from saexp.analysis.contrast_notes import unequal_types
from saexp.config import AnalyzerConfig
from saexp.data.tokenization import pieces
from saexp.errors import ConfigError, DataError
from saexp.latents.statistics import Moments, moments
from saexp.registry import did_you_mean
from saexp.results import TaskResult
from saexp.stats.intervals import MIN_N, difference_of_means, mean_interval
from saexp.stats.rank_tests import stratum_weights
from saexp.wording import counted

RANKINGS = ("max", "mean", "frequency")


class TopFeaturesAnalyzer(Analyzer):
    """Registry kind `analyzer`, name `top_features`; takes several layers, one after another."""

    several_layers = True
    reads_acts = False
    ordinary_only = True

    def __init__(self, cfg: AnalyzerConfig) -> None:
        super().__init__(cfg)
        options = read_options(cfg, {"top_k": 10, "by": "max", "n_texts": 3})
        self.top_k = whole("top_k", options["top_k"])
        self.n_texts = whole("n_texts", options["n_texts"])
        self.by = str(options["by"])
        if self.by not in RANKINGS:
            raise ConfigError(f"analyzer.options.by={self.by}: {did_you_mean(self.by, RANKINGS)}")

    def analyze(self, inputs: AnalysisInputs) -> TaskResult:
        """Metrics `top_features/…`, tables `top_features` and `tokens`.

        Over all ordinary positions chosen, whatever their group: `max`, `mean` (zeros included) and
        `frequency` (share of positions where it is on); `background_freq` the same share on neutral
        text. Only latents that fire at all are ranked, ties by the lower index. `tokens` has every
        chosen position of the `n_texts` texts in which each top latent is strongest.
        """
        inputs = dataclasses.replace(inputs, latents=inputs.ordinary_latents, ordinary=None)
        rows = inputs.latents.rows
        csr = inputs.latents.csr
        about = moments(csr, np.ones(len(rows), dtype=bool), threshold=0.0)
        key = {"max": about.maximum, "mean": about.mean, "frequency": about.frequency}[self.by]
        fired = np.flatnonzero(about.active)
        top = fired[np.argsort(-key[fired], kind="stable")][: self.top_k]
        table = pd.DataFrame(
            {
                "layer": inputs.layer,
                "rank": np.arange(1, len(top) + 1),
                "latent": top,
                "max": about.maximum[top],
                "mean": about.mean[top],
                "frequency": about.frequency[top],
                "n_active": about.active[top],
                "background_freq": _background(inputs)[top],
            }
        )
        columns = sparse.csc_array(csr[:, top])
        strongest, tokens = [], []
        examples = rows["example_id"].to_numpy()
        rows = rows.assign(token=_readable(inputs))
        for place, latent in enumerate(top.tolist()):
            values = np.asarray(columns[:, [place]].todense()).ravel()
            strongest.append(int(values.argmax()))
            tokens.append(self._tokens(rows, examples, values, latent, inputs.layer))
        table["example"] = examples[strongest]
        table["token"] = [_alone(inputs, row) for row in strongest]
        empty = self._tokens(rows.iloc[:0], examples[:0], np.zeros(0), 0, inputs.layer)
        metrics: dict[str, float | int | None] = {
            "top_features/n_positions": len(rows),
            "top_features/n_fired": len(fired),
            "top_features/best_latent": int(top[0]) if len(top) else None,
            f"top_features/best_{self.by}": float(key[top[0]]) if len(top) else None,
        }
        notes = [] if len(top) else [f"layer {inputs.layer}: no latent fires at any position"]
        if 0 < len(top) < self.top_k:
            notes.append(f"layer {inputs.layer}: only {len(top)} latents fire at any position")
        return TaskResult(
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
        """One latent at all positions of the texts in which its maximum is largest."""
        codes, names = pd.factorize(examples)
        highest = np.zeros(len(names))
        np.maximum.at(highest, codes, values)
        order = np.argsort(-highest, kind="stable")[: self.n_texts]
        wanted = order[highest[order] > 0]
        place = np.full(len(names), -1)
        place[wanted] = np.arange(len(wanted))
        chosen = np.flatnonzero(place[codes] >= 0) if len(names) else np.zeros(0, dtype=int)
        chosen = chosen[np.argsort(place[codes[chosen]], kind="stable")]
        part: dict[str, Any] = {
            "layer": layer,
            "latent": latent,
            "example": examples[chosen],
            "token": rows["token"].to_numpy()[chosen],
            "token_index": rows["token_index"].to_numpy()[chosen],
            "value": values[chosen].astype(np.float64),
        }
        return pd.DataFrame(part)


def _readable(inputs: AnalysisInputs) -> pd.Series:
    """Each position's piece of its text; the vocabulary's own spelling without the texts."""
    rows = inputs.latents.rows
    if inputs.model is None or not inputs.texts:
        return rows["token"]
    found = np.empty(len(rows), dtype=object)
    indices = rows["token_index"].to_numpy()
    text_ids = rows["text_id"].to_numpy()
    for group in rows.groupby(["text_id", "example_id"], sort=False).indices.values():
        places = np.asarray(group)
        chosen, which = np.unique(indices[places], return_inverse=True)
        text = inputs.texts[int(text_ids[places[0]])]
        shown = pieces(text, inputs.model.tokenizer, chosen.tolist())
        found[places] = np.array(shown, dtype=object)[which]
    return pd.Series(found, index=rows.index)


def _alone(inputs: AnalysisInputs, row: int) -> str:
    """One position's piece by itself: part of a character is shown as the character."""
    about = inputs.latents.rows.iloc[row]
    if inputs.model is None or not inputs.texts:
        return str(about["token"])
    text = inputs.texts[int(about["text_id"])]
    return pieces(text, inputs.model.tokenizer, [int(about["token_index"])])[0]


def _background(inputs: AnalysisInputs) -> np.ndarray:
    """Share of neutral positions on which each latent fires; NaN without any."""
    neutral = inputs.background
    if neutral is None:
        return np.full(inputs.latents.d_sae, np.nan)
    return moments(neutral.csr, np.ones(len(neutral), dtype=bool), threshold=0.0).frequency


EVERYTHING = "all"
"""Name of the one group of a data set without groups."""
Numbers = dict[str, float | int | None]


@dataclass
class _Group:
    """One group's positions at one layer."""

    name: str
    chosen: Bool[np.ndarray, " n_rows"]
    l0: Float[np.ndarray, " n_rows"]
    """Active latents per position, of all rows."""
    about: Moments
    """Counts and maxima over positions."""
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

    def __init__(self, cfg: AnalyzerConfig) -> None:
        super().__init__(cfg)
        options = read_options(cfg, {"top_k": 10, "n_bins": 60})
        self.top_k = whole("top_k", options["top_k"])
        self.n_bins = whole("n_bins", options["n_bins"], 2)

    def analyze(self, inputs: AnalysisInputs) -> TaskResult:
        """Metrics `stats/…` per group, tables `groups`, `counts`, `frequent`, `l0_histogram` and
        `value_histogram`.

        L0 is the number of latents that are not zero at a position, `mean_active` the mean of their
        values. Means and frequencies are over units, a unit's positions averaged first; counts,
        maxima and `dead_fraction` are over positions and depend on how many there are. Intervals
        are 95 %, each by itself, by the studentised bootstrap over units; None for fewer than
        `MIN_N` units. `l0_difference` is the first group's L0 less the second's within entity types
        that both have, weighted as in van Elteren's test; over all units where they share none.
        Describes all ordinary positions of all splits and selects nothing for a claim. Works with
        one group or none (`all`), too. Raises DataError for a group without positions.
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
            found, about_types = self._difference(groups[0], groups[1])
            metrics |= found
            notes += about_types
        tables = {
            "groups": self._table(groups, metrics),
            "counts": _counts(groups),
            "frequent": _shared(frequent),
            "l0_histogram": pd.concat([_l0_histogram(g) for g in groups], ignore_index=True),
            "value_histogram": self._value_histogram(groups),
        }
        for table in tables.values():
            table.insert(0, "layer", inputs.layer)
        return TaskResult(metrics=metrics, tables=tables, notes=notes)

    def _groups(self, inputs: AnalysisInputs) -> list[_Group]:
        csr, rows = inputs.latents.csr, inputs.latents.rows
        l0 = np.diff(csr.indptr).astype(np.float64)
        found = []
        for name in inputs.groups or (EVERYTHING,):
            mine = np.ones(len(rows), dtype=bool)
            if inputs.groups:
                mine = (rows["group"] == name).fillna(False).to_numpy(dtype=bool)
            if not mine.any():
                raise DataError(
                    f"group '{name}' has no position to describe: all its examples were skipped; "
                    "see skips.parquet, or choose other positions="
                )
            about = moments(csr, mine, threshold=0.0)
            part = sparse.csr_array(csr[mine])
            of_row, units = pd.factorize(rows["unit"].to_numpy()[mine])
            weights = 1 / np.bincount(of_row)[of_row] / len(units)
            is_active = sparse.csr_array((part.data != 0, part.indices, part.indptr), part.shape)
            first_row = np.unique(of_row, return_index=True)[1]
            group = _Group(
                name,
                mine,
                l0,
                about,
                frequency=is_active.T @ weights,
                total=part.T @ weights,
                unit_l0=np.bincount(of_row, l0[mine]) / np.bincount(of_row),
                types=rows["entity_type"].fillna("").to_numpy(dtype=str)[mine][first_row],
                values=part.data,
            )
            found.append(group)
        return found

    def _numbers(self, group: _Group) -> Numbers:
        silent = int((group.about.active == 0).sum())
        g, l0 = group.name, float(group.unit_l0.mean())
        low, high = mean_interval(
            group.unit_l0[:, None], self.cfg.seed, n_resamples=self.cfg.n_bootstrap
        )
        return {
            f"stats/n_positions_{g}": group.about.n,
            f"stats/n_units_{g}": len(group.unit_l0),
            f"stats/l0_{g}": l0,
            f"stats/l0_{g}_ci_low": _number(low[0]),
            f"stats/l0_{g}_ci_high": _number(high[0]),
            f"stats/mean_active_{g}": float(group.total.sum()) / l0 if l0 else None,
            f"stats/max_active_{g}": float(group.values.max()) if len(group.values) else None,
            f"stats/dead_fraction_{g}": silent / len(group.about.active),
            f"stats/n_dead_{g}": silent,
        }

    def _difference(self, first: _Group, second: _Group) -> tuple[Numbers, list[str]]:
        """L0 of the first group less that of the second, within types, and notes on the types."""
        of_first = np.repeat([True, False], [len(first.unit_l0), len(second.unit_l0)])
        types = np.concatenate([first.types, second.types])
        weights: dict[Any, float] = stratum_weights(of_first, types)
        notes = _about_types(first, second, set(weights))
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
                "l0_difference has no interval: too few units of the types that both groups have "
                f"({MIN_N} of each group in all, 2 in each type), or an L0 that does not vary"
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
    active, frequency = group.about.active, group.frequency
    fired = np.flatnonzero(active)
    # Frequencies that differ by rounding alone are equal.
    top = fired[np.argsort(-frequency[fired].round(12), kind="stable")][:top_k]
    return pd.DataFrame(
        {
            "group": group.name,
            "rank": np.arange(1, len(top) + 1),
            "latent": top,
            "n_active": active[top],
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
    few = [g for g in groups if len(g.unit_l0) < MIN_N]
    return [
        f"{g.name} has {counted(len(g.unit_l0), 'unit')}, so its L0 has no interval; it takes "
        f"{MIN_N}"
        for g in few
    ]


def _about_types(first: _Group, second: _Group, shared: set[Any]) -> list[str]:
    """What a difference of types means for the difference of the groups."""
    groups, names = (first, second), f"{first.name} and {second.name}"
    if not shared:
        return [
            f"{names} share no entity type, so l0_difference is over all units, and a difference "
            "between types counts as one between the groups"
        ]
    notes = []
    alone = sum(kind not in shared for g in groups for kind in g.types.tolist())
    if alone:
        notes.append(
            f"l0_difference leaves out {counted(alone, 'unit')} of entity types that only one "
            "group has; the groups' own numbers do not"
        )
    units = pd.DataFrame(
        {
            "entity_type": np.concatenate([g.types for g in groups]),
            "group": np.repeat([g.name for g in groups], [len(g.types) for g in groups]),
        }
    )
    follows = "l0_difference compares within types, the groups' own numbers and lists do not"
    return notes + unequal_types(units, (first.name, second.name), follows)


def _counts(groups: list[_Group]) -> pd.DataFrame:
    """Per latent that is active at all: at how many positions of each group, and its frequency."""
    fired = np.flatnonzero(np.sum([g.about.active for g in groups], axis=0))
    table = pd.DataFrame({"latent": fired})
    for group in groups:
        table[f"n_active_{group.name}"] = group.about.active[fired]
    for group in groups:
        table[f"freq_{group.name}"] = group.frequency[fired]
    if len(groups) == 2:
        a, b = (table[f"freq_{g.name}"] for g in groups)
        table["freq_difference"] = a - b
    return table


def _l0_histogram(group: _Group) -> pd.DataFrame:
    n_active, n = np.unique(group.l0[group.chosen].astype(int), return_counts=True)
    return pd.DataFrame({"group": group.name, "n_active": n_active, "n_positions": n})
