"""Finding the mentions of an entity, or of any other string, in a text."""

import re
import unicodedata

Span = tuple[int, int]
"""[start, end) in characters."""

UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3130-\u318f\u3400-\u4dbf\u4e00-\u9fff"
    "\uac00-\ud7af\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
"""Thai, Lao, Burmese, Khmer, Japanese, Chinese and Korean characters: such text puts no space
between words (or, in Korean, between a word and its particle)."""


def find_mentions(text: str, wanted: str) -> tuple[Span, ...]:
    """Spans of `wanted` in `text`, in order; empty where it does not occur.

    Mentions at word boundaries are preferred: "Art" in "Arthur's Art" is the second one only.
    Where no mention is at word boundaries, every mention counts. Text and string may differ in
    Unicode normalisation (NFC or NFD); the spans are always those of `text` as given.

    >>> find_mentions("Arthur's Art", "Art")
    ((9, 12),)
    """
    for form in dict.fromkeys(
        (wanted, unicodedata.normalize("NFC", wanted), unicodedata.normalize("NFD", wanted))
    ):
        spans = [match.span() for match in re.finditer(re.escape(form), text)] if form else []
        whole = [(start, end) for start, end in spans if _is_whole(text, start, end)]
        if spans:
            return tuple(whole or spans)
    return ()


def look_alike(text: str, wanted: str) -> bool:
    """Whether a string that does not occur in `text` may seem to the eye to stand there.

    Compared without case, compatibility forms, invisible characters and kinds of white space; four
    in five characters must agree, as other alphabets have letters of the same shape.
    """
    if text.isascii() and wanted.isascii():
        return False
    text, wanted = _plain(text), _plain(wanted)
    windows = (text[i : i + len(wanted)] for i in range(len(text) - len(wanted) + 1))
    same = (sum(a == b for a, b in zip(w, wanted, strict=True)) for w in windows)
    return bool(wanted) and max(same, default=0) >= 0.8 * len(wanted)


def _plain(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(
        " " if c.isspace() else c for c in folded if unicodedata.category(c) not in ("Cf", "Mn")
    )


def _is_whole(text: str, start: int, end: int) -> bool:
    return not _is_inside_word(text, start) and not _is_inside_word(text, end)


def _is_inside_word(text: str, index: int) -> bool:
    """Whether a word continues across the boundary before `text[index]`."""
    if not 0 < index < len(text):
        return False
    before, after = text[index - 1], text[index]
    if unicodedata.combining(after):
        return True
    if UNSPACED.match(before) or UNSPACED.match(after):
        return False
    return _is_word(before) and _is_word(after)


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_" or unicodedata.combining(character) > 0
