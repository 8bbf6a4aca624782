"""Selects the tokens of each text that are analysed, and tabulates them.

Indices count the unpadded token ids, special tokens included.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from saexp.config import PositionsConfig
from saexp.data.examples import Example, Skip, Span, find_mentions
from saexp.data.tokenization import PositionNotFound, TokenizedText, in_message, span_to_tokens
from saexp.errors import ConfigError, DataError

OWN_COLUMNS = (
    "row",
    "example_id",
    "unit",
    "group",
    "split",
    "entity",
    "entity_type",
    "text",
    "text_id",
    "token_index",
    "token_id",
    "token",
    "n_entity_tokens",
)
"""Columns of every rows table. A data file's own column of such a name becomes `<name>_in_file`."""


NO_SPAN = "no entity span"
CUT = "text longer than dataset.max_length, so its positions are not those of the whole text"
"""Reason of a skipped example with dataset.truncation=skip."""


@dataclass(frozen=True)
class Candidate:
    """A text in which positions are selected."""

    example: Example
    tokens: TokenizedText
    rng: np.random.Generator


class _Positions(ABC):
    """Base class of the registry kind `positions`."""

    reads_cut = True
    """Whether a note reports texts that were cut. False where a span says which tokens are read: it
    is there whole or not at all."""

    def moved(self, tokens: TokenizedText) -> bool:  # noqa: ARG002
        """Whether other tokens are chosen in this truncated text than in the whole text."""
        return False

    def __init__(self, cfg: PositionsConfig) -> None:
        self.cfg = cfg

    def ordinary(self, tokens: TokenizedText) -> list[int]:
        """Indices that may be chosen; in a chat prompt, those of the user's message.

        Special tokens are included only with `positions.include_special`.
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
        """The indices that this kind of position stands for; may raise PositionNotFound."""


def _of_span(tokens: TokenizedText, span: Span, what: str) -> list[int]:
    found = span_to_tokens(tokens, span)
    if not found:
        raise PositionNotFound(
            f"{what} cut off by truncation" if tokens.truncated else f"{what} has no token"
        )
    return found


def entity_tokens(example: Example, tokens: TokenizedText) -> list[int]:
    """Tokens of the entity's (last) mention; raises PositionNotFound where there is none."""
    if not example.spans:
        raise PositionNotFound(NO_SPAN)
    return _of_span(tokens, example.spans[-1], "entity")


class EntityLast(_Positions):
    """The entity's last token."""

    reads_cut = False

    def choose(self, at: Candidate) -> list[int]:
        return entity_tokens(at.example, at.tokens)[-1:]


class EntityAll(_Positions):
    """All tokens of all mentions."""

    reads_cut = False

    def choose(self, at: Candidate) -> list[int]:
        if not at.example.spans:
            raise PositionNotFound(NO_SPAN)
        return sorted({i for span in at.example.spans for i in _of_span(at.tokens, span, "entity")})


class EntityLastN(_Positions):
    """The entity's last n tokens, or all where it has fewer."""

    reads_cut = False

    def choose(self, at: Candidate) -> list[int]:
        return entity_tokens(at.example, at.tokens)[-self.cfg.n :]


class AfterEntity(_Positions):
    """The n tokens after the entity."""

    reads_cut = False

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

    def moved(self, tokens: TokenizedText) -> bool:
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
        there = self.ordinary(at.tokens)
        chosen = at.rng.permutation(len(there))[: self.cfg.n]
        return sorted(there[i] for i in chosen)


class Middle(_Positions):
    """The middle token, the earlier of two."""

    def choose(self, at: Candidate) -> list[int]:
        there = self.ordinary(at.tokens)
        return there[(len(there) - 1) // 2 :][:1]


class Indices(_Positions):
    """Given indices into the tokens that may be chosen; negative ones count from the end."""

    def __init__(self, cfg: PositionsConfig) -> None:
        super().__init__(cfg)
        if not cfg.indices:
            raise ConfigError("positions=indices needs indices: type 'positions.indices=[0,-1]'")
        self.indices = list(cfg.indices)

    def moved(self, tokens: TokenizedText) -> bool:
        moved = [index >= 0 if tokens.cut_left else index < 0 for index in self.indices]
        return tokens.truncated and any(moved)

    def choose(self, at: Candidate) -> list[int]:
        there = self.ordinary(at.tokens)
        for index in self.indices:
            if not -len(there) <= index < len(there):
                if at.tokens.truncated:
                    raise PositionNotFound("index cut off by truncation")
                raise PositionNotFound(f"index {index} outside the text")
        return sorted({there[i] for i in self.indices})


class Substring(_Positions):
    """All tokens of the last mention of a given string, at word boundaries where there is one."""

    reads_cut = False

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
    """All tokens of the continuation: what follows the prompt, marked by the example's span.

    Where truncation cuts it, the example is left out rather than measured in part.
    """

    reads_cut = False

    def choose(self, at: Candidate) -> list[int]:
        if not at.example.spans:
            raise PositionNotFound("no continuation span")
        return _of_span(at.tokens, at.example.spans[-1], "continuation")


def selected(positions: Any, at: Candidate) -> list[int]:
    """Indices that a positions object, possibly a plugin's, selects in a text, checked.

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


@dataclass(frozen=True, eq=False)
class PositionTable:
    """The analysed positions, one row each, and their texts."""

    rows: pd.DataFrame
    """OWN_COLUMNS, then the file's other columns."""
    texts: list[TokenizedText]
    """Distinct texts; `text_id` counts them."""
    skips: list[Skip]
    n_cut: int = 0
    """Texts that were truncated at the maximum length and are read up to there."""
    n_examples: int = 0
    """Examples of the data set, skipped ones included."""
    example_index: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """`[n_rows]`: index of each row's example in the data set."""


def place(
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
    # A plugin's positions need not derive from `_Positions`.
    moved = getattr(positions, "moved", lambda _: False)
    read_to_the_cut: set[str] = set()
    rows: list[dict[str, Any]] = []
    texts: dict[str, int] = {}
    distinct: list[TokenizedText] = []
    skips: list[Skip] = []
    example_index: list[int] = []
    for number, (example, tokens) in enumerate(zip(examples, tokenized, strict=True)):
        try:
            if truncation == "skip" and moved(tokens):
                raise PositionNotFound(CUT)
            indices = selected(
                positions, Candidate(example, tokens, np.random.default_rng([seed, number]))
            )
        except PositionNotFound as reason:
            skips.append(Skip(example.id, str(reason)))
            continue
        if tokens.truncated and getattr(positions, "reads_cut", True):
            read_to_the_cut.add(example.text)
        if example.text not in texts:
            texts[example.text] = len(distinct)
            distinct.append(tokens)
        n_entity = len(span_to_tokens(tokens, example.spans[-1])) if example.spans else 0
        for index in indices:
            example_index.append(number)
            rows.append(
                {
                    "row": len(rows),
                    "example_id": example.id,
                    "unit": example.unit,
                    "group": example.group,
                    "split": example.split,
                    "entity": example.entity,
                    "entity_type": example.entity_type,
                    "text": example.text,
                    "text_id": texts[example.text],
                    "token_index": index,
                    "token_id": tokens.ids[index],
                    # Unknown for an entity that was cut off.
                    "n_entity_tokens": n_entity or None,
                    **{_free_name(k): _plain(v) for k, v in example.extra.items()},
                }
            )
    if not rows:
        reasons = sorted({s.reason for s in skips}) or ["the data set is empty"]
        hint = ""
        if all(s.reason == NO_SPAN for s in skips) and skips:
            hint = "; give the rows an entity, or type positions=last intervention.where=last"
        if any(s.reason == CUT for s in skips):
            hint = "; type a larger dataset.max_length=, or dataset.truncation=keep"
        raise DataError(
            f"none of {len(skips)} texts has the requested position: {'; '.join(reasons)}{hint}"
        )
    table = pd.DataFrame(rows)
    table.insert(11, "token", tokenizer.convert_ids_to_tokens(table["token_id"].tolist()))
    for column in ("group", "split", "entity", "entity_type"):
        table[column] = table[column].astype("string")
    table["n_entity_tokens"] = table["n_entity_tokens"].astype("Int64")
    for column in table.columns[len(OWN_COLUMNS) :]:
        table[column] = _one_type(table[column])
    return PositionTable(
        table, distinct, skips, len(read_to_the_cut), len(examples), np.asarray(example_index)
    )


def _free_name(column: str) -> str:
    return f"{column}_in_file" if column in OWN_COLUMNS else column


def _one_type(column: pd.Series) -> pd.Series:
    """The column; as text where it mixes numbers, booleans and text, or has huge integers."""
    if column.dtype != object or all(isinstance(v, bool) for v in column.dropna()):
        return column
    return column.map(str, na_action="ignore").astype("string")


def _plain(value: Any) -> Any:
    """A value of the data file for parquet: nested values become text."""
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
