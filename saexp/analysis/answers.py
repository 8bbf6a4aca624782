"""Prompts with the first token of their answers (`data.answer_tokens`)."""

from collections.abc import Sequence
from dataclasses import dataclass

from saexp.data.answer_tokens import answer_token, foil_of
from saexp.data.examples import Example, Skip
from saexp.data.positions import Unplaced
from saexp.data.prompts import as_read, in_template, tokenize_prompts
from saexp.data.tokens import TokenizedText
from saexp.models.loading import LanguageModel


@dataclass(frozen=True)
class Question:
    """One prompt, and the tokens that are compared after it."""

    example: Example
    """With the prompt that the model reads, in the chat template where it has one set, as text."""
    tokens: TokenizedText
    answer_id: int
    foil_id: int | None
    foil_reason: str | None = None
    """Why a foil that the data has is not used."""


def questions(
    examples: Sequence[Example], model: LanguageModel, max_length: int
) -> tuple[list[Question], list[Skip]]:
    """Every example that can be asked, and why the others can't; the first answer counts."""
    own, skips = [], []
    for example in examples:
        if example.answers:
            own.append(example.as_prompt())
        else:
            skips.append(Skip(example.id, "no answer"))
    prompts = as_read(model, [e.text for e in own])
    found = []
    for example, prompt, tokens in zip(
        own, prompts, tokenize_prompts(model, prompts, max_length), strict=True
    ):
        read = in_template(example, prompt) if model.cfg.chat else example
        try:
            if tokens.truncated:
                raise Unplaced(f"prompt longer than {max_length} tokens")
            answer_id = answer_token(model.tokenizer, read, read.answers[0])
        except Unplaced as reason:
            skips.append(Skip(example.id, str(reason)))
            continue
        found.append(Question(read, tokens, answer_id, *_foil(model, read, answer_id)))
    return found, skips


def _foil(model: LanguageModel, read: Example, answer_id: int) -> tuple[int | None, str | None]:
    """The foil's first token, or why there is none."""
    foil = foil_of(read)
    if foil is None:
        return None, None
    try:
        foil_id = answer_token(model.tokenizer, read, foil, "foil")
    except Unplaced as reason:
        return None, str(reason)
    if foil_id == answer_id:
        return None, "foil begins with the answer's first token"
    return foil_id, None
