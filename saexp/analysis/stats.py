"""How sparse and how strong latents are in each group, and which fire most (REFERENCE: study E)."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy import sparse

from saexp.analysis.base import AnalysisInputs
from saexp.analysis.options import read_options, whole
from saexp.analysis.resampling import UnitBootstrap
from saexp.config import AnalyzerConfig
from saexp.errors import DataError
from saexp.latents.summary import Moments, moments
from saexp.results import TaskResult

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
    values: np.ndarray
    """Activations that are not zero."""


class StatsAnalyzer:
    """Registry kind `analyzer`, name `stats`; takes several layers, one after another."""

    several_layers = True
    reads_acts = False
    ordinary_only = True

    def __init__(self, cfg: AnalyzerConfig) -> None:
        self.cfg = cfg
        options = read_options(cfg, {"top_k": 10, "n_bins": 60})
        self.top_k = whole("top_k", options["top_k"])
        self.n_bins = whole("n_bins", options["n_bins"], 2)

    def analyze(self, inputs: AnalysisInputs) -> TaskResult:
        """Metrics `stats/…` per group, tables `groups`, `counts`, `frequent`, `l0_histogram` and
        `value_histogram`.

        L0 is the number of latents that are not zero at a position; its intervals are by bootstrap
        over units. Describes all ordinary positions of all splits and selects nothing for a claim.
        Works with one group or none (`all`), too. Raises DataError for a group without positions.
        """
        inputs = dataclasses.replace(inputs, latents=inputs.ordinary_latents, ordinary=None)
        groups = self._groups(inputs)
        bootstrap = UnitBootstrap(
            inputs.latents.rows["unit"].to_numpy(),
            self.cfg.n_bootstrap,
            self.cfg.seed,
            np.select([g.chosen for g in groups], range(len(groups)), -1),
        )
        metrics: Numbers = {}
        for group in groups:
            metrics |= self._numbers(group, bootstrap)
        frequent = [_frequent(g, self.top_k) for g in groups]
        if len(groups) == 2:
            metrics |= _overlap(*(set(f["latent"]) for f in frequent))
            metrics |= _difference(groups[0], groups[1], bootstrap)
        tables = {
            "groups": self._table(groups, metrics),
            "counts": _counts(groups),
            "frequent": _shared(frequent),
            "l0_histogram": pd.concat([_l0_histogram(g) for g in groups], ignore_index=True),
            "value_histogram": self._value_histogram(groups),
        }
        for table in tables.values():
            table.insert(0, "layer", inputs.layer)
        return TaskResult(metrics=metrics, tables=tables)

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
            values = sparse.csr_array(csr[mine]).data
            found.append(_Group(name, mine, l0, about, values))
        return found

    def _numbers(self, group: _Group, bootstrap: UnitBootstrap) -> Numbers:
        silent = int((group.about.active == 0).sum())
        l0, g = group.l0[group.chosen], group.name
        low, high = bootstrap.mean(np.where(group.chosen, group.l0, np.nan))
        return {
            f"stats/n_positions_{g}": group.about.n,
            f"stats/n_units_{g}": len(np.unique(bootstrap.of_row[group.chosen])),
            f"stats/l0_{g}": float(l0.mean()),
            f"stats/l0_{g}_ci_low": low,
            f"stats/l0_{g}_ci_high": high,
            f"stats/mean_active_{g}": float(group.values.mean()) if len(group.values) else None,
            f"stats/max_active_{g}": float(group.values.max()) if len(group.values) else None,
            f"stats/dead_fraction_{g}": silent / len(group.about.active),
            f"stats/n_dead_{g}": silent,
        }

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
    """The latents that fire at most positions, ties by the lower index."""
    active = group.about.active
    fired = np.flatnonzero(active)
    top = fired[np.argsort(-active[fired], kind="stable")][:top_k]
    return pd.DataFrame(
        {
            "group": group.name,
            "rank": np.arange(1, len(top) + 1),
            "latent": top,
            "n_active": active[top],
            "frequency": group.about.frequency[top],
            "mean_active": group.about.total[top] / active[top],
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


def _difference(first: _Group, second: _Group, bootstrap: UnitBootstrap) -> Numbers:
    """L0 of the first group less that of the second, units drawn within each group."""
    parts = []
    for group in (first, second):
        codes, n = bootstrap.of_row[group.chosen], bootstrap.n_units
        sums = np.bincount(codes, weights=group.l0[group.chosen], minlength=n)
        parts.append((sums, np.bincount(codes, minlength=n).astype(float)))

    def statistic(weights: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            a, b = ((sums @ weights) / (counts @ weights) for sums, counts in parts)
        return a - b

    low, high = bootstrap.interval(statistic)
    value = float(first.l0[first.chosen].mean() - second.l0[second.chosen].mean())
    name = "stats/l0_difference"
    return {name: value, f"{name}_ci_low": low, f"{name}_ci_high": high}


def _counts(groups: list[_Group]) -> pd.DataFrame:
    """Per latent that fired at all: at how many positions of each group it does."""
    fired = np.flatnonzero(np.sum([g.about.active for g in groups], axis=0))
    table = pd.DataFrame({"latent": fired})
    for group in groups:
        table[f"n_active_{group.name}"] = group.about.active[fired]
    for group in groups:
        table[f"freq_{group.name}"] = group.about.frequency[fired]
    if len(groups) == 2:
        a, b = (table[f"freq_{g.name}"] for g in groups)
        table["freq_difference"] = a - b
    return table


def _l0_histogram(group: _Group) -> pd.DataFrame:
    n_active, n = np.unique(group.l0[group.chosen].astype(int), return_counts=True)
    return pd.DataFrame({"group": group.name, "n_active": n_active, "n_positions": n})
