"""What is changed: latents singly, as a group, other directions, and the controls of each."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saexp.config import InterventionConfig
from saexp.errors import ConfigError, InterventionError
from saexp.interventions.controls import matched_controls
from saexp.interventions.facts import Condition, LatentFacts
from saexp.interventions.ops import Add, Move, Op, Vector
from saexp.interventions.prompts import Prompts
from saexp.models.hookpoints import Hookpoint
from saexp.models.loading import LanguageModel

Sets = list[tuple[str, str, str, tuple[int, ...]]]
"""(direction, group of the prompts, role, latents)."""


class LatentIntervention(ABC):
    """Base: which latents and directions, their controls, and the order of conditions."""

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
        if cfg.layers is not None and not self.vectors:
            raise ConfigError(
                f"intervention={cfg.name} works at the SAE's own layer; leave out "
                "intervention.layers"
            )

    def plan(
        self,
        facts: LatentFacts,
        coefficients: Sequence[float],
        prompts: Prompts,  # noqa: ARG002
        model: LanguageModel,  # noqa: ARG002
    ) -> tuple[list[Condition], list[str]]:
        """All conditions, and notes for the report."""
        conditions: list[Condition] = []
        notes: list[str] = []
        sets = self._sets(facts) if "latents" in self.cfg.directions else []
        for direction, of_group, role, latents in sets:
            name = f"{direction}_{role}" if role == "group" else f"{direction}_{latents[0]}"
            controls = matched_controls(
                facts.table, latents, self.cfg.n_controls, alpha=facts.alpha
            )
            notes += controls.notes
            for i, write in enumerate([latents, *controls.sets]):
                full = name if i == 0 else f"{name}_control_{i:02d}"
                edits = tuple(self.edit(latents, write, of_group, c, facts) for c in coefficients)
                condition = Condition(
                    name=full,
                    role=role if i == 0 else "control",
                    direction=direction,
                    prompts=of_group,
                    latents=write,
                    of=name,
                    edits=edits,
                    strengths=tuple(self.strength(e, write, facts) for e in edits),
                    weights=self.weights(facts.directions(write), facts),
                )
                conditions.append(condition)
        for kind in self.cfg.directions:
            if kind != "latents":
                conditions += self._of_vectors(kind, facts, coefficients)
        return conditions, list(dict.fromkeys(notes))

    def weights(self, directions: Tensor, facts: LatentFacts) -> Tensor | None:  # noqa: ARG002
        """Directions taken out of the model's weights, where the intervention does that."""
        return None

    def _of_vectors(
        self, kind: str, facts: LatentFacts, coefficients: Sequence[float]
    ) -> list[Condition]:
        """A direction of the stream itself, towards each group, with random ones as controls."""
        made = []
        for towards in facts.groups:
            natural = facts.mean_difference(towards)
            if kind == "probe":
                unit = facts.probe_direction
                natural = unit * (unit @ natural)
            generator = torch.Generator().manual_seed(
                self.cfg.seed * 1000 + facts.groups.index(towards)
            )
            n_random = self.cfg.n_controls + (kind == "random")
            noise = torch.randn(n_random, len(natural), generator=generator)
            noise = noise / noise.norm(dim=-1, keepdim=True) * natural.norm()
            vectors = [*([] if kind == "random" else [natural]), *noise]
            prompts = towards if self.own_prompts else facts.other(towards)
            name = f"{towards}_{kind}"
            for i, vector in enumerate(vectors):
                edits = tuple(self.write(vector, c, facts) for c in coefficients)
                condition = Condition(
                    name=name if i == 0 else f"{name}_control_{i:02d}",
                    role="direction" if i == 0 else "control",
                    direction=towards,
                    prompts=prompts,
                    latents=(),
                    of=name,
                    edits=edits,
                    strengths=tuple(self.strength(e, (), facts) for e in edits),
                    weights=self.weights(vector[None], facts),
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
        """For `latents`, written along the directions of `write` (themselves or controls)."""

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
        if self.cfg.latents == "selected":
            chosen = table[table["selected"]].sort_values("rank")
            return chosen.groupby("direction", sort=False).head(self.cfg.top_k)
        facts.check(self.cfg.latents)
        return table[table["latent"].isin(self.cfg.latents)]

    def _sets(self, facts: LatentFacts) -> Sets:
        """Each direction's latents go on one group's prompts: singly, and as a group.

        Without two groups, or a contrast between them, every latent goes on all prompts.
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
        return sets

    def _places(self, facts: LatentFacts) -> list[Hookpoint]:
        """Where vectors are written: the SAE's own stream, at every layer asked for."""
        layers = self.cfg.layers
        if layers is None:
            return [facts.written]
        numbers = range(facts.n_layers) if layers == "all" else layers
        return [Hookpoint(int(n), facts.written.stream) for n in numbers]


class Steer(LatentIntervention):
    """Add directions: x + coefficient * unit * direction.

    Units: `raw`, the decoder row as it is; `max_act` and `p99_act`, times each latent's maximum or
    99th percentile where active; `resid_norm`, a vector as long as the stream is on average,
    so that coefficients compare across layers, SAEs and numbers of latents. Several latents are
    mixed in proportion to how far their means differ between the groups (train split): the
    difference of means, as far as these latents make it up. Other directions have `raw` as their
    natural length (the difference of means; a probe's component of it).
    """

    vectors = True

    def edit(
        self,
        latents: tuple[int, ...],
        write: tuple[int, ...],
        prompts: str,  # noqa: ARG002
        coefficient: float,
        facts: LatentFacts,
    ) -> tuple[Op, ...]:
        """Controls get the scales of the latents they stand for, at the same added length."""
        of_latent = facts.by_latent
        directions = facts.directions(write).double().cpu()
        norms = of_latent.loc[list(write), "norm"].to_numpy(dtype=float)
        own_norms = of_latent.loc[list(latents), "norm"].to_numpy(dtype=float)
        if self.cfg.unit == "resid_norm":
            weights = self._mixing(latents, facts) * own_norms / norms
            if len(write) == 1 or not weights.any():
                weights = 1 / norms
            mixed = torch.as_tensor(weights) @ directions
            scales = weights * facts.mean_norm / float(mixed.norm())
        elif self.cfg.unit == "raw":
            scales = own_norms / norms
        else:
            acts = of_latent.loc[list(latents), self.cfg.unit].to_numpy(dtype=float)
            scales = acts * own_norms / norms
        vector = Vector((torch.as_tensor(scales) @ directions).float())
        return tuple(Add(at, vector, coefficient) for at in self._places(facts))

    def _mixing(self, latents: tuple[int, ...], facts: LatentFacts) -> np.ndarray:
        if len(facts.groups) != 2:
            return np.ones(len(latents))
        columns = [f"mean_{g}" for g in facts.groups]
        means = facts.by_latent.loc[list(latents), columns].to_numpy(float)
        return np.abs(means[:, 0] - means[:, 1])

    def write(self, vector: Tensor, coefficient: float, facts: LatentFacts) -> tuple[Op, ...]:
        """`raw`: the vector itself; `resid_norm`: as long as the stream."""
        if self.cfg.unit in ("max_act", "p99_act"):
            raise ConfigError(
                f"intervention.unit={self.cfg.unit} is a latent's activation, which "
                f"intervention.directions={self.cfg.directions} lacks; type resid_norm or raw"
            )
        if self.cfg.unit == "resid_norm":
            vector = vector / vector.norm() * facts.mean_norm
        return tuple(Add(at, Vector(vector), coefficient) for at in self._places(facts))

    def strength(
        self, ops: tuple[Op, ...], latents: tuple[int, ...], facts: LatentFacts
    ) -> dict[str, float]:
        """Added length over the stream's mean norm; for one latent its other units too."""
        op = ops[0]
        assert isinstance(op, Add)
        length = abs(op.coefficient) * float(op.vector.values.norm())
        found = {"length": length, "resid_norm": length / facts.mean_norm}
        if len(latents) == 1:
            columns = facts.by_latent.loc[list(latents), ["norm", "max_act", "p99_act"]]
            norm, *acts = columns.to_numpy(dtype=float)[0].tolist()
            found["raw"] = length / norm
            for unit, act in zip(("max_act", "p99_act"), acts, strict=True):
                found[unit] = length / norm / act if act else float("nan")
        return found


class Clamp(LatentIntervention):
    """Move latents towards their mean in the other group; coefficient 1 is all the way.

    x + coefficient * (target - a) * direction, the reconstruction error kept. `intervention.rule`:
    `always`, only where it is `active`, or raised to `at_least` the target. Latents of both
    directions are moved together. `intervention.values` gives targets instead, one per named
    latent. Controls add the same displacement along matched latents.
    """

    def edit(
        self,
        latents: tuple[int, ...],
        write: tuple[int, ...],
        prompts: str,
        coefficient: float,
        facts: LatentFacts,
    ) -> tuple[Op, ...]:
        """Targets are means on the train split of the group that the prompts are not of."""
        if self.cfg.values is not None:
            given = dict(zip(self.cfg.latents, self.cfg.values, strict=True))
            targets = [float(given[f]) for f in latents]
        else:
            if len(facts.groups) != 2:
                raise ConfigError(
                    "intervention=clamp moves latents to their mean in the other group, and this "
                    "data set has no two groups; type intervention.values=[…], one per latent"
                )
            column = f"mean_{facts.other(prompts)}"
            targets = facts.by_latent.loc[list(latents), column].tolist()
        return (
            Move(
                facts.hookpoint,
                latents,
                write,
                tuple(map(float, targets)),
                coefficient,
                self.cfg.rule,
            ),
        )

    def _sets(self, facts: LatentFacts) -> Sets:
        """All chosen latents together, and singly, towards each group, on the other's prompts."""
        if len(facts.groups) != 2:
            return super()._sets(facts)
        latents = tuple(self._chosen(facts)["latent"].tolist())
        sets: Sets = []
        for towards in facts.groups:
            if len(latents) > 1:
                sets.append((towards, facts.other(towards), "group", latents))
            sets += [(towards, facts.other(towards), "single", (f,)) for f in latents]
        return sets
