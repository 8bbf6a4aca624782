"""One tokenisation per text, with the character range of every token."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from saexp.data.examples import Span
from saexp.errors import DataError


@dataclass(frozen=True)
class TokenizedText:
    """A text as the model reads it: no padding, special tokens included."""

    text: str
    ids: tuple[int, ...]
    offsets: tuple[Span, ...]
    """Character range of each token in `text`; (0, 0) for special ones that are not in it."""
    special: tuple[bool, ...]
    truncated: bool

    def __len__(self) -> int:
        return len(self.ids)


def tokenize(
    texts: Sequence[str], tokenizer: Any, max_length: int, prepend_bos: bool | None = None
) -> list[TokenizedText]:
    """Tokenise once, cut at `max_length` tokens.

    `prepend_bos`: whether texts begin with the BOS token; None, as the tokenizer has it. A text
    that begins with the BOS token's string (a chat template's output) never gets a second one, and
    keeps its own. Tokenizers without offsets get theirs by decoding prefixes. Raises DataError
    where BOS is asked for and the tokenizer has none.
    """
    bos = getattr(tokenizer, "bos_token", None)
    has_bos = [bool(bos) and text.startswith(bos) for text in texts]
    change = 0 if prepend_bos is None else int(prepend_bos) - int(adds_bos(tokenizer))
    if change == 1 and not bos:
        raise DataError("prepend_bos=true, but the tokenizer has no BOS token")
    done: dict[int, TokenizedText] = {}
    for add_special in (True, False):
        chosen = [i for i, has in enumerate(has_bos) if has != add_special]
        if not chosen:
            continue
        some = [texts[i] for i in chosen]
        kept = max_length - change if add_special else max_length
        read = _fast if getattr(tokenizer, "is_fast", False) else _slow
        found = read(some, tokenizer, kept, add_special)
        if add_special and change:
            found = [_with_bos(t, tokenizer.bos_token_id, change == 1) for t in found]
        done.update(zip(chosen, found, strict=True))
    return [done[i] for i in range(len(texts))]


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its BOS token in front of a text by itself."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def _with_bos(tokens: TokenizedText, bos_id: int, wanted: bool) -> TokenizedText:
    """With the BOS token in front, or without the one that is there."""
    if wanted:
        return replace(
            tokens,
            ids=(bos_id, *tokens.ids),
            offsets=((0, 0), *tokens.offsets),
            special=(True, *tokens.special),
        )
    return replace(
        tokens, ids=tokens.ids[1:], offsets=tokens.offsets[1:], special=tokens.special[1:]
    )


def _fast(
    texts: list[str], tokenizer: Any, max_length: int, add_special: bool
) -> list[TokenizedText]:
    encoded = tokenizer(
        texts,
        add_special_tokens=add_special,
        truncation=True,
        max_length=max_length,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
    )
    special_ids = set(tokenizer.all_special_ids)
    return [
        TokenizedText(
            text=text,
            ids=tuple(ids),
            offsets=tuple((int(a), int(b)) for a, b in encoded["offset_mapping"][i]),
            special=tuple(
                bool(m) or t in special_ids
                for t, m in zip(ids, encoded["special_tokens_mask"][i], strict=True)
            ),
            truncated=bool(encoded.encodings[i].overflowing),
        )
        for i, (text, ids) in enumerate(zip(texts, encoded["input_ids"], strict=True))
    ]


def _slow(
    texts: list[str], tokenizer: Any, max_length: int, add_special: bool
) -> list[TokenizedText]:
    special_ids = set(tokenizer.all_special_ids)
    done = []
    for text in texts:
        full = tokenizer(text, add_special_tokens=add_special)["input_ids"]
        ids = full
        if len(full) > max_length:
            ids = tokenizer(
                text, add_special_tokens=add_special, truncation=True, max_length=max_length
            )["input_ids"]
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        fits = range(len(full) - len(bare) + 1)
        before = next((n for n in fits if full[n : n + len(bare)] == bare), 0)
        after = len(full) - len(bare) - before
        added = [n < before or n >= len(ids) - after for n in range(len(ids))]
        done.append(
            TokenizedText(
                text=text,
                ids=tuple(ids),
                offsets=_offsets_by_decoding(text, ids, added, tokenizer),
                special=tuple(i in special_ids for i in ids),
                truncated=len(full) > max_length,
            )
        )
    return done


def _offsets_by_decoding(
    text: str, ids: Sequence[int], added: Sequence[bool], tokenizer: Any
) -> tuple[Span, ...]:
    """Character ranges from decoded prefixes; a token inside a multi-byte character gets all of it.

    `added` are special tokens that stand in the ids but not in the text. Raises DataError where
    the decoded text is not the text itself.
    """
    plain: list[int] = []
    ends: list[int] = []
    cut: list[bool] = []
    for token, is_added in zip(ids, added, strict=True):
        if not is_added:
            plain.append(token)
        decoded = tokenizer.decode(plain, clean_up_tokenization_spaces=False) if plain else ""
        ends.append(len(decoded.rstrip("\ufffd")))
        cut.append(decoded.endswith("\ufffd"))
    whole = tokenizer.decode(plain, clean_up_tokenization_spaces=False) if plain else ""
    shift = len(text) - len(text.lstrip()) - (len(whole) - len(whole.lstrip()))
    if not text[max(shift, 0) :].startswith(whole[max(-shift, 0) :].rstrip("\ufffd")):
        raise DataError(
            f"the tokenizer has no offsets and does not decode '{text[:40]}' back, so "
            "spans cannot be found; use a fast tokenizer"
        )
    offsets: list[Span] = []
    start = 0
    for index, (end, is_added) in enumerate(zip(ends, added, strict=True)):
        if is_added:
            offsets.append((0, 0))
            continue
        finished = next((e for e in ends[index:] if e > end), end + 1) if cut[index] else end
        offsets.append((max(start + shift, 0), max(finished + shift, 0)))
        start = end
    return tuple(offsets)


def span_to_tokens(tokens: TokenizedText, span: Span) -> list[int]:
    """Indices of the tokens that hold characters of the span; none where it was cut off.

    Surrounding white space does not count, so a byte-level token that begins with the space before
    the span belongs to it, and a token that is that space alone does not.
    """
    start, end = span
    inside = tokens.text[start:end]
    start += len(inside) - len(inside.lstrip())
    end -= len(inside) - len(inside.rstrip())
    if tokens.truncated:
        kept = [o for o, s in zip(tokens.offsets, tokens.special, strict=True) if not s]
        # Some tokenizers cut at the left.
        if not kept or end > max(b for _, b in kept) or start < min(a for a, _ in kept):
            return []
    return [
        i
        for i, ((a, b), is_special) in enumerate(zip(tokens.offsets, tokens.special, strict=True))
        if not is_special and max(a, start) < min(b, end)
    ]
