"""Sections of analyzers' pages, and the page of a custom analyzer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io

from saexp.reports.saved import SavedRun

N_ROWS = 200
"""Rows of a table that a page shows."""


@dataclass(frozen=True)
class Table:
    """Rows to sort by a click on the head."""

    head: list[str]
    rows: list[list[Any]]
    title: str = ""
    folded: bool = False
    """Shown only when its title is clicked."""


@dataclass(frozen=True)
class Strip:
    """A text whose tokens are shaded."""

    label: str
    tokens: list[tuple[str, float, str]]
    """(text, shade from 0 to 1, what hovering says)."""


@dataclass(frozen=True)
class Section:
    """One heading and what stands under it."""

    title: str
    text: str = ""
    figures: list[tuple[str, str]] = field(default_factory=list)
    """(name, caption)."""
    tables: list[Table] = field(default_factory=list)
    strips: list[Strip] = field(default_factory=list)
    html: str = ""
    """Content of a plugin's section, inserted as it is."""


def cell(value: Any) -> Any:
    """A value that a page's table can show: a number, text, or nothing."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is pd.NaT:
        return None
    if value is None or value is pd.NA or isinstance(value, str | int | float):
        return value
    return str(value)


def shown(
    table: pd.DataFrame,
    title: str = "",
    columns: dict[str, str] | None = None,
    *,
    folded: bool = False,
    n_rows: int = N_ROWS,
) -> Table:
    """The first rows of a table; `columns` says which, and their names on the page."""
    names = {str(c): str(c) for c in table.columns} if columns is None else columns
    there = [c for c in names if c in table.columns]
    part = table[there].head(n_rows)
    if len(table) > n_rows:
        title = f"{title} (first {n_rows} of {len(table):,})".strip()
    rows = [[cell(v) for v in row] for row in part.itertuples(index=False, name=None)]
    return Table([names[c] for c in there], rows, title, folded)


def layers_of(table: pd.DataFrame) -> list[int]:
    """Layers that a table has rows of, in order."""
    return [int(n) for n in pd.unique(table["layer"])]


def suffix(layer: int, layers: Sequence[int]) -> str:
    """Ending of a metric's name where a run has several layers."""
    return f"_layer_{layer}" if len(layers) > 1 else ""


def interval(low: Any, high: Any, digits: int = 3) -> str:
    """` [0.912, 0.954]`, or nothing where there is none."""
    if low is None or high is None or pd.isna(low) or pd.isna(high):
        return ""
    return f" [{low:.{digits}f}, {high:.{digits}f}]"


def told(run: SavedRun, metric: str, digits: int = 3) -> str:
    """A metric with its interval, `metric_ci_low` and `metric_ci_high`, where it has one."""
    m = run.metrics
    value = m.get(metric)
    if value is None:
        return "not defined"
    between = interval(m.get(f"{metric}_ci_low"), m.get(f"{metric}_ci_high"), digits)
    return f"{value:.{digits}f}{between}"


def table_of(run: SavedRun, name: str) -> pd.DataFrame:
    """A table that the analyzer always saves."""
    table = run.table(name)
    assert table is not None, f"the run saves {name}.parquet"
    return table


FIGURES = "figures.json"
"""File with the figures that an analyzer made itself, by name."""
_COMMON = ("collection/", "sparsity/", "reconstruction/", "check/")
_N_TOLD = 6


def asked(run: SavedRun) -> str:
    """What kind of page this is."""
    return f"What the analyzer '{run.config['analyzer']['name']}' gave."


def figures(run: SavedRun) -> dict[str, go.Figure]:
    """The figures that were saved."""
    saved = run.object(FIGURES) or {}
    return {name: plotly.io.from_json(text) for name, text in saved.items()}


def sentences(run: SavedRun) -> list[str]:
    """The first of its metrics."""
    own = _own_metrics(run)
    if not own:
        return []
    named = [
        f"{k} {'not defined' if v is None else f'{v:.4g}'}" for k, v in list(own.items())[:_N_TOLD]
    ]
    more = f", and {len(own) - _N_TOLD} more in metrics.json" if len(own) > _N_TOLD else ""
    return [f"{', '.join(named)}{more}."]


def sections(run: SavedRun) -> list[Section]:
    """Metrics, then every figure, then every table."""
    own = _own_metrics(run)
    found = []
    if own:
        rows = [[name, cell(value)] for name, value in own.items()]
        found.append(Section("Metrics", tables=[Table(["metric", "value"], rows)]))
    found += [Section(name, figures=[(name, "")]) for name in figures(run)]
    for name in run.provenance["tables"]:
        table = run.table(name)
        if table is not None:
            found.append(Section(name, f"All rows are in {name}.parquet.", tables=[shown(table)]))
    return found


def _own_metrics(run: SavedRun) -> dict[str, float | int | None]:
    return {k: v for k, v in run.metrics.items() if not k.startswith(_COMMON)}
