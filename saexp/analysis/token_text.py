"""Tokens as people read them."""

from collections.abc import Sequence
from typing import Any

_SPACES = ("Ġ", "▁")
"""How byte-level and SentencePiece vocabularies write a space before a word."""


def token_texts(tokenizer: Any, ids: Sequence[int]) -> dict[int, str]:
    """Token id -> the text it stands for, with the space that decoding one token alone may drop."""
    found = {}
    for token_id in set(ids):
        text, raw = tokenizer.decode([token_id]), tokenizer.convert_ids_to_tokens(token_id)
        dropped = str(raw).startswith(_SPACES) and not text.startswith(" ")
        found[token_id] = f" {text}" if dropped else text
    return found
