"""sweep.html and what is printed: the best cell by its train value, told by its test value."""

from pathlib import Path
from urllib.parse import unquote

import pandas as pd
import pytest

from saexp.reports.cells import cells_table
from saexp.reports.sweep import findings, write_sweep
from tests.reports.left import assert_links_lead_to_reports, page_of
from tests.reports.written import NASTY, cell, contrast, effect, write_json


def test_the_best_cell_is_chosen_by_train_and_told_by_test(tmp_path: Path) -> None:
    for layer, train, test in ((1, 0.8, 0.99), (2, 0.9, 0.7), (3, 0.7, 0.95)):
        metrics = contrast("known", layer * 10, train=train, test=test) | contrast("unknown", None)
        cell(tmp_path, layer, f"layer={layer}", metrics=metrics)
    assert findings(cells_table(tmp_path)) == [
        "known: best at layer 2, width 256 (chosen on the train split): latent 20, held-out AUROC "
        "0.700 [0.670, 0.710].",
        "unknown: no cell selects a latent.",
    ]


def test_a_width_is_told_as_it_is_beside_cells_that_failed(tmp_path: Path) -> None:
    cell(tmp_path, 0, "layer=9", error="ModelError: no\n")
    cell(tmp_path, 1, "layer=2", metrics=contrast("known", 4, train=0.9, test=0.8))
    assert "best at layer 2, width 256 (" in findings(cells_table(tmp_path))[0]


def test_cells_without_a_bootstrap_are_told_without_an_interval(tmp_path: Path) -> None:
    metrics = contrast("known", 4, train=0.9, test=0.8)
    cell(tmp_path, 0, metrics={k: None if "_ci_" in k else v for k, v in metrics.items()})
    (told,) = findings(cells_table(tmp_path))
    assert told.endswith("latent 4, held-out AUROC 0.800.")


def test_an_effect_is_told_from_its_least_to_its_most_with_the_controls(tmp_path: Path) -> None:
    for number, (layer, value) in enumerate([(1, 0.2), (2, 0.9)]):
        metrics = effect("unknown", 0, 0.3) | effect("unknown", 2, value, low=0.1, high=0.4)
        cell(tmp_path, number, f"layer={layer}", metrics=metrics)
    assert findings(cells_table(tmp_path)) == [
        "Acting on 'unknown': refusal from 0.20 (layer 1, width 256, coefficient 2; controls 0.10 "
        "to 0.40) to 0.90 (layer 2, width 256, coefficient 2; controls 0.10 to 0.40)."
    ]


def test_an_effect_that_is_the_same_everywhere_is_told_so(tmp_path: Path) -> None:
    cell(tmp_path, 0, metrics=effect("known", 0, 1.0) | effect("known", 1, 1.0))
    assert findings(cells_table(tmp_path)) == ["Acting on 'known': refusal 1.00 in every cell."]


SIGNS = "dataset.text='%d a&b#c?<i>'"


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A cell in each state, with markup in what was typed and in what was said."""
    write_json(
        tmp_path / "plan.json",
        {
            "command": f"python -m saexp {NASTY}",
            "cells": [["layer=0", SIGNS], ["layer=9"], ["layer=2"], ["layer=0"]],
        },
    )
    metrics = contrast("known", 1234, train=0.9, test=0.8) | {"contrast/n_significant": 3}
    cell(tmp_path, 0, "layer=0", SIGNS, metrics=metrics)
    cell(tmp_path, 1, "layer=9", error=f"DataError: the text '{NASTY}' is none\n")
    cell(tmp_path, 2, "layer=2")
    write_sweep(tmp_path)
    return tmp_path


def test_text_of_errors_and_commands_is_never_markup(sweep: Path) -> None:
    body = page_of(sweep)
    assert "<td>the text &#39;&lt;/script&gt;&lt;b&gt;&amp;&#39; is none</td>" in body
    assert "<code>python -m saexp &lt;/script&gt;&lt;b&gt;&amp;</code>" in body
    assert NASTY not in (sweep / "sweep.html").read_text("utf-8")


def test_the_page_counts_every_state_and_lists_every_cell(sweep: Path) -> None:
    body = page_of(sweep)
    for state in ("finished", "failed", "stopped", "not run"):
        assert f"<b>1</b><span>cells {state}</span>" in body
        assert f"<td>{state}</td>" in body
    assert "<td>layer=9" in body
    assert '<td class="n" data-v="0.8">0.800</td>' in body


def test_a_link_leads_to_a_folder_with_signs_in_its_name(sweep: Path) -> None:
    assert_links_lead_to_reports(sweep, 1)
    assert "#" in unquote(page_of(sweep).split('<a href="')[1].split('"')[0])


def test_the_page_loads_nothing_from_elsewhere(sweep: Path) -> None:
    body = page_of(sweep)
    assert not [w for w in ("http://", "https://", 'src="', "<link", "@import") if w in body]


def test_a_page_is_made_of_cells_none_of_which_finished(tmp_path: Path) -> None:
    cell(tmp_path, 0, "layer=8", error="ModelError: no\n")
    cell(tmp_path, 1, "layer=9", error="ModelError: no\n")
    table, figures = write_sweep(tmp_path)
    assert (len(table), figures) == (2, {})
    assert "<td>layer=9</td><td>no</td>" in page_of(tmp_path)
    assert len(pd.read_parquet(tmp_path / "sweep.parquet")) == 2
