"""Tokenization, chat templates, and the tokens of answers."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from saexp.config import ModelConfig
from saexp.data import UNSPACED_SCRIPT, Example, Span
from saexp.errors import DataError, ModelError


class PositionNotFound(Exception):
    """A text lacks the requested position; the message is the reason that is reported."""


@dataclass(frozen=True)
class TokenizedText:
    """A text as the model reads it: no padding, special tokens included."""

    text: str
    ids: tuple[int, ...]
    offsets: tuple[Span, ...]
    """Character range of each token in `text`; (0, 0) for special tokens that are not in it."""
    special: tuple[bool, ...]
    truncated: bool
    cut_left: bool = False
    """Whether truncation removed the beginning of the text rather than the end."""
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
    belongs to the text. `prepend_bos` decides whether texts begin with the BOS token; None leaves
    that to the tokenizer. A text that begins with the BOS token's string gets no second one.
    `templated` texts are the output of a chat template: the tokenizer adds nothing, and a BOS is
    added or removed only where `prepend_bos` is not None. For tokenizers that return no offsets,
    these are determined by decoding prefixes. Raises DataError where BOS is requested and the
    tokenizer has no BOS token.
    """
    bos = getattr(tokenizer, "bos_token", None)
    if prepend_bos and not bos:
        raise DataError("prepend_bos=true, but the tokenizer has no BOS token")
    if not texts:
        return []
    prefix = () if templated else _special_prefix(tokenizer)
    if prepend_bos is not None:
        prefix = _with_bos(prefix, tokenizer, prepend_bos)
    convert = _tokenize_fast if getattr(tokenizer, "is_fast", False) else _tokenize_slow
    left = getattr(tokenizer, "truncation_side", "right") == "left"
    result = []
    for tokens in convert(list(texts), tokenizer, None if left else max_length):
        has_bos = bool(bos) and tokens.text.startswith(bos)
        if has_bos and templated and prepend_bos is False:
            tokens = _without_first(tokens)
        result.append(_prefixed(tokens, () if has_bos else prefix, max_length, left))
    return result


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer prepends its BOS token by default."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and _special_prefix(tokenizer)[:1] == (bos,)


def _special_prefix(tokenizer: Any) -> tuple[int, ...]:
    """Special tokens that the tokenizer prepends to a text."""
    text = "a"
    whole = list(tokenizer(text)["input_ids"])
    bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    starts = range(len(whole) - len(bare) + 1)
    return tuple(whole[: next((n for n in starts if whole[n : n + len(bare)] == bare), 0)])


def _with_bos(prefix: tuple[int, ...], tokenizer: Any, prepend_bos: bool) -> tuple[int, ...]:
    bos = tokenizer.bos_token_id
    if bos is None:
        return prefix
    rest = prefix[1:] if prefix[:1] == (bos,) else prefix
    return (bos, *rest) if prepend_bos else rest


def _without_first(tokens: TokenizedText) -> TokenizedText:
    return replace(
        tokens, ids=tokens.ids[1:], offsets=tokens.offsets[1:], special=tokens.special[1:]
    )


def _prefixed(
    tokens: TokenizedText, prefix: tuple[int, ...], max_length: int, left: bool
) -> TokenizedText:
    """The text after the special tokens `prefix`, truncated at `max_length` tokens in all."""
    n, n_room = len(tokens), max(max_length - len(prefix), 0)
    part = slice(n - n_room, n) if left and n > n_room else slice(0, n_room)
    return replace(
        tokens,
        ids=(*prefix, *tokens.ids[part])[:max_length],
        offsets=(*((0, 0) for _ in prefix), *tokens.offsets[part])[:max_length],
        special=(*(True for _ in prefix), *tokens.special[part])[:max_length],
        truncated=n > n_room,
        cut_left=left and n > n_room,
    )


def _tokenize_fast(texts: list[str], tokenizer: Any, max_length: int | None) -> list[TokenizedText]:
    """Tokenize without special tokens, and convert at most `max_length` + 2 tokens of each text.

    That suffices to detect that a text is too long, even where a BOS in the text is removed.
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


def _tokenize_slow(texts: list[str], tokenizer: Any, n_located: int | None) -> list[TokenizedText]:
    """As `_tokenize_fast`, with offsets from decoding, for the first `n_located` tokens only."""
    special_ids = set(tokenizer.all_special_ids)
    result = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        offsets = _offsets_by_decoding(text, ids[:n_located], tokenizer)
        result.append(
            TokenizedText(
                text=text,
                ids=tuple(ids),
                offsets=(*offsets, *((0, 0) for _ in ids[len(offsets) :])),
                special=tuple(i in special_ids for i in ids),
                truncated=False,
            )
        )
    return result


def _offsets_by_decoding(text: str, ids: Sequence[int], tokenizer: Any) -> tuple[Span, ...]:
    """Character ranges from decoded prefixes; a token within a multi-byte character has all of it.

    Raises DataError where decoding does not restore the text.
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
            "the tokenizer returns no offsets and its tokens do not decode to the text "
            f"'{text[:40]}', so spans cannot be located; use a fast tokenizer"
        )
    offsets: list[Span] = []
    start = 0
    for index, end in enumerate(ends):
        whole_end = next((e for e in ends[index:] if e > end), end + 1) if cut[index] else end
        offsets.append((max(start + shift, 0), max(whole_end + shift, 0)))
        start = end
    return tuple(offsets)


def in_message(tokens: TokenizedText, index: int) -> bool:
    """Whether a token has characters of the user's message, not only of the chat template."""
    if tokens.message is None:
        return True
    (start, end), (a, b) = tokens.message, tokens.offsets[index]
    # Some tokenizers give an empty range for a token of white space.
    return start <= a < end if a == b else max(a, start) < min(b, end)


def span_to_tokens(tokens: TokenizedText, span: Span) -> list[int]:
    """Indices of the tokens that have characters of the span; empty where it was truncated.

    White space at the ends of the span does not count: a token of white space there is not
    included, while a byte-level token that begins with the space before a word is.
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
"""A space before a word, as byte-level and SentencePiece vocabularies write it."""
_UNDECODED = "\ufffd"
"""The result of decoding bytes that are not a whole character."""


def token_pieces(
    text: TokenizedText, tokenizer: Any, indices: Sequence[int] | None = None
) -> list[str]:
    """The text of each token; concatenated, they are the text and the special tokens' names.

    White space that a tokenizer leaves out of its offsets belongs to the next token. Where several
    byte-level tokens make up one character, such as an emoji, the first has it and the others are
    empty. With `indices`, ascending, only these tokens are returned, and the first of them that is
    part of a character has it.
    """
    names = tokenizer.convert_ids_to_tokens(list(text.ids))
    pieces, shown, before = [], 0, 0
    included = range(len(text)) if indices is None else set(indices)
    for i, ((a, b), special) in enumerate(zip(text.offsets, text.special, strict=True)):
        if special and a == b:
            pieces += [str(names[i])] * (i in included)
            continue
        start = a if text.text[before:a].strip() else min(a, before)
        if i in included:
            pieces.append(text.text[max(start, shown) : b])
            shown = max(shown, b)
        before = max(before, b)
    return pieces


def token_texts(tokenizer: Any, ids: Sequence[int]) -> dict[int, str]:
    """Token id -> the text of that token alone, with the space that decoding may drop.

    For a token that is part of a character, the text is its name in the vocabulary.
    """
    texts = {}
    for token_id in set(ids):
        text = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        raw = str(tokenizer.convert_ids_to_tokens(token_id))
        dropped = raw.startswith(_SPACES) and not text.startswith(" ")
        texts[token_id] = raw if _UNDECODED in text else f" {text}" if dropped else text
    return texts


_SENTINEL = "SaexpUserMessage7261"
"""A message that chat templates neither contain nor change."""
IN_CHAT = "strip"
"""`Example.answer_space` of a chat prompt: the answer begins the model's turn."""
MESSAGE_CHANGED = "the chat template changes the message, so positions in it cannot be located"
"""Reason of a skipped example."""


@runtime_checkable
class ChatModel(Protocol):
    """The part of a language model that tokenization needs."""

    cfg: ModelConfig
    prepend_bos: bool | None

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        ...

    def chat_text(self, prompt: str) -> str:
        """The prompt in the chat template."""
        ...


@dataclass(frozen=True)
class Prompt:
    """The text that a model reads for one message of the user."""

    text: str
    message: Span | None
    """Span of the message in `text`; None where the chat template changes it."""
    shift: int = 0
    """Index of a character in `text` minus its index in the original message."""

    def located(self, span: Span) -> Span | None:
        """The span in `text` of a span of the original message; None where it was removed."""
        if self.message is None:
            return None
        start = max(span[0] + self.shift, self.message[0])
        end = min(span[1] + self.shift, self.message[1])
        return (start, end) if start < end else None


def format_prompts(model: ChatModel, messages: Sequence[str]) -> list[Prompt]:
    """The messages in the chat template where `model.chat` is set, else unchanged."""
    if not model.cfg.chat or not messages:
        return [Prompt(text, (0, len(text))) for text in messages]
    before, after = _template_parts(model)
    return [_locate_message(model.chat_text(text), text, before, after) for text in messages]


def _template_parts(model: ChatModel) -> tuple[str, str]:
    """The chat template's text before and after a message; empty where the message is repeated.

    Raises ModelError where the template leaves the message out, so that all prompts are equal.
    """
    text = model.chat_text(_SENTINEL)
    if _SENTINEL.lower() not in text.lower():
        raise ModelError(
            f"{model.cfg.name}: its chat template leaves out the user's message; set "
            "model.chat=false"
        )
    before, _, after = text.partition(_SENTINEL)
    return ("", "") if _SENTINEL in after else (before, after)


def as_chat_prompt(example: Example, prompt: Prompt) -> Example:
    """The example as a chat prompt; spans are shifted with the user's message."""
    spans = tuple(s for s in map(prompt.located, example.spans) if s is not None)
    space = IN_CHAT if example.answer_space == "auto" else example.answer_space
    return replace(
        example,
        text=prompt.text,
        prompt=prompt.text,
        message=example.text,
        spans=spans,
        answer_space=space,
    )


def _locate_message(text: str, message: str, before: str, after: str) -> Prompt:
    """The prompt, with the span of the message between the template's text before and after it.

    A template may strip white space around the message; where it changes anything else, the span is
    None.
    """
    end = len(text) - len(after)
    if text.startswith(before) and text.endswith(after) and len(before) <= end:
        middle = text[len(before) : end]
        for n in (0, len(message) - len(message.lstrip())):
            if middle in (message[n:], message[n:].rstrip()):
                return Prompt(text, (len(before), end), len(before) - n)
    return Prompt(text, None)


def tokenize_texts(model: ChatModel, texts: Sequence[str], max_length: int) -> list[TokenizedText]:
    """Tokenize texts that are read but not continued, truncated at `max_length` tokens.

    With `model.chat`, a text that begins as the chat template does (such as those that task=label
    saves) is taken for the template's output, so that no BOS is added by default.
    """
    before = _template_parts(model)[0] if model.cfg.chat else ""
    by_index: dict[int, TokenizedText] = {}
    for templated in (True, False):
        indices = [
            i for i, t in enumerate(texts) if (before != "" and t.startswith(before)) is templated
        ]
        bos = model.cfg.prepend_bos if templated else model.prepend_bos
        some = [texts[i] for i in indices]
        tokenized = tokenize(some, model.tokenizer, max_length, bos, templated=templated)
        by_index |= dict(zip(indices, tokenized, strict=True))
    return [by_index[i] for i in range(len(texts))]


def tokenize_prompts(
    model: ChatModel, prompts: Sequence[Prompt], max_length: int
) -> list[TokenizedText]:
    """Tokenize prompts that are continued, and locate the user's message in them.

    A prompt longer than `max_length` is marked `truncated` and must not be continued.
    """
    chat = model.cfg.chat
    tokenized = tokenize(
        [p.text for p in prompts],
        model.tokenizer,
        max_length,
        model.cfg.prepend_bos if chat else model.prepend_bos,
        templated=chat,
    )
    if not chat:
        return tokenized
    return [replace(t, message=p.message) for t, p in zip(tokenized, prompts, strict=True)]


_CLOSING = ",.;:?!)]\u201d\u2026"
"""Punctuation that is followed by a space, unlike opening quotation marks and brackets."""


def foil_of(example: Example) -> str | None:
    """The wrong answer in the data's column `foil`; None where it is missing."""
    foil = example.extra.get("foil")
    return None if foil is None or not str(foil) or foil != foil else str(foil)


def answer_text(example: Example, answer: str) -> str:
    """The answer as it follows `example.text`, according to the example's `answer_space`.

    `never`: unchanged. `always`: after a space, unless there is white space already. `auto`: after
    a space where one belongs between the two characters that meet: the prompt ends in a letter, a
    digit or closing punctuation, and the answer begins with a letter or digit; but not between two
    digits, nor in a script that is written without spaces. `strip`: leading white space removed.

    >>> answer_text(Example(id="1", text="The capital of France is"), "Paris")
    ' Paris'
    >>> answer_text(Example(id="2", text="19"), "87")
    '87'
    """
    if example.answer_space == IN_CHAT:
        return answer.lstrip()
    before, after = example.text[-1:], answer[:1]
    if example.answer_space == "never" or not before or not after:
        return answer
    if before.isspace() or after.isspace():
        return answer
    needs_space = example.answer_space == "always" or _needs_space(before, after)
    return f" {answer}" if needs_space else answer


def _needs_space(before: str, after: str) -> bool:
    # Korean puts a space before an answer, which is a word.
    if UNSPACED_SCRIPT.match(before) or UNSPACED_SCRIPT.match(after):
        return False
    if before.isdecimal() and after.isdecimal():
        return False
    # L, N and M: letters, digits, and the accents of decomposed letters.
    ends = unicodedata.category(before)[0] in "LNM" or before in _CLOSING
    return ends and unicodedata.category(after)[0] in "LN"


def answer_token(tokenizer: Any, example: Example, answer: str, what: str = "answer") -> int:
    """Id of the first token of `answer` after `example.text`; messages call the answer `what`.

    Raises PositionNotFound where the answer has no token, or its first token includes the end of
    the prompt.
    """
    if not answer.strip():
        raise PositionNotFound(f"{what} has no token")
    options = {"add_special_tokens": False}
    before = list(tokenizer(example.text, **options)["input_ids"])
    whole = list(tokenizer(example.text + answer_text(example, answer), **options)["input_ids"])
    if whole[: len(before)] != before or len(whole) == len(before):
        raise PositionNotFound(f"{what} merges with the prompt's last token")
    return int(whole[len(before)])


def space_note(examples: list[Example]) -> list[str]:
    """One line on the answers to which a space was prepended; empty where there are none."""
    n = sum(answer_text(e, e.answers[0]) == f" {e.answers[0]}" for e in examples if e.answers)
    if not n:
        return []
    return [
        f"a space was added before {n} answers, because one belongs between them and their prompt "
        "(dataset.answer_space=never leaves them unchanged)"
    ]
