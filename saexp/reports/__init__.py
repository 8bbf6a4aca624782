"""What all report pages share: templates, tables, sections, the style of figures, provenance."""

import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from saexp.files import RUN_FOLDER, write_text
from saexp.reports.saved_run import SavedRun

TEMPLATES = Path(__file__).parent / "templates"
N_ROWS = 200
"""Rows of a table that a page shows."""

GROUP_COLOURS = ("#0072B2", "#D55E00")
"""First and second group: blue and vermillion of Okabe and Ito, safe for colour blindness."""
QUIET = "#8a8f98"
"""Controls, inactive latents and everything that is not selected."""
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, for series that are not groups."""
CHANCE_LINE = {"color": QUIET, "dash": "dot", "width": 1}
"""Style of lines that mark chance or equality."""
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"


# Content of a page


@dataclass(frozen=True)
class Finding:
    """A sentence of the first screen and the figures beside it."""

    sentence: str
    """Several sentences are separated by line breaks."""
    figures: list[tuple[str, str]] = field(default_factory=list)
    """(name, caption)."""


@dataclass(frozen=True)
class TileGroup:
    """Numbers shown as tiles under one title, with a line on how to read them."""

    title: str
    text: str
    tiles: list[tuple[str, Any]]
    """(label, value)."""


@dataclass(frozen=True)
class Table:
    """A table whose columns can be sorted."""

    head: list[str]
    rows: list[list[Any]]
    title: str = ""
    folded: bool = False
    """Whether it is shown only after a click on its title."""
    group: str = ""
    """The group whose coloured label precedes the title."""


@dataclass(frozen=True)
class Strip:
    """A text whose tokens are shaded by an activation."""

    label: str
    tokens: list[tuple[str, float, str]]
    """(text, shade from 0 to 1, hover text)."""


@dataclass(frozen=True)
class Section:
    """A heading with its explanation, figures, tables and texts."""

    title: str
    text: str = ""
    """How to read what follows."""
    figures: list[tuple[str, str]] = field(default_factory=list)
    """(name, caption)."""
    tables: list[Table] = field(default_factory=list)
    strips: list[Strip] = field(default_factory=list)
    html: str = ""
    """Content of a plugin's section, inserted as it is."""


@dataclass(frozen=True)
class AnalyzerPage:
    """The page of one analyzer; every function reads nothing but the run's saved files."""

    question: Callable[[SavedRun], str]
    """What the run was to answer."""
    findings: Callable[[SavedRun], list[Finding]]
    """The first screen."""
    sentences: Callable[[SavedRun], list[str]]
    """The numbers behind the findings, in words."""
    figures: Callable[[SavedRun], dict[str, go.Figure]]
    sections: Callable[[SavedRun], list[Section]]


# Values in words and cells


def number(value: Any, digits: int = 3) -> str:
    """A number for reading: scientific notation if tiny, a dash if missing."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, str | bool):
        return str(value)
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    size = abs(float(value))
    return f"{value:.1e}" if size < 1e-3 else f"{value:.{digits}f}" if size < 10 else f"{value:.1f}"


def interval_words(low: Any, high: Any, digits: int = 3) -> str:
    """` [0.912, 0.954]`, or nothing if either limit is missing."""
    if low is None or high is None or pd.isna(low) or pd.isna(high):
        return ""
    return f" [{low:.{digits}f}, {high:.{digits}f}]"


def metric_words(run: SavedRun, metric: str, digits: int = 3) -> str:
    """A metric with its interval `metric_ci_low` to `metric_ci_high`, if it has one."""
    m = run.metrics
    value = m.get(metric)
    if value is None:
        return "not defined"
    limits = interval_words(m.get(f"{metric}_ci_low"), m.get(f"{metric}_ci_high"), digits)
    return f"{value:.{digits}f}{limits}"


def wrapped(text: str, width: int = 34) -> str:
    """The text with the line breaks that titles of narrow panels need."""
    return "<br>".join(textwrap.wrap(text, width))


def cell(value: Any) -> Any:
    """A value that a page's table can show: a number, text or None."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is pd.NaT:
        return None
    if value is None or value is pd.NA or isinstance(value, str | int | float):
        return value
    return str(value)


def as_table(
    table: pd.DataFrame,
    title: str = "",
    columns: Mapping[str, str] | None = None,
    *,
    folded: bool = False,
    n_rows: int = N_ROWS,
) -> Table:
    """The first rows of a table; `columns` maps those to show to their names on the page."""
    names = {str(c): str(c) for c in table.columns} if columns is None else columns
    present = [c for c in names if c in table.columns]
    if len(table) > n_rows:
        title = f"{title} (first {n_rows} of {len(table):,})".strip()
    part = table[present].head(n_rows)
    rows = [[cell(v) for v in row] for row in part.itertuples(index=False, name=None)]
    return Table([names[c] for c in present], rows, title, folded)


def saved_table(run: SavedRun, name: str) -> pd.DataFrame:
    """A table that every run of this kind saves."""
    table = run.table(name)
    assert table is not None, f"the run saves {name}.parquet"
    return table


def layers_of(table: pd.DataFrame) -> list[int]:
    """Layers that a table has rows of, in order."""
    return [int(n) for n in pd.unique(table["layer"])]


def layer_suffix(layer: int, layers: Sequence[int]) -> str:
    """Ending of a metric's or figure's name if a run has several layers."""
    return f"_layer_{layer}" if len(layers) > 1 else ""


# Parts that several pages have

SAE_CHECK_HEAD = ["hookpoint", "quantity", "measured", "expected", "tolerance", "verdict"]


def sae_check_rows(run: SavedRun) -> list[list[Any]]:
    """Rows of check.parquet for reading; none if the run did not check its SAE."""
    table = run.table("check")
    if table is None:
        return []
    rows = []
    for row in table.to_dict("records"):
        is_alternative = row["verdict"] == "other reading"
        expected = "" if is_alternative else "unknown"
        if pd.notna(row["expected"]):
            expected = row["expected"]
        measured = [row["hookpoint"], row["quantity"], row["here"]]
        rows.append([*measured, expected, row["tolerance"], row["verdict"]])
    return rows


def provenance_rows(run: SavedRun) -> list[tuple[str, str]]:
    """How the run was made, as (name, value)."""
    about = run.provenance
    model, machine = about["model"], about["machine"]
    rows = [
        ("command", about["command"]),
        ("started", about["started"]),
        ("model", f"{model['name']} (revision {model.get('revision') or 'default'})"),
        ("model weights", model["fingerprint"]),
    ]
    if "dtype" in model:
        rows.append(("model dtype", f"{model['dtype']} ({model['dtype_source']})"))
    if "sae" in about:
        sae = about["sae"]
        rows += [
            ("SAE", f"{sae.get('name')} ({sae.get('architecture')}, d_sae {sae['d_sae']})"),
            ("SAE weights", str(sae.get("fingerprint"))),
        ]
    if "store" in about:
        rows.append(("activation store", about["store"]["key"]))
    if "labels" in about:
        rows.append(("labels", about["labels"]["key"]))
    return [
        *rows,
        ("seed", str(about["seed"])),
        ("machine", f"{machine['system']}, {machine['cores']} cores, {machine['device']}"),
        ("seconds", ", ".join(f"{k} {v:.1f} s" for k, v in about["seconds"].items())),
        ("versions", ", ".join(f"{k} {v}" for k, v in about["versions"].items())),
    ]


# Figures


def style(figure: go.Figure, height: int, *, legend_below: bool = False) -> go.Figure:
    """Apply the common style: no background, so that pages can be light or dark."""
    figure.update_layout(
        height=height,
        margin={"l": 60, "r": 20, "t": 40, "b": 55},
        font={"family": _FONT, "size": 13},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hoverlabel={"font": {"family": _FONT}},
    )
    grid: dict[str, Any] = {
        "gridcolor": "rgba(128,128,128,.25)",
        "zerolinecolor": "rgba(128,128,128,.45)",
    }
    figure.update_xaxes(**grid)
    figure.update_yaxes(automargin=True, **grid)
    if legend_below:
        # Above, the legend would cover the titles of the panels.
        legend = {"yref": "container", "y": 0.01, "yanchor": "bottom"}
        figure.update_layout(legend=legend, margin={"b": 110})
    return figure


def translucent(colour: str, opacity: float) -> str:
    """A colour `#rrggbb` or `rgb(r, g, b)` at this opacity, which legends show.

    They do not show the opacity of a trace.
    """
    if colour.startswith("#"):
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    else:
        red, green, blue = (int(n) for n in re.findall(r"\d+", colour)[:3])
    return f"rgba({red},{green},{blue},{opacity:.2g})"


def error_bars(values: pd.Series, low: pd.Series, high: pd.Series) -> dict[str, Any] | None:
    """Plotly's error bars from `low` to `high`; None if no value has an interval."""
    if low.isna().all():
        return None
    return {
        "type": "data",
        "symmetric": False,
        "array": high - values,
        "arrayminus": values - low,
        "thickness": 1,
    }


def diagonal(low: float, high: float) -> go.Scatter:
    """A dotted line on which both coordinates are equal."""
    return go.Scatter(
        x=[low, high],
        y=[low, high],
        mode="lines",
        line=CHANCE_LINE,
        hoverinfo="skip",
        showlegend=False,
    )


def frequency_scatter(
    series: Sequence[tuple[str, pd.DataFrame, str, bool]], x: str, y: str, names: tuple[str, str]
) -> go.Figure:
    """Activation frequency of each latent in two groups, on logarithmic axes.

    `series` are (name, rows, colour, whether points carry the latent's number); rows have `latent`
    and the columns `x` and `y`. `names` are what a frequency of the x and of the y group is a
    fraction of. Frequencies of 0 are drawn at the lower edge, which is labelled "0".
    """
    values = np.concatenate([t[[x, y]].to_numpy(dtype=float).ravel() for _, t, _, _ in series])
    positive = values[values > 0]
    least = float(positive.min()) if len(positive) else 0.1
    zero = least / 2.5
    figure = go.Figure(diagonal(zero, 1))
    for name, table, colour, labelled in series:
        hover = [
            f"latent {latent}<br>{names[1]}: {b:.1%}<br>{names[0]}: {a:.1%}"
            for latent, a, b in zip(table["latent"], table[x], table[y], strict=True)
        ]
        figure.add_trace(
            go.Scatter(
                x=table[x].clip(lower=zero),
                y=table[y].clip(lower=zero),
                mode="markers+text" if labelled else "markers",
                name=name,
                text=table["latent"].astype(str),
                textposition="top center",
                textfont={"size": 11},
                marker={"color": colour, "size": 9 if labelled else 5, "opacity": 0.85},
                hovertext=hover,
                hoverinfo="text",
                showlegend=len(series) > 1,
            )
        )
    ticks = [10.0**p for p in range(math.ceil(math.log10(least)), 1)]
    axis = {
        "type": "log",
        "range": [math.log10(zero) - 0.15, 0.2],
        "tickvals": [zero, *ticks],
        "ticktext": ["0", *(f"{100 * t:g}%" for t in ticks)],
    }
    figure.update_xaxes(title=f"active on {names[0]}", **axis)
    figure.update_yaxes(title=f"active on {names[1]}", **axis)
    return style(figure, 480)


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
    figure = go.Figure()
    width = 0.3 / len(frequencies)
    for index, (name, values) in enumerate(frequencies.items()):
        heights = np.histogram(np.log10(values[values > 0]), bins=edges)[0]
        colour = colours[name]
        figure.add_trace(histogram_trace(name, middles, heights, colour, as_bars=is_alone))
        figure.add_trace(
            go.Bar(
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


def histogram_trace(
    name: str, x: Any, y: Any, colour: str, *, as_bars: bool
) -> go.Bar | go.Scatter:
    """Bars for a series that is alone, a stepped line for one of several."""
    if as_bars:
        return go.Bar(x=x, y=y, name=name, marker={"color": colour}, showlegend=False)
    line = {"color": colour, "shape": "hvh"}
    return go.Scatter(x=x, y=y, name=name, mode="lines", line=line)


# Writing


@cache
def environment() -> jinja2.Environment:
    """Templates that escape everything not marked as markup; compiled once per process."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["number"] = number
    return templates


def figure_json(figure: go.Figure) -> str:
    """A figure's data and layout for a <script>; '<' is escaped so that no text can end it."""
    return (figure.to_json() or "{}").replace("<", "\\u003c")


def write_page(path: Path, template: str, figures: Mapping[str, go.Figure], **content: Any) -> Path:
    """Render a template with its figures and plotly inside; returns the path.

    Raises StoreError if it cannot be written.
    """
    page = (
        environment()
        .get_template(template)
        .render(
            figures={name: figure_json(figure) for name, figure in figures.items()},
            plotly=get_plotlyjs(),
            **content,
        )
    )
    write_text(path, page, option=RUN_FOLDER)
    return path


def write_run_page(
    run: SavedRun, template: str, figures: Mapping[str, go.Figure], **content: Any
) -> Path:
    """Render report.html of a run, with its notes, skips, provenance and config."""
    return write_page(
        run.folder / "report.html",
        template,
        figures,
        notes=run.provenance["notes"],
        skips=run.provenance["skips"],
        provenance=provenance_rows(run),
        config=run.config_text,
        **content,
    )
