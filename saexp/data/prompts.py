"""Prompts as token ids, with the chat template where `model.chat` is set, and answer tokens."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from saexp.config import ModelConfig
from saexp.data.examples import UNSPACED_SCRIPT, Example, Span
from saexp.data.positions import PositionNotFound
from saexp.data.tokenization import TokenizedText, tokenize
from saexp.errors import ModelError

_SENTINEL = "SaexpUserMessage7261"
"""A message that no template contains and none has a reason to change."""
IN_CHAT = "strip"
"""`Example.answer_space` of a chat prompt: the answer begins the model's turn."""
CHANGED = "the chat template changes the message, so positions in it cannot be located"
"""Reason of a skip."""


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
    """Index of a character in `text` minus its index in the message as given."""

    def located(self, span: Span) -> Span | None:
        """The span of `text` for a span of the original message; None where it was removed."""
        if self.message is None:
            return None
        start = max(span[0] + self.shift, self.message[0])
        end = min(span[1] + self.shift, self.message[1])
        return (start, end) if start < end else None


def as_read(model: ChatModel, messages: Sequence[str]) -> list[Prompt]:
    """The messages in the chat template where `model.chat` is set, else unchanged."""
    if not model.cfg.chat or not messages:
        return [Prompt(text, (0, len(text))) for text in messages]
    before, after = _frame(model)
    return [_framed(model.chat_text(text), text, before, after) for text in messages]


def _frame(model: ChatModel) -> tuple[str, str]:
    """The text that the chat template puts before and after a message; empty where it repeats it.

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


def in_template(example: Example, prompt: Prompt) -> Example:
    """The example as a chat prompt; spans are moved with the user's message."""
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


def _framed(text: str, message: str, before: str, after: str) -> Prompt:
    """Locate the message between the template's own text before and after it.

    A template may strip white space around the message; where it changes anything else, the message
    has no location.
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

    With `model.chat`, a text that begins like the chat template (such as those that task=label
    saves) counts as its output, and begins with the template's own BOS or none.
    """
    before = _frame(model)[0] if model.cfg.chat else ""
    done: dict[int, TokenizedText] = {}
    for templated in (True, False):
        chosen = [
            i for i, t in enumerate(texts) if (before != "" and t.startswith(before)) is templated
        ]
        bos = model.cfg.prepend_bos if templated else model.prepend_bos
        some = [texts[i] for i in chosen]
        found = tokenize(some, model.tokenizer, max_length, bos, templated=templated)
        done |= dict(zip(chosen, found, strict=True))
    return [done[i] for i in range(len(texts))]


def tokenize_prompts(
    model: ChatModel, prompts: Sequence[Prompt], max_length: int
) -> list[TokenizedText]:
    """Tokenize prompts that are continued, and locate the user's message in them.

    A prompt longer than `max_length` is marked `truncated` and must not be continued.
    """
    chat = model.cfg.chat
    found = tokenize(
        [p.text for p in prompts],
        model.tokenizer,
        max_length,
        model.cfg.prepend_bos if chat else model.prepend_bos,
        templated=chat,
    )
    if not chat:
        return found
    return [replace(t, message=p.message) for t, p in zip(found, prompts, strict=True)]


_CLOSING = ",.;:?!)]\u201d\u2026"
"""Punctuation that is followed by a space, unlike opening quotation marks and brackets."""


def foil_of(example: Example) -> str | None:
    """The wrong answer in the column `foil` of the data; None where it is missing."""
    foil = example.extra.get("foil")
    return None if foil is None or not str(foil) or foil != foil else str(foil)


def answer_text(example: Example, answer: str) -> str:
    """The answer as it follows `example.text`, by the example's `answer_space`.

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
    wanted = example.answer_space == "always" or _belongs_between(before, after)
    return f" {answer}" if wanted else answer


def _belongs_between(before: str, after: str) -> bool:
    # Korean puts a space before an answer, which is a word.
    if UNSPACED_SCRIPT.match(before) or UNSPACED_SCRIPT.match(after):
        return False
    if before.isdecimal() and after.isdecimal():
        return False
    # L, N and M: letters, digits, and the accents of decomposed letters.
    ends = unicodedata.category(before)[0] in "LNM" or before in _CLOSING
    return ends and unicodedata.category(after)[0] in "LN"


def answer_token(tokenizer: Any, example: Example, answer: str, what: str = "answer") -> int:
    """Id of the first token of `answer` after `example.text`; `what` is its name in reasons.

    Raises PositionNotFound where the answer has no token, or shares its first with the prompt.
    """
    if not answer.strip():
        raise PositionNotFound(f"{what} has no token")
    read = {"add_special_tokens": False}
    before = list(tokenizer(example.text, **read)["input_ids"])
    whole = list(tokenizer(example.text + answer_text(example, answer), **read)["input_ids"])
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
