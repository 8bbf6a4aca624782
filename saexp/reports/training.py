"""Report of a training run: loss curves, densities, activations; from its saved tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from saexp.config import SAETrainerConfig
from saexp.reports.figures import GROUP_COLOURS, QUIET, style
from saexp.reports.finding import sentences
from saexp.reports.html import provenance_rows, write_page
from saexp.reports.saved import SavedRun

CAPTIONS = {
    "losses": "Losses while training, on scaled inputs, logarithmic.",
    "progress": "L0, explained variance and dead latents while training, on training batches; dead "
    "are those that have not fired in the last sae_trainer.dead_feature_window steps.",
    "density": "Share of held-out positions on which each latent fires; the bar at the left is "
    "latents that never did.",
    "active": "Number of active latents per held-out position.",
    "values": "Activations that are not zero, held-out positions; the count is logarithmic.",
}
_N_BINS = 60


def training_figures(folder: str | Path) -> dict[str, go.Figure]:
    """Name -> figure: losses, progress, density, active, values."""
    run = SavedRun(Path(folder))
    history, density = run.table("training"), run.table("density")
    active, values = run.table("active"), run.table("values")
    assert history is not None and density is not None, "a training run saves its tables"
    assert active is not None and values is not None, "a training run saves its tables"
    return {
        "losses": _losses(history),
        "progress": _progress(history),
        "density": _density(density),
        "active": _histogram(active["n_active"], "active latents per position", "positions"),
        "values": _histogram(values["value"], "activation", "activations", log=True),
    }


def _losses(history: pd.DataFrame) -> go.Figure:
    figure = go.Figure()
    for name in (c for c in history.columns if c.endswith("loss")):
        if (history[name] > 0).any():
            figure.add_trace(go.Scatter(x=history["step"], y=history[name], name=name))
    figure.update_xaxes(title_text="step")
    figure.update_yaxes(type="log")
    return style(figure, 360)


def _progress(history: pd.DataFrame) -> go.Figure:
    panels = {"l0": "L0", "explained_variance": "explained variance", "dead_fraction": "dead share"}
    figure = make_subplots(rows=1, cols=len(panels), subplot_titles=list(panels.values()))
    for column, name in enumerate(panels, start=1):
        line = go.Scatter(
            x=history["step"],
            y=history[name],
            showlegend=False,
            line={"color": GROUP_COLOURS[0]},
        )
        figure.add_trace(line, row=1, col=column)
    figure.update_xaxes(title_text="step")
    return style(figure, 320)


def _density(density: pd.DataFrame) -> go.Figure:
    fired = density.loc[density["frequency"] > 0, "frequency"]
    n_silent = len(density) - len(fired)
    least = np.floor(np.log10(fired.min())) if len(fired) else -1.0
    counts, edges = np.histogram(np.log10(fired), bins=40, range=(least, 0))
    figure = go.Figure(
        [
            go.Bar(
                x=(edges[:-1] + edges[1:]) / 2,
                y=counts,
                name="fire",
                marker={"color": GROUP_COLOURS[0]},
            ),
            go.Bar(x=[least - 0.3], y=[n_silent], name="never fire", marker={"color": QUIET}),
        ]
    )
    figure.update_layout(bargap=0.02)
    figure.update_xaxes(title_text="log10 of the share of positions")
    figure.update_yaxes(title_text="latents")
    return style(figure, 320)


def _histogram(values: pd.Series, x: str, y: str, *, log: bool = False) -> go.Figure:
    counts, edges = np.histogram(values, bins=_N_BINS)
    bars = go.Bar(
        x=(edges[:-1] + edges[1:]) / 2,
        y=counts,
        width=np.diff(edges),
        marker={"color": GROUP_COLOURS[0]},
    )
    figure = go.Figure(bars)
    figure.update_xaxes(title_text=x)
    figure.update_yaxes(title_text=y, type="log" if log else "linear")
    return style(figure, 320)


def transcoder_sentence(
    trainer: SAETrainerConfig, about: Mapping[str, Any], metrics: Mapping[str, float | int | None]
) -> str:
    """What a transcoder's training made, in one sentence of held-out numbers.

    `about` and `metrics` are what provenance.json and metrics.json will hold.
    """
    explained, l0 = metrics["reconstruction/explained_variance"], metrics["sparsity/l0"]
    silent, sae = metrics["sparsity/dead_fraction"], about["sae"]
    assert l0 is not None and silent is not None, "counted on every position"
    shown = "not defined" if explained is None else f"{explained:.3f}"
    skip = " and a skip connection" if trainer.options.get("skip") else ""
    return (
        f"{trainer.name} of {sae['d_sae']} latents{skip}, from {sae['hookpoint']} to "
        f"{sae['hookpoint_out']} of {about['model']['name']}: explained variance of "
        f"{sae['hookpoint_out']} {shown}, L0 {l0:.1f}, {silent:.0%} of the latents silent on "
        f"{about['n_measured']:,} held-out positions; trained on {about['n_trained_on']:,}."
    )


def _title(run: SavedRun) -> str:
    about, name = run.provenance["sae"], run.config["sae_trainer"]["name"]
    model = run.provenance["model"]["name"].rpartition("/")[2]
    if "hookpoint_out" in about:
        return f"{name}: {model}, {about['hookpoint']} to {about['hookpoint_out']}"
    return f"{name} SAE: {model}, {about['hookpoint']}"


def _place(run: SavedRun) -> str:
    """Which streams the numbers are about."""
    about = run.provenance["sae"]
    if "hookpoint_out" in about:
        return (
            f"Reads {about['hookpoint']} and predicts {about['hookpoint_out']}; explained variance "
            "and cosine are of the stream that is predicted."
        )
    return f"Reads {about['hookpoint']} and reconstructs it."


def write_training_report(folder: str | Path, figures: Mapping[str, go.Figure]) -> Path:
    """Render report.html from the folder's files; returns its path."""
    run = SavedRun(Path(folder))
    tiles: list[tuple[str, Any]] = [
        ("L0", run.metrics["sparsity/l0"]),
        ("explained variance", run.metrics["reconstruction/explained_variance"]),
        ("… median position", run.metrics["reconstruction/explained_variance_median"]),
        ("high-norm positions left out", run.metrics["reconstruction/n_high_norm"]),
        ("cosine", run.metrics["reconstruction/cosine"]),
        ("share never fired, held-out", run.metrics["sparsity/dead_fraction"]),
        ("positions trained on", run.provenance["n_trained_on"]),
        ("positions measured", run.provenance["n_measured"]),
    ]
    return write_page(
        Path(folder) / "report.html",
        "training.html",
        figures,
        title=_title(run),
        place=_place(run),
        finding=sentences(run),
        notes=run.provenance["notes"],
        tiles=tiles,
        captions=CAPTIONS,
        provenance=provenance_rows(run),
        config=run.config_text,
    )
