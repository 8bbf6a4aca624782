"""Pages about the quality of SAEs: task=evaluate and task=train."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from saexp.config import SAETrainerConfig
from saexp.errors import counted
from saexp.reports.page import (
    GROUP_COLOURS,
    PALETTE,
    QUIET,
    Finding,
    TileGroup,
    as_table,
    cell,
    density_histogram,
    error_bars,
    histogram_trace,
    interval_words,
    saved_table,
    style,
    write_run_page,
)
from saexp.reports.saved import SavedRun
from saexp.results import sae_words

# task=evaluate

_DENSITY_CAPTION = (
    "Number of latents by the fraction of positions at which they are active, on a logarithmic "
    "axis; the separate bar at the left counts latents that are never active."
)
_EVALUATION_CAPTIONS = {
    "losses": "Next-token loss of the unchanged model, and with the activation replaced by the "
    "SAE's reconstruction, its mean or zeros; 95 % intervals by the studentised bootstrap over "
    "texts, or over entities if texts have one (none for fewer than 10).",
    "layers": "CE score by layer: the fraction of the loss caused by ablating the activation that "
    "the reconstruction recovers. 1 is a perfect SAE, 0 is no better than the ablation.",
    "l0": "Fraction of positions by their number of active latents.",
    "density": _DENSITY_CAPTION,
}
_IDENTITY = {"hookpoint": "hookpoint", "d_sae": "latents"}
_TABLES = {
    "ce": {
        "ce_sae": "reconstruction",
        "ce_increase": "increase",
        "ce_mean": "mean",
        "ce_zero": "zeros",
        "ce_loss_score": "CE score",
        "ce_loss_score_ci_low": "low",
        "ce_loss_score_ci_high": "high",
        "ce_loss_score_mean": "CE score against the mean",
    },
    "kl": {
        "kl_sae": "reconstruction",
        "kl_mean": "mean",
        "kl_zero": "zeros",
        "kl_score": "KL score",
        "kl_score_ci_low": "low",
        "kl_score_ci_high": "high",
        "kl_score_mean": "KL score against the mean",
    },
    "sparsity": {
        "l0": "L0",
        "l0_ci_low": "low",
        "l0_ci_high": "high",
        "n_dead": "latents never active",
        "dead_fraction": "fraction never active",
        "mean_active": "mean activation where active",
        "max_active": "maximum activation",
    },
    "reconstruction": {
        "explained_variance": "explained variance",
        "explained_variance_legacy": "legacy",
        "explained_variance_median": "median position",
        "explained_variance_all_positions": "with high-norm positions",
        "n_high_norm": "high-norm positions",
        "cosine": "cosine similarity",
        "mse": "squared error",
        "l2_ratio": "norm ratio",
        "relative_bias": "relative bias",
    },
}
"""Tables of the page: metric -> head of its column."""


def evaluation_sentences(folder: str | Path) -> list[str]:
    """The findings, then the numbers of the same SAEs and of the unchanged model."""
    run = SavedRun(Path(folder))
    rows = [row for _, row in _reported(saved_table(run, "evaluation")).iterrows()]
    return [*_evaluation_findings(run), *map(_quality_sentence, rows), _model_sentence(run)]


def _reported(table: pd.DataFrame) -> pd.DataFrame:
    """All SAEs, or of more than four the best and the worst."""
    if len(table) <= 4:
        return table
    order = table["ce_loss_score"].sort_values(ascending=False, na_position="last").index
    return table.loc[[order[0], order[-1]]]


def _evaluation_findings(run: SavedRun) -> list[str]:
    """One sentence per reported SAE."""
    table = saved_table(run, "evaluation")
    rows = _reported(table)
    sentences = [_loss_sentence(row) for _, row in rows.iterrows()]
    if len(rows) < len(table):
        sentences.insert(0, f"The best and the worst of {len(table)} SAEs by their CE score:")
    return sentences


def _model_sentence(run: SavedRun) -> str:
    metrics, first = run.metrics, saved_table(run, "evaluation").iloc[0]
    n_texts = int(metrics["evaluation/n_texts"] or 0)
    return (
        f"{run.provenance['model']['name']}, {counted(n_texts, 'text')} of data set "
        f"'{run.provenance['dataset']['name']}': the unchanged model has a next-token loss of "
        f"{first['ce_clean']:.3f}{_limits(first, 'ce_clean')} nats over "
        f"{metrics['evaluation/n_scored']:,} predictions."
    )


def _limits(row: pd.Series, name: str) -> str:
    return interval_words(row[f"{name}_ci_low"], row[f"{name}_ci_high"])


def _value(row: pd.Series, name: str) -> str:
    if pd.isna(row[name]):
        return "not defined"
    return f"{row[name]:.3f}{_limits(row, name)}"


def _loss_sentence(row: pd.Series) -> str:
    hookpoint = row["hookpoint"]
    if row["writes"] != hookpoint:
        hookpoint = f"{hookpoint} to {row['writes']}"
    return (
        f"{sae_words(row)}, {hookpoint}: with its reconstruction the model's next-token loss is "
        f"{row['ce_sae']:.3f} nats instead of {row['ce_clean']:.3f}; with zeros it is "
        f"{row['ce_zero']:.3f}, so the CE score is {_value(row, 'ce_loss_score')}."
    )


def _quality_sentence(row: pd.Series) -> str:
    return (
        f"{sae_words(row)}, {row['hookpoint']}: loss {row['ce_mean']:.3f} nats with the mean, KL "
        f"{_value(row, 'kl_sae')} nats, L0 {row['l0']:.1f}, explained variance "
        f"{_value(row, 'explained_variance')}; {row['n_dead']:,} of {row['d_sae']:,} latents are "
        f"never active at {counted(row['n_positions'], 'position')}."
    )


def write_evaluation_report(folder: str | Path, figures: Mapping[str, go.Figure]) -> Path:
    """Render report.html from the folder's files; returns its path."""
    run = SavedRun(Path(folder))
    table, about = saved_table(run, "evaluation"), run.provenance
    hookpoints = ", ".join(dict.fromkeys(table["hookpoint"]))
    if table["hookpoint"].nunique() > 2:
        first, last = table["hookpoint"].iloc[[0, -1]]
        hookpoints = f"{len(table)} SAEs, {first} to {last}"
    sentences = _evaluation_findings(run)
    hero = "layers" if "layers" in figures else "losses"
    return write_run_page(
        run,
        "evaluation.html",
        figures,
        title=f"SAE quality: {about['model']['name'].rpartition('/')[2]}, {hookpoints}",
        findings=[Finding("\n".join(sentences), [(hero, _EVALUATION_CAPTIONS[hero])])],
        sentences=evaluation_sentences(folder)[len(sentences) :],
        tile_groups=_tile_groups(run, table),
        hero=hero,
        captions=_EVALUATION_CAPTIONS,
        where=_where(run, table),
        tables={
            name: as_table(table, columns={**_IDENTITY, **columns})
            for name, columns in _TABLES.items()
        },
    )


def _tile_groups(run: SavedRun, table: pd.DataFrame) -> list[TileGroup]:
    first = table.iloc[0]
    data: list[tuple[str, Any]] = [
        ("texts", run.metrics["evaluation/n_texts"]),
        ("predictions scored", run.metrics["evaluation/n_scored"]),
        ("CE of the unchanged model (nats)", cell(first["ce_clean"])),
    ]
    if len(table) > 1:
        data.append(("SAEs", len(table)))
    groups = [TileGroup("Data", "CE is the mean next-token cross-entropy loss.", data)]
    if len(table) > 1:
        return groups
    loss = {
        "ce_sae": "CE, reconstruction (nats)",
        "ce_mean": "CE, mean (nats)",
        "ce_zero": "CE, zeros (nats)",
        "ce_loss_score": "CE score",
        "ce_loss_score_mean": "CE score, against the mean",
        "kl_sae": "KL, reconstruction (nats)",
        "kl_score": "KL score",
    }
    sparsity = {
        "l0": "L0 (active latents per position)",
        "explained_variance": "explained variance (fraction)",
        "dead_fraction": "fraction of latents never active",
    }
    for title, text, labels in (
        ("Loss of the model", "Scores: 1 is a perfect SAE, 0 no better than zeros.", loss),
        (
            "Sparsity and reconstruction",
            "Lower L0 is sparser; explained variance 1 is exact.",
            sparsity,
        ),
    ):
        tiles = [(words, cell(first[name])) for name, words in labels.items()]
        groups.append(TileGroup(title, text, tiles))
    return groups


def _where(run: SavedRun, table: pd.DataFrame) -> list[list[Any]]:
    """Which positions each number is measured at."""
    where, first = run.provenance["where"], table.iloc[0]
    positions, scored, compared = (
        cell(first[name]) for name in ("n_positions", "n_scored", "n_compared")
    )
    ablated = positions if where["ablated"] == where["spliced"] else None
    return [
        ["reconstruction spliced in; L0, density, explained variance", where["spliced"], positions],
        ["zeros or the mean spliced in", where["ablated"], ablated],
        ["next-token loss (CE)", where["scored"], scored],
        ["KL(unchanged || changed), after each of these tokens", where["compared"], compared],
    ]


_STATES = {
    "clean": ("unchanged", QUIET),
    "sae": ("reconstruction", PALETTE[0]),
    "mean": ("mean", PALETTE[4]),
    "zero": ("zeros", PALETTE[1]),
}


def evaluation_figures(folder: str | Path) -> dict[str, go.Figure]:
    """Name -> figure: losses, layers (of several), l0, density."""
    run = SavedRun(Path(folder))
    table = saved_table(run, "evaluation")
    names = {label: _sae_name(label) for label in table["sae"]}
    colours = _colours(list(names.values()))
    l0, densities = saved_table(run, "l0_histogram"), saved_table(run, "densities")
    figures = {"losses": _losses(table)}
    if table["layer"].nunique() > 1:
        figures["layers"] = _scores_by_layer(table)
    figures["l0"] = _l0({n: l0[l0["sae"] == label] for label, n in names.items()}, colours)
    frequencies = {
        n: densities.loc[densities["sae"] == label, "frequency"] for label, n in names.items()
    }
    figures["density"] = density_histogram(frequencies, colours)
    return figures


def _colours(names: list[str]) -> dict[str, str]:
    if len(names) < len(PALETTE):
        return dict(zip(names, PALETTE, strict=False))
    return dict(zip(names, [str(c) for c in sample_colorscale("Viridis", len(names))], strict=True))


def _sae_name(label: str) -> str:
    return label.replace("_width_", ", width ").replace("_", " ")


def _bars(rows: pd.DataFrame, name: str) -> dict[str, Any] | None:
    return error_bars(rows[name], rows[f"{name}_ci_low"], rows[f"{name}_ci_high"])


def _losses(table: pd.DataFrame) -> go.Figure:
    figure = go.Figure()
    for state, (name, colour) in _STATES.items():
        bars = go.Bar(
            x=[_sae_name(label) for label in table["sae"]],
            y=table[f"ce_{state}"],
            error_y=_bars(table, f"ce_{state}"),
            name=name,
            marker={"color": colour},
        )
        figure.add_trace(bars)
    figure.update_layout(barmode="group")
    figure.update_xaxes(title="SAE")
    figure.update_yaxes(title="next-token loss (nats per token)")
    return style(figure, 380)


def _scores_by_layer(table: pd.DataFrame) -> go.Figure:
    figure = go.Figure()
    for (width, rows), colour in zip(table.groupby("d_sae"), PALETTE * 9, strict=False):
        for name, dash, reference in (
            ("ce_loss_score", "solid", "zeros"),
            ("ce_loss_score_mean", "dot", "the mean"),
        ):
            line = go.Scatter(
                x=rows["layer"],
                y=rows[name],
                error_y=_bars(rows, name),
                name=f"width {width}, against {reference}",
                mode="lines+markers",
                line={"color": colour, "dash": dash},
            )
            figure.add_trace(line)
    figure.update_xaxes(title="layer", dtick=1 if table["layer"].nunique() < 20 else None)
    figure.update_yaxes(title="CE score (1: perfect)")
    return style(figure, 380, legend_below=True)


def _l0(counts: Mapping[str, pd.DataFrame], colours: Mapping[str, str]) -> go.Figure:
    figure = go.Figure()
    largest = max(int(rows["n_active"].max()) for rows in counts.values())
    size = max(1, -(-(largest + 1) // 60))
    for name, rows in counts.items():
        heights = np.bincount(rows["n_active"] // size, weights=rows["n_positions"])
        x = (np.arange(len(heights)) + 0.5) * size - 0.5
        fractions = heights / heights.sum()
        as_bars = len(counts) == 1
        figure.add_trace(histogram_trace(name, x, fractions, colours[name], as_bars=as_bars))
    figure.update_layout(bargap=0.02)
    figure.update_xaxes(title="active latents at a position (L0)")
    figure.update_yaxes(title="fraction of positions")
    return style(figure, 340)


# task=train

_TRAINING_CAPTIONS = {
    "losses": "Losses during training, on scaled inputs, on a logarithmic axis.",
    "progress": "L0, explained variance and dead latents on training batches; a latent is dead if "
    "it was not active in the last sae_trainer.dead_feature_window steps.",
    "density": _DENSITY_CAPTION,
    "active": "Number of held-out positions by their number of active latents.",
    "values": "Number of activations by their value, zeros not counted, held-out positions; the "
    "count is logarithmic.",
}
_N_BINS = 60


def training_figures(folder: str | Path) -> dict[str, go.Figure]:
    """Name -> figure: losses, progress, density, active, values."""
    run = SavedRun(Path(folder))
    history, active = saved_table(run, "training"), saved_table(run, "active")
    frequencies = {"latents": saved_table(run, "density")["frequency"]}
    values = saved_table(run, "values")["value"]
    return {
        "losses": _training_losses(history),
        "progress": _progress(history),
        "density": density_histogram(frequencies, {"latents": GROUP_COLOURS[0]}),
        "active": _histogram(
            active["n_active"], "active latents at a position (L0)", "number of positions"
        ),
        "values": _histogram(values, "activation", "number of activations", log=True),
    }


def _training_losses(history: pd.DataFrame) -> go.Figure:
    figure = go.Figure()
    for name in (c for c in history.columns if c.endswith("loss")):
        if (history[name] > 0).any():
            label = name.replace("_", " ")
            figure.add_trace(go.Scatter(x=history["step"], y=history[name], name=label))
    figure.update_xaxes(title="training step")
    figure.update_yaxes(title="loss", type="log")
    return style(figure, 360).update_layout(showlegend=True)


def _progress(history: pd.DataFrame) -> go.Figure:
    panels = {
        "l0": "L0",
        "explained_variance": "explained variance",
        "dead_fraction": "fraction of dead latents",
    }
    figure = make_subplots(rows=1, cols=len(panels), horizontal_spacing=0.12)
    for column, (name, title) in enumerate(panels.items(), start=1):
        line = {"color": GROUP_COLOURS[0]}
        curve = go.Scatter(x=history["step"], y=history[name], name=title, line=line)
        figure.add_trace(curve, row=1, col=column)
        figure.update_yaxes(title=title, row=1, col=column)
    figure.update_xaxes(title="training step")
    return style(figure, 320).update_layout(showlegend=False)


def _histogram(values: pd.Series, x: str, y: str, *, log: bool = False) -> go.Figure:
    counts, edges = np.histogram(values, bins=_N_BINS)
    colour = {"color": GROUP_COLOURS[0]}
    middles = (edges[:-1] + edges[1:]) / 2
    figure = go.Figure(go.Bar(x=middles, y=counts, width=np.diff(edges), marker=colour))
    figure.update_xaxes(title=x)
    figure.update_yaxes(title=y, type="log" if log else "linear")
    return style(figure, 320)


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


def _training_title(run: SavedRun) -> str:
    about, name = run.provenance["sae"], run.config["sae_trainer"]["name"]
    model = run.provenance["model"]["name"].rpartition("/")[2]
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


def write_training_report(folder: str | Path, figures: Mapping[str, go.Figure]) -> Path:
    """Render report.html from the folder's files; returns its path."""
    run = SavedRun(Path(folder))
    sentences = run.provenance.get("finding") or [training_sentence(run)]
    labels = {
        "sparsity/l0": "L0 (active latents per position)",
        "reconstruction/explained_variance": "explained variance (fraction)",
        "reconstruction/explained_variance_median": "… median position",
        "reconstruction/n_high_norm": "high-norm positions left out",
        "reconstruction/cosine": "cosine similarity",
        "sparsity/dead_fraction": "fraction of latents never active",
    }
    tiles: list[tuple[str, Any]] = [(label, run.metrics[k]) for k, label in labels.items()]
    tiles += [
        ("positions trained on", run.provenance["n_trained_on"]),
        ("positions measured", run.provenance["n_measured"]),
    ]
    text = f"Measured on texts that were not trained on. {_streams(run)}"
    return write_run_page(
        run,
        "training.html",
        figures,
        title=_training_title(run),
        findings=[
            Finding(sentences[0], [("progress", _TRAINING_CAPTIONS["progress"])]),
            *map(Finding, sentences[1:]),
        ],
        tile_groups=[TileGroup("Quality on held-out texts", text, tiles)],
        captions=_TRAINING_CAPTIONS,
    )
