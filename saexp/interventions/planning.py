"""Which conditions an intervention has: latents singly, together or over layers, other directions.

Their controls are made in `design`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor

from saexp.config import InterventionConfig
from saexp.config.interventions import SELECTED
from saexp.errors import ConfigError, InterventionError
from saexp.interventions.facts import Condition, LatentFacts
from saexp.interventions.layered import LatentSet, Sets, layered_sets
from saexp.interventions.ops import Op
from saexp.interventions.prompts import Prompts
from saexp.interventions.vectors import stream_direction
from saexp.models.hookpoints import Hookpoint
from saexp.models.loading import LanguageModel


class LatentIntervention(ABC):
    """Base: which latents and directions, how they are written, and the order of conditions."""

    own_prompts = False
    """Whether a direction's latents are tried on that group's own prompts."""
    vectors = False
    """Whether it can use directions that are no latents."""

    def __init__(self, cfg: InterventionConfig) -> None:
        self.cfg = cfg
        others = [d for d in cfg.directions if d != "latents"]
        if others and not self.vectors:
            raise ConfigError(
                f"intervention={cfg.name} changes latents, and "
                f"intervention.directions={cfg.directions} names '{others[0]}', which is none; "
                "type intervention=steer, project_out or orthogonalize"
            )
        if cfg.layers is not None and not self.vectors and not cfg.by_layer:
            raise ConfigError(
                f"intervention={cfg.name} works at the SAE's own layer; leave out "
                "intervention.layers, or type intervention.latents=selected_per_layer for the "
                "latents of each layer's SAE"
            )

    def plan(
        self,
        facts: LatentFacts,
        coefficients: Sequence[float],
        prompts: Prompts,  # noqa: ARG002
        model: LanguageModel,  # noqa: ARG002
    ) -> tuple[list[Condition], list[str]]:
        """All conditions but their controls, and notes for the report."""
        conditions: list[Condition] = []
        notes: list[str] = []
        for chosen in self._latent_sets(facts, notes):
            conditions.append(self._of_latents(chosen, coefficients, notes))
        for kind in self.cfg.directions:
            if kind != "latents":
                conditions += self._of_vectors(kind, facts, coefficients, notes)
        return conditions, list(dict.fromkeys(notes))

    def weights(self, directions: Tensor, facts: LatentFacts) -> Tensor | None:  # noqa: ARG002
        """Directions taken out of the model's weights, where the intervention does that."""
        return None

    def _latent_sets(self, facts: LatentFacts, notes: list[str]) -> list[LatentSet]:
        if "latents" not in self.cfg.directions:
            return []
        if facts.layers:
            sets = {n: (f, self._sets(f)) for n, f in facts.layers.items()}
            found, lacking = layered_sets(sets)
            notes += lacking
            return found
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
        """A set of latents, of one SAE or of several."""
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
        """A condition on latents with its edit made along those of `write`, per SAE: its own, or
        control latents; nothing at coefficients at which it is not tried."""
        parts = [
            (
                facts,
                latents,
                [
                    self.edit(own, latents, condition.prompts, c, facts)
                    if condition.tried(k)
                    else ()
                    for k, c in enumerate(coefficients)
                ],
            )
            for (facts, own), latents in zip(condition.parts, write, strict=True)
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
        self, kind: str, facts: LatentFacts, coefficients: Sequence[float], notes: list[str]
    ) -> list[Condition]:
        """A direction of the stream itself, towards each group."""
        made = []
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
            made.append(condition)
        return made

    def write(
        self,
        vector: Tensor,  # noqa: ARG002
        coefficient: float,  # noqa: ARG002
        facts: LatentFacts,  # noqa: ARG002
    ) -> tuple[Op, ...]:
        """Operations for a direction of the stream; kinds with `vectors` define it."""
        raise InterventionError(f"intervention={self.cfg.name} writes no directions but latents'")

    @abstractmethod
    def edit(
        self,
        latents: tuple[int, ...],
        write: tuple[int, ...],
        prompts: str,
        coefficient: float,
        facts: LatentFacts,
    ) -> tuple[Op, ...]:
        """For `latents`, written along the directions of `write`: themselves or control latents."""

    def strength(
        self,
        ops: tuple[Op, ...],  # noqa: ARG002
        latents: tuple[int, ...],  # noqa: ARG002
        facts: LatentFacts,  # noqa: ARG002
    ) -> dict[str, float]:
        """What a coefficient is in every unit, where that does not depend on the prompt."""
        return {}

    def _chosen(self, facts: LatentFacts) -> pd.DataFrame:
        table = facts.table
        asked = self.cfg.latents_at(facts.hookpoint.layer)
        if asked == SELECTED:
            chosen = table[table["selected"]].sort_values("rank", kind="stable")
            return chosen.groupby("direction", sort=False).head(self.cfg.top_k)
        facts.check(asked)
        return table[table["latent"].isin(asked)]

    def _sets(self, facts: LatentFacts) -> Sets:
        """Each direction's latents go on one group's prompts: singly, and as a group.

        Without two groups, or a contrast between them, every latent goes on all prompts; so does
        each latent selected for neither group, one at a time.
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

    def _places(self, facts: LatentFacts) -> list[Hookpoint]:
        """Where vectors are written: the SAE's own stream, at every layer asked for."""
        layers = None if self.cfg.by_layer else self.cfg.layers
        if layers is None:
            return [facts.written]
        numbers = range(facts.n_layers) if layers == "all" else layers
        return [Hookpoint(int(n), facts.written.stream) for n in numbers]


def _inactive(facts: LatentFacts, latents: Sequence[int]) -> list[str]:
    """What to know of latents that are active nowhere."""
    return [
        f"latent {f} is never active on the train split: only its decoder direction is known; "
        "operations that move its own activation change nothing where it is inactive on the "
        "prompts too, and frequency-matched controls are the most rarely active latents"
        for f, frequency in zip(latents, facts.numbers(latents, "frequency"), strict=True)
        if frequency == 0
    ]


def _together(strengths: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of several layers, what is added in all, and that over each layer's median norm, summed."""
    if len(strengths) == 1:
        return strengths[0]
    return {
        unit: sum(s[unit] for s in strengths)
        for unit in ("length", "resid_norm")
        if all(unit in s for s in strengths)
    }
