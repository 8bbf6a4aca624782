"""Lines of text files: ends of lines, byte order mark and white space as Python reads them."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saexp import registry
from saexp.config import DatasetConfig
from saexp.data.datasets import background_texts
from saexp.data.tables import text_lines
from saexp.errors import DataError
from saexp.labeling.wikidata import read_published

NO_ENDS = ["\u2028", "\u2029", "\u0085", "\f", "\v", "\x1c", "\x1d", "\x1e"]
"""Where str.splitlines cuts and a text file does not end a line."""
TEXTS = st.text(st.sampled_from([*"ab \té🙂", "\n", "\r", *NO_ENDS]), max_size=30)


def texts_of(name, path, **options):
    cfg = DatasetConfig(name=name, path=str(path), **options)
    return [e.text for e in registry.build("dataset", cfg).examples]


@given(TEXTS, st.booleans())
def test_lines_are_those_between_line_feeds_and_carriage_returns(tmp_path_factory, text, marked):
    file = tmp_path_factory.mktemp("lines") / "f.txt"
    file.write_bytes((b"\xef\xbb\xbf" if marked else b"") + text.encode())
    expected = re.split("\r\n|\r|\n", text)
    assert text_lines(file) == (expected if expected[-1] else expected[:-1])


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_every_reader_of_lines_keeps_what_stands_in_them(tmp_path, newline, mark):
    lines = ["    indented", "a\u2028b\u0085c\fd\x1ee", "trailing  ", "\ttab", *NO_ENDS]
    file = tmp_path / "f.txt"
    file.write_bytes(mark + newline.join(["", *lines, "", "  "]).encode())
    expected = lines[:4]
    assert texts_of("text", file) == expected
    assert texts_of("text", tmp_path) == expected
    cfg = DatasetConfig(name="any", background=str(file))
    assert background_texts(cfg) == expected


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("inside", NO_ENDS[:3])
def test_json_lines_and_csv_keep_them_too(tmp_path, newline, mark, inside):
    texts = [f" one{inside}text ", f"{inside}another"]
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "f.jsonl").write_bytes(mark + newline.join(rows).encode())
    (tmp_path / "f.csv").write_bytes(mark + newline.join(["text", *texts]).encode())
    assert texts_of("jsonl", tmp_path / "f.jsonl") == texts
    assert texts_of("csv", tmp_path / "f.csv") == texts
    entities = [
        json.dumps({"entity": t, "entity_type": "x", "attributes": []}, ensure_ascii=False)
        for t in texts
    ]
    for name, content in (
        ("e.jsonl", newline.join(entities)),
        ("e.json", f"[{newline}{','.join(entities)}]"),
    ):
        (tmp_path / name).write_bytes(mark + content.encode())
        assert [row["entity"] for _, row in read_published(str(tmp_path / name))] == texts


@pytest.mark.parametrize("length", [10, 100_000])
def test_the_first_byte_that_is_not_utf8_is_counted_from_the_files_beginning(tmp_path, length):
    file = tmp_path / "f.txt"
    file.write_bytes(b"a\n" * (length // 2) + b"\xe9\n")
    with pytest.raises(DataError) as error:
        text_lines(file)
    assert str(error.value) == f"{file}: is not UTF-8 text (byte {length})"
