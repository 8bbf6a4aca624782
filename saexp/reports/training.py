"""The page of task=train: learning curves, and quality on held-out text, of one or several SAEs."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from saexp.config import SAETrainerConfig
from saexp.errors import counted
from saexp.reports import (
    GROUP_COLOURS,
    PALETTE,
    Chart,
    Finding,
    TileGroup,
    as_table,
    bar,
    saved_table,
    scatter,
    style,
    write_run_page,
)
from saexp.reports.sae_quality import (
    DENSITY_CAPTION,
    density_histogram,
    histogram_trace,
    sae_colours,
)
from saexp.reports.saved_run import SavedRun, lines
from saexp.results import model_title

_CAPTIONS = {
    "losses": "Losses during training, on scaled inputs, on a logarithmic axis.",
    "progress": "L0, explained variance and dead latents on training batches; a latent is dead if "
    "it was not active in the last sae_trainer.dead_feature_window steps.",
    "quality": "Explained variance and L0 of each SAE on held-out positions; higher and further to "
    "the left is better.",
    "density": DENSITY_CAPTION,
    "active": "Number of held-out positions by their number of active latents.",
    "values": "Number of activations by their value, zeros not counted, held-out positions; the "
    "count is logarithmic.",
}
_EVALUATED = (
    "The CE score and the points of L0 are of held-out text, with the reconstruction spliced in."
)
_OVERALL = "The whole loss of each SAE during training, on scaled inputs, on a logarithmic axis."
_N_BINS = 60
_PANELS = {
    "l0": "L0",
    "explained_variance": "explained variance",
    "dead_fraction": "fraction of dead latents",
    "ce_loss_score": "CE score",
}
_HELD_OUT = {"l0": "held_out_l0"}
"""Curve -> the same number on held-out text, drawn as points."""
SAES = "saes"
"""Table of the runs that trained several SAEs: one row for each."""
_COLUMNS = {
    "sae": "SAE",
    "hookpoint": "hookpoint",
    "d_sae": "latents",
    "explained_variance": "explained variance",
    "l0": "L0",
    "dead_fraction": "fraction never active",
    "ce_loss_score": "CE score",
    "cosine": "cosine similarity",
    "n_trained_on": "positions trained on",
    "n_measured": "positions measured",
}


def training_figures(folder: str | Path) -> dict[str, go.Figure]:
    """Name -> figure: losses, progress, density, active, values; of several SAEs also quality."""
    run = SavedRun(Path(folder))
    history = _by_sae(saved_table(run, "training"))
    density, active, values = (
        _by_sae(saved_table(run, name)) for name in ("density", "active", "values")
    )
    colours = {"": GROUP_COLOURS[0]} if len(history) == 1 else sae_colours(list(history))
    alone = history.get("")
    losses = _overall_losses(history, colours) if alone is None else _losses(alone)
    figures = {"losses": losses, "progress": _progress(history, colours)}
    if len(history) > 1:
        figures["quality"] = _quality(saved_table(run, SAES), colours)
    frequencies = {name or "latents": table["frequency"] for name, table in density.items()}
    of_density = {name or "latents": colour for name, colour in colours.items()}
    return {
        **figures,
        "density": density_histogram(frequencies, of_density),
        "active": _histogram(
            {name: table["n_active"] for name, table in active.items()},
            colours,
            "active latents at a position (L0)",
            "number of positions",
        ),
        "values": _histogram(
            {name: table["value"] for name, table in values.items()},
            colours,
            "activation",
            "number of activations",
            log=True,
        ),
    }


def _by_sae(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Label -> rows of the SAE; the label of a single one is empty."""
    if "sae" not in table:
        return {"": table}
    return {str(name): rows for name, rows in table.groupby("sae", sort=False)}


def _step_title(histories: Iterable[pd.DataFrame]) -> str:
    """The axis of training steps, with how many times the data were seen at its end."""
    epochs = [float(h["epoch"].iloc[-1]) for h in histories if "epoch" in h and len(h)]
    if not epochs:
        return "training step"
    return f"training step ({max(epochs):.2f} epochs)"


def _epochs(history: pd.DataFrame) -> dict[str, Any]:
    """Options of a curve whose hover label has the epoch of each step."""
    if "epoch" not in history:
        return {}
    return {
        "customdata": history["epoch"],
        "hovertemplate": "step %{x}, epoch %{customdata:.2f}: %{y:.4g}",
    }


def _losses(history: pd.DataFrame) -> go.Figure:
    figure = Chart()
    names = [str(c) for c in history if str(c).endswith("loss")]
    names.sort(key=lambda name: name == "overall_loss")
    for name in names:
        if (history[name] > 0).any():
            # Without an auxiliary loss it equals another one, which a dotted line leaves visible.
            line = {"dash": "dot", "width": 3} if name == "overall_loss" else {}
            about = {"name": name.replace("_", " "), "line": line, **_epochs(history)}
            figure.add_trace(scatter(x=history["step"], y=history[name], **about))
    figure.update_xaxes(title=_step_title([history]))
    figure.update_yaxes(title="loss", type="log")
    return style(figure, 360, showlegend=True)


def _overall_losses(histories: Mapping[str, pd.DataFrame], colours: Mapping[str, str]) -> go.Figure:
    figure = Chart()
    for name, history in histories.items():
        line = {"color": colours[name]}
        about = {"name": name, "line": line, **_epochs(history)}
        figure.add_trace(scatter(x=history["step"], y=history["overall_loss"], **about))
    figure.update_xaxes(title=_step_title(histories.values()))
    figure.update_yaxes(title="loss", type="log")
    return style(figure, 360, legend_below=True, showlegend=True)


def _progress(histories: Mapping[str, pd.DataFrame], colours: Mapping[str, str]) -> go.Figure:
    panels = {k: v for k, v in _PANELS.items() if any(k in h for h in histories.values())}
    figure = Chart.with_panels(1, len(panels), spacing=(0.36 / len(panels), None))
    for column, (name, title) in enumerate(panels.items(), start=1):
        for label, history in histories.items():
            line = {"color": colours[label]}
            about = {"name": label or title, "legendgroup": label, "showlegend": column == 1}
            if name in history:
                known = history[history[name].notna()]
                mode = "lines+markers" if name == "ce_loss_score" else None
                shown = {"line": line, "mode": mode, **about, **_epochs(known)}
                curve = scatter(x=known["step"], y=known[name], **shown)
                figure.add_trace(curve, row=1, col=column)
            if (held_out := _HELD_OUT.get(name)) in history:
                known = history[history[held_out].notna()]
                about |= {"name": f"{label or title}, held-out text", "showlegend": False}
                points = scatter(
                    x=known["step"],
                    y=known[held_out],
                    mode="markers",
                    marker={"color": colours[label], "symbol": "diamond", "size": 8},
                    **about,
                )
                figure.add_trace(points, row=1, col=column)
        figure.update_yaxes(title=title, row=1, col=column)
        values = pd.concat([h[name].dropna() for h in histories.values() if name in h])
        if name != "l0" and values.nunique() == 1:
            # Around a constant, Plotly's axis would reach 1 to both sides.
            ends = [min(0.0, values.iloc[0]), max(1.0, values.iloc[0])]
            figure.update_yaxes(range=[ends[0] - 0.03, ends[1] + 0.03], row=1, col=column)
    figure.update_xaxes(title=_step_title(histories.values()))
    several = len(histories) > 1
    height = 380 if several else 320
    return style(figure, height, legend_below=several, showlegend=several)


def _quality(table: pd.DataFrame, colours: Mapping[str, str]) -> go.Figure:
    figure = Chart()
    for row in table.to_dict("records"):
        point = scatter(
            x=[row["l0"]],
            y=[row["explained_variance"]],
            name=str(row["sae"]),
            mode="markers",
            marker={"color": colours[str(row["sae"])], "size": 11},
        )
        figure.add_trace(point)
    figure.update_xaxes(title="L0 (active latents per position)")
    figure.update_yaxes(title="explained variance")
    return style(figure, 400, legend_below=True, showlegend=True)


def _histogram(
    series: Mapping[str, pd.Series],
    colours: Mapping[str, str],
    x: str,
    y: str,
    *,
    log: bool = False,
) -> go.Figure:
    """One series as bars, several as lines over the same bins."""
    figure = Chart()
    bins: Any = _N_BINS
    if len(series) > 1:
        bins = np.histogram_bin_edges(pd.concat(list(series.values())), bins=_N_BINS)
    for name, values in series.items():
        counts, edges = np.histogram(values, bins=bins)
        middles = (edges[:-1] + edges[1:]) / 2
        if len(series) > 1:
            figure.add_trace(histogram_trace(name, middles, counts, colours[name], as_bars=False))
            continue
        colour = {"color": colours[name]}
        figure.add_trace(bar(x=middles, y=counts, width=np.diff(edges), marker=colour))
    figure.update_xaxes(title=x)
    figure.update_yaxes(title=y, type="log" if log else "linear")
    return style(figure, 320)


def trained_cells(done: pd.DataFrame) -> go.Figure:
    """Explained variance against L0 on held-out texts, a colour per trainer.

    A trace per trainer and layer, its points in order of L0. Up and left is better.
    """
    figure = go.Figure()
    trainers = list(dict.fromkeys(done["sae_trainer"]))
    for index, (name, part) in enumerate(lines(done, ["sae_trainer", "layer"])):
        ordered = part.sort_values("sparsity/l0")
        colour = PALETTE[trainers.index(ordered["sae_trainer"].iloc[0]) % len(PALETTE)]
        figure.add_trace(
            go.Scatter(
                x=ordered["sparsity/l0"],
                y=ordered["reconstruction/explained_variance"],
                name=name.removeprefix("sae_trainer "),
                mode="lines+markers",
                line={"color": colour, "width": 1},
                marker={"size": 9, "symbol": index % 8},
                customdata=ordered["width"],
                hovertemplate="L0 %{x:.1f}, explained variance %{y:.3f}, width %{customdata}",
            )
        )
    figure.update_xaxes(title="L0 (active latents per position)")
    figure.update_yaxes(title="explained variance (fraction)")
    return style(figure, 460, legend_below=True)


def training_sentence(run: SavedRun) -> str:
    """The trained SAE's held-out quality in one sentence."""
    m, about = run.metrics, run.provenance
    sae = about["sae"]
    subject = (
        f"{run.config['sae_trainer']['name']} SAE with {counted(sae['d_sae'], 'latent')} on "
        f"{sae['hookpoint']} of {about['model']['name']}: "
    )
    return f"{subject}{_quality_words('', about, m)}"


def transcoder_sentence(
    trainer: SAETrainerConfig, about: Mapping[str, Any], metrics: Mapping[str, float | int | None]
) -> str:
    """A trained transcoder's held-out quality in one sentence.

    `about` and `metrics` are what provenance.json and metrics.json will hold.
    """
    sae = about["sae"]
    skip = " and a skip connection" if trainer.options.get("skip") else ""
    subject = (
        f"{trainer.name} with {counted(sae['d_sae'], 'latent')}{skip}, from {sae['hookpoint']} to "
        f"{sae['hookpoint_out']} of {about['model']['name']}: "
    )
    of = f" of {sae['hookpoint_out']}"
    return f"{subject}{_quality_words(of, about, metrics)}"


def several_sentence(model: str, table: pd.DataFrame) -> str:
    """The range of the held-out quality of several SAEs; `table` is the table `saes`."""
    explained, l0 = table["explained_variance"].dropna(), table["l0"]
    ranged = "not defined"
    if len(explained):
        best = table["sae"].iloc[int(np.nanargmax(table["explained_variance"].astype(float)))]
        ranged = f"{explained.min():.3f} to {explained.max():.3f} (largest: {best})"
    return (
        f"{counted(len(table), 'SAE')} of {model}, trained in one pass: explained variance "
        f"{ranged} and L0 {l0.min():.1f} to {l0.max():.1f} on held-out positions."
    )


def _quality_words(
    of: str, about: Mapping[str, Any], metrics: Mapping[str, float | int | None]
) -> str:
    explained, l0 = metrics["reconstruction/explained_variance"], metrics["sparsity/l0"]
    dead = metrics["sparsity/dead_fraction"]
    assert l0 is not None and dead is not None, "counted on every position"
    shown = "not defined" if explained is None else f"{explained:.3f}"
    return (
        f"explained variance{of} {shown} and L0 {l0:.1f} on "
        f"{counted(about['n_measured'], 'held-out position')}, where {dead:.0%} of the latents are "
        f"never active; trained on {counted(about['n_trained_on'], 'position')}."
    )


def _title(run: SavedRun) -> str:
    name, model = run.config["sae_trainer"]["name"], run.provenance["model"]["name"]
    about, model = run.provenance["sae"], model_title(model)
    if (saes := run.table(SAES)) is not None:
        return f"{counted(len(saes), 'SAE')} trained together: {model}"
    if "hookpoint_out" in about:
        return f"{name}: {model}, {about['hookpoint']} to {about['hookpoint_out']}"
    return f"{name} SAE: {model}, {about['hookpoint']}"


def _streams(run: SavedRun) -> str:
    """Which activations the numbers are about."""
    about = run.provenance["sae"]
    if "hookpoint_out" in about:
        return (
            f"It reads {about['hookpoint']} and predicts {about['hookpoint_out']}; explained "
            "variance and cosine similarity are of the predicted activations."
        )
    return f"It reads {about['hookpoint']} and reconstructs it."


def _tiles(run: SavedRun) -> list[TileGroup]:
    """The numbers of a single SAE."""
    labels = {
        "sparsity/l0": "L0 (active latents per position)",
        "reconstruction/explained_variance": "explained variance (fraction)",
        "reconstruction/explained_variance_median": "… median position",
        "reconstruction/n_high_norm": "high-norm positions left out",
        "reconstruction/cosine": "cosine similarity",
        "sparsity/dead_fraction": "fraction of latents never active",
        "train/ce_loss_score": "CE score",
        "train/epochs": "epochs (times the training data were read)",
    }
    tiles: list[tuple[str, Any]] = [
        (label, run.metrics[k]) for k, label in labels.items() if k in run.metrics
    ]
    tiles += [
        ("positions trained on", run.provenance["n_trained_on"]),
        ("positions measured", run.provenance["n_measured"]),
    ]
    text = f"Measured on texts that were not trained on. {_streams(run)}"
    return [TileGroup("Quality on held-out texts", text, tiles)]


def write_training_report(folder: str | Path, figures: Mapping[str, go.Figure]) -> Path:
    """Render report.html from the folder's files; returns its path."""
    run = SavedRun(Path(folder))
    sentences = run.provenance.get("finding") or [training_sentence(run)]
    saes, captions = run.table(SAES), dict(_CAPTIONS)
    hero = "progress" if saes is None else "quality"
    if any("held_out_l0" in h for h in _by_sae(saved_table(run, "training")).values()):
        captions["progress"] += f" {_EVALUATED}"
    if saes is not None:
        captions["losses"] = _OVERALL
    return write_run_page(
        run,
        "training.html",
        figures,
        title=_title(run),
        findings=[
            Finding(sentences[0], [(hero, captions[hero])]),
            *map(Finding, sentences[1:]),
        ],
        tile_groups=_tiles(run) if saes is None else [],
        captions=captions,
        hero=hero,
        saes=None if saes is None else as_table(saes, columns=_COLUMNS),
    )
