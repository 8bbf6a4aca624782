"""Pages about the latents themselves: analyzer=stats, analyzer=top_features, task=dashboard."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from saexp.errors import StoreError, counted
from saexp.files import RUN_FOLDER, write_text
from saexp.reports import (
    GROUP_COLOURS,
    AnalyzerPage,
    Chart,
    Finding,
    Section,
    Strip,
    Table,
    as_table,
    bar,
    environment,
    error_bars,
    frequency_scatter,
    interval_words,
    layer_suffix,
    layers_of,
    saved_table,
    scatter,
    style,
    translucent,
)
from saexp.reports.saved_run import SavedRun
from saexp.results import SAE_CHECK_HEAD, model_title, provenance_rows, sae_check_rows

# analyzer=stats

_GROUP_COLUMNS = {
    "group": "group",
    "n_positions": "positions (N)",
    "n_units": "units",
    "l0": "L0",
    "l0_ci_low": "low",
    "l0_ci_high": "high",
    "mean_active": "mean activation where active",
    "max_active": "maximum activation",
    "dead_fraction": "fraction never active in N",
    "n_dead": "latents never active",
}
_INTERVALS = "95 % intervals by the studentised bootstrap over units (none for fewer than 10)"
_N_LAYERS_LISTED = 3
"""Layers with a sentence each; of more, the range is reported."""
_N_LABELLED = 8
"""Latents labelled in the scatter plot."""


def _stats_question(_: SavedRun) -> str:
    return (
        "How many latents are active at a position, how strongly, which are active most often, and "
        "how many are never active, group by group? All positions of all splits; every unit "
        "(entity or text) counts once; nothing is selected."
    )


def _stats_figures(run: SavedRun) -> dict[str, go.Figure]:
    """Per layer `l0`, `values` and, of two groups, `frequencies`; of several layers `l0_layers`."""
    groups, l0 = saved_table(run, "groups"), saved_table(run, "l0_histogram")
    values, counts = saved_table(run, "value_histogram"), saved_table(run, "counts")
    layers = layers_of(groups)
    figures = {}
    if len(layers) > 1:
        figures["l0_layers"] = _l0_by_layer(groups)
    for layer in layers:
        suffix = layer_suffix(layer, layers)
        figures[f"l0{suffix}"] = _l0(l0[l0["layer"] == layer])
        figures[f"values{suffix}"] = _values(values[values["layer"] == layer])
        names = list(groups.loc[groups["layer"] == layer, "group"])
        if len(names) == 2:
            of_layer = counts[counts["layer"] == layer]
            figures[f"frequencies{suffix}"] = _frequencies(of_layer, names)
    return figures


def _stats_findings(run: SavedRun) -> list[Finding]:
    table = saved_table(run, "groups")
    layers = layers_of(table)
    if len(layers) > 1:
        figure = ("l0_layers", f"Active latents per position (L0) by layer, with {_INTERVALS}.")
    else:
        figure = ("l0", "Fraction of each group's positions by the number of active latents.")
    sentences = []
    for group, part in table.groupby("group", sort=False):
        if len(layers) > 1:
            sentences.append(_range_sentence(str(group), part))
        else:
            row = part.iloc[0]
            sentences.append(
                f"On {group}, an average of {row['l0']:.1f} latents are active at a position, and "
                f"{row['dead_fraction']:.0%} of all latents are never active in "
                f"{counted(row['n_positions'], 'position')}."
            )
    return [Finding("\n".join(sentences), [figure])]


def _stats_sentences(run: SavedRun) -> list[str]:
    """Per layer and group L0, activations and dead latents; the overlap of the lists."""
    table = saved_table(run, "groups")
    layers = layers_of(table)
    if len(layers) > _N_LAYERS_LISTED:
        return []
    sentences = []
    for layer in layers:
        suffix, where = layer_suffix(layer, layers), f"Layer {layer}, " if len(layers) > 1 else ""
        of_layer = table[table["layer"] == layer]
        for row in of_layer.to_dict("records"):
            activations = "no latent is active"
            if pd.notna(row["mean_active"]):
                activations = (
                    f"mean activation {row['mean_active']:.2f} where active, maximum "
                    f"{row['max_active']:.2f}"
                )
            sentences.append(
                f"{where}{row['group']}: L0 {row['l0']:.2f}"
                f"{interval_words(row['l0_ci_low'], row['l0_ci_high'], 2)}, {activations}, "
                f"{row['dead_fraction']:.0%} of the latents never active in "
                f"{counted(row['n_positions'], 'position')} of {counted(row['n_units'], 'unit')}."
            )
        if len(of_layer) == 2:
            sentences.append(_comparison(run, list(of_layer["group"]), suffix, where))
    return sentences


def _stats_sections(run: SavedRun) -> list[Section]:
    """The groups' numbers, then each layer's histograms, lists and counts."""
    groups, frequent = saved_table(run, "groups"), saved_table(run, "frequent")
    counts = saved_table(run, "counts")
    layers = layers_of(groups)
    columns = {**({"layer": "layer"} if len(layers) > 1 else {}), **_GROUP_COLUMNS}
    sections = [
        Section(
            "Groups",
            f"L0 is the number of active latents at a position, a unit's positions averaged first, "
            f"with {_INTERVALS}. The maximum and the latents never active are over all positions "
            "and depend on how many there are.",
            tables=[as_table(groups, columns=columns)],
        )
    ]
    for layer in layers:
        suffix = layer_suffix(layer, layers)
        of_layer = counts[counts["layer"] == layer].drop(columns="layer")
        n_active = [c for c in of_layer if str(c).startswith("n_active_")]
        totals = of_layer[n_active].sum(axis=1)
        order = totals.sort_values(ascending=False, kind="stable").index
        lists = frequent[frequent["layer"] == layer]
        figures = [
            (
                f"values{suffix}",
                "Activations of all active latents, as a fraction of each group's, on a "
                "logarithmic axis; zeros are not counted.",
            )
        ]
        if len(layers) > 1:
            caption = "Fraction of each group's positions by the number of active latents."
            figures.insert(0, (f"l0{suffix}", caption))
        if len(n_active) == 2:
            caption = (
                "Fraction of positions at which each latent is active, averaged over units, on "
                "logarithmic axes; numbers are those of the latents that differ most."
            )
            figures.append((f"frequencies{suffix}", caption))
        sections.append(
            Section(
                f"Layer {layer}" if len(layers) > 1 else "Latents",
                figures=figures,
                tables=[
                    *(_frequent_table(str(g), p) for g, p in lists.groupby("group", sort=False)),
                    as_table(
                        of_layer.loc[order],
                        "Positions at which each latent is active",
                        _count_columns(of_layer),
                        folded=len(layers) > 1,
                    ),
                ],
            )
        )
    return sections


def _range_sentence(group: str, part: pd.DataFrame) -> str:
    ordered = part.sort_values("l0", kind="stable")
    low, high = ordered.iloc[0], ordered.iloc[-1]
    dead = part["dead_fraction"]
    return (
        f"{group}: L0 ranges from {low['l0']:.2f} (layer {low['layer']}) to {high['l0']:.2f} "
        f"(layer {high['layer']}); {dead.min():.0%} to {dead.max():.0%} of the latents are never "
        f"active in {counted(part['n_positions'].iloc[0], 'position')}."
    )


def _comparison(run: SavedRun, names: list[str], suffix: str, where: str) -> str:
    m = run.metrics
    n_shared = m[f"stats/n_frequent_in_both{suffix}"]
    low, high = (m.get(f"stats/l0_difference_ci_{side}{suffix}") for side in ("low", "high"))
    value = m[f"stats/l0_difference{suffix}"]
    frequent = saved_table(run, "frequent")
    n = int(frequent.groupby(["layer", "group"]).size().max()) if len(frequent) else 0
    return (
        f"{where}L0 of {names[0]} minus {names[1]}, within the entity types that both have: "
        f"{value:.2f}{interval_words(low, high, 2)}; the groups share {n_shared} of their {n} most "
        "frequent latents."
    )


def _frequent_table(group: str, part: pd.DataFrame) -> Table:
    columns = {
        "rank": "rank",
        "latent": "latent",
        "n_active": "positions",
        "frequency": "fraction",
        "mean_active": "mean activation where active",
        "shared": "also in the other list",
    }
    table = part.assign(shared=["yes" if n > 1 else "" for n in part["n_lists"]])
    return as_table(table, f"Most frequent in {group}", columns)


def _count_columns(counts: pd.DataFrame) -> dict[str, str]:
    names = {"latent": "latent"}
    for column in map(str, counts.columns):
        if column.startswith("n_active_"):
            names[column] = f"positions, {column.removeprefix('n_active_')}"
        elif column.startswith("freq_") and column != "freq_difference":
            names[column] = f"fraction, {column.removeprefix('freq_')}"
    return {**names, "freq_difference": "difference"}


def _by_group(table: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """(group, its colour, its rows)."""
    parts = list(table.groupby("group", sort=False))
    return [(str(g), c, p) for (g, p), c in zip(parts, GROUP_COLOURS, strict=False)]


def _l0(table: pd.DataFrame) -> go.Figure:
    figure = Chart()
    for group, colour, part in _by_group(table):
        figure.add_trace(
            bar(
                x=part["n_active"],
                y=part["n_positions"] / part["n_positions"].sum(),
                customdata=part["n_positions"],
                name=group,
                marker={"color": translucent(colour, 0.6)},
                hovertemplate="%{x} active: %{customdata} positions<extra></extra>",
            )
        )
    figure.update_layout(barmode="overlay", bargap=0)
    figure.update_xaxes(title="active latents at a position (L0)")
    figure.update_yaxes(title="fraction of positions")
    return style(figure, 340)


def _values(table: pd.DataFrame) -> go.Figure:
    figure = Chart()
    for group, colour, part in _by_group(table):
        figure.add_trace(
            bar(
                x=(part["low"] + part["high"]) / 2,
                y=part["n"] / max(int(part["n"].sum()), 1),
                width=part["high"] - part["low"],
                customdata=part["n"],
                name=group,
                marker={"color": translucent(colour, 0.6)},
                hovertemplate="around %{x:.3g}: %{customdata} activations<extra></extra>",
            )
        )
    figure.update_layout(barmode="overlay", bargap=0)
    figure.update_xaxes(title="activation")
    figure.update_yaxes(title="fraction of activations", type="log")
    return style(figure, 340)


def _frequencies(counts: pd.DataFrame, names: list[str]) -> go.Figure:
    """The latents that differ most between the groups carry their number."""
    first, second = (f"freq_{g}" for g in names)
    order = (counts[first] - counts[second]).abs().sort_values(ascending=False).index
    series = [
        ("other latents", counts.loc[order[_N_LABELLED:]], GROUP_COLOURS[0], False),
        ("largest differences", counts.loc[order[:_N_LABELLED]], GROUP_COLOURS[0], True),
    ]
    axes = (f"positions of {names[1]}", f"positions of {names[0]}")
    return frequency_scatter(series, second, first, axes)


def _l0_by_layer(groups: pd.DataFrame) -> go.Figure:
    figure = Chart()
    for group, colour, part in _by_group(groups):
        figure.add_trace(
            scatter(
                x=part["layer"],
                y=part["l0"],
                mode="lines+markers",
                name=group,
                line={"color": colour},
                error_y=error_bars(part["l0"], part["l0_ci_low"], part["l0_ci_high"]),
            )
        )
    figure.update_xaxes(title="layer")
    figure.update_yaxes(title="active latents per position (L0)", rangemode="tozero")
    return style(figure, 340)


STATS = AnalyzerPage(
    _stats_question, _stats_findings, _stats_sentences, _stats_figures, _stats_sections
)


# analyzer=top_features

_BY = {"max": "maximum", "mean": "mean", "frequency": "frequency"}
_AXES = {
    "max": "maximum activation",
    "mean": "mean activation",
    "frequency": "fraction of positions where active",
}
_TOP_COLUMNS = {
    "rank": "rank",
    "latent": "latent",
    "max": "maximum activation",
    "token": "at token",
    "example": "of example",
    "mean": "mean activation",
    "frequency": "active on (fraction of positions)",
    "background_freq": "active on neutral text (fraction)",
}
N_TOKENS = 150
"""Tokens of a text that a strip shows."""
N_TEXTS = 2
"""Texts that are shown per latent."""
N_STRIPS = 10
"""Latents whose texts are shown per layer; fewer if there are many layers."""
_N_LAYERS_IN_WORDS = 8


def _top_question(run: SavedRun) -> str:
    by = _BY[run.analyzer_option("by", "max")]
    return f"Which latents have the largest {by} over the chosen positions, layer by layer?"


def _top_figures(run: SavedRun) -> dict[str, go.Figure]:
    """`by_layer`: the leading latents of each layer, if there are several."""
    table = saved_table(run, "top_features")
    if len(layers_of(table)) < 2:
        return {}
    column = run.analyzer_option("by", "max")
    points = scatter(
        x=table["layer"],
        y=table[column],
        mode="markers",
        marker={
            "size": 9,
            "opacity": 0.8,
            "color": table["background_freq"],
            "cmin": 0,
            "colorscale": "Viridis",
            "colorbar": {"title": {"text": "active on<br>neutral text<br>(fraction)"}},
        },
        customdata=table[["latent", "token"]].to_numpy(),
        hovertemplate="layer %{x}, latent %{customdata[0]}: %{y:.3g} at '%{customdata[1]}'"
        "<extra></extra>",
    )
    figure = Chart(points)
    figure.update_xaxes(title="layer", dtick=1 if len(layers_of(table)) < 30 else None)
    figure.update_yaxes(title=_AXES[column])
    return {"by_layer": style(figure, 380)}


def _top_findings(run: SavedRun) -> list[Finding]:
    """One sentence per layer on the leading latents."""
    table = saved_table(run, "top_features")
    layers = layers_of(table)
    sentences = []
    for layer in layers[:_N_LAYERS_IN_WORDS]:
        of_layer = table[table["layer"] == layer]
        first = of_layer.iloc[0]
        names = ", ".join(map(str, of_layer["latent"].head(5)))
        sentences.append(
            f"Layer {layer}: the leading latents are {names}. Latent {first['latent']} reaches an "
            f"activation of {first['max']:.2f} at '{first['token']}' and is active on "
            f"{first['frequency']:.0%} of the positions."
        )
    if len(layers) > _N_LAYERS_IN_WORDS:
        n_more = len(layers) - _N_LAYERS_IN_WORDS
        sentences.append(f"{counted(n_more, 'more layer')} are in top_features.parquet.")
    caption = "The leading latents of each layer; the colour is how often they are active on "
    figures = [("by_layer", f"{caption}neutral text.")] if len(layers) > 1 else []
    return [Finding("\n".join(sentences or ["No latent is active at any position."]), figures)]


def _top_sections(run: SavedRun) -> list[Section]:
    """Each layer with its texts."""
    table, tokens = saved_table(run, "top_features"), saved_table(run, "tokens")
    layers = layers_of(table)
    n_strips = N_STRIPS if len(layers) <= 2 else 5 if len(layers) <= 8 else 2
    sections = []
    for layer in layers:
        of_layer = table[table["layer"] == layer]
        in_layer = tokens[tokens["layer"] == layer]
        sections.append(
            Section(
                f"Layer {layer}",
                "Tokens are shaded by the latent's activation, fully at its maximum here; only the "
                "chosen positions are shown. All values are in tokens.parquet.",
                tables=[as_table(of_layer, columns=_TOP_COLUMNS)],
                strips=[
                    strip
                    for latent in of_layer["latent"].head(n_strips)
                    for strip in _strips(in_layer[in_layer["latent"] == latent], int(latent))
                ],
            )
        )
    return sections


def _strips(tokens: pd.DataFrame, latent: int) -> list[Strip]:
    """The texts in which the latent is strongest, around their strongest token."""
    top = float(tokens["value"].max()) if len(tokens) else 0.0
    strips = []
    for example, text in list(tokens.groupby("example", sort=False))[:N_TEXTS]:
        peak = int(text["value"].to_numpy().argmax())
        start = max(0, min(peak - N_TOKENS // 2, len(text) - N_TOKENS))
        part = text.iloc[start : start + N_TOKENS]
        cut = f", {len(part)} of {len(text)} positions" if len(part) < len(text) else ""
        shaded = [
            (str(t), max(0.0, float(v)) / top if top else 0.0, f"token {i}: {v:.3g}")
            for t, i, v in zip(part["token"], part["token_index"], part["value"], strict=True)
        ]
        label = f"latent {latent}, example {example}, maximum {text['value'].max():.2f}{cut}"
        strips.append(Strip(label, shaded))
    return strips


TOP_FEATURES = AnalyzerPage(_top_question, _top_findings, lambda _: [], _top_figures, _top_sections)


# task=dashboard

DATA, PAGE = "dashboard.json", "dashboard.html"


def read_dashboard(folder: str | Path) -> dict[str, Any]:
    """The page's content. Raises StoreError if the folder has none."""
    content = SavedRun(Path(folder)).object(DATA)
    if content is None:
        raise StoreError(f"{folder} holds no dashboard ({DATA} is missing)")
    return content


def write_dashboard(folder: str | Path) -> Path:
    """Render dashboard.html from the folder's files; returns its path.

    The page draws its histograms itself, so plotly is not in it. Nothing is loaded from elsewhere
    except Neuronpedia's view of a latent, when a reader opens it.
    """
    run, content = SavedRun(Path(folder)), read_dashboard(folder)
    about = run.provenance
    model = model_title(about["model"]["name"])
    n = counted(len(content["latents"]), "latent")
    page = (
        environment()
        .get_template("dashboard.html")
        .render(
            title=f"{n}: {model}, {about['sae']['hookpoint']}",
            sentences=about["finding"],
            notes=about["notes"],
            norm=content["norm"],
            n_rows=content["n_rows"],
            n_sample=content["n_sample"],
            positions=content["positions"].replace("_", " "),
            neuronpedia_list=content["neuronpedia_list"],
            # '<' is escaped so that no text can end the script.
            data=json.dumps(content, ensure_ascii=False).replace("<", "\\u003c"),
            fit_head=SAE_CHECK_HEAD,
            fit=sae_check_rows(run.table("check")),
            provenance=provenance_rows(run.provenance),
            config=run.config_text,
        )
    )
    path = Path(folder) / PAGE
    write_text(path, page, option=RUN_FOLDER)
    return path
