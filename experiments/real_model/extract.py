"""Paragraphs of English prose from the files of documentation and text packages.

One function a format, each from a file to raw paragraphs; `prose` keeps those that are prose: whole
sentences of English words, and not code, tables, options or other languages.
"""

import gzip
import html
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

_BLOCKS = re.compile(
    r"</?(?:p|li|dd|dt|div|h[1-6]|td|th|tr|table|ul|ol|dl|blockquote|br|section|article|hr|para"
    r"|title|item|note|steps|list|lb|lg|l|verse|chapter)\b[^>]*>|<milestone[^>]*/>",
    re.IGNORECASE,
)
_NOT_TEXT = re.compile(
    r"<(script|style|pre|head|nav|footer|header|figure|screen|code-block|programlisting|svg|title)"
    r"\b[^>]*>.*?</\1>|<!--.*?-->",
    re.IGNORECASE | re.DOTALL,
)
_TAG = re.compile(r"<[^>]*>")
_SPACE = re.compile(r"\s+")
_POD = re.compile(r"[A-Z]<<+\s([^<>]*)\s>>+|[A-Z]<([^<>]*)>")
_ROLE = re.compile(r":[a-z:]+:`~?([^`<]*?)\s*(?:<[^>`]*>)?`|``?([^`]*)``?_?_?")
_WORD = re.compile(r"[a-z']+")
_PLAIN = re.compile(r"[A-Za-z0-9 ,.;:'\"()!?’‘“”–—-]")
_COMMON = (
    "the of and to a in is that it for as with was on be by are this not or from at have an they "
    "which you his he but will their had all if can has we were there when one been who would she "
    "her its what so no may them my him your these into any our me more than do i"
)
_FUNCTION_WORDS = frozenset(_COMMON.split())


def markup(file: Path) -> Iterator[str]:
    """Blocks of HTML, XHTML, DocBook or Mallard, without code blocks and headings' anchors."""
    text = _NOT_TEXT.sub("\n", _read(file))
    for block in _BLOCKS.split(text):
        yield html.unescape(_TAG.sub("", block)).replace("¶", "")


def plain(file: Path) -> Iterator[str]:
    """Blocks between blank lines of a text file; indented ones, mostly examples, are left out."""
    for block in re.split(r"\n\s*\n", _read(file)):
        if not block.startswith(("  ", "\t", "..")):
            yield _ROLE.sub(lambda match: match[1] or match[2] or "", block)


def indented(file: Path) -> Iterator[str]:
    """Blocks between blank lines, indented or not: fortunes, and definitions of a dictionary."""
    for block in re.split(r"\n\s*\n|\n%\n", _read(file)):
        yield re.sub(r"[{}\[\]]", "", block)


def pod(file: Path) -> Iterator[str]:
    """Paragraphs of Perl's documentation."""
    for block in re.split(r"\n\s*\n", _read(file)):
        if not block.startswith((" ", "\t", "=")):
            # From the innermost code outwards.
            while (simpler := _POD.sub(lambda match: match[1] or match[2] or "", block)) != block:
                block = simpler
            yield block


def dialogue(file: Path) -> Iterator[str]:
    """Texts between backquotes in the data of Endless Sky."""
    yield from re.findall(r"`([^`<&]+)`", _read(file))


def sword(file: Path, entry: str = "<IIH") -> Iterator[str]:
    """Verses or comments of a module of the SWORD project.

    `file` is its index, of which an `entry` holds the number of a compressed block, and position
    and length in it; entries of zText4 and newer zCom4 modules are longer, `<III`.
    """
    blocks = _sword_blocks(file)
    texts: list[str] = []
    for number, start, length in struct.iter_unpack(entry, file.read_bytes()):
        if length and number < len(blocks):
            text = blocks[number][start : start + length].decode("utf-8", "replace")
            texts += [html.unescape(_TAG.sub("", part)) for part in _BLOCKS.split(text)]
    # A verse alone is short.
    n_joined = 8 if "texts" in file.parts else 1
    for first in range(0, len(texts), n_joined):
        yield " ".join(texts[first : first + n_joined])


def _sword_blocks(file: Path) -> list[bytes]:
    index = file.with_suffix(file.suffix[:-1] + "s").read_bytes()
    content = file.with_suffix(file.suffix[:-1] + "z").read_bytes()
    entries = struct.iter_unpack("<III", index[: len(index) // 12 * 12])
    return [zlib.decompress(content[start : start + length]) for start, length, _ in entries]


def r_strings(file: Path) -> Iterator[str]:
    """Paragraphs of character vectors in R's database of a package's data, one line an element."""
    content, position = file.read_bytes(), 0
    while position + 4 < len(content):
        unpacker = zlib.decompressobj()
        values = unpacker.decompress(content[position + 4 :])
        position = len(content) - len(unpacker.unused_data)
        lines = [
            values[match.end() : match.end() + int.from_bytes(match[1], "big")].decode(
                "utf-8", "replace"
            )
            for match in re.finditer(rb"\x00\x04\x00\x09(\x00[\x00-\xff]{3})", values)
        ]
        yield from re.split(r"\n\s*\n", "\n".join(lines))


READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    "markup": markup,
    "plain": plain,
    "indented": indented,
    "pod": pod,
    "dialogue": dialogue,
    "sword": sword,
    "sword4": partial(sword, entry="<III"),
    "r": r_strings,
}
"""Format -> its function."""


def _read(file: Path) -> str:
    content = file.read_bytes()
    if file.suffix in (".gz", ".dz"):
        content = gzip.decompress(content)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def sentences(block: str, most: int = 2000) -> Iterator[str]:
    """A block in parts of about `most` characters, divided between sentences."""
    line = _SPACE.sub(" ", block).strip()
    while len(line) > most:
        ends = [match.end() for match in re.finditer(r"[.!?][\"”’)]* ", line[:most])]
        cut = ends[-1] if ends else most
        yield line[:cut].strip()
        line = line[cut:]
    yield line


def prose(paragraph: str) -> str | None:
    """The paragraph, which is one line; None where it is not English prose.

    It has at least 12 words, of which at least 30% are among the commonest function words; 96% of
    its characters are letters, digits, spaces and ordinary punctuation; it ends as a sentence does.
    """
    line = paragraph.strip()
    words = _WORD.findall(line.lower())
    if len(words) < 12 or not line.endswith((".", "!", "?", '"', "”", ":", ")", "’", "'")):
        return None
    common = sum(word in _FUNCTION_WORDS for word in words) / len(words)
    ordinary = len(_PLAIN.findall(line)) / len(line)
    letters = sum(map(len, words)) / len(line)
    if common < 0.3 or ordinary < 0.96 or letters < 0.7 or max(map(len, words)) > 40:
        return None
    return line
