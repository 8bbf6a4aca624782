"""Figures of task=evaluate: losses, CE scores by layer, L0 and densities; from saved tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from saexp.reports.analyses_parts import table_of
from saexp.reports.figures import QUIET, style
from saexp.reports.saved import SavedRun

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito."""
_STATES = {
    "clean": ("unchanged", QUIET),
    "sae": ("reconstruction", _COLOURS[0]),
    "mean": ("mean", _COLOURS[4]),
    "zero": ("zeros", _COLOURS[1]),
}


def evaluation_figures(folder: str | Path) -> dict[str, go.Figure]:
    """Name -> figure: losses, layers (of several), l0, density."""
    run = SavedRun(Path(folder))
    table = table_of(run, "evaluation")
    colours = _colours(list(table["sae"]))
    figures = {"losses": _losses(table)}
    if table["layer"].nunique() > 1:
        figures["layers"] = _layers(table)
    figures["l0"] = _l0(table_of(run, "l0_histogram"), colours)
    figures["density"] = _density(table_of(run, "densities"), colours)
    return figures


def _colours(labels: list[str]) -> dict[str, str]:
    if len(labels) <= len(_COLOURS):
        return dict(zip(labels, _COLOURS, strict=False))
    scale = [str(c) for c in sample_colorscale("Viridis", len(labels))]
    return dict(zip(labels, scale, strict=True))


def _words(label: str) -> str:
    return label.replace("_width_", ", width ").replace("_", " ")


def _bars(rows: pd.DataFrame, name: str) -> dict[str, Any] | None:
    if rows[f"{name}_ci_low"].isna().all():
        return None
    return {
        "type": "data",
        "symmetric": False,
        "array": rows[f"{name}_ci_high"] - rows[name],
        "arrayminus": rows[name] - rows[f"{name}_ci_low"],
    }


def _losses(table: pd.DataFrame) -> go.Figure:
    figure = go.Figure()
    for state, (name, colour) in _STATES.items():
        bars = go.Bar(
            x=[_words(label) for label in table["sae"]],
            y=table[f"ce_{state}"],
            error_y=_bars(table, f"ce_{state}"),
            name=name,
            marker={"color": colour},
        )
        figure.add_trace(bars)
    figure.update_layout(barmode="group")
    figure.update_yaxes(title_text="nats per token")
    return style(figure, 380)


def _layers(table: pd.DataFrame) -> go.Figure:
    figure = go.Figure()
    for (width, rows), colour in zip(table.groupby("d_sae"), _COLOURS * 9, strict=False):
        for name, dash, against in (
            ("ce_loss_score", "solid", "zeros"),
            ("ce_loss_score_mean", "dot", "the mean"),
        ):
            line = go.Scatter(
                x=rows["layer"],
                y=rows[name],
                error_y=_bars(rows, name),
                name=f"width {width}, against {against}",
                mode="lines+markers",
                line={"color": colour, "dash": dash},
            )
            figure.add_trace(line)
    figure.update_xaxes(title_text="layer", dtick=1 if table["layer"].nunique() < 20 else None)
    figure.update_yaxes(title_text="CE score")
    return style(figure, 380, legend_below=True)


def _l0(counts: pd.DataFrame, colours: Mapping[str, str]) -> go.Figure:
    figure = go.Figure()
    top = int(counts["n_active"].max())
    size = max(1, -(-(top + 1) // 60))
    for label, colour in colours.items():
        mine = counts[counts["sae"] == label]
        heights = np.bincount(mine["n_active"] // size, weights=mine["n_positions"])
        x = (np.arange(len(heights)) + 0.5) * size - 0.5
        figure.add_trace(_histogram(label, x, heights / heights.sum(), colour, len(colours)))
    figure.update_layout(bargap=0.02)
    figure.update_xaxes(title_text="active latents")
    figure.update_yaxes(title_text="share of positions")
    return style(figure, 340)


def _density(densities: pd.DataFrame, colours: Mapping[str, str]) -> go.Figure:
    figure = go.Figure()
    fired = densities[densities["frequency"] > 0]
    least = int(np.floor(np.log10(fired["frequency"].min()))) if len(fired) else -1
    edges = np.linspace(least, 0, 41)
    middles = (edges[:-1] + edges[1:]) / 2
    for label, colour in colours.items():
        mine = fired.loc[fired["sae"] == label, "frequency"]
        heights = np.histogram(np.log10(mine), bins=edges)[0]
        figure.add_trace(_histogram(label, middles, heights, colour, len(colours)))
    if len(colours) == 1:
        silent = go.Bar(
            x=[least - 0.25],
            y=[len(densities) - len(fired)],
            name="never fire",
            marker={"color": QUIET},
            showlegend=False,
        )
        figure.add_trace(silent)
    powers = list(range(least, 1))
    figure.update_layout(bargap=0.02)
    figure.update_xaxes(
        title_text="share of positions", tickvals=powers, ticktext=[f"{10.0**p:g}" for p in powers]
    )
    figure.update_yaxes(title_text="latents")
    return style(figure, 340)


def _histogram(label: str, x: np.ndarray, y: np.ndarray, colour: str, n: int) -> Any:
    """Bars of one SAE alone, lines of several."""
    if n == 1:
        return go.Bar(x=x, y=y, name=_words(label), marker={"color": colour}, showlegend=False)
    line = {"color": colour, "shape": "hvh"}
    return go.Scatter(x=x, y=y, name=_words(label), mode="lines", line=line)
