"""Prompts as a model reads them: in its chat template where it has one set, then as token ids.

The only place where a prompt becomes the ids that a model continues. In chat these are the ids of
`apply_chat_template(..., tokenize=True, add_generation_prompt=True)`, whatever BOS the SAE was
trained with; `model.prepend_bos`, typed by the user, is the one thing that changes them. Otherwise
they are the tokenizer's own, without an EOS token behind the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from saexp.config import ModelConfig
from saexp.data.examples import Example, Span
from saexp.data.tokens import TokenizedText, tokenize
from saexp.errors import ModelError

_SENTINEL = "SaexpUserMessage7261"
"""A message that no template holds and none has a reason to change."""
IN_CHAT = "strip"
"""`Example.answer_space` of a prompt in chat: the answer begins the model's turn."""
CHANGED = "the chat template changes the message, so positions in it cannot be located"
"""Reason of a skip."""


@runtime_checkable
class ChatModel(Protocol):
    """What is needed of a language model."""

    cfg: ModelConfig
    prepend_bos: bool | None

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        ...

    def chat_text(self, prompt: str) -> str:
        """The prompt in the chat template."""
        ...


@dataclass(frozen=True)
class Prompt:
    """What a model reads for one message of the user."""

    text: str
    message: Span | None
    """Where the message is in `text`; None where the chat template changes it."""
    shift: int = 0
    """Index of a character in `text` minus its index in the message as given."""

    def located(self, span: Span) -> Span | None:
        """A span of the message as given, in `text`; None where nothing of it is there."""
        if self.message is None:
            return None
        start = max(span[0] + self.shift, self.message[0])
        end = min(span[1] + self.shift, self.message[1])
        return (start, end) if start < end else None


def as_read(model: ChatModel, messages: Sequence[str]) -> list[Prompt]:
    """The messages in the chat template where `model.chat` is set, else as they are."""
    if not model.cfg.chat or not messages:
        return [Prompt(text, (0, len(text))) for text in messages]
    before, after = _frame(model)
    return [_framed(model.chat_text(text), text, before, after) for text in messages]


def _frame(model: ChatModel) -> tuple[str, str]:
    """What the chat template puts before and after a message; nothing where it repeats it.

    Raises ModelError where it leaves the message out: every prompt would be the same.
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
    """The example as the model reads it in chat: its spans are moved with the user's message."""
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
    """The message located between what the template puts before and after it.

    A template may strip white space around the message; where it changes anything else, the
    message has no location.
    """
    end = len(text) - len(after)
    if text.startswith(before) and text.endswith(after) and len(before) <= end:
        middle = text[len(before) : end]
        for n in (0, len(message) - len(message.lstrip())):
            if middle in (message[n:], message[n:].rstrip()):
                return Prompt(text, (len(before), end), len(before) - n)
    return Prompt(text, None)


def tokenize_texts(model: ChatModel, texts: Sequence[str], max_length: int) -> list[TokenizedText]:
    """Token ids of texts that are read and not continued, cut at `max_length`.

    With `model.chat`, a text that begins as the chat template does (such as those that task=label
    saves) is one of its outputs, and has the template's own BOS or none.
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
    """Token ids to continue, with the location of the user's message; see the module's docstring.

    `truncated` where a prompt is longer than `max_length`: it is not one to continue.
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
