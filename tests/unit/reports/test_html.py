"""report.html: numbers for reading, text never markup, everything in one file."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from saexp.reports import figure_json, number
from saexp.reports.analysis import report_figures, write_report
from tests.unit.reports.run_outputs import body_of
from tests.unit.reports.written import NASTY, run

READ = [
    (None, "–"),
    (float("nan"), "–"),
    (pd.NA, "–"),
    (0, "0"),
    (0.0, "0"),
    (12345, "12,345"),
    (12345.0, "12,345"),
    (np.int64(1234567), "1,234,567"),
    (-3, "-3"),
    (0.12345, "0.123"),
    (-0.5, "-0.500"),
    (0.001, "0.001"),
    (0.0009, "9.0e-04"),
    (-2e-9, "-2.0e-09"),
    (9.87654, "9.877"),
    (12.345, "12.3"),
    (np.float64(0.25), "0.250"),
    ("16k", "16k"),
    ("1234", "1234"),
    (True, "True"),
]


@pytest.mark.parametrize(("value", "shown"), READ, ids=[repr(v) for v, _ in READ])
def test_a_number_is_shown_for_reading(value: Any, shown: str) -> None:
    assert number(value) == shown


def test_digits_can_be_chosen() -> None:
    assert number(0.12345, 2) == "0.12"


def test_no_text_in_a_figure_can_end_its_script() -> None:
    import plotly.graph_objects as go

    json = figure_json(go.Figure(go.Scatter(x=[1], y=[1], name=NASTY)))
    assert "<" not in json
    assert "script" in json


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("run"), notes=("a note & <i>",))


@pytest.fixture(scope="module")
def page(written: Path) -> Path:
    return write_report(written)


@pytest.fixture(scope="module")
def figures(written: Path) -> dict[str, Any]:
    return report_figures(written)


def test_the_page_loads_nothing_from_elsewhere(page: Path) -> None:
    body = body_of(page)
    assert not [w for w in ("http://", "https://", "<link", "@import", "url(") if w in body]
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#)""", body)


def test_text_of_runs_is_never_markup(page: Path) -> None:
    body = body_of(page)
    assert NASTY not in page.read_text("utf-8")
    assert "steered &lt;/script&gt;&lt;b&gt;&amp;</span>" in body
    assert "<td>prompt &lt;/script&gt;&lt;b&gt;&amp;</td>" in body
    assert "<p>a note &amp; &lt;i&gt;</p>" in body


def row_of(body: str, first: str) -> list[str]:
    """The cells of the table row that begins so, tags off."""
    (row,) = re.findall(rf"<tr><td[^>]*>{first}</td>.*?</tr>", body, flags=re.DOTALL)
    return [re.sub("<[^>]+>", "", c) for c in re.findall(r"<td.*?</td>", row, flags=re.DOTALL)]


def test_the_tables_hold_the_runs_numbers(page: Path) -> None:
    body = body_of(page)
    assert row_of(body, "7")[2:6] == ["0.900", "0.870", "0.910", "0.850"]
    assert row_of(body, "7")[-3:] == ["1.0e-09", "1.0e-06", "0.001"]
    assert body.index('<td class="n" data-v="7">') < body.index('<td class="n" data-v="4">')
    effects = re.findall(r"<tr><td>known_group</td>.*?</tr>", body, flags=re.DOTALL)
    assert len(effects) == 4
    assert ">0.300<" in effects[1]
    assert "<td>0.70 to 0.75</td>" in effects[1]
    # The kinds of control at the chosen coefficient: how many, matched, and their ratios.
    cells = [re.sub("<[^>]+>", "", c) for c in re.findall(r"<td.*?</td>", effects[3])]
    assert cells == [
        *("known_group", "unknown", "0.600", "random directions of equal norm", "49", "49"),
        *("–", "1 (1 to 1)", "0.5 (0.5 to 0.5)", "0.70 to 0.75", "0.020", "yes"),
    ]
    assert row_of(body, "no entity") == ["no entity", "2"]


def test_one_prompt_stands_unsteered_steered_and_under_a_control(page: Path) -> None:
    row = row_of(body_of(page), "prompt .*?")
    assert row[1:] == ["plain", "steered &lt;/script&gt;&lt;b&gt;&amp;", "first control"]


def test_the_second_groups_auroc_is_shown_in_its_own_direction(tmp_path: Path) -> None:
    run(tmp_path, causal=False)
    table = pd.read_parquet(tmp_path / "latents.parquet")
    table["direction"] = "unknown"
    table["auroc_test"], table["ci_low_test"], table["ci_high_test"] = 0.2, 0.15, 0.3
    table.to_parquet(tmp_path / "latents.parquet")
    body = body_of(write_report(tmp_path))
    assert row_of(body, "7")[2:5] == ["0.800", "0.700", "0.850"]
    assert "No intervention was run." in body
    assert "<p>None.</p>" in body


def test_the_first_screen_has_a_sentence_per_direction_beside_its_figures(page: Path) -> None:
    first, second, *others = re.findall(
        r'<section class="finding.*?</section>', body_of(page), re.S
    )
    assert not others
    assert (
        "adding the 2 &#39;known&#39; latents to unknown prompts (coefficient 0.6, n = 20) lowers"
        in first
    )
    assert re.findall(r'id="fig-(\w+)"', first) == ["effect_known_group"]
    assert "No latent is selected for &#39;unknown&#39;." in second
    body = body_of(page)
    order = [body.index(f"<h2>{title}") for title in ("Numbers", "Latents that", "Provenance")]
    assert body.index('class="finding') < order[0] < order[1] < order[2]


def test_points_carry_the_numbers_of_the_selected_latents(figures: dict[str, Any]) -> None:
    figure = figures["frequencies"]
    labelled = {t.name: list(t.text) for t in figure.data if t.mode == "markers+text"}
    assert labelled == {"selected for known": ["7", "4"], "selected for unknown": []}
    assert figure.layout.xaxis.ticktext[0] == "0"


def test_every_axis_of_every_figure_has_a_title(figures: dict[str, Any]) -> None:
    for name, figure in figures.items():
        axes = [*figure.select_xaxes(), *figure.select_yaxes()]
        titles = [a.title.text for a in axes if a.showticklabels is not False]
        assert all(titles), name


def test_inactive_rows_are_counted_on_an_axis_of_their_own(tmp_path: Path) -> None:
    run(tmp_path)
    values = [0.0, 0.0, 0.0, 4.0] * 2
    groups = ["known"] * 4 + ["unknown"] * 4
    table = pd.DataFrame({"latent": 7, "group": groups, "value": values, "split": "test"})
    table.assign(text="a text").to_parquet(tmp_path / "activations.parquet")
    figure = report_figures(tmp_path)["latent_of_known"]
    inactive = [t for t in figure.data if t.yaxis == "y2"]
    assert [list(t.y) for t in inactive] == [[0.75], [0.75]]
    active = [t for t in figure.data if t.yaxis == "y"]
    assert [sum(t.y) for t in active] == [0.25, 0.25]
