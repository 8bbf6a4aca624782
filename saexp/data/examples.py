"""Examples: texts with a group, character spans, answers and a split."""

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from saexp.data.mentions import Span, find_mentions
from saexp.errors import DataError
from saexp.wording import counted


@dataclass(frozen=True, kw_only=True)
class Example:
    """One text to analyse, and what is known about it."""

    id: str
    text: str
    group: str | None = None
    """Label that is contrasted."""
    split: str | None = None
    """train, val or test."""
    spans: tuple[Span, ...] = ()
    """The entity's mentions in `text`, in order; what needs one mention reads the last."""
    entity: str | None = None
    entity_type: str | None = None
    prompt: str | None = None
    """What interventions run on; `text` where None."""
    answers: tuple[str, ...] = ()
    answer_space: str = "auto"
    """How an answer follows the prompt, see `data.answer_tokens` (config: dataset.answer_space)."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """The file's other columns."""

    @property
    def unit(self) -> str:
        """What is split, resampled and counted as one observation: the entity, else the example.

        An entity is one unit in whichever Unicode normalisation its rows have it.
        """
        if self.entity is None:
            return self.id
        return unicodedata.normalize("NFC", f"{self.entity_type or ''}:{self.entity}")

    def as_prompt(self) -> "Example":
        """This example with its prompt as the text, and the entity's mentions there as spans."""
        if self.prompt is None or self.prompt == self.text:
            return self
        spans = () if self.entity is None else find_mentions(self.prompt, self.entity)
        return replace(self, text=self.prompt, spans=spans)


@dataclass(frozen=True)
class Skip:
    """An example that could not be used, and why."""

    example_id: str
    reason: str


def skip_notes(skips: Sequence[Skip], n: int, of: str = "example") -> list[str]:
    """One line on those of `n` examples that could not be used; nothing where all were."""
    if not skips:
        return []
    reasons = Counter(s.reason for s in skips).most_common()
    told = ", ".join(f"{reason} ({count:,})" for reason, count in reasons)
    verb = "was" if len(skips) == 1 else "were"
    return [f"{len(skips):,} of {counted(n, of)} {verb} skipped: {told}"]


@dataclass(kw_only=True)
class ExampleSet:
    """A dataset: its examples, and the two groups that are contrasted (first against second)."""

    name: str
    examples: list[Example]
    groups: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    """What a reader of a report must know of it, such as what was left out."""

    def __len__(self) -> int:
        return len(self.examples)


def infer_groups(
    examples: Sequence[Example], wanted: Sequence[str] | None, where: str
) -> tuple[str, ...]:
    """The two labels to contrast: the ones wanted, else the ones found, in order of appearance.

    A data set without labels has no groups. Raises DataError for one group, a wanted group that is
    missing, or more than two where none are named.
    """
    counts = Counter(e.group for e in examples if e.group is not None)
    if not counts:
        if wanted:
            raise DataError(f"{where}: no row has a group; add a column 'group' or set group_rule")
        return ()
    listed = ", ".join(f"{g} ({n})" for g, n in counts.items())
    if wanted is not None:
        missing = [g for g in wanted if g not in counts]
        if missing:
            raise DataError(f"{where}: no rows of group '{missing[0]}'; the groups are {listed}")
        if len(set(wanted)) != 2:
            raise DataError(f"dataset.groups={list(wanted)} must name two groups out of {listed}")
        return tuple(wanted)
    if len(counts) == 1:
        n = sum(e.group is None for e in examples)
        without = f", and {counted(n, 'row')} without a group" if n else ""
        raise DataError(
            f"{where}: all rows are of one group, {listed}{without}; a contrast needs two"
        )
    if len(counts) > 2:
        raise DataError(
            f"{where}: {len(counts)} groups, {listed}; say which two with "
            "'dataset.groups=[first,second]'"
        )
    return tuple(counts)


def choose(examples: list[Example], n: int | None, seed: int) -> list[Example]:
    """At most `n` examples per group and entity type, a seeded choice, order kept."""
    if n is None:
        return examples
    rng = np.random.default_rng([seed, 11])
    order = rng.permutation(len(examples))
    taken: Counter[tuple[str | None, str | None]] = Counter()
    keep = set()
    for index in order:
        key = (examples[index].group, examples[index].entity_type)
        if taken[key] < n:
            taken[key] += 1
            keep.add(int(index))
    return [e for i, e in enumerate(examples) if i in keep]


def assign_splits(
    examples: Sequence[Example], shares: Mapping[str, float], seed: int
) -> list[Example]:
    """Give every example without a split one, so that all examples of an entity share it.

    Entities are shuffled by the seed within each (group, entity type), then cut by the shares, so
    the splits have the same make-up.
    """
    of_unit: dict[str, str | None] = {e.unit: e.split for e in examples if e.split is not None}
    strata: dict[tuple[str, str], list[str]] = {}
    for example in examples:
        if example.unit not in of_unit:
            of_unit[example.unit] = None
            key = (str(example.group), str(example.entity_type))
            strata.setdefault(key, []).append(example.unit)
    names = [n for n, share in shares.items() if share > 0]
    bounds = np.cumsum([shares[n] for n in names])
    for key in sorted(strata):
        units = sorted(strata[key])
        order = np.random.default_rng([seed, 7]).permutation(len(units))
        for rank, index in enumerate(order):
            share = (rank + 0.5) / len(units)
            of_unit[units[index]] = names[
                int(np.searchsorted(bounds, share).clip(max=len(names) - 1))
            ]
    return [replace(e, split=e.split or of_unit[e.unit]) for e in examples]
