"""What all pages share, in a real browser: tables that sort, figures whose data can be saved."""

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from saexp.reports import write_page
from tests.browser import dom, needs_chromium
from tests.unit.reports.cards import card, written
from tests.unit.reports.run_outputs import body_of
from tests.unit.reports.written import NASTY

pytestmark = [needs_chromium, pytest.mark.slow]

X = np.array([1.5, 2.5, 4.0])
TITLE = "coefficient (× the stream's median norm)"
PANEL = {"text": "Adding the 'known' latent 67 to unknown prompts", "x": 0.5, "y": 1}
PANEL |= {"xref": "paper", "yref": "paper", "showarrow": False}
ROWS = [["b", 10, None], ["a", 9, 0.5], ["c", None, 1e-9]]


CLICKS = """const table = document.querySelectorAll("table.sort")[1], states = [];
const heads = table.querySelectorAll("th");
for (const column of [1, 1, 0, 2]) {
  heads[column].querySelector("button").click();
  states.push([[...table.tBodies[0].rows].map(row => row.cells[0].textContent).join(""),
    ...[...heads].map(h => h.getAttribute("aria-sort"))]);
}
return states;"""
WIDTHS = """const place = document.getElementById("fig-lines"), states = [];
draw(place);
for (const width of ["900px", "300px", ""]) {
  place.style.width = width;
  fit();
  const { xaxis, annotations } = place.layout;
  states.push([xaxis.title.text, annotations[0].text, place.style.minHeight]);
}
return states;"""
VALUES = {
    "points": "return Object.values(figures).map(points);",
    "csv": 'return csv([{ a: "x,y", b: null }, { b: "say \\"no\\"", c: 1.5 }]);',
    "order": CLICKS,
    "titles": WIDTHS,
    "sends": "return config.showSendToCloud;",
}
"""Functions that the page's scripts can give the value of."""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep's template with figures of every kind that reports draw."""
    tmp_path = tmp_path_factory.mktemp("page")
    line = go.Scatter(x=X, y=X * 2, name="a line", error_y={"array": X / 10, "arrayminus": X / 5})
    points = go.Scatter(x=["p", "q"], y=np.array([1, 2]), customdata=np.array([[7, 8.5], [9, 0.5]]))
    heat = go.Heatmap(x=[0, 1], y=["low", "high"], z=np.array([[0.1, 0.2], [0.3, np.nan]]))
    links = {"source": [0, 0], "target": [1, 2], "value": [0.9, 0.8]}
    layout = {"xaxis": {"title": {"text": TITLE}}, "annotations": [PANEL]}
    figures = {
        "lines": go.Figure([line, points], layout=layout),
        "heat": go.Figure(heat),
        "flow": go.Figure(go.Sankey(node={"label": ["7", "1", NASTY]}, link=links)),
    }
    write_page(
        tmp_path / "page.html",
        "sweep.html",
        figures,
        title="A page",
        command=None,
        counts=[],
        findings=[],
        further=["lines", "heat"],
        missing=[],
        notes=[],
        captions=dict.fromkeys(figures, "as drawn"),
        head=["cell", "status"],
        rows=[],
        failed=[],
        flows=["flow"],
        match_head=["name", "size", "share"],
        matches=ROWS,
        splits=[],
    )
    return tmp_path / "page.html"


@pytest.fixture(scope="module")
def drawn(page: Path) -> str:
    """The page in the browser, once it has evaluated VALUES."""
    functions = ", ".join(f"{name}: (() => {{ {body} }})()" for name, body in VALUES.items())
    script = f"<script>document.body.dataset.said = JSON.stringify({{ {functions} }});</script>"
    asked = page.with_name("evaluated.html")
    asked.write_text(page.read_text("utf-8") + script, encoding="utf-8")
    return dom(asked, page.parent)


@pytest.fixture(scope="module")
def values(drawn: str) -> dict[str, Any]:
    match = re.search(r'data-said="(.*?)"[ >]', drawn)
    assert match is not None
    return json.loads(html.unescape(match[1]))


def test_the_data_of_a_figure_are_what_it_was_made_of(values: dict[str, Any]) -> None:
    lines, heat, flow = values["points"]
    assert lines[:3] == [
        {"trace": "a line", "x": x, "y": 2 * x, "error_up": x / 10, "error_down": x / 5} for x in X
    ]
    assert lines[3:] == [
        {"trace": "trace 2", "x": "p", "y": 1, "customdata_1": 7, "customdata_2": 8.5},
        {"trace": "trace 2", "x": "q", "y": 2, "customdata_1": 9, "customdata_2": 0.5},
    ]
    assert [(p["x"], p["y"], p["z"]) for p in heat] == [
        (0, "low", 0.1),
        (1, "low", 0.2),
        (0, "high", 0.3),
        (1, "high", None),
    ]
    assert flow == [
        {"trace": "trace 1", "from": "7", "to": "1", "value": 0.9},
        {"trace": "trace 1", "from": "7", "to": NASTY, "value": 0.8},
    ]


def test_csv_is_quoted_where_it_must_be(values: dict[str, Any]) -> None:
    assert values["csv"] == 'a,b,c\r\n"x,y",,\r\n,"say ""no""",1.5\r\n'


def test_every_figure_is_drawn_and_has_its_buttons(page: Path, drawn: str) -> None:
    assert body_of(page).count('<div class="plot" id="fig-') == 3
    assert drawn.count('class="saving"') == 3
    assert "main-svg" in drawn
    assert page.read_text("utf-8").count("plotly.js v") == 1


def test_a_table_sorts_by_a_click_and_says_so(values: dict[str, Any]) -> None:
    assert values["order"] == [
        ["abc", "none", "ascending", "none"],
        ["bac", "none", "descending", "none"],
        ["abc", "ascending", "none", "none"],
        ["cab", "none", "none", "ascending"],
    ]


def test_long_titles_are_wrapped_while_the_page_is_narrow(values: dict[str, Any]) -> None:
    wide, narrow, again = values["titles"]
    assert wide == again == [TITLE, PANEL["text"], ""]
    axis, panel, height = narrow
    assert axis == "coefficient (× the stream's<br>median norm)"
    assert panel == "Adding the 'known' latent 67<br>to unknown prompts"
    assert height == f"{400 + 18 + 21}px"


def test_no_figure_offers_to_send_its_data_anywhere(values: dict[str, Any]) -> None:
    """Without a pointer that hovers, as here, no figure has a bar of buttons to look at."""
    assert values["sends"] is False


TIMING = """<script>addEventListener("load", () => {
  document.documentElement.dataset.ms = performance.now();
})</script>"""
"""Milliseconds from the navigation's start; the browser's own start is not the page's."""


@needs_chromium
@pytest.mark.slow
def test_a_browser_draws_it_from_the_file_in_under_two_seconds(tmp_path: Path) -> None:
    inactive = card(3, n_active=0, density=0.0, mean_active=None, max=0.0, top=[], quantiles=[])
    inactive["histogram"] = {"width": 0.0, "counts": [[], []]}
    cards = [*(card(i) for i in range(49)), inactive | {"latent": 900}]
    page = written(tmp_path, cards)
    timed = tmp_path / "timed.html"
    timed.write_text(page.read_text("utf-8") + TIMING)
    drawn = dom(timed, tmp_path)
    took = re.search(r'data-ms="([\d.]+)"', drawn)
    assert took is not None
    assert float(took[1]) < 2000
    assert drawn.count('<button type="button" value=') == 50
    assert drawn.count('class="card"') == 1
    assert drawn.count('class="text"') == 20
    assert "<rect" in drawn
    assert "<iframe" not in drawn
    assert 'title="not analysed"' in drawn
    last = page.with_name("last.html")
    last.write_text(page.read_text("utf-8").replace("list();\nfromHash();", "go(900);list();"))
    assert "Never active here." in dom(last, tmp_path)


@needs_chromium
@pytest.mark.slow
def test_keys_search_and_order_find_a_latent(tmp_path: Path) -> None:
    odd = card(41, promoted=[["Special", 1.0]])
    page = written(tmp_path, [card(30), odd, card(4), card(12)])
    page.write_text(page.read_text("utf-8") + KEYS)
    match = re.search(r'data-reported="([^"]*)"', dom(page, tmp_path))
    assert match is not None
    steps = ["30 of 4", "41 of 4", "4 of 4", "41 of 4", "search", "41 of 1", "41 of 1"]
    # A number finds latents that begin with it, and texts that hold it: "tok4" is in every one.
    assert match[1].split("; ") == [*steps, "41 of 4", "4 12 30 41", "4"]


KEYS = """<script>
const event = key => new KeyboardEvent("keydown", { key, bubbles: true });
const press = (key, on = document.body) => on.dispatchEvent(event(key));
const states = [], tell = () => states.push(`${current} of ${matching.length}`);
tell(); press("j"); tell(); press("ArrowRight"); tell(); press("k"); tell();
press("/"); states.push(document.activeElement.id);
here("search").value = "special"; here("search").dispatchEvent(new Event("input")); tell();
press("j", here("search")); tell();
here("search").value = "4"; here("search").dispatchEvent(new Event("input")); tell();
here("search").value = ""; here("search").dispatchEvent(new Event("input"));
here("sort").value = 1; here("sort").dispatchEvent(new Event("change"));
states.push(matching.map(c => c.latent).join(" "));
here("all").click(); states.push(document.querySelectorAll("article").length);
document.body.dataset.reported = states.join("; ");
</script>"""
