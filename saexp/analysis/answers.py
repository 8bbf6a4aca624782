"""Prompts with the first token of their answers, as a tokenizer would go on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from saexp.data.examples import Example, Skip
from saexp.data.tokens import TokenizedText, tokenize
from saexp.models.loading import LanguageModel

_ROOM = 8
"""Tokens beyond max_length that are looked at for the answer."""


class _Merged(Exception):
    """An answer whose beginning is no token of its own; the message is the reason."""


@dataclass(frozen=True)
class Question:
    """One prompt, and the tokens that are compared after it."""

    example: Example
    prompt: str
    """What the model reads: in the chat template where the model has one set."""
    tokens: TokenizedText
    answer_id: int
    foil_id: int | None
    foil_reason: str | None = None
    """Why a foil that the data has is not used."""


def foil_of(example: Example) -> str | None:
    """The wrong answer in the data's column `foil`."""
    foil = example.extra.get("foil")
    return None if foil is None or not str(foil) or foil != foil else str(foil)


def questions(
    examples: Sequence[Example], model: LanguageModel, max_length: int
) -> tuple[list[Question], list[Skip]]:
    """Every example that can be asked, and why the others can't.

    The first answer token is the one that follows the prompt's own tokens when prompt and answer
    are tokenised as one text. Where the prompt's tokens change by that (its last one merges with
    the answer), the example is a skip: the model would be asked something else. Of several
    accepted answers the first counts. In chat the answer begins the model's turn, so white space
    before it is dropped.
    """
    chat = model.cfg.chat
    asked, skips = [], []
    for example in examples:
        if example.answers:
            asked.append(example)
        else:
            skips.append(Skip(example.id, "no answer"))
    texts = [e.as_prompt().text for e in asked]
    prompts = [model.chat_text(t) if chat else t for t in texts]
    foils = [foil_of(e) for e in asked]

    def after(prompt: str, word: str) -> str:
        return prompt + (word.lstrip() if chat else word)

    def read(texts: list[str], longest: int) -> list[TokenizedText]:
        return tokenize(texts, model.tokenizer, longest, model.prepend_bos)

    longest = max_length + _ROOM
    alone = [_bare(t) for t in read(prompts, max_length)]
    answered = read([after(p, e.answers[0]) for p, e in zip(prompts, asked, strict=True)], longest)
    with_foil = iter(
        read([after(p, f) for p, f in zip(prompts, foils, strict=True) if f is not None], longest)
    )
    found = []
    for example, prompt, tokens, full, foil in zip(
        asked, prompts, alone, answered, foils, strict=True
    ):
        other = next(with_foil) if foil is not None else None
        if tokens.truncated:
            skips.append(Skip(example.id, f"prompt longer than {max_length} tokens"))
            continue
        try:
            answer_id = _next_token(tokens, full, "answer")
        except _Merged as reason:
            skips.append(Skip(example.id, str(reason)))
            continue
        foil_id, why = _foil_token(tokens, other, answer_id)
        found.append(Question(example, prompt, tokens, answer_id, foil_id, why))
    return found, skips


def joins_without_space(question: Question) -> bool:
    """Whether the answer is glued to the prompt's last word, which is rarely what was meant."""
    answer, prompt = question.example.answers[0], question.prompt
    return bool(prompt) and prompt[-1].isalnum() and answer[:1].isalnum()


def _bare(tokens: TokenizedText) -> TokenizedText:
    """Without special tokens that the tokenizer puts behind a text."""
    end = len(tokens)
    while end > 1 and tokens.special[end - 1] and tokens.offsets[end - 1] == (0, 0):
        end -= 1
    return replace(
        tokens,
        ids=tokens.ids[:end],
        offsets=tokens.offsets[:end],
        special=tokens.special[:end],
    )


def _next_token(prompt: TokenizedText, full: TokenizedText, what: str) -> int:
    n = len(prompt)
    if full.ids[:n] != prompt.ids:
        raise _Merged(f"{what} merges with the prompt's last token")
    if len(_bare(full)) <= n:
        raise _Merged(f"{what} has no token")
    return full.ids[n]


def _foil_token(
    prompt: TokenizedText, full: TokenizedText | None, answer_id: int
) -> tuple[int | None, str | None]:
    if full is None:
        return None, None
    try:
        foil_id = _next_token(prompt, full, "foil")
    except _Merged as reason:
        return None, str(reason)
    if foil_id == answer_id:
        return None, "foil begins with the answer's first token"
    return foil_id, None
