"""Examples (texts with a group, spans, answers and a split), mentions of entities, and cells."""

import ast
import io
import json
import math
import numbers
import re
import tokenize
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from saexp.config.groups import MISSING_VALUES
from saexp.errors import DataError, counted

Span = tuple[int, int]
"""[start, end) in characters."""

_UNSPACED_RANGES = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_HANGUL_RANGES = "\u3130-\u318f\uac00-\ud7af"
UNSPACED_SCRIPT = re.compile(f"[{_UNSPACED_RANGES}]")
"""A character of a script without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer,
Japanese and Chinese."""
UNSPACED = re.compile(f"[{_UNSPACED_RANGES}{_HANGUL_RANGES}]")
"""A character that may be followed by another word without a space: those of `UNSPACED_SCRIPT`, and
Korean, which puts spaces between words but not between a word and its particle."""


def find_mentions(text: str, string: str) -> tuple[Span, ...]:
    """Spans of `string` in `text`, in order; empty where it does not occur.

    Where there are mentions at word boundaries, only these are returned: "Art" in "Arthur's Art"
    is the second one. Text and string may differ in Unicode normalisation (NFC or NFD); the spans
    are indices into `text` as it is passed.

    >>> find_mentions("Arthur's Art", "Art")
    ((9, 12),)
    """
    for form in dict.fromkeys(
        (string, unicodedata.normalize("NFC", string), unicodedata.normalize("NFD", string))
    ):
        spans = list(_occurrences(text, form)) if form else []
        whole = [(start, end) for start, end in spans if _is_whole(text, start, end)]
        if spans:
            return tuple(whole or spans)
    return ()


def _occurrences(text: str, string: str) -> Iterator[Span]:
    """Spans of `string` in `text` that do not overlap, from the left."""
    start = text.find(string)
    while start >= 0:
        end = start + len(string)
        yield start, end
        start = text.find(string, end)


def look_alike(text: str, string: str) -> bool:
    """Whether a passage of `text` looks like `string`, although other characters may encode it.

    Case, compatibility forms, invisible characters and kinds of white space are ignored; 80% of the
    characters must agree, since other alphabets have letters of the same shape.
    """
    if text.isascii() and string.isascii():
        return False
    text, string = _plain(text), _plain(string)
    windows = (text[i : i + len(string)] for i in range(len(text) - len(string) + 1))
    n_equal = (sum(a == b for a, b in zip(w, string, strict=True)) for w in windows)
    return bool(string) and max(n_equal, default=0) >= 0.8 * len(string)


def _plain(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(
        " " if c.isspace() else c for c in folded if unicodedata.category(c) not in ("Cf", "Mn")
    )


def _is_whole(text: str, start: int, end: int) -> bool:
    return not _is_inside_word(text, start) and not _is_inside_word(text, end)


def _is_inside_word(text: str, index: int) -> bool:
    """Whether a word continues across the boundary before `text[index]`."""
    if not 0 < index < len(text):
        return False
    before, after = text[index - 1], text[index]
    if unicodedata.combining(after):
        return True
    if UNSPACED.match(before) or UNSPACED.match(after):
        return False
    return _is_word(before) and _is_word(after)


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_" or unicodedata.combining(character) > 0


@dataclass(frozen=True, kw_only=True)
class Example:
    """One text to analyse, with its labels."""

    id: str
    text: str
    group: str | None = None
    """The label by which examples are contrasted."""
    split: str | None = None
    """train, val or test."""
    spans: tuple[Span, ...] = ()
    """The entity's mentions in `text`, in order; the last is used where one mention is needed."""
    entity: str | None = None
    entity_type: str | None = None
    prompt: str | None = None
    """Prompt for interventions; `text` where None."""
    message: str | None = None
    """The user's message, where `prompt` is the output of a chat template."""
    answers: tuple[str, ...] = ()
    answer_space: str = "auto"
    """How an answer follows the prompt: `dataset.answer_space`, see `tokenization.answer_text`."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """The file's other columns."""

    @property
    def question(self) -> str:
        """The prompt without a chat template."""
        return self.message or self.prompt or self.text

    @property
    def unit(self) -> str:
        """Key of the unit of observation for splits and resampling: the entity, else the example.

        It does not depend on the Unicode normalisation of the entity.
        """
        if self.entity is None:
            return self.id
        return unicodedata.normalize("NFC", f"{self.entity_type or ''}:{self.entity}")

    def as_prompt(self) -> "Example":
        """The example with its prompt as the text, and the entity's mentions in it as spans."""
        if self.prompt is None or self.prompt == self.text:
            return self
        spans = () if self.entity is None else find_mentions(self.prompt, self.entity)
        return replace(self, text=self.prompt, spans=spans)


@dataclass(frozen=True)
class Skip:
    """An example that could not be used, with the reason."""

    example_id: str
    reason: str


def skip_notes(skips: Sequence[Skip], n: int, of: str = "example") -> list[str]:
    """One line on how many of `n` examples were skipped, and why; empty where none were."""
    if not skips:
        return []
    reasons = Counter(s.reason for s in skips).most_common()
    listed = ", ".join(f"{reason} ({count:,})" for reason, count in reasons)
    verb = "was" if len(skips) == 1 else "were"
    return [f"{len(skips):,} of {counted(n, of)} {verb} skipped: {listed}"]


@dataclass(kw_only=True)
class ExampleSet:
    """A dataset: its examples, and the two groups that are contrasted (first against second)."""

    name: str
    examples: list[Example]
    groups: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    """Sentences for the report, such as how many rows were left out."""

    def __len__(self) -> int:
        return len(self.examples)


def infer_groups(
    examples: Sequence[Example], requested: Sequence[str] | None, where: str
) -> tuple[str, ...]:
    """The two labels to contrast: `requested`, else those of the data in order of appearance.

    A data set without labels has no groups. Raises DataError for one group, for a requested group
    that is missing, and for more than two groups where none are requested.
    """
    counts = Counter(e.group for e in examples if e.group is not None)
    if not counts:
        if requested:
            raise DataError(
                f"{where}: no row has a group; add a column 'group' or type dataset.group_rule="
            )
        return ()
    listed = ", ".join(f"{g} ({n})" for g, n in counts.items())
    if requested is not None:
        missing = [g for g in requested if g not in counts]
        if missing:
            raise DataError(f"{where}: no rows of group '{missing[0]}'; the groups are {listed}")
        if len(set(requested)) != 2:
            raise DataError(f"dataset.groups={list(requested)} must be two of the groups {listed}")
        return tuple(requested)
    if len(counts) == 1:
        n = sum(e.group is None for e in examples)
        without = f", and {counted(n, 'row')} without a group" if n else ""
        raise DataError(
            f"{where}: all rows are of one group, {listed}{without}; a contrast needs two"
        )
    if len(counts) > 2:
        raise DataError(
            f"{where}: {len(counts)} groups, {listed}; choose two with "
            "'dataset.groups=[first,second]'"
        )
    return tuple(counts)


def subsample(examples: list[Example], n: int | None, seed: int) -> list[Example]:
    """At most `n` random examples per group and entity type, in their order; all for None."""
    if n is None:
        return examples
    rng = np.random.default_rng([seed, 11])
    order = rng.permutation(len(examples))
    n_chosen: Counter[tuple[str | None, str | None]] = Counter()
    chosen = set()
    for index in order:
        key = (examples[index].group, examples[index].entity_type)
        if n_chosen[key] < n:
            n_chosen[key] += 1
            chosen.add(int(index))
    return [e for i, e in enumerate(examples) if i in chosen]


def assign_splits(
    examples: Sequence[Example], fractions: Mapping[str, float], seed: int
) -> list[Example]:
    """Assign a split to every example without one, the same to all examples of an entity.

    Entities are shuffled by the seed within each (group, entity type) and divided in proportion to
    `fractions` (by split), so that all splits have the same composition.
    """
    of_unit: dict[str, str | None] = {e.unit: e.split for e in examples if e.split is not None}
    strata: dict[tuple[str, str], list[str]] = {}
    for example in examples:
        if example.unit not in of_unit:
            of_unit[example.unit] = None
            key = (str(example.group), str(example.entity_type))
            strata.setdefault(key, []).append(example.unit)
    names = [name for name, fraction in fractions.items() if fraction > 0]
    bounds = np.cumsum([fractions[name] for name in names])
    for key in sorted(strata):
        units = sorted(strata[key])
        order = np.random.default_rng([seed, 7]).permutation(len(units))
        for rank, index in enumerate(order):
            quantile = (rank + 0.5) / len(units)
            position = int(np.searchsorted(bounds, quantile).clip(max=len(names) - 1))
            of_unit[units[index]] = names[position]
    return [replace(e, split=e.split or of_unit[e.unit]) for e in examples]


class MissingValues:
    """Decides which values of a table are missing, and counts them by column.

    Missing are null, NaN, the empty string, `texts`, and numbers equal to one of the `texts`; by
    default `texts` are those that `pandas.read_csv` treats as missing.
    """

    def __init__(self, texts: Sequence[str | int | float] = MISSING_VALUES) -> None:
        self.texts = {"", *map(str, texts)}
        self.numbers = {value for text in self.texts if (value := _finite(text)) is not None}
        self.counts: Counter[str] = Counter()
        """Column -> number of rows whose value is missing, or contains missing values."""
        self.spellings: dict[str, None] = {}
        """Texts, other than the empty one, that occurred as missing values."""

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, str):
            return value in self.texts
        if isinstance(value, numbers.Number) and not isinstance(value, bool):
            return value != value or value in self.numbers
        return value is None

    def cleaned(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row with None for each missing value, also inside lists and mappings; counts them."""
        cleaned = {}
        for column, value in row.items():
            cleaned[column], n_missing = self._clean(value)
            if n_missing:
                self.counts[column] += 1
        return cleaned

    def _clean(self, value: Any) -> tuple[Any, int]:
        if isinstance(value, Mapping):
            items = {k: self._clean(v) for k, v in value.items()}
            return {k: v for k, (v, _) in items.items()}, sum(n for _, n in items.values())
        if isinstance(value, list | tuple):
            cells = [self._clean(v) for v in value]
            return [v for v, _ in cells], sum(n for _, n in cells)
        if value not in self:
            return value, 0
        if isinstance(value, str) and value:
            self.spellings[value] = None
        return None, 1

    def notes(self, n_rows: int) -> list[str]:
        """One line with the counts by column; empty where no value is missing."""
        if not self.counts:
            return []
        columns = ", ".join(f"'{column}' {n:,}" for column, n in self.counts.items())
        note = f"missing values in {n_rows:,} rows, by column: {columns}"
        if self.spellings:
            texts = ", ".join(f'"{text}"' for text in self.spellings)
            note += (
                f" (of texts, {texts}; dataset.missing_values sets which texts count as missing)"
            )
        return [note]


def _finite(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def parse_list(text: str, opening: str = "[") -> list[Any] | None:
    """Parse a cell that holds a list in JSON or Python syntax; None for any other text.

    A list begins with one of the brackets in `opening`. Raises ValueError for a printed NumPy
    array, whose items are not separated.

    >>> parse_list("['Estia.', 'Estia']")
    ['Estia.', 'Estia']
    """
    text = text.strip()
    if not text or text[0] not in opening:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _python_value(text)
    return list(value) if isinstance(value, list | tuple) else None


def _python_value(text: str) -> Any:
    """The value of a Python literal, which may contain `nan`; None for any other text."""
    try:
        with warnings.catch_warnings():
            # Unknown escapes in a string literal.
            warnings.simplefilter("ignore")
            tree = ast.parse(text, mode="eval")
        value = ast.literal_eval(_NaN().visit(tree))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    kinds = [token.type for token in tokens if token.type != tokenize.NL]
    if any(a == b == tokenize.STRING for a, b in zip(kinds, kinds[1:], strict=False)):
        raise ValueError("holds a printed NumPy array; write its items as a JSON list")
    return value


class _NaN(ast.NodeTransformer):
    """Replaces the name `nan`, as Python prints NaN, by the number."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(float("nan")) if node.id == "nan" else node
