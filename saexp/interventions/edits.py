"""What is changed: conditions (latents singly, as a group, their controls) as edits of a stream."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saexp.config import InterventionConfig
from saexp.errors import InterventionError
from saexp.interventions.controls import matched_controls
from saexp.interventions.engine import Edit


@dataclass(frozen=True)
class Condition:
    """One thing that is done to prompts of one group, at every coefficient."""

    name: str
    role: str
    """single, group or control."""
    direction: str
    """Group the latents speak for."""
    prompts: str
    """Group whose prompts it is tried on."""
    latents: tuple[int, ...]
    """Latents whose directions are written."""
    of: str
    """For a control: the condition it belongs to; else its own name."""
    edits: tuple[Edit, ...]
    """One per coefficient."""


@dataclass(frozen=True)
class LatentFacts:
    """What edits need to know: one row per latent that fired.

    Columns latent, direction, selected, rank, frequency, norm (of the decoder row), q_value,
    max_act, p99_act, and mean_<group>.
    """

    table: pd.DataFrame
    groups: tuple[str, str]
    mean_norm: float
    """Mean norm of the stream at the analysed rows."""
    alpha: float
    directions: Callable[[Sequence[int]], Tensor]
    """Latents -> `[n, d_in]`, what one unit of each adds to the stream (`sae.directions`)."""

    @cached_property
    def by_latent(self) -> pd.DataFrame:
        """The table with latents as its index."""
        return self.table.set_index("latent")


class _Intervention(ABC):
    """Base: which latents, their controls, and the order of conditions."""

    def __init__(self, cfg: InterventionConfig) -> None:
        self.cfg = cfg

    def conditions(
        self, facts: LatentFacts, coefficients: Sequence[float]
    ) -> tuple[list[Condition], list[str]]:
        """All conditions, and notes for the report."""
        conditions: list[Condition] = []
        notes: list[str] = []
        for sets_of in self._sets(facts):
            direction, prompts, role, latents = sets_of
            name = f"{direction}_{role}" if role == "group" else f"{direction}_{latents[0]}"
            conditions.append(
                self._condition(
                    name, role, direction, prompts, latents, latents, facts, coefficients
                )
            )
            controls = matched_controls(
                facts.table, latents, self.cfg.n_controls, alpha=facts.alpha
            )
            notes += controls.notes
            conditions += [
                self._condition(
                    f"{name}_control_{i:02d}",
                    "control",
                    direction,
                    prompts,
                    latents,
                    control,
                    facts,
                    coefficients,
                    of=name,
                )
                for i, control in enumerate(controls.sets, 1)
            ]
        return conditions, notes

    def _condition(
        self,
        name: str,
        role: str,
        direction: str,
        prompts: str,
        latents: tuple[int, ...],
        write: tuple[int, ...],
        facts: LatentFacts,
        coefficients: Sequence[float],
        of: str | None = None,
    ) -> Condition:
        edits = tuple(self.edit(latents, write, prompts, c, facts) for c in coefficients)
        return Condition(name, role, direction, prompts, write, of or name, edits)

    @abstractmethod
    def edit(
        self,
        latents: tuple[int, ...],
        write: tuple[int, ...],
        prompts: str,
        coefficient: float,
        facts: LatentFacts,
    ) -> Edit:
        """For `latents`, written along the directions of `write` (themselves or controls)."""

    def _sets(self, facts: LatentFacts) -> list[tuple[str, str, str, tuple[int, ...]]]:
        """(direction, group of the prompts, role, latents)."""
        first, second = facts.groups
        other = {first: second, second: first}
        table = facts.table
        if self.cfg.latents == "selected":
            chosen = table[table["selected"]].sort_values("rank")
            chosen = chosen.groupby("direction", sort=False).head(self.cfg.top_k)
        else:
            missing = sorted(set(self.cfg.latents) - set(table["latent"]))
            if missing:
                raise InterventionError(
                    f"intervention.latents: latent {missing[0]} never fires on this data "
                    "set, so nothing is known of it; choose others"
                )
            chosen = table[table["latent"].isin(self.cfg.latents)]
        return self._arrange(chosen, other, facts)

    def _arrange(
        self, chosen: pd.DataFrame, other: dict[str, str], facts: LatentFacts
    ) -> list[tuple[str, str, str, tuple[int, ...]]]:
        """Each direction's latents go on the other group's prompts: singly, and as a group."""
        sets = []
        for direction in facts.groups:
            latents = chosen.loc[chosen["direction"] == direction, "latent"].tolist()
            if len(latents) > 1:
                sets.append((direction, other[direction], "group", tuple(latents)))
            sets += [(direction, other[direction], "single", (f,)) for f in latents]
        return sets


class Steer(_Intervention):
    """Add decoder directions: x + coefficient * unit * direction.

    Units: `raw`, the decoder row as it is; `max_act` and `p99_act`, times each latent's maximum or
    99th percentile where active; `resid_norm`, a vector as long as the stream is on average,
    so that coefficients compare across layers, SAEs and numbers of latents. Several latents are
    mixed in proportion to how far their means differ between the groups (train split): the
    difference of means, as far as these latents make it up.
    """

    def edit(
        self,
        latents: tuple[int, ...],
        write: tuple[int, ...],
        prompts: str,  # noqa: ARG002
        coefficient: float,
        facts: LatentFacts,
    ) -> Edit:
        """Controls get the scales of the latents they stand for, at the same added length."""
        of_latent = facts.by_latent
        norms = of_latent.loc[list(write), "norm"].to_numpy(dtype=float)
        own_norms = of_latent.loc[list(latents), "norm"].to_numpy(dtype=float)
        if self.cfg.unit == "resid_norm":
            first, second = facts.groups
            means = of_latent.loc[list(latents), [f"mean_{first}", f"mean_{second}"]].to_numpy(
                float
            )
            weights = np.abs(means[:, 0] - means[:, 1]) * own_norms / norms
            if len(write) == 1 or not weights.any():
                weights = 1 / norms
            mixed = torch.as_tensor(weights) @ facts.directions(write).double().cpu()
            scales = weights * facts.mean_norm / float(mixed.norm())
        elif self.cfg.unit == "raw":
            scales = own_norms / norms
        else:
            acts = of_latent.loc[list(latents), self.cfg.unit].to_numpy(dtype=float)
            scales = acts * own_norms / norms
        return Edit(write, coefficient, scales=tuple(map(float, scales)))


class Clamp(_Intervention):
    """Move latents towards their mean in the other group; coefficient 1 is all the way.

    x + coefficient * (target - a) * direction, the reconstruction error kept. Latents of both
    directions are moved together. Controls add the same displacement along matched latents.
    """

    def edit(
        self,
        latents: tuple[int, ...],
        write: tuple[int, ...],
        prompts: str,
        coefficient: float,
        facts: LatentFacts,
    ) -> Edit:
        """Targets are means on the train split of the group that the prompts are not of."""
        target_group = next(g for g in facts.groups if g != prompts)
        means = facts.by_latent.loc[list(latents), f"mean_{target_group}"]
        return Edit(write, coefficient, read=latents, targets=tuple(map(float, means)))

    def _arrange(
        self, chosen: pd.DataFrame, other: dict[str, str], facts: LatentFacts
    ) -> list[tuple[str, str, str, tuple[int, ...]]]:
        """All chosen latents together, and singly, towards each group, on the other's prompts."""
        latents = tuple(chosen["latent"].tolist())
        sets = []
        for towards in facts.groups:
            if len(latents) > 1:
                sets.append((towards, other[towards], "group", latents))
            sets += [(towards, other[towards], "single", (f,)) for f in latents]
        return sets
