"""What is changed: directions added, latents moved."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saexp.errors import ConfigError
from saexp.interventions.facts import LatentFacts
from saexp.interventions.layered import Sets
from saexp.interventions.ops import Add, Move, Op, Vector
from saexp.interventions.planning import LatentIntervention


class Steer(LatentIntervention):
    """Add directions: x + coefficient * unit * direction.

    Units: `raw`, the decoder row as it is; `max_act` and `p99_act`, times each latent's maximum or
    99th percentile where active; `resid_norm`, a vector as long as the stream's median norm,
    so that coefficients compare across layers, SAEs and numbers of latents. Several latents are
    mixed in proportion to how far their means differ between the groups (train split): the
    difference of means, as far as these latents make it up. Other directions have `raw` as their
    natural length (the difference of means; a probe's component of it; `denoised_difference`, its
    least-squares part in the span of the latents' decoder rows, which allows for rows that overlap
    and for latents selected for the other group, as the mix of latents does not).
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
        """Control latents get the scales of the latents they stand for, and what they add together
        is brought to the norm that those add."""
        vector = self._mixed(latents, write, facts)
        if write != latents and len(latents) > 1 and self.cfg.unit != "resid_norm":
            vector *= self._mixed(latents, latents, facts).norm() / vector.norm()
        step = Vector(vector.float())
        return tuple(Add(at, step, coefficient) for at in self._places(facts))

    def _mixed(
        self, latents: tuple[int, ...], write: tuple[int, ...], facts: LatentFacts
    ) -> Float[Tensor, " d"]:
        """One unit of `latents`, along the directions of `write`; float64."""
        directions = facts.directions(write).double().cpu()
        norms = facts.numbers(write, "norm")
        own_norms = facts.numbers(latents, "norm")
        if self.cfg.unit == "resid_norm":
            weights = self._mixing(latents, facts) * own_norms / norms
            if len(write) == 1 or not weights.any():
                weights = 1 / norms
            mixed = torch.as_tensor(weights) @ directions
            scales = weights * facts.median_norm / float(mixed.norm())
        elif self.cfg.unit == "raw":
            scales = own_norms / norms
        else:
            scales = self._activations(latents, facts) * own_norms / norms
        return torch.as_tensor(scales) @ directions

    def _activations(self, latents: tuple[int, ...], facts: LatentFacts) -> np.ndarray:
        """The unit of each latent. Raises ConfigError for one without an activation."""
        found = facts.numbers(latents, self.cfg.unit)
        for latent, value in zip(latents, found, strict=True):
            if not value:
                raise ConfigError(
                    f"intervention.unit={self.cfg.unit}: latent {latent} is never active on the "
                    f"train split at {facts.hookpoint.name}, so it has no such value; type "
                    "intervention.unit=resid_norm or raw"
                )
        return found

    def _mixing(self, latents: tuple[int, ...], facts: LatentFacts) -> np.ndarray:
        if len(facts.groups) != 2:
            return np.ones(len(latents))
        one, other = (facts.numbers(latents, f"mean_{g}") for g in facts.groups)
        return np.abs(one - other)

    def write(self, vector: Tensor, coefficient: float, facts: LatentFacts) -> tuple[Op, ...]:
        """`raw`: the vector itself; `resid_norm`: as long as the stream."""
        if self.cfg.unit in ("max_act", "p99_act"):
            raise ConfigError(
                f"intervention.unit={self.cfg.unit} is a latent's activation, which "
                f"intervention.directions={self.cfg.directions} lacks; type resid_norm or raw"
            )
        if self.cfg.unit == "resid_norm":
            vector = vector / vector.norm() * facts.median_norm
        return tuple(Add(at, Vector(vector), coefficient) for at in self._places(facts))

    def strength(
        self, ops: tuple[Op, ...], latents: tuple[int, ...], facts: LatentFacts
    ) -> dict[str, float]:
        """Added length over the stream's median norm; for one latent its other units too."""
        op = ops[0]
        assert isinstance(op, Add)
        length = abs(op.coefficient) * float(op.vector.values.norm())
        found = {"length": length, "resid_norm": length / facts.median_norm}
        if len(latents) == 1:
            norm = float(facts.numbers(latents, "norm")[0])
            found["raw"] = length / norm
            for unit in ("max_act", "p99_act"):
                act = float(facts.numbers(latents, unit)[0])
                found[unit] = length / norm / act if act else float("nan")
        return found


class Clamp(LatentIntervention):
    """Move latents towards their mean in the other group; coefficient 1 is all the way.

    x + coefficient * (target - a) * direction, the reconstruction error kept. `intervention.rule`:
    `always`, only where it is `active`, or raised to `at_least` the target. Latents of both
    directions are moved together. `intervention.values` gives targets instead, one per named
    latent. Controls add displacements of the same norms along frequency-matched latents.
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
            given = self.cfg.targets_at(facts.hookpoint.layer)
            targets = [float(given[f]) for f in latents]
        else:
            if len(facts.groups) != 2:
                raise ConfigError(
                    "intervention=clamp moves latents to their mean in the other group, and this "
                    "data set has no two groups; type intervention.values=[…], one per latent"
                )
            column = f"mean_{facts.other(prompts)}"
            targets = facts.numbers(latents, column).tolist()
        targets = tuple(map(float, targets))
        if write == latents:
            move = Move(facts.hookpoint, latents, write, targets, coefficient, self.cfg.rule)
            return (move,)
        ratios = facts.numbers(latents, "norm") / facts.numbers(write, "norm")
        return tuple(
            Move(facts.hookpoint, (own,), (other,), (target,), coefficient * ratio, self.cfg.rule)
            for own, other, target, ratio in zip(
                latents, write, targets, ratios.tolist(), strict=True
            )
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
