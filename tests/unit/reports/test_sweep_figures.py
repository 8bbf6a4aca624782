"""Figures over a sweep's cells hold the numbers of its table, where there are points for them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from saexp.reports.findings import SURFACE
from saexp.reports.saved_run import cells_table
from saexp.reports.sweep import effects_table
from saexp.reports.sweep_figures import sweep_figures
from tests.unit.reports.written import cell, contrast, effect


def contrast_metrics(test: float) -> dict[str, Any]:
    """Metrics of a cell whose numbers follow from one: `known` has it, `unknown` 0.1 less."""
    metrics = contrast("known", round(test * 100), train=test - 0.2, test=test)
    return metrics | contrast("unknown", 1, train=test - 0.3, test=test - 0.1)


def effects(test: float, coefficients: Sequence[float]) -> list[dict[str, Any]]:
    """Of the same cell, acting on `unknown`."""
    rows = [effect("unknown", c, test * c, low=c / 20, high=c / 10) for c in coefficients]
    return sum(rows, [])


def figures_of(folder: Path) -> dict[str, Any]:
    table = cells_table(folder)
    finished = table[table["status"] == "finished"]
    return sweep_figures(table, effects_table(folder, finished))


def effects_of(folder: Path) -> pd.DataFrame:
    return effects_table(folder, cells_table(folder))


def grid(
    folder: Path, layers: Sequence[int], widths: Sequence[Any], coefficients: Sequence[float] = ()
) -> pd.DataFrame:
    """A finished cell per layer and width; the table."""
    for layer in layers:
        for width in widths:
            number = len(list(folder.iterdir())) if folder.is_dir() else 0
            test = 0.6 + layer / 10 + number / 100
            more = {"metrics": contrast_metrics(test), "effects": effects(test, coefficients)}
            cell(folder, number, f"layer={layer}", f"width={width}", **more)
    return cells_table(folder)


EXIST = [
    ([1], [64], [1], set()),
    ([1, 2], [64], [1], {"over_layers"}),
    ([1], [64, 128], [1], {"over_width"}),
]


@pytest.mark.parametrize(("layers", "widths", "coefficients", "names"), EXIST)
def test_a_figure_is_there_where_it_has_two_points(
    tmp_path: Path,
    layers: list[int],
    widths: list[int],
    coefficients: list[float],
    names: set[str],
) -> None:
    grid(tmp_path, layers, widths, coefficients)
    assert set(figures_of(tmp_path)) == names


@pytest.fixture(scope="module")
def of_grid(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Table and figures of cells at three layers with two widths and two coefficients."""
    folder = tmp_path_factory.mktemp("grid")
    table = grid(folder, [3, 1, 2], [64, 128], [0, 0.5])
    return table, figures_of(folder)


def test_a_grid_has_all_figures(of_grid: tuple[pd.DataFrame, dict[str, Any]]) -> None:
    assert set(of_grid[1]) == {"over_layers", "over_width", "heat_map", "over_coefficient"}


def test_cells_that_did_not_finish_or_compare_no_groups_draw_nothing(tmp_path: Path) -> None:
    cell(tmp_path, 0, "layer=1", metrics=contrast_metrics(0.8))
    cell(tmp_path, 1, "layer=2", error="ModelError: no\n")
    cell(tmp_path, 2, "layer=3")
    assert figures_of(tmp_path) == {}
    for number in (3, 4):
        cell(tmp_path / "collected", number, f"layer={number}", metrics={"collection/n_rows": 5})
    assert figures_of(tmp_path / "collected") == {}


def traces(figure: Any, axis: str = "x") -> dict[str, Any]:
    """Name -> trace, of one panel."""
    return {t.name: t for t in figure.data if (t.xaxis or "x") == axis}


def test_points_and_bars_over_layers_are_the_tables(
    of_grid: tuple[pd.DataFrame, dict[str, Any]],
) -> None:
    table, figures = of_grid
    figure = figures["over_layers"]
    for axis, measure in (("x", "auroc"), ("x2", "separation")):
        drawn = traces(figure, axis)
        assert set(drawn) == {f"{g}, width {w}" for g in ("known", "unknown") for w in (64, 128)}
        for group in ("known", "unknown"):
            key = f"contrast/best_{measure}_{group}"
            part = table[table["width"] == 128].sort_values("layer")
            trace = drawn[f"{group}, width 128"]
            assert list(trace.x) == [1, 2, 3]
            assert np.allclose(trace.y, part[f"{key}_test"])
            assert np.allclose(trace.y + trace.error_y.array, part[f"{key}_ci_high_test"])
            assert np.allclose(trace.y - trace.error_y.arrayminus, part[f"{key}_ci_low_test"])
            assert list(trace.customdata) == part[f"contrast/best_latent_{group}"].tolist()


def test_a_cell_that_selects_no_latent_has_no_point_on_its_line(tmp_path: Path) -> None:
    for layer in (0, 1, 2):
        metrics = contrast_metrics(0.8) | (contrast("known", None) if layer == 1 else {})
        cell(tmp_path, layer, f"layer={layer}", metrics=metrics)
    drawn = traces(figures_of(tmp_path)["over_layers"])
    assert list(drawn["known"].x) == [0, 2]
    assert list(drawn["unknown"].x) == [0, 1, 2]


def test_cells_without_intervals_are_drawn_without_bars(tmp_path: Path) -> None:
    for layer in (0, 1):
        metrics = {
            k: None if "_ci_" in k else v for k, v in contrast_metrics(0.8 + layer / 10).items()
        }
        cell(tmp_path, layer, f"layer={layer}", metrics=metrics)
    drawn = traces(figures_of(tmp_path)["over_layers"])
    assert np.allclose(drawn["known"].y, [0.8, 0.9])


def test_models_are_lines_of_their_own(tmp_path: Path) -> None:
    for number, (model, layer) in enumerate([("a", 0), ("a", 1), ("b", 0), ("b", 1)]):
        words = f"model={model}", f"layer={layer}"
        cell(tmp_path, number, *words, metrics=contrast_metrics(0.6 + number / 10))
    drawn = traces(figures_of(tmp_path)["over_layers"])
    assert np.allclose(drawn["known, model a"].y, [0.6, 0.7])
    assert np.allclose(drawn["known, model b"].y, [0.8, 0.9])


def test_a_line_has_one_colour_in_every_panel(tmp_path: Path) -> None:
    """Also where a panel lacks a line that stands before it: there is one legend."""
    for layer in (0, 1, 2):
        rows = effect("known", 0, 0.1) + effect("known", 1, 0.5 + layer / 10)
        if layer:
            rows += effect("unknown", 0, 0.1) + effect("unknown", 1, 0.2 + layer / 10)
        cell(tmp_path, layer, f"layer={layer}", metrics=contrast_metrics(0.8), effects=rows)
    figure = figures_of(tmp_path)["over_coefficient"]
    known, unknown = (
        {name: trace.line.color for name, trace in traces(figure, axis).items()}
        for axis in ("x", "x2")
    )
    assert len(known) == len(set(known.values())) == 3
    assert unknown == {name: known[name] for name in list(known)[1:]}


@pytest.mark.parametrize("key", ["sae", "seed"])
def test_no_cell_is_left_out_of_the_curves(tmp_path: Path, key: str) -> None:
    for number in range(4):
        words = f"{key}={number % 2}", f"layer={number // 2}"
        cell(tmp_path, number, *words, metrics=contrast_metrics(0.6 + number / 10))
    drawn = figures_of(tmp_path)["over_layers"].data
    known = [y for t in drawn if t.name.startswith("known") and t.xaxis == "x" for y in t.y]
    assert np.allclose(sorted(known), [0.6, 0.7, 0.8, 0.9])


def test_widths_are_in_the_order_of_their_size(tmp_path: Path) -> None:
    grid(tmp_path, [0, 1], ["131k", "16k", "1m"])
    figures = figures_of(tmp_path)
    assert list(traces(figures["over_width"])["known, layer 0"].x) == ["16k", "131k", "1m"]
    assert list(figures["heat_map"].data[0].y) == ["16k", "131k", "1m"]


def test_the_map_holds_each_cells_number_at_its_layer_and_width(
    of_grid: tuple[pd.DataFrame, dict[str, Any]],
) -> None:
    table, figures = of_grid
    known, unknown = figures["heat_map"].data
    for panel, group in ((known, "known"), (unknown, "unknown")):
        values = table.set_index(["width", "layer"])[f"contrast/best_auroc_{group}_test"]
        for y, width in enumerate((64, 128)):
            for x, layer in enumerate((1, 2, 3)):
                assert (panel.y[y], panel.x[x]) == (str(width), str(layer))
                assert panel.z[y][x] == pytest.approx(values[width, layer])


def test_the_map_holds_no_mean_over_models(tmp_path: Path) -> None:
    for number in range(8):
        words = [f"model={number % 2}", f"layer={number // 4}", f"width={64 + number // 2 % 2}"]
        cell(tmp_path, number, *words, metrics=contrast_metrics(0.5 + number / 20))
    figures = figures_of(tmp_path)
    panels = figures["heat_map"].data if "heat_map" in figures else ()
    known = [z for panel in panels for z in np.ravel(panel.z)]
    real = [0.5 + n / 20 - less for n in range(8) for less in (0, 0.1)]
    assert all(np.isclose(z, real).any() for z in known)


def test_effects_are_those_of_the_cells_summaries(tmp_path: Path) -> None:
    rows = effect("unknown", -0.5, 0.25, low=0.1, high=0.2, train=0.4, p=0.02, chosen=True)
    rows += effect("unknown", 1e-05, 0.75) + effect("not_known", 1e20, 1.0, low=0.0, high=0.5)
    rows += [row | {"main": False} for row in effect("known", 2, 0.9)]
    cell(tmp_path, 0, "layer=1", metrics={}, effects=rows)
    cell(tmp_path, 1, "layer=2", metrics={})
    table = effects_of(tmp_path).set_index(["outcome", "direction", "coefficient"])
    assert table["value"].to_dict() == {
        ("refusal", "unknown", -0.5): 0.25,
        ("refusal", "unknown", 1e-05): 0.75,
        ("refusal", "not_known", 1e20): 1.0,
    }
    spans = table[["controls_min", "controls_max"]]
    assert spans.loc[("refusal", "unknown", -0.5)].tolist() == [0.1, 0.2]
    assert spans.loc[("refusal", "not_known", 1e20)].tolist() == [0.0, 0.5]
    assert spans.loc[("refusal", "unknown", 1e-05)].isna().all()
    first = table.loc[("refusal", "unknown", -0.5)]
    assert first[["ci_low", "ci_high", "gap_train", "p_controls"]].tolist() == pytest.approx(
        [0.15, 0.35, 0.4, 0.02]
    )
    assert table["chosen"].tolist() == [True, False, False]
    assert table["gap_train"].isna().tolist() == [False, True, True]


def test_only_matched_controls_are_in_the_range(tmp_path: Path) -> None:
    cell_folder = cell(
        tmp_path, 0, metrics={}, effects=effect("unknown", 1, 0.25, low=0.1, high=0.2)
    )
    names = [f"unknown_group_control_{n}" for n in (0, 1)]
    controls = pd.DataFrame({"condition": names, "matched": [False, True]})
    controls.to_parquet(cell_folder / "controls.parquet")
    assert effects_of(tmp_path)[["controls_min", "controls_max"]].to_numpy().tolist() == [[0.2] * 2]


def test_bands_span_the_controls_of_all_coefficients_and_ranges_all_controls(
    tmp_path: Path,
) -> None:
    rows = effect("unknown", 1, 0.2, low=0.1, high=0.2)
    rows += effect("unknown", 2, 0.5, low=0.1, high=0.3, chosen=True)
    extreme = {"condition": "unknown_group_control_9", "refusal": 0.9}
    cell(tmp_path, 0, metrics={}, effects=[*rows, rows[-1] | extreme])
    ranges = effects_of(tmp_path).set_index("coefficient")
    assert ranges[["band_min", "band_max"]].to_numpy().tolist() == [[0.1, 0.2], [0.1, 0.3]]
    assert ranges[["controls_min", "controls_max"]].to_numpy().tolist() == [[0.1, 0.2], [0.1, 0.9]]


def test_a_row_is_reported_once_where_cells_share_a_coefficient(tmp_path: Path) -> None:
    for number in (1, 2):
        rows = effects(0.8, [0, number])
        cell(
            tmp_path,
            number,
            f"coefficient=[0,{number}]",
            metrics=contrast_metrics(0.8),
            effects=rows,
        )
    assert effects_of(tmp_path)["coefficient"].tolist() == [0, 1, 2]


def test_cells_that_differ_keep_equal_effects_of_their_own(tmp_path: Path) -> None:
    """The first one differs from each other in one word."""
    words = ["layer=2", "model=b", "sae=b", "dataset=b", "layer=3", "width=512", "seed=1"]
    for number, word in enumerate(words):
        rows = effect("unknown", 1, 0.25, low=0.0, high=0.0)
        more = () if word == "seed=1" else ("seed=0",)
        cell(tmp_path, number, word, *more, metrics={}, effects=rows)
    assert effects_of(tmp_path)["value"].tolist() == [0.25] * len(words)


def test_the_effect_of_a_single_selected_latent_is_reported_too(tmp_path: Path) -> None:
    rows = effect("known", 0, 0.1, condition="known_9") + effect(
        "known", 1, 0.9, condition="known_9"
    )
    cell(tmp_path, 0, "layer=1", metrics={}, effects=rows)
    assert effects_of(tmp_path)["value"].tolist() == [0.1, 0.9]


def test_outcomes_and_the_band_of_controls_are_the_tables(tmp_path: Path) -> None:
    for number, layer in enumerate((1, 2)):
        test = 0.8 - number / 10
        more = {"metrics": contrast_metrics(test), "effects": effects(test, [0.5, -1, 0])}
        cell(tmp_path, number, f"layer={layer}", **more)
    figure = figures_of(tmp_path)["over_coefficient"]
    line, band = (traces(figure)[n] for n in ("layer 2", "layer 2: matched controls"))
    assert list(line.x) == [-1, 0, 0.5]
    assert np.allclose(line.y, [-0.7, 0, 0.35])
    assert list(band.x) == [-1, 0, 0.5, 0.5, 0, -1]
    assert np.allclose(band.y, [-0.05, 0, 0.05, 0.025, 0, -0.1])
    assert figure.layout.annotations[0].text == "Adding 'unknown' latents to<br>prompts"


def baseline(value: float, group: str = "all") -> dict[str, Any]:
    """The summary's row of prompts without intervention."""
    (row,) = effect("", 0, value, condition=f"baseline_{group}")
    return row | {"role": "baseline", "main": False, "group": group}


def test_dose_curves_begin_at_the_value_without_intervention(tmp_path: Path) -> None:
    """Once for the cells of a line, and not where a cell has coefficient 0."""
    for number, (layer, coefficient) in enumerate(((1, 0.5), (1, 1), (2, 0), (2, 1))):
        rows = [*effect("unknown", coefficient, coefficient / 2), baseline(0.25)]
        rows.append(baseline(0.9, "others"))
        cell(
            tmp_path,
            number,
            f"layer={layer}",
            f"coefficient={coefficient}",
            metrics=contrast_metrics(0.8),
            effects=rows,
        )
    curves = traces(figures_of(tmp_path)["over_coefficient"])
    points = {name: dict(zip(curve.x, curve.y, strict=True)) for name, curve in curves.items()}
    assert points == {"layer 1": {0: 0.25, 0.5: 0.25, 1: 0.5}, "layer 2": {0: 0, 1: 0.5}}
    assert curves["layer 1"].error_y.array == pytest.approx([0.1] * 3)


def test_a_setting_of_the_intervention_separates_dose_curves(tmp_path: Path) -> None:
    for number, (where, coefficient) in enumerate((w, c) for w in ("last", "all") for c in (0, 1)):
        words = (f"intervention.where={where}", f"coefficient={coefficient}")
        rows = effect("unknown", coefficient, number / 4)
        cell(tmp_path, number, *words, metrics=contrast_metrics(0.8), effects=rows)
    figure = figures_of(tmp_path)["over_coefficient"]
    lines = {line.name: tuple(line.y) for line in figure.data}
    assert lines == {"intervention.where all": (0.5, 0.75), "intervention.where last": (0, 0.25)}


def test_the_surface_baseline_is_drawn_beside_the_auroc_once(tmp_path: Path) -> None:
    for number, (layer, width) in enumerate(((2, "1k"), (1, "1k"), (2, "512"), (1, "512"))):
        metrics = contrast_metrics(0.8) | {SURFACE: 0.4 + layer / 10}
        metrics |= {f"{SURFACE}_ci_low": 0.3, f"{SURFACE}_ci_high": 0.7}
        cell(tmp_path, number, f"layer={layer}", f"width={width}", metrics=metrics)
    figures = figures_of(tmp_path)
    (line,) = [t for t in figures["over_layers"].data if t.name.startswith("surface baseline")]
    assert (list(line.x), list(line.y)) == ([1, 2], pytest.approx([0.5, 0.6]))
    assert line.xaxis == "x"
    assert line.error_y.array == pytest.approx([0.2, 0.1])
    names = [t.name for t in figures["over_layers"].data if t.showlegend]
    assert names[:2] == ["known, width 512", "known, width 1k"]
