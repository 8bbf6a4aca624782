"""The text of tokens that are known by their ids alone, such as those of a corpus."""

from collections.abc import Sequence
from typing import Any

_CONTEXT = 3
"""Characters or words before a token that are decoded with it, since decoders treat the first token
of a text specially."""
_BEFORE = 32
"""Tokens before the first one at which decoding begins, so that it is not within a character."""
_LONGEST_CHARACTER = 8
"""Tokens that may make up one character; UTF-8 has at most four bytes."""
_UNDECODED = "\ufffd"


def decoded_pieces(ids: Sequence[int], tokenizer: Any, first: int, end: int) -> list[str]:
    """The text of tokens [first, end), in context; special tokens are their names.

    As `tokenization.token_pieces` of the text that was tokenized: concatenated, the pieces are the
    text. Where several tokens make up one character, the first has it and the others are empty.

    >>> decoded_pieces(tokenizer("A café").input_ids, tokenizer, 1, 3)   # doctest: +SKIP
    ['A', ' café']
    """
    special = set(tokenizer.all_special_ids)
    start = at = max(0, first - _BEFORE)
    pieces: list[str] = []
    begins: list[int] = []
    """First tokens of the pieces since the last special token."""
    while at < end:
        if ids[at] in special:
            pieces.append(str(tokenizer.convert_ids_to_tokens(ids[at])))
            at, begins = at + 1, []
            continue
        begins = [*begins[-_CONTEXT:], at]
        before = _decode(tokenizer, ids[begins[0] : at])
        last = min(len(ids), at + _LONGEST_CHARACTER)
        stop = at
        piece = _UNDECODED
        while piece.endswith(_UNDECODED) and stop < last and ids[stop] not in special:
            stop += 1
            piece = _decode(tokenizer, ids[begins[0] : stop])[len(before) :]
        pieces += [piece, *[""] * (stop - at - 1)]
        at = stop
    return pieces[first - start : end - start]


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
