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

from saexp.files import RUN_FOLDER, write_bytes
from saexp.reports.saved_run import SavedRun
from saexp.results import provenance_rows

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


# Figures


Trace = dict[str, Any]
"""A trace of a figure, as plotly writes it: its type and its settings."""


def scatter(**settings: Any) -> Trace:
    """Points or lines."""
    return {"type": "scatter", **settings}


def bar(**settings: Any) -> Trace:
    """Bars."""
    return {"type": "bar", **settings}


class Chart:
    """A figure under construction: traces and settings, with the methods of plotly's figures.

    Plotly checks every update of one of its figures, which takes longer than all the rest of a
    page. Here it checks the complete figure once, in `style`.
    """

    def __init__(self, *traces: Trace) -> None:
        self.traces: list[Trace] = list(traces)
        self.layout: dict[str, Any] = {}
        self._panels: dict[tuple[int, int], list[str]] = {(1, 1): ["x", "y"]}
        """(row, column) -> its x axis, its y axis and where there is one its secondary y axis."""

    @classmethod
    def with_panels(
        cls,
        rows: int,
        cols: int,
        titles: Sequence[str] = (),
        spacing: tuple[float | None, float | None] = (None, None),
        *,
        shared_yaxes: bool = False,
        secondary_y: bool = False,
    ) -> "Chart":
        """Panels as `plotly.subplots.make_subplots` arranges them; `spacing` is between columns,
        between rows."""
        chart, n_axes = cls(), 2 if secondary_y else 1
        default = (0.2 * n_axes / cols, (0.5 if titles else 0.3) / rows)
        x_gap, y_gap = (d if gap is None else gap for gap, d in zip(spacing, default, strict=True))
        width = ((0.94 if secondary_y else 1.0) - x_gap * (cols - 1)) / cols
        height = (1.0 - y_gap * (rows - 1)) / rows
        for index in range(rows * cols):
            row, col = divmod(index, cols)
            left, bottom = col * (width + x_gap), (rows - 1 - row) * (height + y_gap)
            x, y = _axis("x", index), _axis("y", index * n_axes)
            chart._panels[row + 1, col + 1] = [x, y]
            chart.layout[_key(x)] = {"anchor": y, "domain": [left, left + width]}
            chart.layout[_key(y)] = {"anchor": x, "domain": [bottom, bottom + height]}
            if shared_yaxes and col:
                first = chart._panels[row + 1, 1][1]
                chart.layout[_key(y)] |= {"matches": first, "showticklabels": False}
            if secondary_y:
                other = _axis("y", index * n_axes + 1)
                chart._panels[row + 1, col + 1].append(other)
                chart.layout[_key(other)] = {"anchor": x, "overlaying": y, "side": "right"}
        chart.layout["annotations"] = [
            _panel_title(text, chart.layout[_key(x)], chart.layout[_key(y)])
            for text, (x, y, *_) in zip(titles, chart._panels.values(), strict=False)
        ]
        return chart

    def add_trace(
        self, trace: Any, row: int = 1, col: int = 1, *, secondary_y: bool = False
    ) -> None:
        """Add a trace, in its panel where there are several."""
        if self.layout.get("xaxis", {}).get("anchor"):
            x, *y = self._panels[row, col]
            trace = {**trace, "xaxis": x, "yaxis": y[secondary_y]}
        self.traces.append(trace)

    def update_layout(self, **settings: Any) -> None:
        """Merge settings into those that there are."""
        _merge(self.layout, settings)

    def update_xaxes(self, row: int | None = None, col: int | None = None, **settings: Any) -> None:
        """Merge settings into those of the x axes, of one row or column or of all."""
        for x, *_ in self._chosen(row, col):
            _merge(self.layout.setdefault(_key(x), {}), settings)

    def update_yaxes(
        self,
        row: int | None = None,
        col: int | None = None,
        *,
        secondary_y: bool | None = None,
        **settings: Any,
    ) -> None:
        """Merge settings into those of the y axes, of one row or column, or all of a kind."""
        chosen = slice(None) if secondary_y is None else slice(1, None) if secondary_y else slice(1)
        for _, *axes in self._chosen(row, col):
            for y in axes[chosen]:
                _merge(self.layout.setdefault(_key(y), {}), settings)

    def _chosen(self, row: int | None, col: int | None) -> list[list[str]]:
        return [p for (r, c), p in self._panels.items() if row in (None, r) and col in (None, c)]


def _axis(letter: str, index: int) -> str:
    """Plotly's name of an axis: x, x2, x3."""
    return letter if index == 0 else f"{letter}{index + 1}"


def _key(axis: str) -> str:
    """An axis in a layout: x2 is xaxis2."""
    return f"{axis[0]}axis{axis[1:]}"


def _panel_title(text: str, x: Mapping[str, Any], y: Mapping[str, Any]) -> dict[str, Any]:
    """The annotation above a panel with these axes."""
    return {
        "text": text,
        "x": sum(x["domain"]) / 2,
        "y": y["domain"][1],
        "xref": "paper",
        "yref": "paper",
        "xanchor": "center",
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"size": 16},
    }


def _merge(into: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Merge nested settings, as plotly's updates do; `settings` are not changed later."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            into[name] = into.get(name) if isinstance(into.get(name), dict) else {}
            _merge(into[name], value)
        else:
            into[name] = value


def style(
    chart: "Chart | go.Figure", height: int, *, legend_below: bool = False, **layout: Any
) -> go.Figure:
    """The figure in the common style: no background, so that pages can be light or dark.

    Settings of its `layout` that are listed replace those of the style.
    """
    chart.update_layout(
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
    chart.update_xaxes(**grid)
    chart.update_yaxes(automargin=True, **grid)
    if legend_below:
        # Above, the legend would cover the titles of the panels.
        legend = {"yref": "container", "y": 0.01, "yanchor": "bottom"}
        chart.update_layout(legend=legend, margin={"b": 110})
    chart.update_layout(**layout)
    return chart if isinstance(chart, go.Figure) else go.Figure(chart.traces, chart.layout)


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


def diagonal(low: float, high: float) -> Trace:
    """A dotted line on which both coordinates are equal."""
    return scatter(
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
    figure = Chart(diagonal(zero, 1))
    for name, table, colour, labelled in series:
        hover = [
            f"latent {latent}<br>{names[1]}: {b:.1%}<br>{names[0]}: {a:.1%}"
            for latent, a, b in zip(table["latent"], table[x], table[y], strict=True)
        ]
        figure.add_trace(
            scatter(
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
    json = {name: figure_json(figure) for name, figure in figures.items()}
    page = environment().get_template(template).render(figures=json, **content)
    # Afterwards, as each step of a template would copy its 5 MB. Other content is escaped.
    script = b"<script>%s</script>" % get_plotlyjs().encode()
    page = page.encode().replace(b"<script>plotly</script>", script, 1)
    write_bytes(path, page, option=RUN_FOLDER)
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
        provenance=provenance_rows(run.provenance),
        config=run.config_text,
        **content,
    )
