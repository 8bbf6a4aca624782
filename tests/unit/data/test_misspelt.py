"""Columns of a data file that are nearly called as one that means something."""

import json
from pathlib import Path
from typing import Any

import pytest

from saexp.config import DatasetConfig
from saexp.data import ExampleSet
from saexp.data.datasets import jsonl

TWO: list[dict[str, Any]] = [
    {"text": "The player Bo Li", "entity": "Bo Li", "group": "known"},
    {"text": "The player Ed Xu", "entity": "Ed Xu", "group": "unknown"},
]


def read(folder: Path, rows: list[dict[str, Any]], **options: Any) -> ExampleSet:
    path = folder / "f.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return jsonl(DatasetConfig(name="mine", path=str(path), **options))


@pytest.mark.parametrize(
    ("column", "meant"),
    [("splitt", "split"), ("Split", "split"), ("spilt", "split"), ("entity_typ", "entity_type")]
    + [("anwser", "answer"), ("promt", "prompt"), ("ID", "id")],
)
def test_a_column_that_is_nearly_one_of_ours_is_noted(tmp_path, column, meant):
    dataset = read(tmp_path, [{**TWO[0], column: "train"}, TWO[1]])
    assert dataset.notes == [f"column '{column}' is not used by saexp; did you mean {meant}?"]
    assert dataset.examples[0].extra == {column: "train"}


def test_other_columns_are_kept_without_a_word(tmp_path):
    years = {"year": 1987, "idx": 3, "title": "x", "foil": "y", "attribute": "z"}
    assert read(tmp_path, [{**row, **years} for row in TWO]).notes == []
    # The file has the column itself, maps it, or makes its groups of the other.
    both = [{**row, "split": "train", "splitt": "x"} for row in TWO]
    assert read(tmp_path, both).notes == []
    mapped = [{**row, "splitt": "train"} for row in TWO]
    assert read(tmp_path, mapped, columns={"split": "splitt"}).notes == []
    ruled = [{"text": f"a {n}", "groups": n} for n in range(2)]
    assert read(tmp_path, ruled, group_rule="groups == 0").notes == []
