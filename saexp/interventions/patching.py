"""Edits made of activations: another prompt's in place of one's own, or an SAE's reconstruction."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saexp.config import InterventionConfig
from saexp.directions import random_directions
from saexp.errors import ConfigError, InterventionError
from saexp.interventions.controls import OWN_GROUP
from saexp.interventions.engine import padded
from saexp.interventions.facts import Condition, LatentFacts
from saexp.interventions.ops import Patch, Splice, Vector
from saexp.interventions.prompts import Placed, Prompts
from saexp.models.context_length import check_positions
from saexp.models.hookpoints import Hookpoint
from saexp.models.hooks import run_truncated
from saexp.models.loading import LanguageModel
from saexp.models.rope import by_regime

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
        ids, mask = padded([p.tokens.ids for p in batch], model.pad_id, model.device)
        rows = [i for i, p in enumerate(batch) for _ in p.positions]
        width = ids.shape[1]
        places = [width - len(p.tokens) + k for p in batch for k in p.positions]
        where: Any = (torch.tensor(rows), torch.tensor(places))
        values = run_truncated(model, ids, mask, hookpoints, where)
        for hookpoint, tensor in values.items():
            parts: tuple[Tensor, ...] = tensor.float().split([len(p.positions) for p in batch])
            for prompt, acts in zip(batch, parts, strict=True):
                found[hookpoint][prompt.example.id] = Vector(acts)
    return found
