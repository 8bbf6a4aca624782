"""Positions: which tokens of each text are analysed, and the table of them.

Indices count the unpadded token ids, special tokens included.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from saexp.config import PositionsConfig
from saexp.data import Example, Skip, Span, find_mentions
from saexp.data.rows import Chosen, PositionTable
from saexp.data.tokenization import PositionNotFound, TokenizedText, in_message, span_to_tokens
from saexp.errors import ConfigError, DataError

NO_SPAN = "no entity span"
TRUNCATED = "text longer than dataset.max_length, so its positions are not those of the whole text"
"""Reason of a skipped example with dataset.truncation=skip."""


@dataclass(frozen=True)
class Candidate:
    """A text in which positions are selected."""

    example: Example
    tokens: TokenizedText
    rng: np.random.Generator


class _Positions(ABC):
    """Base class of the registry kind `positions`."""

    counts_truncated = True
    """Whether a note counts texts that were truncated. False where a span decides which tokens are
    selected, because truncation keeps a span whole or the example is skipped."""

    def differs_if_truncated(self, tokens: TokenizedText) -> bool:  # noqa: ARG002
        """Whether truncation makes the selection differ from the one in the whole text."""
        return False

    def __init__(self, cfg: PositionsConfig) -> None:
        self.cfg = cfg

    def ordinary(self, tokens: TokenizedText) -> list[int]:
        """Indices of tokens that may be selected; in a chat prompt, those of the user's message.

        Special tokens are among them only with `positions.include_special`.
        """
        return [
            i
            for i, special in enumerate(tokens.special)
            if (self.cfg.include_special if special else in_message(tokens, i))
        ]

    def select(self, at: Candidate) -> list[int]:
        """Token indices in order. Raises PositionNotFound where there are none."""
        chosen = self.choose(at)
        if not chosen:
            raise PositionNotFound("text has no ordinary token")
        return chosen

    @abstractmethod
    def choose(self, at: Candidate) -> list[int]:
        """The selected indices, possibly none; may raise PositionNotFound."""


def _of_span(tokens: TokenizedText, span: Span, what: str) -> list[int]:
    indices = span_to_tokens(tokens, span)
    if not indices:
        raise PositionNotFound(
            f"{what} cut off by truncation" if tokens.truncated else f"{what} has no token"
        )
    return indices


def entity_tokens(example: Example, tokens: TokenizedText) -> list[int]:
    """Tokens of the entity's (last) mention; raises PositionNotFound where there is none."""
    if not example.spans:
        raise PositionNotFound(NO_SPAN)
    return _of_span(tokens, example.spans[-1], "entity")


class EntityLast(_Positions):
    """The entity's last token."""

    counts_truncated = False

    def choose(self, at: Candidate) -> list[int]:
        return entity_tokens(at.example, at.tokens)[-1:]


class EntityAll(_Positions):
    """All tokens of all mentions."""

    counts_truncated = False

    def choose(self, at: Candidate) -> list[int]:
        if not at.example.spans:
            raise PositionNotFound(NO_SPAN)
        return sorted({i for span in at.example.spans for i in _of_span(at.tokens, span, "entity")})


class EntityLastN(_Positions):
    """The entity's last n tokens, or all where it has fewer."""

    counts_truncated = False

    def choose(self, at: Candidate) -> list[int]:
        return entity_tokens(at.example, at.tokens)[-self.cfg.n :]


class AfterEntity(_Positions):
    """The n tokens after the entity."""

    counts_truncated = False

    def choose(self, at: Candidate) -> list[int]:
        last = entity_tokens(at.example, at.tokens)[-1]
        after = [i for i in self.ordinary(at.tokens) if last < i <= last + self.cfg.n]
        if len(after) < self.cfg.n:
            if at.tokens.truncated:
                raise PositionNotFound("tokens after the entity cut off by truncation")
            raise PositionNotFound(f"fewer than {self.cfg.n} tokens after the entity")
        return after


class Last(_Positions):
    """The text's last n tokens."""

    def differs_if_truncated(self, tokens: TokenizedText) -> bool:
        fewer = len(self.ordinary(tokens)) < self.cfg.n
        return tokens.truncated and (fewer or not tokens.cut_left)

    def choose(self, at: Candidate) -> list[int]:
        return self.ordinary(at.tokens)[-self.cfg.n :]


class All(_Positions):
    """Every token."""

    def choose(self, at: Candidate) -> list[int]:
        return self.ordinary(at.tokens)


class Random(_Positions):
    """n tokens at random, without repetition; all where the text has fewer."""

    def choose(self, at: Candidate) -> list[int]:
        ordinary = self.ordinary(at.tokens)
        chosen = at.rng.permutation(len(ordinary))[: self.cfg.n]
        return sorted(ordinary[i] for i in chosen)


class Middle(_Positions):
    """The middle token, the earlier of two."""

    def choose(self, at: Candidate) -> list[int]:
        ordinary = self.ordinary(at.tokens)
        return ordinary[(len(ordinary) - 1) // 2 :][:1]


class Indices(_Positions):
    """`positions.indices` into the tokens that may be selected; negative: from the end."""

    def __init__(self, cfg: PositionsConfig) -> None:
        super().__init__(cfg)
        if not cfg.indices:
            raise ConfigError("positions=indices needs indices: type 'positions.indices=[0,-1]'")
        self.indices = list(cfg.indices)

    def differs_if_truncated(self, tokens: TokenizedText) -> bool:
        shifted = [index >= 0 if tokens.cut_left else index < 0 for index in self.indices]
        return tokens.truncated and any(shifted)

    def choose(self, at: Candidate) -> list[int]:
        ordinary = self.ordinary(at.tokens)
        for index in self.indices:
            if not -len(ordinary) <= index < len(ordinary):
                if at.tokens.truncated:
                    raise PositionNotFound("index cut off by truncation")
                raise PositionNotFound(f"index {index} outside the text")
        return sorted({ordinary[i] for i in self.indices})


class Substring(_Positions):
    """All tokens of the last mention of `positions.substring`, if possible at word boundaries."""

    counts_truncated = False

    def __init__(self, cfg: PositionsConfig) -> None:
        super().__init__(cfg)
        if not cfg.substring:
            raise ConfigError("positions=substring needs a string: type positions.substring=TEXT")
        self.substring = cfg.substring

    def choose(self, at: Candidate) -> list[int]:
        first, end = at.tokens.message or (0, len(at.example.text))
        mentions = find_mentions(at.example.text[first:end], self.substring)
        if not mentions:
            raise PositionNotFound("substring not found")
        start, stop = mentions[-1]
        return _of_span(at.tokens, (first + start, first + stop), "substring")


class Continuation(_Positions):
    """All tokens of the continuation, the text after the prompt, which is the example's last span.

    Examples whose continuation is truncated are skipped.
    """

    counts_truncated = False

    def choose(self, at: Candidate) -> list[int]:
        if not at.example.spans:
            raise PositionNotFound("no continuation span")
        return _of_span(at.tokens, at.example.spans[-1], "continuation")


def selected(positions: Any, at: Candidate) -> list[int]:
    """Indices that a positions object, possibly a plugin's, selects in a text.

    Raises PositionNotFound where it selects none, DataError for an index outside the text.
    """
    chosen = [int(index) for index in positions.select(at)]
    if not chosen:
        raise PositionNotFound("no position chosen")
    outside = [index for index in chosen if not 0 <= index < len(at.tokens)]
    if outside:
        raise DataError(
            f"positions chose index {outside[0]} in a text of {len(at.tokens)} tokens; "
            "`select` must return indices from 0 on"
        )
    return chosen


def resolve_positions(
    examples: Sequence[Example],
    tokenized: Sequence[TokenizedText],
    positions: Any,
    tokenizer: Any,
    seed: int,
    truncation: str = "skip",
) -> PositionTable:
    """Resolve the positions of all examples: one row per position, one skip per example without.

    `truncation`: a truncated text in which other positions would be selected than in the whole text
    is skipped (`skip`), or is read as if it ended there (`keep`). Raises DataError where no example
    has a position.
    """
    # Positions of a plugin may not derive from `_Positions`.
    differs = getattr(positions, "differs_if_truncated", lambda _: False)
    counts_truncated = getattr(positions, "counts_truncated", True)
    truncated_texts: set[str] = set()
    text_ids: dict[str, int] = {}
    texts: list[TokenizedText] = []
    skips: list[Skip] = []
    chosen: list[Chosen] = []
    for number, (example, tokens) in enumerate(zip(examples, tokenized, strict=True)):
        candidate = Candidate(example, tokens, np.random.default_rng([seed, number]))
        try:
            if truncation == "skip" and differs(tokens):
                raise PositionNotFound(TRUNCATED)
            indices = selected(positions, candidate)
        except PositionNotFound as reason:
            skips.append(Skip(example.id, str(reason)))
            continue
        if tokens.truncated and counts_truncated:
            truncated_texts.add(example.text)
        if example.text not in text_ids:
            text_ids[example.text] = len(texts)
            texts.append(tokens)
        n_entity = len(span_to_tokens(tokens, example.spans[-1])) if example.spans else 0
        chosen.append(Chosen(number, example, text_ids[example.text], indices, n_entity))
    if not chosen:
        raise _no_position(skips)
    return PositionTable(
        chosen,
        texts,
        skips,
        tokenizer,
        n_truncated=len(truncated_texts),
        n_examples=len(examples),
    )


def _no_position(skips: Sequence[Skip]) -> DataError:
    reasons = sorted({s.reason for s in skips}) or ["the data set is empty"]
    hint = ""
    if all(s.reason == NO_SPAN for s in skips) and skips:
        hint = "; give the rows an entity, or type positions=last intervention.where=last"
    if any(s.reason == TRUNCATED for s in skips):
        hint = "; type a larger dataset.max_length=, or dataset.truncation=keep"
    return DataError(
        f"none of {len(skips)} texts has the requested position: {'; '.join(reasons)}{hint}"
    )
