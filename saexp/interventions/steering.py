"""The interventions: steer, clamp, scale, ablate, project out, orthogonalize, splice, patch."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saexp.config import InterventionConfig
from saexp.errors import ConfigError, InterventionError
from saexp.interventions.conditions import Condition, LatentIntervention, Placed, Prompts
from saexp.interventions.controls import OWN_GROUP
from saexp.interventions.directions import LatentFacts, Sets, orthonormal
from saexp.interventions.generation import read_streams
from saexp.interventions.operations import Add, Move, Op, Patch, Project, Row, Splice, Vector
from saexp.models.forward import check_positions
from saexp.models.hookpoints import Hookpoint
from saexp.models.loading import LanguageModel
from saexp.models.rope import by_regime
from saexp.stats.permutation import random_directions


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


class Scale(LatentIntervention):
    """Multiply latents by 1 + coefficient: 0 leaves them, -1 silences, 1 doubles; error kept.

    Latents are scaled on prompts of the group they are selected for. Controls are frequency-matched
    latents, scaled themselves; there is no vector that a random direction could replace.
    """

    own_prompts = True

    def edit(
        self,
        latents: tuple[int, ...],  # noqa: ARG002
        write: tuple[int, ...],
        prompts: str,  # noqa: ARG002
        coefficient: float,
        facts: LatentFacts,
    ) -> tuple[Op, ...]:
        """x + coefficient * a * direction."""
        return (Move(facts.hookpoint, write, write, (0.0,) * len(write), -coefficient),)


class Ablate(Scale):
    """Take latents out, the error kept: x - coefficient * a * direction."""

    def edit(
        self,
        latents: tuple[int, ...],
        write: tuple[int, ...],
        prompts: str,
        coefficient: float,
        facts: LatentFacts,
    ) -> tuple[Op, ...]:
        """Coefficient 1 puts the latents to zero."""
        return super().edit(latents, write, prompts, -coefficient, facts)


class ProjectOut(LatentIntervention):
    """Remove directions from the stream: x - coefficient * Q'Q x, Q an orthonormal basis of them.

    At every layer of `intervention.layers` (Arditi et al. 2024, arXiv 2406.11717, section 2.4), the
    SAE's own by default, on prompts of the group that the latents are selected for. Controls remove
    the directions of frequency-matched latents, or as many random directions.
    """

    own_prompts = True
    vectors = True

    def edit(
        self,
        latents: tuple[int, ...],  # noqa: ARG002
        write: tuple[int, ...],
        prompts: str,  # noqa: ARG002
        coefficient: float,
        facts: LatentFacts,
    ) -> tuple[Op, ...]:
        """Controls remove control latents' directions."""
        return self._removed(facts.directions(write).float().cpu(), coefficient, facts)

    def write(self, vector: Tensor, coefficient: float, facts: LatentFacts) -> tuple[Op, ...]:
        """The one direction."""
        return self._removed(vector[None], coefficient, facts)

    def _removed(
        self, directions: Tensor, coefficient: float, facts: LatentFacts
    ) -> tuple[Op, ...]:
        basis = Vector(orthonormal(directions))
        return tuple(Project(at, basis, coefficient) for at in self._places(facts))


class Orthogonalize(ProjectOut):
    """Remove directions from the weights that write to the stream, for as long as the test runs."""

    def weights(self, directions: Tensor, facts: LatentFacts) -> Tensor | None:  # noqa: ARG002
        """All directions of the condition."""
        return orthonormal(directions.float().cpu())

    def _removed(
        self,
        directions: Tensor,  # noqa: ARG002
        coefficient: float,
        facts: LatentFacts,  # noqa: ARG002
    ) -> tuple[Op, ...]:
        if coefficient not in (0, 1):
            raise ConfigError(
                f"coefficient={coefficient:g}: orthogonalised weights are or are not; type "
                "'coefficient=[0,1]'"
            )
        return ()


_BATCH = 64


class SpliceIn:
    """The SAE's reconstruction in place of the activation, with or without its error.

    x + coefficient * (x^ - x) on each group's own prompts. A control takes a step of the same
    length in a random direction (Gurnee 2024: are an SAE's errors like random ones?).
    Raises ConfigError where layers are named: one SAE is spliced, at its own hookpoint.
    """

    def __init__(self, cfg: InterventionConfig) -> None:
        if cfg.layers is not None:
            raise ConfigError(
                f"intervention.layers={cfg.layers}: splice has one SAE, at its own hookpoint; "
                "leave it out, or sweep with -m layer=1,2"
            )
        self.cfg = cfg

    def plan(
        self,
        facts: LatentFacts,
        coefficients: Sequence[float],
        prompts: Prompts,
        model: LanguageModel,  # noqa: ARG002
    ) -> tuple[list[Condition], list[str]]:
        """A condition per group, and its controls."""
        conditions = []
        width = len(facts.directions([0])[0])
        for group in prompts.of_group:
            of = ("splice", facts.hookpoint.name, group)
            noise = random_directions(self.cfg.n_controls, width, self.cfg.seed, *of)
            ways = [None, *map(Vector, noise)]
            name = f"{group}_splice"
            for i, way in enumerate(ways):
                edits = tuple(
                    (Splice(facts.hookpoint, c, error=self.cfg.error and way is None, instead=way),)
                    for c in coefficients
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


class PatchFrom:
    """Activations of a paired prompt in place of one's own, place by place.

    Each prompt is paired with one of the other group of the same entity type, with as many
    positions to change (Ferrando et al. 2024, appendix; activation patching). Controls take the
    activations of other prompts of the prompt's own group. `intervention.streams`, `.layers` and,
    for attn_z, `.heads` say which places are tried, one at a time.
    """

    def __init__(self, cfg: InterventionConfig) -> None:
        self.cfg = cfg
        if cfg.where == "generated":
            raise ConfigError("intervention.where=generated: a patch needs prompt positions")
        if cfg.heads is not None and cfg.streams != ["attn_z"]:
            raise ConfigError(
                f"intervention.heads needs 'intervention.streams=[attn_z]', not {cfg.streams}"
            )

    def plan(
        self,
        facts: LatentFacts,
        coefficients: Sequence[float],
        prompts: Prompts,
        model: LanguageModel,
    ) -> tuple[list[Condition], list[str]]:
        """A condition per place and direction, and its controls; notes on prompts without pair."""
        if len(facts.groups) != 2:
            raise InterventionError(
                "intervention=patch pairs prompts of two groups, and this data set has no two"
            )
        places = self._places(facts, model)
        stored = _captured(prompts.all(), sorted({p for p, _, _ in places}), model)
        conditions: list[Condition] = []
        notes: list[str] = []
        for towards in facts.groups:
            targets = prompts.of_group.get(facts.other(towards), [])
            donors = prompts.of_group.get(towards, [])
            pairs = {t.example.id: _donors(t, donors, 1, self.cfg.seed) for t in targets}
            alone = sum(not p for p in pairs.values())
            if alone:
                notes.append(
                    f"{alone} {facts.other(towards)} prompts have no pair of {towards}: none of "
                    "their entity type has as many positions to change"
                )
            own = {
                t.example.id: _donors(t, targets, self.cfg.n_controls, self.cfg.seed)
                for t in targets
            }
            for hookpoint, columns, label in places:
                name = f"{towards}_patch_{label}"
                sources = [
                    pairs,
                    *(
                        {k: v[i : i + 1] for k, v in own.items()}
                        for i in range(self.cfg.n_controls)
                    ),
                ]
                for i, of_target in enumerate(sources):
                    per_prompt = {
                        target: tuple(
                            (Patch(hookpoint, stored[hookpoint][chosen[0].example.id], c, columns),)
                            for c in coefficients
                        )
                        for target, chosen in of_target.items()
                        if chosen
                    }
                    if not per_prompt:
                        continue
                    conditions.append(
                        Condition(
                            name=f"{name}_{OWN_GROUP}_{i:02d}" if i else name,
                            role="control" if i else "place",
                            direction=towards,
                            prompts=facts.other(towards),
                            latents=(),
                            of=name,
                            edits=(),
                            per_prompt=per_prompt,
                            control_kind=OWN_GROUP if i else "",
                            number=i,
                        )
                    )
        if not conditions:
            raise InterventionError(f"no prompt can be patched ({'; '.join(notes)})")
        return conditions, notes

    def _places(
        self, facts: LatentFacts, model: LanguageModel
    ) -> list[tuple[Hookpoint, tuple[int, int] | None, str]]:
        layers = self.cfg.layers
        if layers is None:
            numbers = [facts.written.layer]
        else:
            numbers = list(range(model.n_layers)) if layers == "all" else [int(n) for n in layers]
        found = []
        for stream in self.cfg.streams:
            for layer in numbers:
                hookpoint = Hookpoint(layer, stream)
                model.check_layer(layer)
                if self.cfg.heads is None:
                    found.append((hookpoint, None, f"{stream}_{layer}"))
                    continue
                n_heads = int(model.text_config.num_attention_heads)
                heads = range(n_heads) if self.cfg.heads == "all" else self.cfg.heads
                for head in heads:
                    if not 0 <= head < n_heads:
                        raise ConfigError(
                            f"intervention.heads: head {head}, but the model has heads "
                            f"0-{n_heads - 1}"
                        )
                    size = _head_dim(model)
                    columns = (head * size, (head + 1) * size)
                    found.append((hookpoint, columns, f"{stream}_{layer}_head_{head}"))
        return found


def _head_dim(model: LanguageModel) -> int:
    about = model.text_config
    return int(getattr(about, "head_dim", None) or model.d_model // about.num_attention_heads)


def _donors(target: Placed, donors: Sequence[Placed], n: int, seed: int) -> list[Placed]:
    """At most `n` other prompts that fit, a seeded choice; equally long ones first."""
    fits = [
        d
        for d in donors
        if d.example.unit != target.example.unit
        and d.example.entity_type == target.example.entity_type
        and len(d.positions) == len(target.positions)
    ]
    order = np.random.default_rng([seed, len(target.tokens), *target.tokens.ids]).permutation(
        len(fits)
    )
    shuffled = [fits[i] for i in order]
    return sorted(shuffled, key=lambda d: len(d.tokens) != len(target.tokens))[:n]


def _captured(
    prompts: Sequence[Placed], hookpoints: Sequence[Hookpoint], model: LanguageModel
) -> dict[Hookpoint, dict[str, Vector]]:
    """Per hookpoint and example the values `[n_positions, d]` that an unedited pass has."""
    found: dict[Hookpoint, dict[str, Vector]] = {h: {} for h in hookpoints}
    usable = [p for p in prompts if p.positions]
    lengths = [len(p.tokens) for p in usable]
    check_positions(model, max(lengths, default=0))
    for part in by_regime(model.text_config, lengths, _BATCH):
        batch = [usable[i] for i in part]
        rows = [Row(p.tokens.ids) for p in batch]
        values = read_streams(model, rows, {}, hookpoints, [p.positions for p in batch])
        for hookpoint, parts in values.items():
            for prompt, acts in zip(batch, parts, strict=True):
                found[hookpoint][prompt.example.id] = Vector(acts)
    return found
