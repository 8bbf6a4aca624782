"""Figures of a run, from its saved tables."""

from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from saexp.reports.effect_figures import effect_figures
from saexp.reports.saved import SavedRun
from saexp.reports.style import GROUP_COLOURS, QUIET, see_through, style

N_HISTOGRAMS = 2
"""Latents per direction whose values are drawn."""


def colours(run: SavedRun) -> dict[str, str]:
    """Group -> its colour, the same in every figure and table."""
    return dict(zip(run.groups, GROUP_COLOURS, strict=True))


def run_figures(folder: str | Path) -> dict[str, go.Figure]:
    """Name -> figure: frequencies, values, types, dose_response; those the run has data for."""
    run = SavedRun(Path(folder))
    if run.latents is None:
        return {}
    figures = {"frequencies": frequencies(run)}
    activations = run.table("activations")
    if activations is not None and len(activations):
        figures["values"] = values(run, activations)
    if len(run.entity_types) > 1 and bool(run.latents["selected"].any()):
        figures["types"] = by_type(run)
    return figures | effect_figures(run)


def frequencies(run: SavedRun) -> go.Figure:
    """Share of held-out entities of each group on which a latent fires, one point per latent."""
    assert run.latents is not None
    first, second = run.groups
    figure = go.Figure()
    figure.add_shape(
        type="line", x0=0, y0=0, x1=1, y1=1, line={"color": QUIET, "dash": "dot", "width": 1}
    )
    chosen = {g: run.selected(g) for g in run.groups}
    rest = run.latents[~run.latents["selected"]]
    layers = [("not selected", rest, QUIET, 5)]
    layers += [(f"selected for {g}", chosen[g], c, 10) for g, c in colours(run).items()]
    for name, table, colour, size in layers:
        figure.add_trace(
            go.Scatter(
                x=table[f"freq_{second}_test"],
                y=table[f"freq_{first}_test"],
                mode="markers",
                name=name,
                marker={"color": colour, "size": size, "opacity": 0.85},
                customdata=np.stack(
                    [table["latent"], table["auroc_test"], table["q_value"]], axis=1
                ),
                hovertemplate=(
                    f"latent %{{customdata[0]:d}}<br>{first} %{{y:.2f}}, {second} %{{x:.2f}}<br>"
                    "AUROC %{customdata[1]:.3f}, q %{customdata[2]:.2g}<extra></extra>"
                ),
            )
        )
    figure.update_xaxes(title=f"fires on {second} (share, test)", range=[-0.03, 1.03])
    figure.update_yaxes(title=f"fires on {first} (share, test)", range=[-0.03, 1.03])
    return style(figure, 480)


def values(run: SavedRun, activations: pd.DataFrame) -> go.Figure:
    """Histograms of the leading latents' values on held-out rows, one group over the other."""
    panels = []
    for group in run.groups:
        there = set(activations["latent"])
        best = [f for f in run.selected(group)["latent"] if f in there]
        panels += [(group, f) for f in best[:N_HISTOGRAMS]]
    figure = make_subplots(
        cols=2,
        rows=max(1, -(-len(panels) // 2)),
        subplot_titles=[f"latent {f} ({g})" for g, f in panels],
        vertical_spacing=0.18,
    )
    test = activations[activations["split"] == "test"]
    for index, (_, latent) in enumerate(panels):
        mine = test[test["latent"] == latent]
        top = float(mine["value"].max()) or 1.0
        for group, colour in colours(run).items():
            figure.add_trace(
                go.Histogram(
                    x=mine.loc[mine["group"] == group, "value"],
                    name=group,
                    legendgroup=group,
                    showlegend=index == 0,
                    marker={"color": colour},
                    opacity=0.6,
                    histnorm="probability",
                    xbins={"start": 0, "end": top * 1.001, "size": top / 30},
                ),
                row=index // 2 + 1,
                col=index % 2 + 1,
            )
    figure.update_layout(barmode="overlay")
    figure.update_yaxes(title="share of rows")
    figure.update_xaxes(title="activation")
    return style(figure, 300 * max(1, -(-len(panels) // 2)), legend_below=True)


def by_type(run: SavedRun) -> go.Figure:
    """Separation of the leading latents per entity type, on held-out entities."""
    figure = go.Figure()
    first = run.groups[0]
    for group, colour in colours(run).items():
        for number, (_, row) in enumerate(run.selected(group).head(4).iterrows()):
            # The table keeps each type's separation in the latent's own direction.
            heights = [row[f"separation_{t}_test"] for t in run.entity_types]
            figure.add_trace(
                go.Bar(
                    x=run.entity_types,
                    y=heights,
                    name=f"{group}: latent {row['latent']}",
                    marker={"color": see_through(colour, 1 - 0.2 * number)},
                )
            )
    figure.update_yaxes(
        title=f"separation in its direction<br>({first} against {run.groups[1]})",
        range=[-0.1, 1.02],
    )
    figure.update_layout(barmode="group")
    return style(figure, 420, legend_below=True)
