"""Files with one example a row: what is read, and each error with file and line."""

import csv as csv_module
import json
import threading
import unicodedata

import pytest

from saexp.config import DatasetConfig
from saexp.data import Example
from saexp.data.datasets import csv, jsonl
from saexp.data.tables import parse_rule, read_rows, to_examples
from saexp.errors import ConfigError, DataError, SaexpError
from saexp.labeling import questions

TWO = [
    {"text": "The player Bo Li", "entity": "Bo Li", "group": "known"},
    {"text": "The player Ed Xu", "entity": "Ed Xu", "group": "unknown"},
]


@pytest.fixture()
def write(tmp_path):
    """Write rows (or lines as they are) to a JSONL file and give its path."""

    def write(*rows, name="f.jsonl"):
        lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(tmp_path / name)

    return write


def read(path, of=jsonl, **options):
    return of(DatasetConfig(name="mine", path=path, **options))


def message_of(make, kind: type[SaexpError] = DataError) -> str:
    with pytest.raises(kind) as error:
        make()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_column_of_the_contract_is_read(write):
    row = {
        **{"text": "A player Bo Li, Bo Li", "group": "known", "entity": "Bo Li"},
        **{"entity_type": "player", "prompt": "Who is Bo Li?", "answer": ["x", 3]},
        **{"id": "p1", "split": "val", "year": 1987},
    }
    one = read(write(row, TWO[1])).examples[0]
    assert one == Example(
        id="p1",
        text="A player Bo Li, Bo Li",
        group="known",
        split="val",
        spans=((9, 14), (16, 21)),
        entity="Bo Li",
        entity_type="player",
        prompt="Who is Bo Li?",
        answers=("x", "3"),
        extra={"year": 1987},
    )


def test_without_ids_they_are_line_numbers_and_blank_lines_count(write):
    path = write(TWO[0], "", "   ", TWO[1])
    assert [e.id for e in read(path).examples] == ["1", "4"]


@pytest.mark.parametrize("answer", [None, [], "absent"])
def test_an_answer_may_be_absent(write, answer):
    row = TWO[0] if answer == "absent" else {**TWO[0], "answer": answer}
    assert read(write(row, TWO[1])).examples[0].answers == ()


@pytest.mark.parametrize("span", [[11, 16], "[11, 16]", "(11, 16)"])
def test_a_span_gives_the_entity(write, span):
    row = {"text": "The player Bo Li", "span": span, "group": "known"}
    one = read(write(row, TWO[1])).examples[0]
    assert (one.spans, one.entity) == (((11, 16),), "Bo Li")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_text_and_entity_may_differ_in_normalisation(write, form):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    text = unicodedata.normalize(form, "Zoë met Zoë, not Zoëy")
    row = {"text": text, "entity": unicodedata.normalize(other, "Zoë")}
    spans = read(write(row)).examples[0].spans
    assert [text[a:b] for a, b in spans] == [unicodedata.normalize(form, "Zoë")] * 2


def test_a_given_span_stays_the_only_one(write):
    row = {"text": "Ann met Bob and then Ann left", "entity": "Ann", "span": [0, 3]}
    assert read(write(row)).examples[0].spans == ((0, 3),)


def test_spans_count_characters_not_bytes(write):
    row = {"text": "né 🙂 Zoë", "entity": "Zoë", "group": "known"}
    assert read(write(row, TWO[1])).examples[0].spans == ((5, 8),)


@pytest.mark.parametrize("of", [jsonl, csv])
def test_a_byte_order_mark_is_skipped(tmp_path, of):
    text = '{"text": "one"}\n' if of is jsonl else "text\none\n"
    (tmp_path / "f").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read(str(tmp_path / "f"), of).examples[0].text == "one"


def test_csv_reads_the_same_as_jsonl(write):
    lines = [
        "text,entity,group,answer,note",
        '"The player, Bo Li",Bo Li,known,yes,"two',
        'lines"',
        "The player Ed Xu,Ed Xu,unknown,,",
    ]
    got = read(write(*lines, name="f.csv"), csv).examples
    assert [(e.id, e.text, e.entity, e.answers) for e in got] == [
        ("3", "The player, Bo Li", "Bo Li", ("yes",)),
        ("4", "The player Ed Xu", "Ed Xu", ()),
    ]
    assert got[0].extra == {"note": "two\nlines"}


LISTS = [
    ('["Estia.", "Estia"]', ("Estia.", "Estia")),
    ("['Estia.', 'Estia']", ("Estia.", "Estia")),
    (""" ["it's", 'a "b"'] """, ("it's", 'a "b"')),
    ("['a', nan, None]", ("a",)),
    ('["a", NaN, null, "", "NA"]', ("a",)),
    ("[1994, 1.5]", ("1994", "1.5")),
    ("[]", ()),
    ("[unclear]", ("[unclear]",)),
    ("[1", ("[1",)),
    ("(1, 2)", ("(1, 2)",)),
    ("Estia", ("Estia",)),
]


@pytest.mark.parametrize(("cell", "answers"), LISTS, ids=[cell for cell, _ in LISTS])
def test_a_list_in_a_csv_cell_is_a_list(tmp_path, write, cell, answers):
    file = tmp_path / "f.csv"
    with file.open("w", newline="", encoding="utf-8") as opened:
        csv_module.writer(opened).writerows([["text", "answers"], ["t", cell]])
    assert read(str(file), csv, columns={"answer": "answers"}).examples[0].answers == answers
    # JSON has lists of its own, so that a string is a string.
    assert read(write({"text": "t", "answer": cell})).examples[0].answers == (cell,)


def test_attributes_in_a_csv_cell_are_asked_as_those_of_a_jsonl_are(tmp_path, write):
    attributes = [{"attribute_type": "director", "attribute_value": "Ann Lee"}]
    row = {"text": "The movie X", "entity": "X", "entity_type": "movie", "attributes": attributes}
    file = tmp_path / "f.csv"
    with file.open("w", newline="", encoding="utf-8") as opened:
        cells = {**row, "attributes": json.dumps(attributes)}
        csv_module.writer(opened).writerows([list(cells), list(cells.values())])
    asked, _ = questions(read(str(file), csv).examples)
    assert asked == questions(read(write(row)).examples)[0]
    assert [q.truths for q in asked] == [("Ann Lee",)]


def test_a_printed_numpy_array_is_not_read_as_a_list(write):
    path = write("text,answer", "t,['a' 'b']", name="f.csv")
    assert message_of(lambda: read(path, csv)) == (
        f"{path}:2: column 'answer' holds a printed NumPy array; write its items as a JSON list"
    )


def test_a_csv_field_may_be_long_in_every_thread(tmp_path):
    text = "word " * 40_000
    file = tmp_path / "f.csv"
    with file.open("w", newline="") as opened:
        csv_module.writer(opened).writerows([["text"], *[[text]] * 4])
    read_examples = []
    threads = [
        threading.Thread(target=lambda: read_examples.append(read(str(file), csv).examples))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[e.text for e in examples] for examples in read_examples] == [[text] * 4] * 4


def test_columns_are_mapped_and_the_files_own_of_that_name_is_kept_apart(write):
    rows = [{"input": r["text"], "label": r["group"], "group": "theirs"} for r in TWO]
    got = read(write(*rows), columns={"text": "input", "group": "label"})
    assert got.groups == ("known", "unknown")
    assert [e.text for e in got.examples] == [r["text"] for r in TWO]
    assert got.examples[0].extra == {"group": "theirs"}


@pytest.mark.parametrize(
    ("text", "column", "true", "false"),
    [
        ("n == 0", "n", [0, 0.0, "0", "0.0"], [1, "zero"]),
        ("n != 0", "n", [1, "zero"], [0, "0"]),
        ("n >= 2", "n", [2, "10"], [1.5]),
        ("n <= 2", "n", [2], ["10"]),
        ("n>2", "n", ["10"], [2]),
        (" n < 2 ", "n", [1], [2]),
        ("ok == true", "ok", [True, "TRUE"], [False, "no"]),
        ("who == 'Bo Li'", "who", ["Bo Li", "bo li"], ["Bo"]),
        ("day > 2020-01-31", "day", ["2020-02-01"], ["2019-12-31"]),
    ],
)
def test_rules(text, column, true, false):
    name, test = parse_rule(text)
    assert name == column
    assert [test(v) for v in [*true, *false]] == [True] * len(true) + [False] * len(false)


def test_a_rule_makes_the_groups(write):
    rows = [{"text": f"t{n}", "n": n, "group": "theirs"} for n in (3, 0, 1)]
    got = read(write(*rows), group_rule="n == 0")
    assert [e.group for e in got.examples] == ["not (n == 0)", "n == 0", "not (n == 0)"]
    assert got.groups == ("not (n == 0)", "n == 0")


@pytest.mark.parametrize("text", ["n", "n = 0", "__import__('os')", "n == "])
def test_invalid_rules_are_refused(write, text):
    message = message_of(lambda: read(write(*TWO), group_rule=text), ConfigError)
    assert message == (
        f"dataset.group_rule={text} is not a rule; type e.g. 'matching_tokens == 0' "
        "(column, one of == != >= <= > <, value)"
    )


@pytest.mark.parametrize(
    ("row", "columns"), [({"text": "t"}, []), ({"text": "t", "n": None}, ["'n' 1"])]
)
def test_a_row_without_a_value_for_the_rule_is_in_neither_group(write, row, columns):
    got = read(write({"text": "t", "n": 0}, row, {"text": "t", "n": 7}), group_rule="n > 5")
    assert [(e.id, e.group) for e in got.examples] == [("1", "not (n > 5)"), ("3", "n > 5")]
    assert got.notes == [
        *(f"missing values in 3 rows, by column: {counts}" for counts in columns),
        "1 of 3 rows has no group and is left out",
    ]


@pytest.mark.parametrize("row", [{"text": "t"}, {"text": "t", "n": None}])
def test_a_rule_on_a_column_without_any_value(write, row):
    path = write(row, row)
    assert message_of(lambda: read(path, group_rule="n == 0")) == (
        f"{path}: no row has a value in column 'n' (n == 0)"
    )


def test_a_rule_that_compares_with_a_missing_value(write):
    path = write({"text": "t", "n": "NA"})
    message = message_of(lambda: read(path, group_rule="n == 'NA'"), ConfigError)
    assert message.startswith("dataset.group_rule=n == 'NA' compares with a missing value")
    rows = write({"text": "t", "n": "NA"}, {"text": "t", "n": "DE"})
    dataset = read(rows, group_rule="n == 'NA'", missing_values=["null"])
    assert [e.group for e in dataset.examples] == ["n == 'NA'", "not (n == 'NA')"]


def test_a_rule_that_compares_a_non_number_is_an_error(write):
    path = write({"text": "t", "n": 0}, {"text": "t", "n": "few"})
    assert message_of(lambda: read(path, group_rule="n > 5")) == (
        f"{path}:2: column 'n': 'few' is not a number (n > 5)"
    )


def test_no_file_and_no_path(tmp_path):
    missing = tmp_path / "absent.jsonl"
    assert message_of(lambda: read(str(missing))) == f"dataset.path={missing}: no such file"
    assert message_of(lambda: read(str(tmp_path))) == f"dataset.path={tmp_path}: no such file"
    for kind in ("jsonl", "csv"):
        message = message_of(lambda kind=kind: read_rows(None, kind), ConfigError)
        assert message == f"dataset={kind} needs a file: type dataset.path=FILE"


@pytest.mark.parametrize(("of", "content"), [(jsonl, "\n\n"), (csv, "text,group\n"), (csv, "")])
def test_an_empty_file(tmp_path, of, content):
    (tmp_path / "f").write_text(content)
    path = str(tmp_path / "f")
    assert message_of(lambda: read(path, of)) == (
        f"{path}: is empty; it needs at least one row with a 'text'"
    )


@pytest.mark.parametrize("of", [jsonl, csv])
def test_a_file_that_is_not_utf8(tmp_path, of):
    (tmp_path / "f").write_bytes(b'{"text": "caf\xe9"}\n')
    path = str(tmp_path / "f")
    assert message_of(lambda: read(path, of)).startswith(f"{path}: is not UTF-8 text (byte ")


LINE_2 = [
    ('{"text": "a"', "is not JSON (Expecting ',' delimiter, column 13)"),
    ('["a"]', 'a row must be an object such as {"text": "…"}'),
    (
        '{"text": "half \\ud83d"}',
        "holds half a character ('\\ud83d'); remove it",
    ),
    (
        {"group": "known"},
        "column 'text' is missing; give the text there or map it with "
        "dataset.columns.text=<column>",
    ),
    *[
        (
            {"text": text},
            "column 'text' is empty or not a string; give the text there or map it with "
            "dataset.columns.text=<column>",
        )
        for text in ("  ", 7)
    ],
    *[
        (
            {"text": text},
            "column 'text' has a missing value (empty, null, NaN or one of "
            "dataset.missing_values); give the text there or map it with "
            "dataset.columns.text=<column>",
        )
        for text in ("", None, float("nan"), "NA")
    ],
    (
        {"text": "The player Bo", "entity": "Bo Li"},
        "entity 'Bo Li' does not occur in its text 'The player Bo'",
    ),
    (
        {"text": "The player Bo Li", "entity": "Bo\u00a0Li"},
        "entity 'Bo\u00a0Li' does not occur in its text 'The player Bo Li'; they look alike but "
        "differ in characters: 'Bo\\xa0Li' is not in 'The player Bo Li'",
    ),
    (
        {"text": "The player B\u043e Li", "entity": "Bo Li"},
        "entity 'Bo Li' does not occur in its text 'The player B\u043e Li'; they look alike but "
        "differ in characters: 'Bo Li' is not in 'The player B\\u043e Li'",
    ),
    ({"text": "東京都", "entity": "大阪"}, "entity '大阪' does not occur in its text '東京都'"),
    ({"text": "t", "entity": True}, "'entity' must be a string, not bool"),
    ({"text": "t", "group": ["a"]}, "'group' must be a string, not list"),
    *[
        (
            {"text": "four", "span": span},
            f"span [{span[0]}, {span[1]}] is outside its text of 4 characters",
        )
        for span in ([0, 5], [-1, 2], [2, 2], [3, 1])
    ],
    *[
        (
            {"text": "four", "span": span},
            "'span' must be [start, end] in characters, such as [4, 11]",
        )
        for span in ([1], [0.5, 2], "1-2", 3, [False, True])
    ],
    (
        {"text": "t", "split": "training"},
        "split 'training' is not known; use one of train, val, test",
    ),
    *[
        ({"text": "t", "answer": answer}, "'answer' must be a string or a list of strings")
        for answer in ({"a": 1}, ["a", ["b"]])
    ],
]


@pytest.mark.parametrize(("row", "message"), LINE_2, ids=[str(r)[:40] for r, _ in LINE_2])
def test_errors_name_file_and_line(write, row, message):
    path = write(TWO[0], row)
    assert message_of(lambda: read(path)) == f"{path}:2: {message}"


def test_a_whole_emoji_written_as_two_escapes_is_fine(write):
    assert read(write('{"text": "\\ud83d\\ude42"}')).examples[0].text == "🙂"


def test_an_id_that_stands_twice(write):
    path = write({**TWO[0], "id": "x"}, TWO[0], {**TWO[1], "id": "x"})
    assert message_of(lambda: read(path)) == f"{path}:3: id 'x' is already used at {path}:1"


def test_made_up_ids_never_meet_given_ones(write):
    rows = [{"text": "t", **fields} for fields in ({}, {"id": 1}, {"id": "line 1"}, {})]
    assert [e.id for e in read(write(*rows)).examples] == ["line line 1", "1", "line 1", "4"]


def test_only_one_group(write):
    path = write(TWO[0], TWO[0])
    assert message_of(lambda: read(path)) == (
        f"{path}: all rows are of one group, known (2); a contrast needs two"
    )


@pytest.mark.parametrize("line", ["a,b", "a,b,c,d"])
def test_a_csv_row_with_another_number_of_fields(write, line):
    path = write("text,group,note", "one,known,x", line, name="f.csv")
    assert message_of(lambda: read(path, csv)) == (
        f"{path}:3: the row does not have the 3 fields of the header; quote texts that contain "
        "commas"
    )


def test_a_csv_with_an_open_quote(write):
    path = write("text", 'one "quoted" word', '"two" words', name="f.csv")
    assert message_of(lambda: read(path, csv)).startswith(f"{path}:3: is not CSV (")


def test_a_csv_text_that_is_empty(write):
    path = write("text,group", "one,known", ",unknown", name="f.csv")
    assert message_of(lambda: read(path, csv)).startswith(
        f"{path}:3: column 'text' has a missing value"
    )


def test_a_mapping_to_a_column_that_is_not_there(write):
    path = write(*TWO)
    assert message_of(lambda: read(path, columns={"group": "label"})) == (
        f"{path}: no row has the column 'label' (dataset.columns.group)"
    )


def test_a_mapping_of_a_column_that_does_not_exist(write):
    path = write(*TWO)
    message = message_of(lambda: read(path, columns={"txt": "text"}), ConfigError)
    assert message == "dataset.columns=txt is not known; did you mean text?"


def test_rows_without_a_prompt_among_others_are_counted(write) -> None:
    path = write({"text": "a b", "prompt": "Is it?"}, {"text": "c d"})
    _, notes = to_examples(read_rows(path, "jsonl"), DatasetConfig(name="jsonl"), path)
    assert notes == ["1 row of 2 without a prompt: interventions run on the text instead"]
    path = write({"text": "a b"}, {"text": "c d"})
    assert to_examples(read_rows(path, "jsonl"), DatasetConfig(name="jsonl"), path)[1] == []


@pytest.mark.parametrize(
    ("cell", "n"), [("[London, Paris]", 1), ('["London", "Paris"]', 0), ("x", 0)]
)
def test_answers_in_brackets_that_are_no_list_are_counted(cell: str, n: int) -> None:
    rows = [("file.csv:2", {"text": "a b", "answer": cell})]
    [example], notes = to_examples(rows, DatasetConfig(name="csv"), "file.csv", lists_as_text=True)
    assert len([note for note in notes if "in brackets" in note]) == n
    assert (example.answers == (cell,)) == (n == 1 or cell == "x")
