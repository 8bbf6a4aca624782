"""Probes over the cells of a sweep: their held-out AUROC by layer, or by another swept key."""

import re

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from saexp.reports import CHANCE_LINE, PALETTE, error_bars, interval_words, style
from saexp.reports.analyzer_pages import name_of
from saexp.reports.saved_run import cell_words, swept

CAPTION = (
    "Held-out AUROC of every probe with 95 % intervals over units; the dotted line is chance. The "
    "surface baseline reads the text alone, without the model."
)

MARKERS = ("circle", "diamond-open", "x")


def probes_of(table: pd.DataFrame) -> list[str]:
    """Names of the probes with a held-out AUROC, but for the one that always predicts one group."""
    pattern = r"probe/(.+?)_auroc_test"
    names = [m[1] for c in table.columns if (m := re.fullmatch(pattern, str(c)))]
    return [n for n in names if n != "majority" and table[f"probe/{n}_auroc_test"].notna().any()]


def probe_columns(table: pd.DataFrame) -> dict[str, str]:
    """Columns of the table of cells and their labels: the held-out AUROC of each probe."""
    return {f"probe/{n}_auroc_test": f"AUROC: {name_of(n)}" for n in probes_of(table)}


def probe_findings(done: pd.DataFrame) -> list[str]:
    """A sentence per probe: its held-out AUROC in the cell with the best AUROC on train."""
    keys, sentences = swept(done), []
    for name in probes_of(done):
        best = _best_cell(done, name)
        if best is None:
            continue
        at = cell_words(best, keys)
        sentence = (
            f"{name_of(name)}: held-out AUROC {_auroc(best, name)}{f' at {at}' if at else ''}"
        )
        difference = best.get(f"probe/{name}_minus_surface_test")
        if difference is not None and pd.notna(difference):
            low, high = (
                best.get(f"probe/{name}_minus_surface_ci_{e}_test") for e in ("low", "high")
            )
            sentence += f", {difference:+.3f}{interval_words(low, high)} against the text alone"
        others = done[f"probe/{name}_auroc_test"].astype(float).dropna()
        if len(others) > 1:
            sentence += f"; {others.min():.3f} to {others.max():.3f} over {len(others)} cells"
        sentences.append(f"{sentence} (cell chosen by the AUROC on train).")
    return sentences


def _best_cell(done: pd.DataFrame, name: str) -> pd.Series | None:
    held_out = done[f"probe/{name}_auroc_test"].notna()
    train = done.loc[held_out, f"probe/{name}_auroc"].astype(float)
    return None if train.isna().all() else done[held_out].iloc[int(np.nanargmax(train))]


def _auroc(cell: pd.Series, name: str) -> str:
    low, high = (cell.get(f"probe/{name}_auroc_ci_{end}_test") for end in ("low", "high"))
    return f"{cell[f'probe/{name}_auroc_test']:.3f}{interval_words(low, high)}"


def probe_figure(done: pd.DataFrame) -> go.Figure | None:
    """Held-out AUROC by layer, or by the first swept key; None where only one cell has probes."""
    names = probes_of(done)
    keys = swept(done)
    x = "layer" if "layer" in done and done["layer"].nunique() > 1 else next(iter(keys), None)
    if not names or x is None:
        return None
    others = [k for k in keys if k != x]
    figure = go.Figure()
    parts = list(done.groupby(others, sort=False, dropna=False)) if others else [((), done)]
    for index, (value, part) in enumerate(parts):
        values = value if isinstance(value, tuple) else (value,)
        suffix = "".join(f", {k} {v}" for k, v in zip(others, values, strict=True))
        ordered = part.sort_values(x) if x == "layer" else part
        for number, name in enumerate(names):
            auroc = ordered[f"probe/{name}_auroc_test"].astype(float)
            limits = [
                ordered.get(f"probe/{name}_auroc_ci_{end}_test", pd.Series(np.nan, ordered.index))
                for end in ("low", "high")
            ]
            figure.add_trace(
                go.Scatter(
                    x=ordered[x] if x == "layer" else ordered[x].astype(str),
                    y=auroc,
                    name=f"{name_of(name)}{suffix}",
                    mode="lines+markers",
                    line={
                        "color": PALETTE[number % len(PALETTE)],
                        "dash": ("solid", "dash", "dot")[index % 3],
                    },
                    # More probes than colours: the next ones differ by their marker.
                    marker={"symbol": MARKERS[number // len(PALETTE) % len(MARKERS)], "size": 9},
                    error_y=error_bars(auroc, *limits),
                )
            )
    figure.add_hline(y=0.5, line=CHANCE_LINE)
    figure.update_xaxes(title=x)
    figure.update_yaxes(title="held-out AUROC")
    return style(figure, 430, legend_below=True)
