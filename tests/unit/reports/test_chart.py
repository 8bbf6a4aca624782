"""Figures that are put together as plain settings, against plotly's own figures as the oracle."""

from typing import Any

import plotly.graph_objects as go
import pytest
from plotly.subplots import make_subplots

from saexp.reports import Chart, scatter, style

GRIDS: list[dict[str, Any]] = [
    {"rows": 1, "cols": 3},
    {"rows": 2, "cols": 2, "titles": list("abc"), "spacing": (0.1, None), "shared_yaxes": True},
    {"rows": 3, "cols": 1, "titles": list("abc"), "spacing": (None, 0.12)},
    {"rows": 2, "cols": 2, "titles": list("abcd"), "secondary_y": True},
]


def plotly_grid(grid: dict[str, Any]) -> Any:
    """The same panels by plotly."""
    x_gap, y_gap = grid.get("spacing", (None, None))
    return make_subplots(
        rows=grid["rows"],
        cols=grid["cols"],
        subplot_titles=grid.get("titles"),
        horizontal_spacing=x_gap,
        vertical_spacing=y_gap,
        shared_yaxes=grid.get("shared_yaxes", False),
        specs=[[{"secondary_y": grid.get("secondary_y", False)}] * grid["cols"]] * grid["rows"],
    )


def draw(figure: Any, grid: dict[str, Any]) -> go.Figure:
    """Traces and settings of a whole row, of a column, of one panel and of all."""
    last = {"row": grid["rows"], "col": grid["cols"]}
    is_chart, second = isinstance(figure, Chart), grid.get("secondary_y", False)
    trace = {"x": [1, 2], "y": [3, 4], "line": {"color": "red"}}
    for panel in ({"row": 1, "col": 1}, last):
        figure.add_trace(scatter(**trace) if is_chart else go.Scatter(trace), **panel)
    if second:
        figure.add_trace(
            scatter(y=[1]) if is_chart else go.Scatter(y=[1]), **last, secondary_y=True
        )
        figure.update_yaxes(title="right", secondary_y=True)
        figure.update_yaxes(title="left", secondary_y=False)
    figure.update_xaxes(title="all", range=[0, 1])
    figure.update_xaxes(title="one", **last)
    figure.update_yaxes(title={"text": "column"}, col=grid["cols"])
    figure.update_layout(legend={"itemsizing": "constant"}, margin={"b": 7})
    return style(figure, 300, legend_below=True)


@pytest.mark.parametrize("grid", GRIDS)
def test_panels_are_those_of_plotly(grid: dict[str, Any]) -> None:
    ours, theirs = (
        draw(figure, grid).to_plotly_json()
        for figure in (Chart.with_panels(**grid), plotly_grid(grid))
    )
    layouts = [dict(figure["layout"]) for figure in (ours, theirs)]
    titles = [layout.pop("annotations", []) for layout in layouts]
    for one, other in zip(*titles, strict=True):
        assert one == {**other, "x": pytest.approx(other["x"]), "y": pytest.approx(other["y"])}
    for name in [key for key in layouts[1] if "axis" in key and "domain" in layouts[1][key]]:
        domain = layouts[0][name].pop("domain")
        assert domain == pytest.approx(layouts[1][name].pop("domain"))
    assert layouts[0] == layouts[1]
    assert list(ours["data"]) == list(theirs["data"])


def test_settings_of_one_axis_stay_out_of_the_others_and_of_the_caller() -> None:
    grid: dict[str, Any] = {"title": {"text": "all"}}
    chart = Chart.with_panels(1, 2)
    chart.update_xaxes(**grid)
    chart.update_xaxes(title={"text": "second"}, col=2)
    titles = [style(chart, 300).layout[name].title.text for name in ("xaxis", "xaxis2")]
    assert (titles, grid) == (["all", "second"], {"title": {"text": "all"}})


def test_a_setting_that_plotly_does_not_know_is_an_error() -> None:
    chart = Chart(scatter(y=[1], colour="red"))
    with pytest.raises(ValueError, match="colour"):
        style(chart, 300)


def test_settings_listed_last_replace_those_of_the_style() -> None:
    layout: Any = style(Chart(), 300, legend_below=True, margin={"t": 40}).layout
    assert (layout.margin.t, layout.margin.b, layout.margin.l) == (40, 110, 60)
