"""The comparison of what two versions of the code left notices every difference."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]
TABLE = pd.DataFrame({"latent": [1, 2], "auroc": [0.5, float("nan")], "note": [None, "a"]})


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(ROOT / "experiments/validation"))
    import same_results

    return same_results


def leave(folder: Path, metrics: dict[str, object], table: pd.DataFrame, name: str) -> Path:
    (folder / "run").mkdir(parents=True)
    (folder / "run/metrics.json").write_text(json.dumps(metrics))
    table.to_parquet(folder / f"run/{name}.parquet")
    return folder


def test_equal_results_differ_in_what_they_cost_alone(script: ModuleType, tmp_path: Path) -> None:
    before = leave(tmp_path / "a", {"x/y": 1.0, "x/seconds": 3.0}, TABLE, "latents")
    after = leave(tmp_path / "b", {"x/y": 1.0 + 1e-14, "x/seconds": 2.0}, TABLE, "latents")
    assert list(script.differences(before, after, {})) == []


def test_renamed_metrics_columns_and_tables_are_compared(
    script: ModuleType, tmp_path: Path
) -> None:
    before = leave(tmp_path / "a", {"x/old": 1}, TABLE, "latents")
    after = leave(tmp_path / "b", {"x/new": 1}, TABLE.rename(columns={"auroc": "area"}), "found")
    renamed = {
        "metrics": {"x/old": "x/new"},
        "columns": {"auroc": "area"},
        "tables": {"latents": "found"},
    }
    assert list(script.differences(before, after, renamed)) == []
    assert len(list(script.differences(before, after, {}))) > 0


def test_cells_are_compared_by_number_and_metrics_of_layers_by_their_old_name(
    script: ModuleType, tmp_path: Path
) -> None:
    table = TABLE.assign(n=pd.array([1, None], dtype="Int64"))
    before = leave(tmp_path / "a/0_layer=1,cache_dir=before", {"x/old_layer_1": 1}, table, "t")
    after = leave(tmp_path / "b/0_layer=1,cache_dir=after", {"x/new_layer_1": 1}, table, "t")
    renamed = {"metrics": {"x/old": "x/new"}}
    assert list(script.differences(before.parent, after.parent, renamed)) == []
    lines = list(script.differences(before.parent, after.parent, {"metrics": {}}))
    assert lines[0].endswith("x/old_layer_1 is missing")


@pytest.mark.parametrize(
    "metrics, table, line",
    [
        ({"x/y": 2.0}, TABLE, "x/y was 1.0, is 2.0"),
        ({"x/y": None}, TABLE, "x/y was 1.0, is None"),
        ({}, TABLE, "x/y is missing"),
        ({"x/y": 1.0, "x/z": 1}, TABLE, "x/z is new"),
        ({"x/y": 1.0}, TABLE.assign(latent=[1, 3]), "latent differs in 1 rows"),
        ({"x/y": 1.0}, TABLE.assign(auroc=[0.5, 0.5]), "auroc differs in 1 rows"),
        ({"x/y": 1.0}, TABLE.assign(note=["b", "a"]), "note differs in 1 rows"),
        ({"x/y": 1.0}, TABLE.head(1), "2 rows before, 1 after"),
        ({"x/y": 1.0}, TABLE.drop(columns="note"), "column note is missing"),
    ],
)
def test_a_difference_is_one_line(
    script: ModuleType,
    tmp_path: Path,
    metrics: dict[str, object],
    table: pd.DataFrame,
    line: str,
) -> None:
    before = leave(tmp_path / "a", {"x/y": 1.0}, TABLE, "latents")
    after = leave(tmp_path / "b", metrics, table, "latents")
    differing = list(script.differences(before, after, {}))
    assert len(differing) == 1
    assert line in differing[0]


def test_a_folder_without_results_is_a_difference(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    after = leave(tmp_path / "b", {"x/y": 1.0}, TABLE, "latents")
    assert len(list(script.differences(tmp_path / "a", after, {}))) == 3
