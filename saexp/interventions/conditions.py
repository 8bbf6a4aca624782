"""The conditions of an intervention and the prompts it runs on."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saexp import registry
from saexp.config import InterventionConfig, PositionsConfig, parse_coefficients
from saexp.config.groups import SELECTED
from saexp.data import Example
from saexp.data.positions import Candidate, entity_tokens, selected
from saexp.data.tokenization import (
    MESSAGE_CHANGED,
    PositionNotFound,
    TokenizedText,
    as_chat_prompt,
    format_prompts,
    tokenize_prompts,
)
from saexp.errors import ConfigError, InterventionError
from saexp.interventions.directions import (
    LatentSet,
    LatentStatistics,
    Sets,
    layered_sets,
    stream_direction,
)
from saexp.interventions.stream_edits import Op
from saexp.models import Hookpoint
from saexp.models.loading import LanguageModel


@dataclass(frozen=True)
class Condition:
    """One intervention on prompts of one group, at every coefficient."""

    name: str
    role: str
    """single, group, direction, place or control."""
    direction: str
    """Group for which the latents are selected, or towards which the prompts are moved."""
    prompts: str
    """Group on whose prompts it is run."""
    latents: tuple[int, ...]
    """Latents whose directions are written; empty for other directions."""
    of: str
    """For a control the name of its condition, else its own name."""
    edits: tuple[tuple[Op, ...], ...]
    """Operations, one tuple per coefficient."""
    strengths: tuple[Mapping[str, float], ...] = ()
    """Per coefficient its value in every unit."""
    per_prompt: Mapping[str, tuple[tuple[Op, ...], ...]] = field(default_factory=dict)
    """Example id -> operations per coefficient, where they differ between prompts."""
    weights: Tensor | None = None
    """`[k, d]`: directions that are removed from the model's weights while it runs."""
    layers: tuple[int, ...] = ()
    """Layer of each of `latents`, where they belong to SAEs of several layers."""
    written: tuple[Hookpoint, ...] = ()
    """Streams that it changes, where that is not the stream of the run's own SAE."""
    parts: "tuple[tuple[LatentStatistics, tuple[int, ...]], ...]" = ()
    """For a condition on latents: per SAE the statistics and the latents, to choose controls by."""
    control_kind: str = ""
    """For a control: one of `controls.CONTROL_KINDS`, or `controls.OWN_GROUP`."""
    number: int = 0
    """For a control its number among those of its kind, from 1."""
    at: tuple[int, ...] | None = None
    """Numbers of the coefficients at which it is run; None: all."""
    frequency_ratio: float = float("nan")
    """For a control on latents: their activation frequency over that of its condition."""
    norm_ratio: float = float("nan")
    """For a control without strengths: its added norm over that of its condition, if known."""
    matched: bool = True
    """For a control: whether it is within its caliper."""

    @property
    def label(self) -> str:
        """Its latents as in tables: `12+77`, for several layers `1:12+2:53`."""
        if not self.layers:
            return "+".join(map(str, self.latents))
        return "+".join(f"{n}:{f}" for n, f in zip(self.layers, self.latents, strict=True))

    @property
    def described(self) -> tuple[str, str, str, str]:
        """What `metric_names` reads."""
        return self.name, self.role, self.direction, self.label

    def tried(self, at: int) -> bool:
        """Whether it is run at a coefficient (by number)."""
        return self.at is None or at in self.at

    def ops(self, example_id: str, at: int) -> tuple[Op, ...] | None:
        """Operations at a coefficient (by number); None where this prompt is not run there."""
        if not self.tried(at):
            return None
        if self.per_prompt:
            return self.per_prompt[example_id][at] if example_id in self.per_prompt else None
        return self.edits[at] if self.edits else ()


Ids = tuple[int, ...]
"""Indices of latents."""
_ANYWHERE = ("all", "prompt", "last", "generated")
"""Values of `intervention.where` that do not depend on where the user's message is."""


@dataclass(frozen=True)
class PositionedPrompt:
    """A prompt, its tokens, and the positions that are changed."""

    example: Example
    tokens: TokenizedText
    positions: tuple[int, ...]


@dataclass
class Prompts:
    """Prompts by group, and how many others are left out for which reason."""

    of_group: dict[str, list[PositionedPrompt]] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)

    def all(self) -> list[PositionedPrompt]:
        """Every prompt, group by group."""
        return [p for placed in self.of_group.values() for p in placed]

    def on(self, group: str) -> list[PositionedPrompt]:
        """Prompts of a group; of `all`: every prompt."""
        return self.all() if group == "all" else self.of_group.get(group, [])

    def of_split(self, split: str) -> "Prompts":
        """Prompts of one split; groups without any are left out."""
        return self.of_prompts(lambda p: p.example.split == split)

    def of_prompts(self, keep: Callable[[PositionedPrompt], bool]) -> "Prompts":
        """The prompts for which `keep` is true; groups without any are left out."""
        of_group = {g: [p for p in placed if keep(p)] for g, placed in self.of_group.items()}
        return Prompts({g: placed for g, placed in of_group.items() if placed})

    def of_groups(self, keep: Callable[[PositionedPrompt], bool]) -> "Prompts":
        """The groups with at least one prompt for which `keep` is true, whole."""
        of_group = {g: placed for g, placed in self.of_group.items() if any(map(keep, placed))}
        return Prompts(of_group, self.reasons)

    def notes(self, what: str = "prompts not steered") -> list[str]:
        """One line per reason."""
        return [f"{n} {what}: {why}" for why, n in sorted(self.reasons.items())]


def edited_positions(
    cfg: InterventionConfig, example: Example, tokens: TokenizedText, seed: int = 0
) -> tuple[int, ...]:
    """Positions of the prompt tokens that `intervention.where` selects.

    That is one of PLACES (`saexp.config`) or any option of the group `positions`, with the settings
    in `intervention.where_options`. Raises PositionNotFound where the prompt has no such token.
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


def coefficient_unit(cfg: InterventionConfig) -> str:
    """The unit of the coefficient."""
    if cfg.name == "steer":
        return cfg.unit
    return {"scale": "times the latents' own value, added", "clamp": "share of the way"}.get(
        cfg.name, "share"
    )


def choose_prompts(examples: Sequence[Example], n: int, seed: int) -> list[Example]:
    """A seeded choice of at most `n` examples per group, balanced over entity types."""
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


def tested_examples(cfg: InterventionConfig, examples: Sequence[Example]) -> list[Example]:
    """Test prompts, and train prompts for the choice of the coefficient."""
    test = [e for e in examples if e.split == "test"]
    train = [e for e in examples if e.split == "train"]
    chosen = choose_prompts(test, cfg.n_prompts, cfg.seed) if test else []
    if train and cfg.n_choice_prompts and len(parse_coefficients(cfg.coefficient)) > 1:
        chosen += choose_prompts(train, cfg.n_choice_prompts, cfg.seed)
    return chosen


def position_prompts(
    examples: Sequence[Example],
    model: LanguageModel,
    cfg: InterventionConfig,
    max_length: int,
    ask: Callable[[Example], Example] | None = None,
) -> Prompts:
    """Prompts with the model's chat template applied where it has one, their tokens and positions.

    `ask` makes the prompt of an example; by default it is `as_prompt()`. Examples without the
    positions are counted in `reasons`.
    """
    placed = Prompts()
    prompted: list[Example] = []
    for example in examples:
        try:
            prompted.append(ask(example) if ask else example.as_prompt())
        except PositionNotFound as reason:
            placed.reasons[str(reason)] = placed.reasons.get(str(reason), 0) + 1
    prompts = format_prompts(model, [e.text for e in prompted])
    tokenized = tokenize_prompts(model, prompts, max_length)
    for number, (example_as_prompt, prompt, tokens) in enumerate(
        zip(prompted, prompts, tokenized, strict=True)
    ):
        try:
            if tokens.truncated:
                raise PositionNotFound("prompt longer than dataset.max_length")
            if prompt.message is None and cfg.where not in _ANYWHERE:
                raise PositionNotFound(MESSAGE_CHANGED)
            example = (
                as_chat_prompt(example_as_prompt, prompt) if model.cfg.chat else example_as_prompt
            )
            positions = edited_positions(cfg, example, tokens, cfg.seed + number)
        except PositionNotFound as reason:
            placed.reasons[str(reason)] = placed.reasons.get(str(reason), 0) + 1
            continue
        placed.of_group.setdefault(str(example.group), []).append(
            PositionedPrompt(example, tokens, positions)
        )
    return placed


class LatentIntervention(ABC):
    """Base of interventions on latents and directions: which ones, how they are written, in which
    conditions."""

    own_prompts = False
    """Whether latents are changed on prompts of their own group, not of the other one."""
    vectors = False
    """Whether it can use directions other than those of latents."""

    def __init__(self, cfg: InterventionConfig) -> None:
        self.cfg = cfg
        others = [d for d in cfg.directions if d != "latents"]
        if others and not self.vectors:
            raise ConfigError(
                f"intervention={cfg.name} changes latents, but "
                f"'{others[0]}' in intervention.directions={cfg.directions} is not a latent; type "
                "intervention=steer, project_out or orthogonalize"
            )
        if cfg.layers is not None and not self.vectors and not cfg.by_layer:
            raise ConfigError(
                f"intervention={cfg.name} works at the SAE's own layer; leave out "
                "intervention.layers, or type intervention.latents=selected_per_layer for the "
                "latents of each layer's SAE"
            )

    def plan(
        self,
        facts: LatentStatistics,
        coefficients: Sequence[float],
        prompts: Prompts,  # noqa: ARG002
        model: LanguageModel,  # noqa: ARG002
    ) -> tuple[list[Condition], list[str]]:
        """All conditions without their controls, and notes for the report."""
        conditions: list[Condition] = []
        notes: list[str] = []
        for chosen in self._latent_sets(facts, notes):
            conditions.append(self._of_latents(chosen, coefficients, notes))
        for kind in self.cfg.directions:
            if kind != "latents":
                conditions += self._of_vectors(kind, facts, coefficients, notes)
        return conditions, list(dict.fromkeys(notes))

    def weights(self, directions: Tensor, facts: LatentStatistics) -> Tensor | None:  # noqa: ARG002
        """Directions to remove from the model's weights, if the intervention does so."""
        return None

    def _latent_sets(self, facts: LatentStatistics, notes: list[str]) -> list[LatentSet]:
        if "latents" not in self.cfg.directions:
            return []
        if facts.layers:
            sets = {n: (f, self._sets(f)) for n, f in facts.layers.items()}
            latent_sets, lacking = layered_sets(sets)
            notes += lacking
            return latent_sets
        return [
            LatentSet(
                f"{direction}_{role if role == 'group' else latents[0]}",
                direction,
                of_group,
                role,
                ((facts, latents),),
            )
            for direction, of_group, role, latents in self._sets(facts)
        ]

    def _of_latents(
        self, chosen: LatentSet, coefficients: Sequence[float], notes: list[str]
    ) -> Condition:
        """The condition on a set of latents, of one SAE or of several."""
        for facts, latents in chosen.parts:
            at = f"{facts.hookpoint.name}: " if chosen.layered else ""
            notes += [f"{at}{note}" for note in _inactive(facts, latents)]
        condition = Condition(
            name=chosen.name,
            role=chosen.role,
            direction=chosen.direction,
            prompts=chosen.prompts,
            latents=(),
            of=chosen.name,
            edits=(),
            layers=chosen.layers,
            written=chosen.written,
            parts=chosen.parts,
        )
        return self.written_along(condition, [own for _, own in chosen.parts], coefficients)

    def written_along(
        self,
        condition: Condition,
        write: Sequence[tuple[int, ...]],
        coefficients: Sequence[float],
    ) -> Condition:
        """A condition on latents whose edit is written along the latents `write`, per SAE: its own
        latents or control latents. It has no operations at coefficients at which it is not run."""
        parts = [
            (
                facts,
                latents,
                [
                    self.edit(latents_of_part, latents, condition.prompts, c, facts)
                    if condition.tried(k)
                    else ()
                    for k, c in enumerate(coefficients)
                ],
            )
            for (facts, latents_of_part), latents in zip(condition.parts, write, strict=True)
        ]
        directions = torch.cat([f.directions(w).float().cpu() for f, w, _ in parts])
        return replace(
            condition,
            latents=tuple(latent for w in write for latent in w),
            edits=tuple(
                tuple(op for *_, edits in parts for op in edits[k])
                for k in range(len(coefficients))
            ),
            strengths=tuple(
                _together(
                    [self.strength(edits[k], w, f) if edits[k] else {} for f, w, edits in parts]
                )
                for k in range(len(coefficients))
            ),
            weights=self.weights(directions, parts[0][0]),
        )

    def _of_vectors(
        self, kind: str, facts: LatentStatistics, coefficients: Sequence[float], notes: list[str]
    ) -> list[Condition]:
        """Conditions on a direction of the stream itself, one towards each group."""
        conditions = []
        latents: tuple[int, ...] = ()
        if kind == "denoised_difference":
            latents = tuple(self._chosen(facts)["latent"].tolist())
        for towards in facts.groups:
            direction, about = stream_direction(kind, towards, facts, latents, self.cfg)
            notes += about
            if direction is None:
                continue
            edits = tuple(self.write(direction.vector, c, facts) for c in coefficients)
            condition = Condition(
                name=f"{towards}_{kind}",
                role="direction",
                direction=towards,
                prompts=towards if self.own_prompts else facts.other(towards),
                latents=direction.latents,
                of=f"{towards}_{kind}",
                edits=edits,
                strengths=tuple({**self.strength(e, (), facts), **direction.about} for e in edits),
                weights=self.weights(direction.vector[None], facts),
            )
            conditions.append(condition)
        return conditions

    def write(
        self,
        vector: Tensor,  # noqa: ARG002
        coefficient: float,  # noqa: ARG002
        facts: LatentStatistics,  # noqa: ARG002
    ) -> tuple[Op, ...]:
        """Operations for a direction of the stream; subclasses with `vectors` define it."""
        raise InterventionError(
            f"intervention={self.cfg.name} can only write directions of latents"
        )

    @abstractmethod
    def edit(
        self, latents: Ids, write: Ids, prompts: str, coefficient: float, facts: LatentStatistics
    ) -> tuple[Op, ...]:
        """Operations for `latents`, written along `write`: the same latents or control latents."""

    def strength(
        self,
        ops: tuple[Op, ...],  # noqa: ARG002
        latents: tuple[int, ...],  # noqa: ARG002
        facts: LatentStatistics,  # noqa: ARG002
    ) -> dict[str, float]:
        """The coefficient in every unit, where that does not depend on the prompt."""
        return {}

    def _chosen(self, facts: LatentStatistics) -> pd.DataFrame:
        table = facts.table
        latents = self.cfg.latents_at(facts.hookpoint.layer)
        if latents == SELECTED:
            chosen = table[table["selected"]].sort_values("rank", kind="stable")
            return chosen.groupby("direction", sort=False).head(self.cfg.top_k)
        facts.check(latents)
        return table[table["latent"].isin(latents)]

    def _sets(self, facts: LatentStatistics) -> Sets:
        """The latents of each direction, together and one by one, on the prompts of one group.

        Without two groups, or without a contrast between them, every latent is changed on all
        prompts. So is each latent that is selected for neither group, one at a time.
        """
        chosen = self._chosen(facts)
        if len(facts.groups) != 2 or not chosen["direction"].astype(bool).any():
            latents = tuple(chosen["latent"].tolist())
            group = [("latents", "all", "group", latents)] if len(latents) > 1 else []
            return [*group, *(("latent", "all", "single", (f,)) for f in latents)]
        sets: Sets = []
        for direction in facts.groups:
            latents = chosen.loc[chosen["direction"] == direction, "latent"].tolist()
            prompts = direction if self.own_prompts else facts.other(direction)
            if len(latents) > 1:
                sets.append((direction, prompts, "group", tuple(latents)))
            sets += [(direction, prompts, "single", (f,)) for f in latents]
        others = chosen.loc[~chosen["direction"].isin(facts.groups), "latent"].tolist()
        return [*sets, *(("latent", "all", "single", (f,)) for f in others)]

    def _places(self, facts: LatentStatistics) -> list[Hookpoint]:
        """Streams where vectors are written: the SAE's, at every layer of `intervention.layers`."""
        layers = None if self.cfg.by_layer else self.cfg.layers
        if layers is None:
            return [facts.written]
        numbers = range(facts.n_layers) if layers == "all" else layers
        return [Hookpoint(int(n), facts.written.stream) for n in numbers]


def _inactive(facts: LatentStatistics, latents: Sequence[int]) -> list[str]:
    """What to know of latents that are active nowhere."""
    return [
        f"latent {f} is never active on the train split: only its decoder direction is known; "
        "operations that move its own activation change nothing where it is inactive on the "
        "prompts too, and frequency-matched controls are the most rarely active latents"
        for f, frequency in zip(latents, facts.numbers(latents, "frequency"), strict=True)
        if frequency == 0
    ]


def _together(strengths: Sequence[dict[str, float]]) -> dict[str, float]:
    """Strengths summed over layers: the added norm, and that over each layer's median norm."""
    if len(strengths) == 1:
        return strengths[0]
    return {
        unit: sum(s[unit] for s in strengths)
        for unit in ("length", "resid_norm")
        if all(unit in s for s in strengths)
    }
