"""sweep.html and what is printed: the best cell by its train value, reported by its test value."""

import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pandas as pd
import pytest

from saexp.reports.contrast import MATCH_HEAD, match_rows, splits
from saexp.reports.findings import SURFACE
from saexp.reports.saved_run import cells_table
from saexp.reports.sweep import findings, write_sweep
from saexp.reports.sweep_figures import flow_figures, importance
from tests.unit.reports.run_outputs import assert_links_lead_to_reports, page_of
from tests.unit.reports.written import NASTY, cell, contrast, effect, write_json


def test_the_best_cell_is_chosen_on_train_and_reported_on_test(tmp_path: Path) -> None:
    for layer, train, test in ((1, 0.8, 0.99), (2, 0.9, 0.7), (3, 0.7, 0.95)):
        metrics = contrast("known", layer * 10, train=train, test=test) | contrast("unknown", None)
        cell(tmp_path, layer, f"layer={layer}", metrics=metrics)
    assert findings(cells_table(tmp_path)) == [
        "known: the best latent is 20 with held-out AUROC 0.700 [0.670, 0.710] at layer 2, width "
        "256 (chosen on the train split); the best latent is above chance in 3 of 3 SAEs (Holm "
        "over SAEs).",
        "unknown: no cell selects a latent.",
    ]


def test_of_cells_that_tell_the_groups_apart_as_well_the_wider_gap_is_taken(tmp_path: Path) -> None:
    for layer, separation in ((1, 0.8), (2, 0.9), (3, 0.7)):
        metrics = contrast("known", layer * 10, train=1.0, test=0.9)
        metrics |= {"contrast/best_separation_known": separation}
        cell(tmp_path, layer, f"layer={layer}", metrics=metrics)
    (finding,) = findings(cells_table(tmp_path))
    assert "the best latent is 20 with" in finding
    assert "at layer 2, width 256 (chosen on the train split)" in finding


def test_a_width_is_reported_unchanged_beside_failed_cells(tmp_path: Path) -> None:
    cell(tmp_path, 0, "layer=9", error="ModelError: no\n")
    cell(tmp_path, 1, "layer=2", metrics=contrast("known", 4, train=0.9, test=0.8))
    assert " at layer 2, width 256 (" in findings(cells_table(tmp_path))[0]


def test_cells_without_a_bootstrap_are_reported_without_an_interval(tmp_path: Path) -> None:
    metrics = contrast("known", 4, train=0.9, test=0.8)
    cell(tmp_path, 0, metrics={k: None if "_ci_" in k else v for k, v in metrics.items()})
    (finding,) = findings(cells_table(tmp_path))
    assert "4 with held-out AUROC 0.800 at " in finding


def test_the_cell_that_stands_out_on_train_is_reported_by_its_test_value(tmp_path: Path) -> None:
    """Not the lowest and highest test values, which chance alone would spread."""
    cells = [(1, 0.4, 0.2, 0.1), (2, 0.5, 0.6, 0.02), (3, 0.9, 0.1, 0.01)]
    for layer, value, train, p in cells:
        rows = effect("unknown", 0, 0.3, train=0.0)
        rows += effect("unknown", 2, value, 0.1, 0.4, train=train, p=p, chosen=True)
        cell(tmp_path, layer, f"layer={layer}", metrics={}, effects=rows)
    assert findings(cells_table(tmp_path), tmp_path) == [
        "Adding 'unknown' latents to prompts raises refusal from 0.30 to 0.50 [0.40, 0.60] (n = "
        "40) at layer 2, coefficient 2 (chosen on train prompts), against 0.10 to 0.40 for its "
        "controls (rank p = 0.02, 0.04 after Holm over 3 tests); 2 of 3 cells differ from their "
        "controls."
    ]
    assert findings(cells_table(tmp_path)) == []


def test_a_change_that_controls_have_too_does_not_stand_out(tmp_path: Path) -> None:
    for layer, control in ((1, 0.9), (2, 0.35)):
        rows = effect("known", 2, 0.9, 0.1, 0.4, train=0.5, chosen=True)
        for row in rows:
            if row["split"] == "train" and row["role"] == "control":
                row["refusal_change"] = 0.3 - control
        cell(tmp_path, layer, f"layer={layer}", metrics={}, effects=rows)
    (sentence,) = findings(cells_table(tmp_path), tmp_path)
    assert "at layer 2, coefficient 2" in sentence
    assert sentence.endswith("; no cell has enough matched controls for a p-value.")


def test_more_cells_than_p_values_can_be_corrected_for_are_noted(tmp_path: Path) -> None:
    for layer in range(6):
        rows = effect("known", 1, 0.9, train=0.1, p=0.01, chosen=True)
        cell(tmp_path, layer, f"layer={layer}", metrics={}, effects=rows)
    sentence, limit = findings(cells_table(tmp_path), tmp_path)
    assert sentence.endswith("; 0 of 6 cells differ from their controls.")
    assert limit == (
        "No cell can differ significantly: the smallest p-value of 99 controls is 0.06 after Holm; "
        "raise intervention.n_controls."
    )


def test_without_train_prompts_the_largest_effect_and_the_range_are_reported(
    tmp_path: Path,
) -> None:
    """Each cell has one coefficient, so there was none to choose on train prompts."""
    for number, value, p in ((0, 0.3, None), (1, 0.4, 0.01), (2, 0.9, 0.01), (3, 0.6, 0.01)):
        rows = effect("known", number, value, 0.1, 0.5, p=p, chosen=number > 0)
        cell(tmp_path, number, f"coefficient={number}", metrics={}, effects=rows)
    (sentence,) = findings(cells_table(tmp_path), tmp_path)
    assert sentence == (
        "Adding 'known' latents to prompts raises refusal from 0.30 to 0.90 [0.80, 1.00] (n = 40) "
        "at coefficient 2 (the largest change of 3 cells), against 0.10 to 0.50 for its controls "
        "(rank p = 0.01, 0.03 after Holm over 3 tests); 3 of 3 cells differ from their controls. "
        "Over coefficients 1 to 3 it is 0.40 to 0.90."
    )


def test_holm_is_over_the_cells_of_all_sentences(tmp_path: Path) -> None:
    for number, p in enumerate((0.01, 0.02)):
        rows = effect("known", 1, 0.6, p=p, chosen=True) + effect(
            "unknown", 1, 0.5, p=p, chosen=True
        )
        cell(tmp_path, number, f"layer={number}", metrics={}, effects=rows)
    for sentence in findings(cells_table(tmp_path), tmp_path):
        assert "at layer 0, coefficient 1 (the largest change of 2 cells)" in sentence
        assert sentence.endswith("; 2 of 2 cells differ from their controls.")


def test_prompts_of_two_groups_have_a_sentence_each(tmp_path: Path) -> None:
    rows = effect("latents", 1, 0.6, 0.1, 0.2, train=0.3, p=0.01, chosen=True)
    other = effect("latents", 1, 0.5, 0.3, 0.4, train=0.2, p=0.05, chosen=True)
    rows += [row | {"group": "b"} for row in other]
    cell(tmp_path, 0, "layer=1", metrics={}, effects=rows)
    first, second = findings(cells_table(tmp_path), tmp_path)
    assert first == (
        "Adding the latents to prompts raises refusal from 0.30 to 0.60 [0.50, 0.70] (n = 40) at "
        "coefficient 1, against 0.10 to 0.20 for its controls (rank p = 0.01, 0.02 after Holm over "
        "2 tests)."
    )
    assert (
        second.startswith("Adding the latents to b prompts raises refusal from 0.30 to 0.50")
        and "against 0.30 to 0.40 for its controls" in second
    )


def test_the_number_of_cells_above_chance_is_after_holm(tmp_path: Path) -> None:
    for layer, p, test in ((1, 0.001, 0.9), (2, 0.02, 0.7), (3, 0.06, 0.6), (4, 0.001, 0.3)):
        metrics = contrast("known", 3, train=0.8, test=test)
        metrics |= {"contrast/best_p_value_known_test": p}
        cell(tmp_path, layer, f"layer={layer}", metrics=metrics)
    (sentence,) = findings(cells_table(tmp_path))
    assert sentence.endswith("; the best latent is above chance in 2 of 4 SAEs (Holm over SAEs).")


def test_cells_of_one_contrast_are_one_test(tmp_path: Path) -> None:
    """p = 0.02 is significant among two SAEs, and would not be among their six cells."""
    for number in range(6):
        metrics = contrast("known", 3, train=0.8, test=0.7) | {SURFACE: 0.45}
        metrics |= {"contrast/best_p_value_known_test": 0.02}
        words = (f"layer={number % 2}", f"coefficient={number // 2}", f"tracker.name=run{number}")
        cell(tmp_path, number, *words, metrics=metrics)
    (sentence,) = findings(cells_table(tmp_path))
    assert sentence.endswith(
        "; the surface baseline has 0.450; the best latent is above chance in 2 of 2 SAEs (Holm "
        "over SAEs)."
    )


def test_cells_that_differ_in_what_is_recorded_are_one_test_of_an_effect(tmp_path: Path) -> None:
    for number in range(4):
        rows = effect("known", 1, 0.6, 0.1, 0.2, p=0.01, chosen=True)
        cell(tmp_path, number, f"tracker.name=run{number}", metrics={}, effects=rows)
    (sentence,) = findings(cells_table(tmp_path), tmp_path)
    assert sentence.endswith("against 0.10 to 0.20 for its controls (rank p = 0.01).")


def test_the_best_cell_of_a_search_is_on_the_first_screen_and_in_the_table(tmp_path: Path) -> None:
    name, cells = "effect/refusal/known_group", []
    for number, value in enumerate((0.5, 0.2, 0.8)):
        cells.append([f"coefficient={number + 1}", f"layer={3 - number}"])
        rows = effect("known", number + 1, value, 0.1, 0.2, p=0.01, chosen=True)
        metrics = {name: value} | contrast("known", 3, train=0.8, test=0.7)
        cell(tmp_path, number, *cells[-1], metrics=metrics, effects=rows, objective=name)
    for direction, largest, best, words in (
        ("minimize", "smallest", 1, "0.200 at layer 2, coefficient 2"),
        ("maximize", "largest", 2, "0.800 at layer 1, coefficient 3"),
    ):
        plan = {"cells": cells, "search": {"objective": name, "direction": direction}}
        write_json(tmp_path / "plan.json", plan)
        table = cells_table(tmp_path)
        sentence = (
            f"Of 3 cells of the search, cell {best} has the {largest} {name}: {words}. The cell "
            "was chosen by this value, so it is optimistic."
        )
        assert findings(table, tmp_path)[0] == sentence
    table, figures = write_sweep(tmp_path)
    assert table.loc[table["is_best"], "cell"].tolist() == [best]
    body = page_of(tmp_path)
    assert body.index(f"<p>{sentence}</p>") < body.index("<h2>Cells</h2>")
    assert body.count("<td>finished, best</td>") == 1
    assert f"objective: {name}" in body
    lines = [trace.name for trace in figures["over_coefficient"].data if trace.showlegend]
    assert lines == ["layer 1", "layer 2", "layer 3"]


def test_the_table_of_cells_has_outcomes_controls_and_p_values(tmp_path: Path) -> None:
    for number, p in enumerate((None, 0.01, 0.02)):
        ends = (None, None) if p is None else (0.1, 0.25)
        rows = effect("known", number, 0.3 + number / 5, *ends, p=p, chosen=p is not None)
        cell(tmp_path, number, f"coefficient={number}", metrics={}, effects=rows)
    write_sweep(tmp_path)
    body = page_of(tmp_path)
    assert '<th class="long">refusal, adding &#39;known&#39; latents to prompts</th>' in body
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row)[3:6] for row in body.split("<tr>")[2:5]]
    assert rows == [
        ["0.300", "–", "–"],
        ["0.500", "0.10\u00a0to\u00a00.25", "0.020"],
        ["0.700", "0.10\u00a0to\u00a00.25", "0.020"],
    ]


SIGNS = "dataset.text='%d a&b#c?<i>'"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cell in each state, with markup in what was typed and in what was said."""
    folder = tmp_path_factory.mktemp("sweep")
    write_json(
        folder / "plan.json",
        {
            "command": f"python -m saexp {NASTY}",
            "cells": [["layer=0", SIGNS], ["layer=9"], ["layer=2"], ["layer=0"]],
        },
    )
    metrics = contrast("known", 1234, train=0.9, test=0.8) | {"contrast/n_significant": 3}
    cell(folder, 0, "layer=0", SIGNS, metrics=metrics)
    cell(folder, 1, "layer=9", error=f"DataError: the text '{NASTY}' is none\n")
    cell(folder, 2, "layer=2")
    write_sweep(folder)
    return folder


def test_text_of_errors_and_commands_is_never_markup(sweep: Path) -> None:
    body = page_of(sweep)
    assert "<td>the text &#39;&lt;/script&gt;&lt;b&gt;&amp;&#39; is none</td>" in body
    assert "<code>python -m saexp &lt;/script&gt;&lt;b&gt;&amp;</code>" in body
    assert NASTY not in (sweep / "sweep.html").read_text("utf-8")


def test_the_page_counts_every_state_and_lists_every_cell(sweep: Path) -> None:
    body = page_of(sweep)
    for state in ("finished", "failed", "stopped", "not run"):
        assert f"<b>1</b><span>cell {state}</span>" in body
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


def match(source: int, latent: int, target: int, nearest: int, **more: Any) -> dict[str, Any]:
    """From one SAE's latent to another's; cells 0, 1, 2 are widths 256, 512, 1024 of layer 2."""
    about: dict[str, Any] = {"latent": latent, "nearest": nearest, "direction": "known", "rank": 1}
    for end, cell_number in (("from", source), ("to", target)):
        size = 256 * 2**cell_number
        about |= {f"{end}_cell": cell_number, f"{end}_width": str(size), f"{end}_d_sae": size}
        about |= {f"{end}_layer": 2, f"{end}_model": "tiny", f"{end}_sae": "tiny"}
    about |= {"nearest_direction": None, "cosine": 0.9, "cosine_by_chance": 0.3}
    return about | {"cofiring": 5, "phi": 0.5, "jaccard": 0.4, "n_rows": 30} | more


@pytest.fixture
def matches() -> pd.DataFrame:
    """Latent 7 of the narrowest is split into 1 and 2; 3 is like nothing."""
    rows = [match(1, 1, 0, 7), match(1, 2, 0, 7, cosine=0.8), match(1, 3, 0, 9, cosine=0.2)]
    rows += [match(0, 7, 1, 1), match(0, 7, 2, 40), match(2, 40, 1, 2, direction="unknown")]
    return pd.DataFrame([*rows, match(2, 40, 0, 7, phi=None, jaccard=None, cofiring=None)])


def test_a_latent_nearest_to_several_of_a_wider_sae_is_reported(matches: pd.DataFrame) -> None:
    assert splits(matches) == [
        "Layer 2: latent 7 of width 256 is the nearest of 2 leading latents of width 512: "
        "1 (0.90), 2 (0.80)."
    ]


def test_the_flow_links_neighbours_that_are_alike_beyond_chance(matches: pd.DataFrame) -> None:
    figures = flow_figures(matches)
    assert list(figures) == ["flow_over_width"]
    (trace,) = figures["flow_over_width"].data
    labels = trace.node.label
    links = {
        (labels[a], labels[b]): value
        for a, b, value in zip(trace.link.source, trace.link.target, trace.link.value, strict=True)
    }
    assert links == {("7", "1"): 0.9, ("7", "2"): 0.8, ("2", "40"): 0.9}
    assert trace.node.x == (0.001, 0.5, 0.5, 0.999)
    assert [a.text for a in figures["flow_over_width"].layout.annotations] == [
        "width 256 (layer 2)",
        "width 512 (layer 2)",
        "width 1024 (layer 2)",
    ]


def test_the_table_of_matches_holds_neighbours_the_most_alike_first(matches: pd.DataFrame) -> None:
    rows = match_rows(matches)
    assert all(len(row) == len(MATCH_HEAD) for row in rows)
    pairs = {(row[1], row[5]) for row in rows}
    assert pairs == {("512", "256"), ("256", "512"), ("1024", "512")}
    cosines = [row[MATCH_HEAD.index("cosine")] for row in rows]
    assert cosines == sorted(cosines, reverse=True)
    assert match_rows(pd.DataFrame()) == []
    assert flow_figures(pd.DataFrame()) == {}
    assert splits(pd.DataFrame()) == []


def test_a_dashboard_cell_is_linked_to_its_own_page(tmp_path: Path) -> None:
    cell_folder = cell(tmp_path, 0, "layer=0", metrics={})
    (cell_folder / "report.html").rename(cell_folder / "dashboard.html")
    write_sweep(tmp_path)
    assert f'<a href="{cell_folder.name}/dashboard.html">' in unquote(page_of(tmp_path))


def test_saes_without_a_width_are_compared_with_those_that_have_one(tmp_path: Path) -> None:
    for number, width in enumerate((256, 512, None)):
        rows = effect("known", 0, 0.3) + effect("known", 1, 0.4 + number / 5, chosen=True)
        metrics = contrast("known", 3, train=0.9, test=0.7 + number / 10)
        cell(tmp_path, number, f"sae={number}", metrics=metrics, effects=rows, width=width)
    table, figures = write_sweep(tmp_path)
    assert len(figures["over_coefficient"].data) == 3
    sentence = findings(table, tmp_path)[-1]
    assert "refusal from 0.30 to 0.80 [0.70, 0.90] (n = 40) at sae 2, coefficient 1" in sentence
    # The width changes with the SAE: one key, of whose importance nothing is to be said.
    assert importance(table, "contrast/best_auroc_known_test").note is None


def test_cells_without_a_point_say_why(tmp_path: Path) -> None:
    for layer in (0, 1):
        metrics = contrast("known", layer, train=0.9, test=0.8)
        metrics |= contrast("unknown", None if layer else 3, train=0.9, test=0.8)
        effects = effect("known", 1, 0.6, chosen=True) if layer else None
        cell(tmp_path, layer, f"layer={layer}", metrics=metrics, effects=effects)
    cell(tmp_path, 2, "layer=9", error="ModelError: no\n")
    write_sweep(tmp_path)
    body = page_of(tmp_path)
    assert "<li>layer 9: failed.</li>" in body
    assert "<li>layer 1: no latent is selected for &#39;unknown&#39;.</li>" in body
    assert "<li>layer 0: no intervention was run.</li>" in body
