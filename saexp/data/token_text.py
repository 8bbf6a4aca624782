"""Tokens as people read them: in a text by `pieces`, of the vocabulary alone by `token_texts`."""

from collections.abc import Sequence
from typing import Any

from saexp.data.tokens import TokenizedText

_SPACES = ("Ġ", "▁")
"""How byte-level and SentencePiece vocabularies write a space before a word."""
_UNDECODED = "\ufffd"
"""What decoding gives for bytes that are no whole character."""


def pieces(text: TokenizedText, tokenizer: Any, indices: Sequence[int] | None = None) -> list[str]:
    """What each token stands for; together the text itself, special tokens besides.

    White space that a tokenizer leaves out of its offsets goes to the token after it. Of several
    tokens of one character (an emoji of byte-level tokens) the first has it, the others are empty.
    `indices`: of these tokens alone, ascending; the first of those has the character.
    """
    names = tokenizer.convert_ids_to_tokens(list(text.ids))
    found, shown, before = [], 0, 0
    wanted = None if indices is None else set(indices)
    for i, ((a, b), special) in enumerate(zip(text.offsets, text.special, strict=True)):
        here = wanted is None or i in wanted
        if special and a == b:
            found += [str(names[i])] * here
            continue
        start = a if text.text[before:a].strip() else min(a, before)
        if here:
            found.append(text.text[max(start, shown) : b])
            shown = max(shown, b)
        before = max(before, b)
    return found


def token_texts(tokenizer: Any, ids: Sequence[int]) -> dict[int, str]:
    """Token id -> the text it stands for by itself, with the space that decoding may drop.

    A token that is part of a character has no text of its own: it keeps its name in the vocabulary.
    """
    found = {}
    for token_id in set(ids):
        text = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        raw = str(tokenizer.convert_ids_to_tokens(token_id))
        dropped = raw.startswith(_SPACES) and not text.startswith(" ")
        found[token_id] = raw if _UNDECODED in text else f" {text}" if dropped else text
    return found
