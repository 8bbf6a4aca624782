"""Importance of the swept keys: on complete, incomplete and degenerate grids of hand-made cells."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from saexp.reports.saved_run import cells_table
from saexp.reports.sweep import write_sweep
from saexp.reports.sweep_figures import importance, importance_figure
from tests.unit.reports.run_outputs import page_of
from tests.unit.reports.written import cell, contrast, effect

AUROC = "contrast/best_auroc_known_test"
GRID = {(1, 256): 0.6, (1, 512): 0.7, (2, 256): 0.8, (2, 512): 0.9}


def sweep(folder: Path, values: dict[tuple[int, int], Any], **config: Any) -> pd.DataFrame:
    for number, ((layer, width), value) in enumerate(values.items()):
        metrics = contrast("known", 3, train=value, test=value) | {"effect/refusal/x": layer * 1.0}
        cell(folder, number, f"layer={layer}", f"width={width}", metrics=metrics, **config)
    return cells_table(folder)


def test_layer_explains_four_times_as_much_as_width(tmp_path: Path) -> None:
    """Means by layer 0.65 and 0.85, by width 0.7 and 0.8: variances 0.01 and 0.0025 of 0.0125."""
    table = sweep(tmp_path, GRID)
    by_key = importance(table, AUROC)
    assert by_key.shares == pytest.approx({"layer": 0.8, "width": 0.2})
    assert by_key.is_complete
    assert by_key.note is None
    figure, notes, of_what = importance_figure(table)
    assert figure is not None
    traces: Any = figure.data
    (bars,) = traces
    assert list(bars.y) == ["layer", "width", "interactions"]
    assert list(bars.x) == pytest.approx([0.8, 0.2, 0])
    assert notes == []
    assert of_what == "the held-out AUROC of the best latent per direction"
    _, figures = write_sweep(tmp_path)
    assert "importance" in figures
    assert f"How much of the variance of {of_what} over the cells" in page_of(tmp_path)


def test_an_incomplete_grid_is_approximate(tmp_path: Path) -> None:
    table = sweep(tmp_path, dict(list(GRID.items())[:3]))
    by_key = importance(table, AUROC)
    assert not by_key.is_complete
    # By hand, of 0.6, 0.7, 0.8: means by layer 0.65 and 0.8, by width 0.7 and 0.7.
    assert by_key.shares == pytest.approx({"layer": 0.75, "width": 0})
    assert by_key.note == (
        "The importance of layer and width is approximate, as the shares of keys overlap: 3 of 4 "
        f"combinations of their values have a value of {AUROC}."
    )
    write_sweep(tmp_path)
    assert "is approximate" in page_of(tmp_path)


def test_few_combinations_or_equal_values_have_no_importance_and_a_reason(tmp_path: Path) -> None:
    diagonal = sweep(tmp_path / "a", {(1, 256): 0.5, (2, 512): 0.7, (3, 512): 0.8})
    by_key = importance(diagonal, AUROC)
    assert by_key.shares == {}
    assert by_key.note is not None
    assert "is not shown: only 3 of 6 combinations" in by_key.note
    equal = importance(sweep(tmp_path / "b", dict.fromkeys(GRID, 0.7)), AUROC)
    assert equal.shares == {}
    assert equal.note is not None
    assert equal.note.endswith(f"is not shown: {AUROC} is the same in every cell.")


def test_keys_that_change_together_are_one(tmp_path: Path) -> None:
    for number, (layer, seed) in enumerate([(1, 0), (1, 1), (2, 0), (2, 1)]):
        metrics = contrast("known", 3, train=0.5, test=0.5 + layer / 10 + seed / 50)
        words = (f"layer={layer}", f"width={layer * 256}", f"seed={seed}")
        cell(tmp_path, number, *words, metrics=metrics)
    shares = importance(cells_table(tmp_path), AUROC).shares
    assert list(shares) == ["layer + width", "seed"]
    assert sum(shares.values()) == pytest.approx(1)


def test_one_key_is_no_question_and_the_commands_objective_is_taken(tmp_path: Path) -> None:
    one = sweep(tmp_path / "a", {(1, 256): 0.5, (2, 256): 0.7})
    assert importance_figure(one)[:2] == (None, [])
    sweep(tmp_path / "b", GRID, objective="effect/refusal/x")
    figure, _, _ = importance_figure(cells_table(tmp_path / "b"), "effect/refusal/x")
    assert figure is not None
    traces: Any = figure.data
    (bars,) = traces
    assert bars.name == "effect/refusal/x"
    assert list(bars.x) == pytest.approx([1, 0, 0])


def test_where_the_coefficient_varies_the_importance_is_of_the_effect(tmp_path: Path) -> None:
    """The AUROC is the same at every coefficient; by hand, of the values 0.3, 0.5, 0.3, 0.9: means
    by layer 0.4 and 0.6, by coefficient 0.3 and 0.7, of all 0.5; sums of squares 0.04, 0.16 of
    0.24, which leaves 0.04 to interactions."""
    effects = {(1, 0): 0.3, (1, 1): 0.5, (2, 0): 0.3, (2, 1): 0.9}
    for number, ((layer, coefficient), value) in enumerate(effects.items()):
        rows = effect("known", coefficient, value, chosen=coefficient > 0)
        metrics = contrast("known", 3, train=0.8, test=0.5 + layer / 10)
        words = (f"layer={layer}", f"coefficient={coefficient}")
        cell(tmp_path, number, *words, metrics=metrics, effects=rows)
    _, figures = write_sweep(tmp_path)
    (bars,) = figures["importance"].data
    assert bars.name == "refusal, adding 'known' latents to prompts"
    assert dict(zip(bars.y, bars.x, strict=True)) == pytest.approx(
        {"layer": 1 / 6, "coefficient": 4 / 6, "interactions": 1 / 6}
    )
    assert "of the variance of the outcome under the intervention over the cells" in page_of(
        tmp_path
    )
