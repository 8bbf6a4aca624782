"""The page about the quality of SAEs (task=evaluate)."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from saexp.errors import counted
from saexp.reports import (
    PALETTE,
    QUIET,
    Chart,
    Finding,
    TileGroup,
    Trace,
    as_table,
    bar,
    cell,
    error_bars,
    interval_words,
    saved_table,
    scatter,
    style,
    translucent,
    write_run_page,
)
from saexp.reports.saved_run import SavedRun
from saexp.results import model_title, model_words, sae_words

# task=evaluate

DENSITY_CAPTION = (
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
    "density": DENSITY_CAPTION,
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
        f"{model_words(run.provenance['model']['name'])}, {counted(n_texts, 'text')} of data set "
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
        title=f"SAE quality: {model_title(about['model']['name'])}, {hookpoints}",
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
    colours = sae_colours(list(names.values()))
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


def density_histogram(
    frequencies: Mapping[str, pd.Series], colours: Mapping[str, str], n_bins: int = 40
) -> go.Figure:
    """Number of latents by the fraction of positions at which they are active, on a log axis.

    One series is drawn as bars, several as lines. A separate bar at the left counts the latents
    that are never active; of several series each has its own.
    """
    active = [f[f > 0] for f in frequencies.values()]
    least = min((math.floor(math.log10(f.min())) for f in active if len(f)), default=-1)
    edges = np.linspace(least, 0, n_bins + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    is_alone = len(frequencies) == 1
    figure = Chart()
    width = 0.3 / len(frequencies)
    for index, (name, values) in enumerate(frequencies.items()):
        heights = np.histogram(np.log10(values[values > 0]), bins=edges)[0]
        colour = colours[name]
        figure.add_trace(histogram_trace(name, middles, heights, colour, as_bars=is_alone))
        figure.add_trace(
            bar(
                x=[least - 0.5 + index * width],
                y=[int((values == 0).sum())],
                width=[width],
                name=f"{name}: never active",
                marker={"color": QUIET if is_alone else translucent(colour, 0.5)},
                showlegend=False,
                hovertemplate="never active: %{y} latents<extra></extra>",
            )
        )
    powers = list(range(least, 1))
    figure.update_layout(bargap=0.02)
    figure.update_xaxes(
        title="fraction of positions at which a latent is active",
        tickvals=[least - 0.5 + width * (len(frequencies) - 1) / 2, *powers],
        ticktext=["never", *(f"{10.0**p:g}" for p in powers)],
    )
    figure.update_yaxes(title="number of latents")
    return style(figure, 340)


def histogram_trace(name: str, x: Any, y: Any, colour: str, *, as_bars: bool) -> Trace:
    """Bars for a series that is alone, a stepped line for one of several."""
    if as_bars:
        return bar(x=x, y=y, name=name, marker={"color": colour}, showlegend=False)
    line = {"color": colour, "shape": "hvh"}
    return scatter(x=x, y=y, name=name, mode="lines", line=line)


def sae_colours(names: list[str]) -> dict[str, str]:
    """A colour for each SAE of a figure."""
    if len(names) < len(PALETTE):
        return dict(zip(names, PALETTE, strict=False))
    return dict(zip(names, [str(c) for c in sample_colorscale("Viridis", len(names))], strict=True))


def _sae_name(label: str) -> str:
    return label.replace("_width_", ", width ").replace("_", " ")


def _bars(rows: pd.DataFrame, name: str) -> dict[str, Any] | None:
    return error_bars(rows[name], rows[f"{name}_ci_low"], rows[f"{name}_ci_high"])


def _losses(table: pd.DataFrame) -> go.Figure:
    figure = Chart()
    for state, (name, colour) in _STATES.items():
        bars = bar(
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
    figure = Chart()
    for (width, rows), colour in zip(table.groupby("d_sae"), PALETTE * 9, strict=False):
        for name, dash, reference in (
            ("ce_loss_score", "solid", "zeros"),
            ("ce_loss_score_mean", "dot", "the mean"),
        ):
            line = scatter(
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
    figure = Chart()
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
