"""The interventions: steer, clamp, scale, ablate, project out, orthogonalize, splice, patch.

Each turns latents or directions into operations (`stream_edits.py`), which forward passes apply."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saexp.config import InterventionConfig
from saexp.errors import ConfigError, InterventionError
from saexp.interventions.conditions import (
    Condition,
    Ids,
    LatentIntervention,
    PositionedPrompt,
    Prompts,
)
from saexp.interventions.controls import OWN_GROUP
from saexp.interventions.directions import LatentStatistics, Sets, orthonormal
from saexp.interventions.generation import read_streams
from saexp.interventions.stream_edits import Add, Move, Op, Patch, Project, Row, Splice, Vector
from saexp.models import Hookpoint
from saexp.models.forward import by_regime, check_positions
from saexp.models.loading import LanguageModel
from saexp.stats.significance import random_directions


class Steer(LatentIntervention):
    """Add directions: x + coefficient * unit * direction.

    Units: `raw`, the decoder row as it is; `max_act` and `p99_act`, times each latent's maximum or
    99th percentile where active; `resid_norm`, a vector as long as the stream's median norm,
    so that coefficients are comparable across layers, SAEs and numbers of latents. Several latents
    are weighted by the difference of their means between the groups (train split), so that their
    sum is the part of the difference of means that these latents account for. For other directions,
    `raw` is the natural length: that of the difference of means; of its component along a probe; or
    of `denoised_difference`, its least-squares projection on the span of the latents' decoder rows,
    which accounts for overlapping rows and for latents of the other group, unlike the weighted sum.
    """

    vectors = True

    def edit(
        self,
        latents: Ids,
        write: Ids,
        prompts: str,  # noqa: ARG002
        coefficient: float,
        facts: LatentStatistics,
    ) -> tuple[Op, ...]:
        """Control latents get the scales of the latents that they replace, and their sum is
        rescaled to the norm of the sum of those."""
        vector = self._mixed(latents, write, facts)
        if write != latents and len(latents) > 1 and self.cfg.unit != "resid_norm":
            vector *= self._mixed(latents, latents, facts).norm() / vector.norm()
        step = Vector(vector.float())
        return tuple(Add(at, step, coefficient) for at in self._places(facts))

    def _mixed(self, latents: Ids, write: Ids, facts: LatentStatistics) -> Float[Tensor, " d"]:
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

    def _activations(self, latents: Ids, facts: LatentStatistics) -> np.ndarray:
        """The unit of each latent. Raises ConfigError for a latent that is never active."""
        values = facts.numbers(latents, self.cfg.unit)
        for latent, value in zip(latents, values, strict=True):
            if not value:
                raise ConfigError(
                    f"intervention.unit={self.cfg.unit}: latent {latent} is never active on the "
                    f"train split at {facts.hookpoint.name}, so this unit is undefined for it; "
                    "type intervention.unit=resid_norm or raw"
                )
        return values

    def _mixing(self, latents: Ids, facts: LatentStatistics) -> np.ndarray:
        if len(facts.groups) != 2:
            return np.ones(len(latents))
        one, other = (facts.numbers(latents, f"mean_{g}") for g in facts.groups)
        return np.abs(one - other)

    def write(self, vector: Tensor, coefficient: float, facts: LatentStatistics) -> tuple[Op, ...]:
        """`raw`: the vector itself; `resid_norm`: rescaled to the stream's median norm."""
        if self.cfg.unit in ("max_act", "p99_act"):
            raise ConfigError(
                f"intervention.unit={self.cfg.unit} is the activation of a latent, which is "
                f"undefined for intervention.directions={self.cfg.directions}; type "
                "intervention.unit=resid_norm or raw"
            )
        if self.cfg.unit == "resid_norm":
            vector = vector / vector.norm() * facts.median_norm
        return tuple(Add(at, Vector(vector), coefficient) for at in self._places(facts))

    def strength(
        self, ops: tuple[Op, ...], latents: Ids, facts: LatentStatistics
    ) -> dict[str, float]:
        """Added norm, absolute and over the stream's median norm; for one latent in every unit."""
        op = ops[0]
        assert isinstance(op, Add)
        length = abs(op.coefficient) * float(op.vector.values.norm())
        strengths = {"length": length, "resid_norm": length / facts.median_norm}
        if len(latents) == 1:
            norm = float(facts.numbers(latents, "norm")[0])
            strengths["raw"] = length / norm
            for unit in ("max_act", "p99_act"):
                act = float(facts.numbers(latents, unit)[0])
                strengths[unit] = length / norm / act if act else float("nan")
        return strengths


class Clamp(LatentIntervention):
    """Move latents towards their mean in the other group; coefficient 1 reaches it.

    x + coefficient * (target - a) * direction; the reconstruction error is kept.
    `intervention.rule` says where: `always`, only where the latent is `active`, or only where it is
    below its target (`at_least`). Latents selected for either group are moved together.
    `intervention.values` gives other targets, one per latent of `intervention.latents`. Controls
    add displacements of the same norms along frequency-matched latents.
    """

    def edit(
        self, latents: Ids, write: Ids, prompts: str, coefficient: float, facts: LatentStatistics
    ) -> tuple[Op, ...]:
        """Targets are means on the train split of the group to which the prompts do not belong."""
        if self.cfg.values is not None:
            target_of = self.cfg.targets_at(facts.hookpoint.layer)
            targets = [float(target_of[f]) for f in latents]
        else:
            if len(facts.groups) != 2:
                raise ConfigError(
                    "intervention=clamp moves latents to their mean in the other group, but this "
                    "data set does not have two groups; type intervention.values=[…], one for "
                    "each latent"
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

    def _sets(self, facts: LatentStatistics) -> Sets:
        """All chosen latents together and one by one, towards each group on the other's prompts."""
        if len(facts.groups) != 2:
            return super()._sets(facts)
        latents = tuple(self._chosen(facts)["latent"].tolist())
        sets: Sets = []
        for towards in facts.groups:
            if len(latents) > 1:
                sets.append((towards, facts.other(towards), "group", latents))
            sets += [(towards, facts.other(towards), "single", (f,)) for f in latents]
        return sets


class _OwnEdit(LatentIntervention):
    """Base of interventions whose controls change control latents as the latents are changed."""

    own_prompts = True

    def edit(
        self,
        latents: Ids,  # noqa: ARG002
        write: Ids,
        prompts: str,  # noqa: ARG002
        coefficient: float,
        facts: LatentStatistics,
    ) -> tuple[Op, ...]:
        """`change` of the latents `write`."""
        return self.change(write, coefficient, facts)

    @abstractmethod
    def change(self, write: Ids, coefficient: float, facts: LatentStatistics) -> tuple[Op, ...]:
        """Operations on these latents."""


class Scale(_OwnEdit):
    """Multiply latents by 1 + coefficient: 0 leaves them unchanged, -1 ablates, 1 doubles them.

    The reconstruction error is kept. Latents are scaled on prompts of the group for which they are
    selected. Controls scale frequency-matched latents instead; random directions are no control, as
    nothing is added that they could replace.
    """

    def change(self, write: Ids, coefficient: float, facts: LatentStatistics) -> tuple[Op, ...]:
        """x + coefficient * a * direction."""
        return (Move(facts.hookpoint, write, write, (0.0,) * len(write), -coefficient),)


class Ablate(Scale):
    """Subtract latents, keeping the reconstruction error: x - coefficient * a * direction."""

    def change(self, write: Ids, coefficient: float, facts: LatentStatistics) -> tuple[Op, ...]:
        """Coefficient 1 sets the latents to zero."""
        return super().change(write, -coefficient, facts)


class ProjectOut(_OwnEdit):
    """Remove directions from the stream: x - coefficient * Q'Q x, Q an orthonormal basis of them.

    At every layer of `intervention.layers` (Arditi et al. 2024, arXiv 2406.11717, section 2.4), by
    default that of the SAE, on prompts of the group for which the latents are selected. Controls
    remove the directions of frequency-matched latents, or as many random directions.
    """

    vectors = True

    def change(self, write: Ids, coefficient: float, facts: LatentStatistics) -> tuple[Op, ...]:
        """Controls remove the directions of control latents."""
        return self._removed(facts.directions(write).float().cpu(), coefficient, facts)

    def write(self, vector: Tensor, coefficient: float, facts: LatentStatistics) -> tuple[Op, ...]:
        """The one direction."""
        return self._removed(vector[None], coefficient, facts)

    def _removed(
        self, directions: Tensor, coefficient: float, facts: LatentStatistics
    ) -> tuple[Op, ...]:
        basis = Vector(orthonormal(directions))
        return tuple(Project(at, basis, coefficient) for at in self._places(facts))


class Orthogonalize(ProjectOut):
    """Remove directions from all weights that write to the stream while the condition runs."""

    def weights(self, directions: Tensor, facts: LatentStatistics) -> Tensor | None:  # noqa: ARG002
        """All directions of the condition."""
        return orthonormal(directions.float().cpu())

    def _removed(
        self,
        directions: Tensor,  # noqa: ARG002
        coefficient: float,
        facts: LatentStatistics,  # noqa: ARG002
    ) -> tuple[Op, ...]:
        if coefficient not in (0, 1):
            raise ConfigError(
                f"coefficient={coefficient:g}: intervention=orthogonalize has no intermediate "
                "strengths; type 'coefficient=[0,1]'"
            )
        return ()


_BATCH = 64


class SpliceReconstruction:
    """Replace the activation by the SAE's reconstruction, with or without its error.

    x + coefficient * (x^ - x) on each group's prompts. Controls take a step of the same length in a
    random direction (Gurnee 2024: are an SAE's errors like random ones?).
    Raises ConfigError where `intervention.layers` is given: an SAE is spliced at its hookpoint.
    """

    def __init__(self, cfg: InterventionConfig) -> None:
        if cfg.layers is not None:
            raise ConfigError(
                f"intervention.layers={cfg.layers}: intervention=splice works at the hookpoint of "
                "its SAE; leave intervention.layers out, or sweep with -m layer=1,2"
            )
        self.cfg = cfg

    def plan(
        self,
        facts: LatentStatistics,
        coefficients: Sequence[float],
        prompts: Prompts,
        model: LanguageModel,  # noqa: ARG002
    ) -> tuple[list[Condition], list[str]]:
        """A condition per group, and its controls."""
        conditions = []
        d_model = len(facts.directions([0])[0])
        for group in prompts.of_group:
            of = ("splice", facts.hookpoint.name, group)
            noise = random_directions(self.cfg.n_controls, d_model, self.cfg.seed, *of)
            name = f"{group}_splice"
            for i, random in enumerate([None, *map(Vector, noise)]):
                error = self.cfg.error and random is None
                edits = tuple(
                    (Splice(facts.hookpoint, c, error=error, instead=random),) for c in coefficients
                )
                conditions.append(
                    Condition(
                        name=f"{name}_random_norm_{i:02d}" if i else name,
                        role="control" if i else "place",
                        direction=group,
                        prompts=group,
                        latents=(),
                        of=name,
                        edits=edits,
                        control_kind="random_norm" if i else "",
                        number=i,
                        norm_ratio=1.0,
                    )
                )
        return conditions, []


class PatchActivations:
    """Replace activations by those of a paired prompt, one location at a time.

    Each prompt is paired with a prompt of the other group that has the same entity type and as many
    positions to change (activation patching; Ferrando et al. 2024, appendix). Controls take the
    activations of other prompts of the same group. `intervention.streams`, `.layers` and, for
    attn_z, `.heads` list the locations.
    """

    def __init__(self, cfg: InterventionConfig) -> None:
        self.cfg = cfg
        if cfg.where == "generated":
            raise ConfigError(
                "intervention.where=generated: intervention=patch needs prompt positions; type "
                "e.g. intervention.where=entity_last"
            )
        if cfg.heads is not None and cfg.streams != ["attn_z"]:
            raise ConfigError(
                f"intervention.heads needs 'intervention.streams=[attn_z]', not {cfg.streams}"
            )

    def plan(
        self,
        facts: LatentStatistics,
        coefficients: Sequence[float],
        prompts: Prompts,
        model: LanguageModel,
    ) -> tuple[list[Condition], list[str]]:
        """A condition per location and direction with its controls; notes on unpaired prompts."""
        if len(facts.groups) != 2:
            raise InterventionError(
                "intervention=patch pairs prompts of two groups, but this data set does not have "
                "two; set dataset.groups"
            )
        locations = self._locations(facts, model)
        stored = _captured(prompts.all(), sorted({h for h, _, _ in locations}), model)
        conditions: list[Condition] = []
        notes: list[str] = []
        for towards in facts.groups:
            group = facts.other(towards)
            donors, unpaired = self._donors(prompts, towards, group)
            if unpaired:
                notes.append(
                    f"{unpaired} {group} prompts have no pair of {towards}: none of their entity "
                    "type has as many positions to change"
                )
            for hookpoint, columns, label in locations:
                for i, donor_of in enumerate(donors):
                    per_prompt = {
                        example_id: tuple(
                            (Patch(hookpoint, stored[hookpoint][donor], c, columns),)
                            for c in coefficients
                        )
                        for example_id, donor in donor_of.items()
                    }
                    if per_prompt:
                        name = f"{towards}_patch_{label}"
                        conditions.append(_patch_condition(name, i, towards, group, per_prompt))
        if not conditions:
            raise InterventionError(f"no prompt can be patched ({'; '.join(notes)})")
        return conditions, notes

    def _donors(
        self, prompts: Prompts, towards: str, group: str
    ) -> tuple[list[dict[str, str]], int]:
        """Example id -> donor's id, from the other group and then per control from the own group;
        beside them the number of prompts without a donor of the other group."""
        targets = prompts.of_group.get(group, [])
        others = prompts.of_group.get(towards, [])
        n, seed = self.cfg.n_controls, self.cfg.seed
        pairs = {t.example.id: _matching(t, others, 1, seed) for t in targets}
        own = {t.example.id: _matching(t, targets, n, seed) for t in targets}
        donors = [{t: d[0].example.id for t, d in pairs.items() if d}]
        donors += [{t: d[i].example.id for t, d in own.items() if i < len(d)} for i in range(n)]
        return donors, sum(not d for d in pairs.values())

    def _locations(
        self, facts: LatentStatistics, model: LanguageModel
    ) -> list[tuple[Hookpoint, tuple[int, int] | None, str]]:
        """(stream, its columns or None for all, label) of every location."""
        layers = self.cfg.layers
        if layers is None:
            layers = [facts.written.layer]
        elif layers == "all":
            layers = range(model.n_layers)
        locations = []
        for stream in self.cfg.streams:
            for layer in map(int, layers):
                model.check_layer(layer)
                hookpoint, label = Hookpoint(layer, stream), f"{stream}_{layer}"
                if self.cfg.heads is None:
                    locations.append((hookpoint, None, label))
                    continue
                for head, columns in self._heads(model):
                    locations.append((hookpoint, columns, f"{label}_head_{head}"))
        return locations

    def _heads(self, model: LanguageModel) -> list[tuple[int, tuple[int, int]]]:
        """The heads of `intervention.heads` and their columns of attn_z."""
        config = model.text_config
        n_heads = int(config.num_attention_heads)
        head_dim = int(getattr(config, "head_dim", None) or model.d_model // n_heads)
        heads = range(n_heads) if self.cfg.heads == "all" else self.cfg.heads
        for head in heads:
            if not 0 <= head < n_heads:
                raise ConfigError(
                    f"intervention.heads: head {head} is out of range: the model has heads "
                    f"0-{n_heads - 1}"
                )
        return [(head, (head * head_dim, (head + 1) * head_dim)) for head in heads]


def _patch_condition(
    name: str,
    number: int,
    towards: str,
    group: str,
    per_prompt: Mapping[str, tuple[tuple[Op, ...], ...]],
) -> Condition:
    """The patch itself (number 0) or one of its controls."""
    return Condition(
        name=f"{name}_{OWN_GROUP}_{number:02d}" if number else name,
        role="control" if number else "place",
        direction=towards,
        prompts=group,
        latents=(),
        of=name,
        edits=(),
        per_prompt=per_prompt,
        control_kind=OWN_GROUP if number else "",
        number=number,
    )


def _matching(
    target: PositionedPrompt, donors: Sequence[PositionedPrompt], n: int, seed: int
) -> list[PositionedPrompt]:
    """At most `n` other prompts that the target can be paired with, a seeded choice; prompts of
    equal length come first."""
    candidates = [
        d
        for d in donors
        if d.example.unit != target.example.unit
        and d.example.entity_type == target.example.entity_type
        and len(d.positions) == len(target.positions)
    ]
    rng = np.random.default_rng([seed, len(target.tokens), *target.tokens.ids])
    shuffled = [candidates[i] for i in rng.permutation(len(candidates))]
    return sorted(shuffled, key=lambda d: len(d.tokens) != len(target.tokens))[:n]


def _captured(
    prompts: Sequence[PositionedPrompt], hookpoints: Sequence[Hookpoint], model: LanguageModel
) -> dict[Hookpoint, dict[str, Vector]]:
    """Hookpoint -> example id -> values `[n_positions, d]` of a pass without intervention."""
    values_of: dict[Hookpoint, dict[str, Vector]] = {h: {} for h in hookpoints}
    usable = [p for p in prompts if p.positions]
    lengths = [len(p.tokens) for p in usable]
    check_positions(model, max(lengths, default=0))
    for part in by_regime(model.text_config, lengths, _BATCH):
        batch = [usable[i] for i in part]
        rows = [Row(p.tokens.ids) for p in batch]
        values = read_streams(model, rows, {}, hookpoints, [p.positions for p in batch])
        for hookpoint, parts in values.items():
            for prompt, acts in zip(batch, parts, strict=True):
                values_of[hookpoint][prompt.example.id] = Vector(acts)
    return values_of
