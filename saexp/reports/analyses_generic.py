"""Page of an analyzer that is none of saexp's own: its numbers, tables and figures as they are."""

import plotly.graph_objects as go
import plotly.io

from saexp.reports.analyses_parts import Section, Table, cell, shown
from saexp.reports.saved import SavedRun

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
