"""Which prompts an intervention runs on, and which of their tokens are changed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from saexp import registry
from saexp.config import InterventionConfig, PositionsConfig
from saexp.data.examples import Example
from saexp.data.positions import Candidate, Unplaced, entity_tokens, selected
from saexp.data.prompts import CHANGED, as_read, in_template, tokenize_prompts
from saexp.data.tokens import TokenizedText
from saexp.models.loading import LanguageModel

_ANYWHERE = ("all", "prompt", "last", "generated")
"""Values of `intervention.where` that do not depend on where the user's message is."""


@dataclass(frozen=True)
class Placed:
    """A prompt, its tokens, and those that are changed."""

    example: Example
    tokens: TokenizedText
    positions: tuple[int, ...]


@dataclass
class Prompts:
    """Prompts by group, and why others are left out."""

    of_group: dict[str, list[Placed]] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)

    def all(self) -> list[Placed]:
        """Every prompt, group by group."""
        return [p for placed in self.of_group.values() for p in placed]

    def on(self, group: str) -> list[Placed]:
        """Those that a condition on this group is tried on; `all`: every prompt."""
        return self.all() if group == "all" else self.of_group.get(group, [])

    def of_split(self, split: str) -> "Prompts":
        """Those of one split; groups without any are left out."""
        found = {
            group: [p for p in placed if p.example.split == split]
            for group, placed in self.of_group.items()
        }
        return Prompts({group: placed for group, placed in found.items() if placed})

    def notes(self, what: str = "prompts not steered") -> list[str]:
        """One line per reason."""
        return [f"{n} {what}: {why}" for why, n in sorted(self.reasons.items())]


def edited_positions(
    cfg: InterventionConfig, example: Example, tokens: TokenizedText, seed: int = 0
) -> tuple[int, ...]:
    """Prompt tokens that `intervention.where` stands for.

    A place of its own (PLACES in the config) or any positions option, whose settings are in
    `intervention.where_options`. Raises Unplaced where the prompt has none.
    """
    where = cfg.where
    ordinary = [i for i, special in enumerate(tokens.special) if not special]
    if where in ("all", "prompt"):
        return tuple(ordinary)
    if where == "last":
        return (len(tokens) - 1,)
    if where == "generated":
        return ()
    if where in ("entity", "entity_last", "entity_to_end"):
        entity = entity_tokens(example, tokens)
        if where == "entity":
            return tuple(entity)
        return (entity[-1],) if where == "entity_last" else tuple(range(entity[-1], len(tokens)))
    positions = registry.build("positions", PositionsConfig(name=where, **cfg.where_options))
    return tuple(selected(positions, Candidate(example, tokens, np.random.default_rng(seed))))


def choose_prompts(examples: Sequence[Example], n: int, seed: int) -> list[Example]:
    """At most `n` examples per group, spread evenly over entity types, a seeded choice."""
    rng = np.random.default_rng([seed, 31])
    chosen: list[Example] = []
    for group in sorted({str(e.group) for e in examples}):
        of_type: dict[str, list[Example]] = {}
        for index in rng.permutation(len(examples)):
            example = examples[index]
            if str(example.group) == group:
                of_type.setdefault(str(example.entity_type), []).append(example)
        queues = [of_type[t] for t in sorted(of_type)]
        turn = [q[i] for i in range(max(map(len, queues))) for q in queues if i < len(q)]
        chosen += turn[:n]
    return chosen


def placed_prompts(
    examples: Sequence[Example],
    model: LanguageModel,
    cfg: InterventionConfig,
    max_length: int,
    ask: Callable[[Example], Example] | None = None,
) -> Prompts:
    """Prompts in the model's chat template where it has one, tokenised, with their positions.

    `ask` makes the prompt from an example; its own prompt otherwise. What cannot be placed is
    counted in `reasons`.
    """
    found = Prompts()
    asked: list[Example] = []
    for example in examples:
        try:
            asked.append(ask(example) if ask else example.as_prompt())
        except Unplaced as reason:
            found.reasons[str(reason)] = found.reasons.get(str(reason), 0) + 1
    prompts = as_read(model, [e.text for e in asked])
    tokenized = tokenize_prompts(model, prompts, max_length)
    for number, (own, prompt, tokens) in enumerate(zip(asked, prompts, tokenized, strict=True)):
        try:
            if tokens.truncated:
                raise Unplaced("prompt longer than dataset.max_length")
            if prompt.message is None and cfg.where not in _ANYWHERE:
                raise Unplaced(CHANGED)
            example = in_template(own, prompt) if model.cfg.chat else own
            places = edited_positions(cfg, example, tokens, cfg.seed + number)
        except Unplaced as reason:
            found.reasons[str(reason)] = found.reasons.get(str(reason), 0) + 1
            continue
        found.of_group.setdefault(str(example.group), []).append(Placed(example, tokens, places))
    return found
