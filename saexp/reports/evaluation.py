"""Report and figures of task=evaluate."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from saexp.reports.analyses_generic import cell, interval, table_of
from saexp.reports.figures import QUIET, style
from saexp.reports.html import provenance_rows, write_page
from saexp.reports.saved import SavedRun
from saexp.wording import sae_words

CAPTIONS = {
    "losses": "Next-token loss of the model as it is, and with the SAE's reconstruction, the "
    "stream's mean or zeros in place of the stream; 95 % intervals by the studentised "
    "bootstrap over texts, or over entities where texts have one (none for fewer than 10).",
    "layers": "Share of the loss that ablating the stream costs which the reconstruction wins "
    "back: 1 is a perfect SAE, 0 one that is no better than the ablation.",
    "l0": "Number of active latents per position.",
    "density": "Share of the positions at which each latent fires, logarithmic; the grey bar is "
    "latents that never did.",
    "densities": "Share of the positions at which each latent fires, logarithmic; those that never "
    "did are counted in the table.",
}
_WHICH = {"hookpoint": "stream", "d_sae": "latents"}
_TABLES = {
    "ce": {
        "ce_sae": "reconstruction",
        "ce_increase": "increase",
        "ce_mean": "mean",
        "ce_zero": "zeros",
        "ce_loss_score": "CE score",
        "ce_loss_score_ci_low": "low",
        "ce_loss_score_ci_high": "high",
        "ce_loss_score_mean": "against the mean",
    },
    "kl": {
        "kl_sae": "reconstruction",
        "kl_mean": "mean",
        "kl_zero": "zeros",
        "kl_score": "KL score",
        "kl_score_ci_low": "low",
        "kl_score_ci_high": "high",
        "kl_score_mean": "against the mean",
    },
    "sparsity": {
        "l0": "L0",
        "l0_ci_low": "low",
        "l0_ci_high": "high",
        "n_dead": "never fired",
        "dead_fraction": "share",
        "mean_active": "mean active value",
        "max_active": "largest value",
    },
    "reconstruction": {
        "explained_variance": "explained variance",
        "explained_variance_legacy": "legacy",
        "explained_variance_median": "median position",
        "explained_variance_all_positions": "with high norms",
        "n_high_norm": "high-norm positions",
        "cosine": "cosine",
        "mse": "squared error",
        "l2_ratio": "norm ratio",
        "relative_bias": "relative bias",
    },
}
"""Tables of the page: metric -> head of its column."""


def evaluation_sentences(folder: str | Path) -> list[str]:
    """One sentence on the unchanged model, then one per SAE, of many the best and the worst."""
    run = SavedRun(Path(folder))
    table, metrics = table_of(run, "evaluation"), run.metrics
    texts, scored = metrics["evaluation/n_texts"], metrics["evaluation/n_scored"]
    first = table.iloc[0]
    told = [
        f"{run.provenance['model']['name']}, {texts:,} texts of data set "
        f"'{run.provenance['dataset']['name']}': next-token loss {first['ce_clean']:.3f}"
        f"{_between(first, 'ce_clean')} nats over {scored:,} predictions."
    ]
    chosen = table
    if len(table) > 4:
        order = table["ce_loss_score"].sort_values(ascending=False, na_position="last").index
        chosen = table.loc[[order[0], order[-1]]]
        told.append(f"{len(table)} SAEs, of which the best and the worst by their CE score:")
    return told + [_sentence(row) for _, row in chosen.iterrows()]


def _between(row: pd.Series, name: str) -> str:
    return interval(row[f"{name}_ci_low"], row[f"{name}_ci_high"])


def _number(row: pd.Series, name: str) -> str:
    if pd.isna(row[name]):
        return "not defined"
    return f"{row[name]:.3f}{_between(row, name)}"


def _sentence(row: pd.Series) -> str:
    place = row["hookpoint"]
    if row["writes"] != place:
        place = f"{place} to {row['writes']}"
    return (
        f"{sae_words(row)}, {place}: loss {row['ce_sae']:.3f} with its reconstruction "
        f"({row['ce_mean']:.3f} with the mean, {row['ce_zero']:.3f} with zeros), CE score "
        f"{_number(row, 'ce_loss_score')}, KL {_number(row, 'kl_sae')}; L0 {row['l0']:.1f}, "
        f"explained variance {_number(row, 'explained_variance')}, {row['n_dead']} latents silent "
        f"at {row['n_positions']:,} positions."
    )


def write_evaluation_report(folder: str | Path, figures: Mapping[str, go.Figure]) -> Path:
    """Render report.html from the folder's files; returns its path."""
    run = SavedRun(Path(folder))
    table, about = table_of(run, "evaluation"), run.provenance
    place = ", ".join(dict.fromkeys(table["hookpoint"]))
    if table["hookpoint"].nunique() > 2:
        place = f"{len(table)} SAEs, {table['hookpoint'].iloc[0]} to {table['hookpoint'].iloc[-1]}"
    return write_page(
        Path(folder) / "report.html",
        "evaluation.html",
        figures,
        title=f"SAE quality: {about['model']['name'].rpartition('/')[2]}, {place}",
        finding=about["finding"],
        notes=about["notes"],
        tiles=_tiles(run, table),
        captions=CAPTIONS if len(table) == 1 else {**CAPTIONS, "density": CAPTIONS["densities"]},
        where=_where(run, table),
        tables={name: _shown(table, columns) for name, columns in _TABLES.items()},
        skips=about["skips"],
        provenance=provenance_rows(run),
        config=run.config_text,
    )


def _tiles(run: SavedRun, table: pd.DataFrame) -> list[tuple[str, Any]]:
    first = table.iloc[0]
    shared = [
        ("texts", run.metrics["evaluation/n_texts"]),
        ("predictions scored", run.metrics["evaluation/n_scored"]),
        ("CE, unchanged (nats)", cell(first["ce_clean"])),
    ]
    if len(table) > 1:
        return [*shared, ("SAEs", len(table))]
    own = {
        "ce_sae": "CE, reconstruction",
        "ce_mean": "CE, mean",
        "ce_zero": "CE, zeros",
        "ce_loss_score": "CE score",
        "ce_loss_score_mean": "CE score, against the mean",
        "kl_sae": "KL, reconstruction",
        "kl_score": "KL score",
        "l0": "L0",
        "explained_variance": "explained variance",
        "dead_fraction": "share never fired",
    }
    return [*shared, *((words, cell(first[name])) for name, words in own.items())]


def _where(run: SavedRun, table: pd.DataFrame) -> list[list[Any]]:
    where, first = run.provenance["where"], table.iloc[0]
    positions, scored, compared = (
        cell(first[name]) for name in ("n_positions", "n_scored", "n_compared")
    )
    ablated = positions if where["ablated"] == where["spliced"] else None
    return [
        ["reconstruction in place; L0, densities, explained variance", where["spliced"], positions],
        ["zeros or the mean in place", where["ablated"], ablated],
        ["next-token loss (CE)", where["scored"], scored],
        ["KL(unchanged || new), after each of these tokens", where["compared"], compared],
    ]


def _shown(table: pd.DataFrame, columns: Mapping[str, str]) -> dict[str, Any]:
    columns = {**_WHICH, **columns}
    rows = table[list(columns)].itertuples(index=False, name=None)
    return {"head": list(columns.values()), "rows": [[cell(v) for v in row] for row in rows]}


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
