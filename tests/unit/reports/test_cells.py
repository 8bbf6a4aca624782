"""A sweep read back from its cells' folders, whatever state each was left in."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from saexp.reports.saved_run import cells_table, groups_of, swept
from saexp.results import read_plan
from tests.unit.reports.written import cell, contrast, write_json


def back_from_parquet(table: pd.DataFrame, folder: Path) -> pd.DataFrame:
    table.to_parquet(folder / "back.parquet", index=False)
    return pd.read_parquet(folder / "back.parquet")


def test_a_cell_is_finished_failed_stopped_or_not_run(tmp_path: Path) -> None:
    cell(tmp_path, 0, "layer=0", metrics={"a/b": 1.5})
    cell(tmp_path, 1, "layer=9", error="ModelError: layer=9, but tiny has 0-4: try 4\n")
    cell(tmp_path, 2, "layer=2")
    write_json(tmp_path / "plan.json", {"cells": [[f"layer={n}"] for n in (0, 9, 2, 3)]})
    table = cells_table(tmp_path)
    assert table["status"].tolist() == ["finished", "failed", "stopped", "not run"]
    assert table["layer"].tolist() == [0, 9, 2, 3]
    assert table["cell"].tolist() == [0, 1, 2, 3]
    errors = [None if pd.isna(e) else e for e in table["error"]]
    assert errors == [None, "layer=9, but tiny has 0-4: try 4", None, None]
    assert table["a/b"].tolist()[0] == 1.5
    assert table["a/b"].isna().tolist() == [False, True, True, True]
    assert table["folder"].tolist()[:3] == ["0_layer=0", "1_layer=9", "2_layer=2"]
    assert pd.isna(table["folder"][3])


def test_a_cell_that_ctrl_c_ended_is_stopped_and_no_failure(tmp_path: Path) -> None:
    # As api.run writes it.
    cell(tmp_path, 0, "layer=0", error=f"KeyboardInterrupt: {KeyboardInterrupt()}\n")
    row = cells_table(tmp_path).iloc[0]
    assert (row["status"], row["error"]) == ("stopped", None)


def test_an_error_without_a_message_is_reported_by_its_class(tmp_path: Path) -> None:
    cell(tmp_path, 0, error=f"MemoryError: {MemoryError()}\n")
    assert cells_table(tmp_path)["error"][0].rstrip(":") == "MemoryError"


def test_a_cell_killed_before_hydra_had_written_its_overrides_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "0_layer=1/.hydra").mkdir(parents=True)
    cell(tmp_path, 1, "layer=2", metrics={})
    assert cells_table(tmp_path)["status"].tolist() == ["stopped", "finished"]


READ = ["layer=3", "seed=-1", "coefficient=0.25", "coefficient=2.5e-1", "width=16k", "verify=true"]
READ += ["++analyzer.x=7", "dataset.path=null", "model.device=cuda:0"]
READ += ["model.revision=2024-01-01", 'dataset.group_rule="n == 0"']
OTHER_IN_YAML = ["coefficient=1e-05", "dataset.text=no", "dataset.text=Paris: a city"]
NOT_IN_YAML = ["dataset.path=*.txt", "positions.substring=@", r"dataset.text='it\'s'"]


@pytest.mark.parametrize("override", [*READ, *OTHER_IN_YAML, *NOT_IN_YAML])
def test_an_override_is_a_column_with_the_value_that_hydra_reads(
    tmp_path: Path, override: str
) -> None:
    (read,) = OverridesParser.create().parse_overrides([override])
    cell(tmp_path, 0, override)
    values = cells_table(tmp_path)[read.key_or_group].tolist()
    assert values == [read.value()]
    assert isinstance(values[0], type(read.value()))


def test_numbers_stay_numbers_in_parquet(tmp_path: Path) -> None:
    for number, (layer, at) in enumerate([(0, "0"), (1, "0.5"), (2, "-1")]):
        cell(tmp_path, number, f"layer={layer}", f"coefficient={at}", metrics={"a/n": layer})
    table = back_from_parquet(cells_table(tmp_path), tmp_path)
    assert table["layer"].dtype == table["a/n"].dtype == "int64"
    assert table["coefficient"].tolist() == [0.0, 0.5, -1.0]
    assert table["coefficient"].dtype == "float64"


MIXED = [
    (("16k", "65536"), ["16k", "65536"]),
    (("[0,1]", "2"), ["[0, 1]", "2"]),
    (("null", "all"), [None, "all"]),
    (("{a: 1}", "{a: 2}"), ["{'a': 1}", "{'a': 2}"]),
]


@pytest.mark.parametrize(("typed", "expected"), MIXED)
def test_values_of_several_kinds_are_text_in_parquet(
    tmp_path: Path, typed: tuple[str, str], expected: list[Any]
) -> None:
    for number, value in enumerate(typed):
        cell(tmp_path, number, f"key={value}")
    table = back_from_parquet(cells_table(tmp_path), tmp_path)
    assert [None if pd.isna(v) else v for v in table["key"]] == expected


def test_numbers_and_truth_values_together_go_to_parquet(tmp_path: Path) -> None:
    for number, value in enumerate(("true", "2", "0.5")):
        cell(tmp_path, number, f"key={value}")
    assert len(back_from_parquet(cells_table(tmp_path), tmp_path)) == 3


def test_only_overrides_that_differ_are_swept(tmp_path: Path) -> None:
    fixed = ["tracker=none", "seed=1"]
    cell(tmp_path, 0, "layer=0", "width=64", *fixed, metrics={"a/b": 1.0})
    cell(tmp_path, 1, "layer=1", "width=64", *fixed, metrics={"a/b": 2.0})
    cell(tmp_path, 2, "layer=9", "width=64", *fixed, error="ModelError: no\n")
    assert swept(cells_table(tmp_path)) == ["layer"]
    cell(tmp_path, 3, "layer=0", "width=128", *fixed, metrics={"a/b": 3.0})
    assert swept(cells_table(tmp_path)) == ["layer", "width"]


def test_what_was_not_typed_comes_from_the_cells_config(tmp_path: Path) -> None:
    model = {"name": "org/big"}
    cell(tmp_path, 0, "layer=0", metrics={}, model=model, width="16k", coefficient=0.5)
    row = cells_table(tmp_path).iloc[0]
    columns = ["model", "sae", "dataset", "width", "coefficient"]
    assert row[columns].tolist() == ["org/big", "tiny", "entities", "16k", 0.5]


def test_cells_are_in_the_order_of_their_numbers_and_other_folders_are_none(
    tmp_path: Path,
) -> None:
    for number in (10, 2, 1):
        cell(tmp_path, number, f"seed={number}")
    (tmp_path / ".submitit/7_1").mkdir(parents=True)
    (tmp_path / "3_no_hydra_here").mkdir()
    (tmp_path / "4_file").touch()
    assert cells_table(tmp_path)["cell"].tolist() == [1, 2, 10]
    assert cells_table(tmp_path)["seed"].tolist() == [1, 2, 10]


def test_groups_are_those_of_the_metrics_in_their_order(tmp_path: Path) -> None:
    metrics = {**contrast("known", 3, train=0.9, test=0.8), **contrast("not_known", None)}
    cell(tmp_path, 0, metrics=metrics)
    assert groups_of(cells_table(tmp_path)) == ["known", "not_known"]


def test_a_sweep_without_a_readable_plan_has_the_cells_that_are_there(tmp_path: Path) -> None:
    assert read_plan(tmp_path) == {}
    (tmp_path / "plan.json").write_text('{"cells": [["lay')
    assert read_plan(tmp_path) == {}
    assert len(cells_table(tmp_path)) == 0
    cell(tmp_path, 0, "layer=0")
    assert cells_table(tmp_path)["status"].tolist() == ["stopped"]


def test_folders_left_by_an_earlier_sweep_are_no_cells_of_this_one(tmp_path: Path) -> None:
    for layer in (3, 0, 7):
        cell(tmp_path, 0, f"layer={layer}", metrics={"a/b": layer})
    cell(tmp_path, 1, "layer=5", metrics={"a/b": 5})
    write_json(tmp_path / "plan.json", {"cells": [["layer=0"]]})
    table = cells_table(tmp_path)
    assert table["layer"].tolist() == table["a/b"].tolist() == [0]
