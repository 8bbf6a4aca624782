"""Missing values in every column of every kind of file, against pandas' own reading."""

import csv as csv_module
import io
import json
import math

import datasets as hf_datasets
import pandas as pd
import pytest

import saexp
from saexp import registry
from saexp.config import DatasetConfig
from saexp.config.groups import MISSING_VALUES
from saexp.data import MissingValues
from saexp.errors import ConfigError
from saexp.interventions.outcomes import Accuracy

PRESENT = ["na", "none", "Null", "NAN", " NA", "-", "null.", "0", "Nanna", "N/A!"]


def build(name, **options):
    return registry.build("dataset", DatasetConfig(name=name, **options))


def write_table(folder, kind, rows):
    """The rows in a file of this kind; its path."""
    if kind == "hf":
        hf_datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
        return str(folder / "saved")
    file = folder / f"f.{kind}"
    if kind == "jsonl":
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    else:
        pd.DataFrame(rows).to_csv(file, index=False)
    return str(file)


def read_by_pandas(texts):
    file = io.StringIO()
    csv_module.writer(file, quoting=csv_module.QUOTE_ALL).writerows([["x"], *[[t] for t in texts]])
    file.seek(0)
    return pd.read_csv(file, dtype=str)["x"].isna().tolist()


def test_the_texts_are_those_that_pandas_reads_as_missing():
    words = ["na", "n/a", "n.a.", "nan", "null", "none", "nil", "nat", "inf", "ind", "qnan"]
    cased = [f(w) for w in words for f in (str.lower, str.upper, str.title)] + ["NaN", "NaT"]
    signed = [f"{a}{w}{b}" for w in cased for a in ("", "-", "+", "#", "<", " ") for b in ("", ">")]
    numbers = [
        f"{a}{n}.#{w}" for a in ("", "-", "#") for n in (0, 1) for w in ("IND", "QNAN", "INF")
    ]
    texts = list(
        dict.fromkeys([*MISSING_VALUES, *PRESENT, *signed, *numbers, "#N/A N/A", "?", "."])
    )
    assert read_by_pandas(texts) == [text in MISSING_VALUES for text in texts]


@pytest.mark.parametrize("value", [*MISSING_VALUES, None, math.nan])
def test_what_is_missing(value):
    assert value in MissingValues()


@pytest.mark.parametrize("value", [*PRESENT, " ", 0, 0.0, False, math.inf, [], {}])
def test_what_is_not_missing(value):
    assert value not in MissingValues()


def test_numbers_of_the_list_are_missing_however_they_are_written():
    for marker in ("-999", -999):
        missing = MissingValues([marker])
        assert all(value in missing for value in ("-999", -999, -999.0, "", None, math.nan))
        assert not any(value in missing for value in ("NA", "nan", 999, "-999.5"))


def test_an_unquoted_null_on_the_command_line():
    assert saexp.compose(["dataset.missing_values=[-999,NA]"]).dataset.missing_values == [
        -999,
        "NA",
    ]
    with pytest.raises(ConfigError) as error:
        saexp.compose(["dataset.missing_values=[NULL]"])
    assert str(error.value) == (
        "dataset.missing_values=[None] must be texts or numbers (null itself always is missing); "
        """quote: 'dataset.missing_values=["null","NA"]'"""
    )


WAYS = [
    ("jsonl", None),
    ("jsonl", math.nan),
    ("jsonl", "NaN"),
    ("jsonl", "null"),
    ("jsonl", ""),
    ("csv", None),
    ("csv", "nan"),
    ("csv", "NA"),
    ("hf", None),
    ("hf", "None"),
]


@pytest.mark.parametrize(("kind", "nothing"), WAYS)
def test_a_missing_value_is_one_in_every_column(tmp_path, kind, nothing):
    full = {
        **{"text": "The banana of Ann", "group": "a", "entity": "Ann", "entity_type": "person"},
        **{"span": "[14, 17]", "prompt": "Who?", "answer": "x", "id": "1", "split": "train"},
        **{"note": "kept"},
    }
    other = {**full, "id": "2", "group": "b"}
    gaps = {k: nothing for k in full} | {"text": "A banana from here", "group": "b"}
    got = build(kind, path=write_table(tmp_path, kind, [full, other, gaps]))
    one = got.examples[2]
    assert (one.id, one.group, one.text) == (
        "4" if kind == "csv" else "3",
        "b",
        "A banana from here",
    )
    assert (one.entity, one.entity_type, one.spans) == (None, None, ())
    assert (one.prompt, one.answers, one.extra) == (None, (), {"note": None})
    assert one.split in ("train", "val", "test")
    columns = [c for c in full if c not in ("text", "group")]
    counts = ", ".join(f"'{column}' 1" for column in columns)
    note = f"missing values in 3 rows, by column: {counts}"
    if isinstance(nothing, str) and nothing:
        note += (
            f' (of texts, "{nothing}"; dataset.missing_values sets which texts count as missing)'
        )
    lacks = "1 row of 3 without a prompt: interventions run on the text instead"
    assert got.notes == [note, lacks]


@pytest.mark.parametrize(("kind", "nothing"), WAYS)
def test_a_row_without_a_group_belongs_to_none(tmp_path, kind, nothing):
    rows = [{"text": f"t{n}", "group": g} for n, g in enumerate(["a", nothing, "b", nothing])]
    got = build(kind, path=write_table(tmp_path, kind, rows))
    assert [(e.text, e.group) for e in got.examples] == [("t0", "a"), ("t2", "b")]
    assert got.groups == ("a", "b")
    assert got.notes[-1] == "2 of 4 rows have no group and are left out"


@pytest.mark.parametrize("kind", ["jsonl", "csv", "hf"])
def test_a_missing_score_is_neither_above_nor_below(tmp_path, kind):
    scores = [0.9, None, 0.1, math.nan, 0.7]
    rows = [{"text": f"t{n}", "score": s} for n, s in enumerate(scores)]
    got = build(kind, path=write_table(tmp_path, kind, rows), group_rule="score > 0.5")
    table = pd.DataFrame(rows).dropna()
    for group, part in table.groupby(table["score"] > 0.5):
        name = "score > 0.5" if group else "not (score > 0.5)"
        assert [e.text for e in got.examples if e.group == name] == part["text"].tolist()
    assert got.notes == [
        "missing values in 5 rows, by column: 'score' 2",
        "2 of 5 rows have no group and are left out",
    ]


def test_rows_without_a_type_are_counted_where_types_are_chosen(tmp_path):
    rows = [{"text": "t", "entity_type": t} for t in ("city", None, "song")]
    got = build("jsonl", path=write_table(tmp_path, "jsonl", rows), entity_types=["city"])
    assert [e.id for e in got.examples] == ["1"]
    assert got.notes[-1] == "1 of 3 rows has no entity_type and is left out"


def test_a_custom_list_of_missing_values_can_keep_na(tmp_path):
    rows = [
        {"text": "Mr. Null is from NA", "entity": "Null", "group": g} for g in ("NA", "DE", "nan")
    ]
    path = write_table(tmp_path, "jsonl", rows)
    got = build("jsonl", path=path, missing_values=["nan"])
    assert got.groups == ("NA", "DE")
    assert {e.entity for e in got.examples} == {"Null"}
    assert got.notes[0].startswith("missing values in 3 rows, by column: 'group' 1 (of texts")


def test_missing_items_of_an_answer_are_left_out(tmp_path):
    rows = [{"text": "t", "answer": ["x", None, math.nan, "NA", 3]}]
    got = build("jsonl", path=write_table(tmp_path, "jsonl", rows))
    assert got.examples[0].answers == ("x", "3")
    assert got.notes[0].startswith("missing values in 1 rows, by column: 'answer' 1")


def test_a_list_in_a_csv_is_judged_as_the_same_list_in_jsonl(tmp_path):
    answers = ["Estia.", "Estia"]
    written = {"jsonl": answers, "csv": repr(answers), "hf": json.dumps(answers)}
    for kind, answer in written.items():
        rows = [{"text": "Which award was it?", "answer": answer}]
        one = build(kind, path=write_table(tmp_path, kind, rows)).examples[0]
        assert one.answers == tuple(answers)
        assert Accuracy().score("It was the Estia.", one)
        assert not Accuracy().score("It was another one.", one)
