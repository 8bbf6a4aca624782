"""Random tables, written by the standard library and by pandas, read as pandas reads them."""

import csv as csv_module
import json
import math
import tempfile
from pathlib import Path

import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from saexp import registry
from saexp.config import DatasetConfig

CHARACTERS = st.sampled_from(
    [
        *'ab,"; é東🙂',
        "e\u0301",
        "\u2028",
        "\u0085",
        "\f",
        "\x1c",
        "\n",
        "\r",
        "\r\n",
        "\ufeff",
        "\t",
    ]
)
WORDS = st.lists(CHARACTERS, min_size=1, max_size=6).map(lambda c: "x" + "".join(c) + "x")
NOTHING = st.sampled_from([None, math.nan, "", "nan", "NaN", "null", "None", "NA", "N/A", "<NA>"])
CELLS = st.one_of(WORDS, NOTHING)
ROWS = st.fixed_dictionaries(
    {
        "text": WORDS,
        "prompt": CELLS,
        "entity_type": CELLS,
        "answer": st.one_of(CELLS, st.lists(WORDS, max_size=3)),
        "score": st.one_of(st.integers(-9, 9), st.none(), st.just(math.nan), st.just("NA")),
        "note": CELLS,
    }
)


def or_none(value):
    """A value as pandas has it, its own missing one as None."""
    return value if isinstance(value, list) or pd.notna(value) else None


def as_texts(value) -> tuple[str, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def write_csv(file: Path, rows, by_pandas: bool, python_lists: bool) -> None:
    dump = repr if python_lists else json.dumps
    cells = [{k: dump(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]
    if by_pandas:
        # With another end of line, pandas writes a carriage return without quotes.
        pd.DataFrame(cells, dtype=object).to_csv(file, index=False, lineterminator="\r\n")
        return
    with file.open("w", newline="", encoding="utf-8-sig") as opened:
        writer = csv_module.DictWriter(opened, list(cells[0]))
        writer.writeheader()
        writer.writerows(cells)


def check(name, path, expected):
    """Compare with rows that have None where pandas found a missing value."""
    cfg = DatasetConfig(name=name, path=str(path), group_rule="score > 0")
    scores = [row["score"] for row in expected]
    if all(score is None for score in scores) or len({s > 0 for s in scores if s is not None}) < 2:
        cfg.group_rule = None
    dataset = registry.build("dataset", cfg)
    grouped = cfg.group_rule is not None
    left = [row for row in expected if not grouped or row["score"] is not None]
    assert len(dataset.examples) == len(left)
    for example, row in zip(dataset.examples, left, strict=True):
        assert example.text == row["text"]
        assert example.prompt == row["prompt"]
        assert example.entity_type == row["entity_type"]
        assert example.answers == as_texts(row["answer"])
        assert example.extra["note"] == row["note"]
        if grouped:
            assert (example.group == "score > 0") == (row["score"] > 0)
    counts = {column: sum(row[column] is None for row in expected) for column in expected[0]}
    missing_value_notes = [note for note in dataset.notes if note.startswith("missing values")]
    columns = "".join(f"'{c}' {n}, " for c, n in counts.items() if n)
    assert bool(missing_value_notes) == bool(columns)
    for note in missing_value_notes:
        listed = note.partition("by column: ")[2].partition(" (of texts")[0].split(", ")
        assert sorted(listed) == sorted(filter(None, columns.split(", ")))


@settings(deadline=None, max_examples=40)
@given(st.lists(ROWS, min_size=1, max_size=6), st.booleans(), st.booleans())
def test_a_csv_is_read_as_pandas_reads_it(rows, by_pandas, python_lists):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "f.csv"
        write_csv(file, rows, by_pandas, python_lists)
        text = [c for c in rows[0] if c != "score"]
        table = pd.read_csv(file, dtype=dict.fromkeys(text, str), encoding="utf-8-sig")
        expected = [{k: or_none(v) for k, v in r.items()} for r in table.to_dict("records")]
        for row, written in zip(expected, rows, strict=True):
            if isinstance(written["answer"], list):
                row["answer"] = written["answer"]
        check("csv", file, expected)


@settings(deadline=None, max_examples=40)
@given(st.lists(ROWS, min_size=1, max_size=6), st.booleans(), st.sampled_from(["\n", "\r\n", "\r"]))
def test_a_jsonl_has_the_missing_values_of_a_csv(rows, ascii_only, newline):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "f.jsonl"
        lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
        file.write_bytes((newline.join(lines) + newline).encode())
        cells = Path(folder) / "cells.csv"
        write_csv(cells, rows, by_pandas=True, python_lists=False)
        missing = pd.read_csv(cells, dtype=str).isna().to_dict("records")
        expected = [
            {k: None if gone[k] else v for k, v in row.items()}
            for row, gone in zip(rows, missing, strict=True)
        ]
        check("jsonl", file, expected)
