"""experiments/real_model/corpus.py: formats are read as written, and only prose is taken, once."""

import gzip
import struct
import sys
import zlib
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments/real_model"))

from corpus import PACKAGES, Package, documents_in  # noqa: E402
from extract import READERS, prose, sentences  # noqa: E402

PROSE = "The old house stood at the end of the road, and no one in the town knew who had built it."


def blocks(file: Path, form: str) -> list[str]:
    return [" ".join(block.split()) for block in READERS[form](file) if block.strip()]


@pytest.mark.parametrize(
    ("text", "is_prose"),
    [
        (PROSE, True),
        (PROSE[:-1], False),
        ("It is short.", False),
        (
            "for (i = 0; i < n; i++) { x[i] = y[i] * z[i]; } is the loop that is at the end of it.",
            False,
        ),
        (
            "Das alte Haus stand am Ende der Straße, und niemand in der Stadt weiß etwas.",
            False,
        ),
        ("--all -a --verbose -v --quiet -q --help -h the of to and in is a b c d e f.", False),
        (
            "Apple, pear, plum, cherry, peach, grape, melon, lemon, lime, orange, fig, date, kiwi.",
            False,
        ),
    ],
)
def test_only_sentences_of_english_are_prose(text: str, is_prose: bool) -> None:
    assert prose(text) == (text if is_prose else None)


def test_long_blocks_are_divided_between_sentences_and_nothing_is_lost() -> None:
    block = "\n".join([PROSE] * 60)
    parts = list(sentences(block))
    assert len(parts) > 2
    assert " ".join(parts) == " ".join(block.split())
    assert all(len(part) <= 2000 and part.endswith(".") for part in parts)
    assert len(list(sentences("x" * 5000))) == 3


def test_markup_without_code_and_tags(tmp_path: Path) -> None:
    file = tmp_path / "a.html"
    file.write_text(
        f"<head><title>t</title></head><h1>Title</h1><p>A <b>bold</b> &amp; <code>f()</code> word¶."
        f"<pre>int x;</pre><ul><li>one</li><li>{PROSE}</ul><script>var x;</script>"
    )
    assert blocks(file, "markup") == ["Title", "A bold & f() word.", "one", PROSE]


def test_text_files(tmp_path: Path) -> None:
    file = tmp_path / "a.txt.gz"
    file.write_bytes(
        gzip.compress(b"One\nblock.\n\n    code\n\n.. note::\n\nA :ref:`link <x>` and ``y``.")
    )
    assert blocks(file, "plain") == ["One block.", "A link and y."]
    file = tmp_path / "a.pod"
    file.write_text("=head1 NAME\n\nThe B<bold C<inner>> text C<< of >> it.\n\n  code\n")
    assert blocks(file, "pod") == ["The bold inner text of it."]
    file = tmp_path / "fortunes"
    file.write_text("One.\n%\n  {Two}.\n")
    assert blocks(file, "indented") == ["One.", "Two."]
    file = tmp_path / "game.txt"
    file.write_text('\t`A "said" text.`\n\t`with <name>`\n')
    assert blocks(file, "dialogue") == ['A "said" text.']


@pytest.mark.parametrize(("form", "entry"), [("sword", "<IIH"), ("sword4", "<III")])
def test_modules_of_sword(tmp_path: Path, form: str, entry: str) -> None:
    verses = [b"<w>First</w> verse.", b"A <i>second</i> one &amp; more."]
    content = [zlib.compress(b"".join(verses)), zlib.compress(verses[0])]
    (tmp_path / "ot.bzz").write_bytes(b"".join(content))
    sizes = [len(c) for c in content]
    index = struct.pack("<6I", 0, sizes[0], 0, sizes[0], sizes[1], 0)
    (tmp_path / "ot.bzs").write_bytes(index)
    entries = [(0, 0, len(verses[0])), (0, len(verses[0]), len(verses[1])), (0, 0, 0), (1, 0, 19)]
    (tmp_path / "ot.bzv").write_bytes(b"".join(struct.pack(entry, *e) for e in entries))
    expected = ["First verse.", "A second one & more.", "First verse."]
    assert blocks(tmp_path / "ot.bzv", form) == expected


def test_strings_of_r(tmp_path: Path) -> None:
    lines = ["Chapter 1", "", "A first line", "and a second.", "", "The end."]
    values = b"".join(b"\x00\x04\x00\x09" + struct.pack(">i", len(x)) + x.encode() for x in lines)
    chunk = struct.pack(">I", len(values)) + zlib.compress(values)
    (tmp_path / "Rdata.rdb").write_bytes(chunk * 2)
    assert (
        blocks(tmp_path / "Rdata.rdb", "r")
        == ["Chapter 1", "A first line and a second.", "The end."] * 2
    )


def test_a_paragraph_is_taken_once_and_documents_are_of_limited_size(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    number = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    texts = [
        f"{PROSE[:-1]} in the {a} of the {b} and the {c}."
        for a in number
        for b in number
        for c in number
    ]
    file.write_text("\n\n".join(texts + texts))
    seen: set[bytes] = set()
    package = Package("a", ".", "plain")
    documents = list(documents_in(file, package, "a/a.txt", seen))
    paragraphs = [p for document in documents for p in document["text"].split("\n\n")]
    assert paragraphs == texts
    assert all(len(document["text"]) < 22_000 for document in documents)
    assert len(documents) > 3
    assert list(documents_in(file, package, "again", seen)) == []


def test_every_package_has_a_known_format_and_registry() -> None:
    assert len({package.name for package in PACKAGES}) == len(PACKAGES)
    for package in PACKAGES:
        assert package.format in READERS
        assert package.registry in ("debian", "pypi")
        assert ("==" in package.name) is (package.registry == "pypi")
