"""Attention from the last token to the entity, and the cost of edited weights on neutral text."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pandas as pd
import torch

from saexp.config import InterventionConfig
from saexp.context import progress
from saexp.data.positions import Unplaced, entity_tokens
from saexp.errors import InterventionError
from saexp.interventions.batching import BatchEdit, SAEs
from saexp.interventions.computing import batch_tokens_for, weight_divergences
from saexp.interventions.conditions import Placed, Prompts
from saexp.interventions.generation import padded
from saexp.interventions.latent_values import Condition
from saexp.interventions.measure import Job, Measurement, cost_row
from saexp.interventions.operations import Row
from saexp.models.attention import attention_to
from saexp.models.forward import check_positions
from saexp.models.loading import LanguageModel
from saexp.models.rope import by_regime
from saexp.models.weight_editing import Original, orthogonalized
from saexp.stats.permutation import paired_head_test

_BATCH = 64
_TOLD = ("group", "direction", "place")


def attention_tables(
    conditions: Sequence[Condition],
    prompts: Prompts,
    coefficients: Sequence[float],
    chosen: Mapping[str, float],
    model: LanguageModel,
    saes: SAEs,
    cfg: InterventionConfig,
) -> tuple[dict[str, pd.DataFrame], dict[str, float | int | None]]:
    """Tables `attention` (per layer and head) and `attention_summary` (per condition), and metrics.

    Numbers of the summary are over entities (`n`), tested against the unsteered prompts. Test
    prompts only; each condition at the coefficient chosen for it, else its largest. Its
    controls among `conditions` are run at the same one. A condition that takes directions out of
    the weights is compared with the model's own weights. Raises InterventionError where no prompt
    has an entity.
    """
    reported = [c for c in conditions if c.role in _TOLD]
    reported = reported or [c for c in conditions if c.role == "single"]
    heads: list[pd.DataFrame] = []
    rows: list[dict[str, Any]] = []
    metrics: dict[str, float | int | None] = {}
    stored: dict[Any, np.ndarray] = {}
    family = [
        (c, m)
        for m in reported
        for c in conditions
        if m.name in (c.name, c.of) and c.tried(_chosen_number(m, chosen, coefficients))
    ]
    with progress(len(family), "attention", "condition") as bar:
        for condition, main in family:
            at = _chosen_number(main, chosen, coefficients)
            coefficient = coefficients[at]
            placed = _usable(prompts, condition)
            pairs = [(p, condition.ops(p.example.id, at)) for p in placed]
            pairs = [(p, ops) for p, ops in pairs if ops is not None]
            if not pairs:
                raise InterventionError("outcome attention: no test prompt has an entity in it")
            entities = [_entity(p) for p, _ in pairs]
            plain = [
                Row(p.tokens.ids, about=entity)
                for (p, _), entity in zip(pairs, entities, strict=True)
            ]
            before = _measured(model, plain, {}, stored)
            generated = cfg.where in ("all", "generated")
            edited = [
                Row(p.tokens.ids, ops, p.positions, generated, about=entity)
                for (p, ops), entity in zip(pairs, entities, strict=True)
            ]
            with ExitStack() as stack:
                weights = condition.weights if coefficient else None
                if weights is not None:
                    out = orthogonalized(model, weights, embedding=cfg.embedding)
                    stack.enter_context(out)
                seen = stored if weights is None else {}
                after = _measured(model, edited, saes, seen)
            units = np.array([p.example.unit for p, _ in pairs])
            found = paired_head_test(
                before.reshape(len(pairs), -1), after.reshape(len(pairs), -1), units, seed=cfg.seed
            )
            about = {
                "condition": condition.name,
                "role": condition.role,
                "control_kind": condition.control_kind,
                "of": condition.of,
                "direction": condition.direction,
                "group": condition.prompts,
                "coefficient": coefficient,
                "n": found.overall.n_units,
                "n_prompts": len(pairs),
            }
            rows.append(
                about
                | {
                    "original": found.overall.mean_first,
                    "edited": found.overall.mean_second,
                    "difference": found.overall.difference,
                    "ci_low": found.overall.ci_low,
                    "ci_high": found.overall.ci_high,
                    "p_value": found.overall.p_value,
                }
            )
            if condition is main:
                layers, n_heads = before.shape[1:]
                table = pd.DataFrame(
                    {
                        "layer": np.repeat(np.arange(layers), n_heads),
                        "head": np.tile(np.arange(n_heads), layers),
                        "original": before.mean(0).ravel(),
                        "edited": after.mean(0).ravel(),
                        "difference": found.difference,
                        "p_corrected": found.p_corrected,
                    }
                )
                heads.append(table.assign(**about))
                name = f"effect/attention/{condition.name}_at_{coefficient:g}"
                metrics[name] = found.overall.difference
            bar.update(1)
    tables = {
        "attention": pd.concat(heads, ignore_index=True),
        "attention_summary": pd.DataFrame(rows),
    }
    return tables, metrics


def _chosen_number(
    main: Condition, chosen: Mapping[str, float], coefficients: Sequence[float]
) -> int:
    return list(coefficients).index(chosen.get(main.name, max(coefficients, key=abs)))


def _usable(prompts: Prompts, condition: Condition) -> list[Placed]:
    found = []
    for prompt in prompts.on(condition.prompts):
        if prompt.example.split == "test" and prompt.example.spans:
            found.append(prompt)
    return found


def _entity(prompt: Placed) -> tuple[int, ...]:
    try:
        return tuple(entity_tokens(prompt.example, prompt.tokens))
    except Unplaced as reason:
        raise InterventionError(f"outcome attention: {reason}") from reason


def _measured(
    model: LanguageModel, rows: Sequence[Row], saes: SAEs, stored: dict[Any, np.ndarray]
) -> np.ndarray:
    """`[n, n_layers, n_heads]`, attention of each row's last token to its tokens `about`."""
    missing = [i for i, row in enumerate(rows) if row.key not in stored]
    lengths = [len(rows[i].ids) for i in missing]
    check_positions(model, max(lengths, default=0))
    for part in by_regime(model.text_config, lengths, _BATCH):
        chosen = [missing[k] for k in part]
        batch = [rows[i] for i in chosen]
        ids, mask = padded([r.ids for r in batch], model.pad_id, model.device)
        width = ids.shape[1]
        keys = torch.zeros_like(ids, dtype=torch.bool)
        for k, row in enumerate(batch):
            keys[k, [width - len(row.ids) + t for t in row.about]] = True
        edits = BatchEdit(batch, width, saes, model.device).functions(width)
        found = attention_to(model, ids, mask, keys, edits=edits).numpy()
        for row, values in zip(batch, found, strict=True):
            stored[row.key] = values
    return np.stack([stored[row.key] for row in rows])


def weight_costs(
    measurement: Measurement,
    jobs: Sequence[Job],
    neutral: Sequence[str],
    original: Original | None,
) -> list[dict[str, Any]]:
    """KL(original || edited weights) on neutral text, per condition and strength, as other costs.

    The jobs share the weights that the model has now; `original` gives it back its own for a while,
    and is None where they are its own: there the cost is 0.
    """
    cells = {
        (j.condition.name, j.coefficient): j.condition
        for j in jobs
        if j.condition.weights is not None
    }
    if not cells:
        return []
    model = measurement.model
    prompts = [text.ids for text in measurement.neutral_tokens(neutral)]
    values = np.zeros(len(prompts))
    if original is not None:
        made = weight_divergences(
            model,
            prompts,
            original,
            batch_tokens=batch_tokens_for(model, measurement.cfg.batch_tokens),
            cache=measurement.cache,
        )
        values = np.asarray(made)
    return [
        cost_row(condition, coefficient, values) for (_, coefficient), condition in cells.items()
    ]
