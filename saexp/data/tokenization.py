"""Tokenizes texts, with the character range of every token, and turns tokens back into text."""

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
    cut_left: bool = False
    """Whether truncation removed the beginning of the text, not its end."""
    message: Span | None = None
    """Span of the user's message in `text`; None where all of `text` is the user's."""

    def __len__(self) -> int:
        return len(self.ids)


def tokenize(
    texts: Sequence[str],
    tokenizer: Any,
    max_length: int,
    prepend_bos: bool | None = None,
    *,
    templated: bool = False,
) -> list[TokenizedText]:
    """Tokenize texts and truncate them at `max_length` tokens.

    The token ids are those of the tokenizer without an appended EOS token, so that the last token
    belongs to the text. `prepend_bos` says whether texts begin with the BOS token; None leaves that
    to the tokenizer. A text that begins with the BOS token's string keeps it and gets no second
    one. `templated` texts are the output of a chat template: the tokenizer adds nothing, and
    `prepend_bos` adds or removes a BOS only where it is not None. For tokenizers without offsets,
    offsets are found by decoding prefixes. Raises DataError where BOS is requested and the
    tokenizer has none.
    """
    bos = getattr(tokenizer, "bos_token", None)
    if prepend_bos and not bos:
        raise DataError("prepend_bos=true, but the tokenizer has no BOS token")
    if not texts:
        return []
    added = () if templated else _added_in_front(tokenizer)
    if prepend_bos is not None:
        added = _with_bos(added, tokenizer, prepend_bos)
    read = _fast if getattr(tokenizer, "is_fast", False) else _slow
    left = getattr(tokenizer, "truncation_side", "right") == "left"
    done = []
    for tokens in read(list(texts), tokenizer, None if left else max_length):
        own = bool(bos) and tokens.text.startswith(bos)
        if own and templated and prepend_bos is False:
            tokens = _without_first(tokens)
        done.append(_framed(tokens, () if own else added, max_length, left))
    return done


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer prepends its BOS token by default."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and _added_in_front(tokenizer)[:1] == (bos,)


def _added_in_front(tokenizer: Any) -> tuple[int, ...]:
    """Special tokens that the tokenizer prepends to a text."""
    text = "a"
    whole = list(tokenizer(text)["input_ids"])
    bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    starts = range(len(whole) - len(bare) + 1)
    return tuple(whole[: next((n for n in starts if whole[n : n + len(bare)] == bare), 0)])


def _with_bos(added: tuple[int, ...], tokenizer: Any, wanted: bool) -> tuple[int, ...]:
    bos = tokenizer.bos_token_id
    if bos is None:
        return added
    rest = added[1:] if added[:1] == (bos,) else added
    return (bos, *rest) if wanted else rest


def _without_first(tokens: TokenizedText) -> TokenizedText:
    return replace(
        tokens, ids=tokens.ids[1:], offsets=tokens.offsets[1:], special=tokens.special[1:]
    )


def _framed(
    tokens: TokenizedText, added: tuple[int, ...], max_length: int, left: bool
) -> TokenizedText:
    """The text with the special tokens `added` prepended, truncated at `max_length` tokens."""
    n, n_left = len(tokens), max(max_length - len(added), 0)
    part = slice(n - n_left, n) if left and n > n_left else slice(0, n_left)
    return replace(
        tokens,
        ids=(*added, *tokens.ids[part])[:max_length],
        offsets=(*((0, 0) for _ in added), *tokens.offsets[part])[:max_length],
        special=(*(True for _ in added), *tokens.special[part])[:max_length],
        truncated=n > n_left,
        cut_left=left and n > n_left,
    )


def _fast(texts: list[str], tokenizer: Any, max_length: int | None) -> list[TokenizedText]:
    """Tokenize without special tokens, and convert at most `max_length` + 2 tokens of each text.

    That suffices to see that a text is too long, even where its own BOS is removed.
    """
    part = slice(None if max_length is None else max_length + 2)
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    special_ids = set(tokenizer.all_special_ids)
    return [
        TokenizedText(
            text=text,
            ids=tuple(ids[part]),
            offsets=tuple((int(a), int(b)) for a, b in offsets[part]),
            special=tuple(t in special_ids for t in ids[part]),
            truncated=False,
        )
        for text, ids, offsets in zip(
            texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
        )
    ]


def _slow(texts: list[str], tokenizer: Any, n_located: int | None) -> list[TokenizedText]:
    """As `_fast`, with offsets found by decoding, for the first `n_located` tokens only."""
    special_ids = set(tokenizer.all_special_ids)
    done = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        offsets = _offsets_by_decoding(text, ids[:n_located], tokenizer)
        done.append(
            TokenizedText(
                text=text,
                ids=tuple(ids),
                offsets=(*offsets, *((0, 0) for _ in ids[len(offsets) :])),
                special=tuple(i in special_ids for i in ids),
                truncated=False,
            )
        )
    return done


def _offsets_by_decoding(text: str, ids: Sequence[int], tokenizer: Any) -> tuple[Span, ...]:
    """Character ranges from decoded prefixes; a token inside a multi-byte character gets all of it.

    Raises DataError where decoding does not give the text back.
    """
    ends: list[int] = []
    cut: list[bool] = []
    whole = ""
    for n in range(1, len(ids) + 1):
        whole = tokenizer.decode(list(ids[:n]), clean_up_tokenization_spaces=False)
        ends.append(len(whole.rstrip("\ufffd")))
        cut.append(whole.endswith("\ufffd"))
    shift = len(text) - len(text.lstrip()) - (len(whole) - len(whole.lstrip()))
    if not text[max(shift, 0) :].startswith(whole[max(-shift, 0) :].rstrip("\ufffd")):
        raise DataError(
            f"the tokenizer has no offsets and does not decode '{text[:40]}' back, so "
            "spans cannot be found; use a fast tokenizer"
        )
    offsets: list[Span] = []
    start = 0
    for index, end in enumerate(ends):
        finished = next((e for e in ends[index:] if e > end), end + 1) if cut[index] else end
        offsets.append((max(start + shift, 0), max(finished + shift, 0)))
        start = end
    return tuple(offsets)


def in_message(tokens: TokenizedText, index: int) -> bool:
    """Whether a token holds characters of the user's message, not only of the chat template."""
    if tokens.message is None:
        return True
    (start, end), (a, b) = tokens.message, tokens.offsets[index]
    # Some tokenizers give an empty range for a token of white space.
    return start <= a < end if a == b else max(a, start) < min(b, end)


def span_to_tokens(tokens: TokenizedText, span: Span) -> list[int]:
    """Indices of the tokens that hold characters of the span; empty where it was truncated.

    Surrounding white space does not count, so a byte-level token that begins with the space before
    the span belongs to it, and a token that is that space alone does not.
    """
    start, end = span
    inside = tokens.text[start:end]
    start += len(inside) - len(inside.lstrip())
    end -= len(inside) - len(inside.rstrip())
    if tokens.truncated:
        ranges = [o for o, s in zip(tokens.offsets, tokens.special, strict=True) if not s]
        # Some tokenizers truncate on the left.
        if not ranges or end > max(b for _, b in ranges) or start < min(a for a, _ in ranges):
            return []
    return [
        i
        for i, ((a, b), is_special) in enumerate(zip(tokens.offsets, tokens.special, strict=True))
        if not is_special and max(a, start) < min(b, end)
    ]


_SPACES = ("Ġ", "▁")
"""How byte-level and SentencePiece vocabularies write a space before a word."""
_UNDECODED = "\ufffd"
"""What decoding gives for bytes that are not a whole character."""


def pieces(text: TokenizedText, tokenizer: Any, indices: Sequence[int] | None = None) -> list[str]:
    """The text of each token; together they are the text itself, apart from special tokens.

    White space that a tokenizer leaves out of its offsets belongs to the next token. Where several
    byte-level tokens make up one character, such as an emoji, the first has it and the others are
    empty. `indices` limits the result to these tokens, ascending; then the first of them has it.
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
    """Token id -> the text of that token alone, with the space that decoding may drop.

    A token that is part of a character is shown by its name in the vocabulary.
    """
    texts = {}
    for token_id in set(ids):
        text = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        raw = str(tokenizer.convert_ids_to_tokens(token_id))
        dropped = raw.startswith(_SPACES) and not text.startswith(" ")
        texts[token_id] = raw if _UNDECODED in text else f" {text}" if dropped else text
    return texts
