"""Attention from the last token to the entity, with and without an intervention."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from saexp.config import InterventionConfig
from saexp.context import progress
from saexp.data.positions import entity_tokens
from saexp.data.tokenization import PositionNotFound
from saexp.errors import InterventionError
from saexp.interventions.conditions import Condition, PositionedPrompt, Prompts
from saexp.interventions.measure import condition_columns
from saexp.interventions.outcomes import metric_names
from saexp.interventions.stream_edits import BatchEdit, Row, SAEs
from saexp.models.forward import by_regime, check_positions, padded
from saexp.models.hooks import attention_to
from saexp.models.loading import LanguageModel
from saexp.models.unembedding import orthogonalized
from saexp.stats.significance import paired_head_test

_ATTENTION_BATCH = 64
_MAIN_ROLES = ("group", "direction", "place")


@dataclass(frozen=True)
class AttentionTest:
    """Attention from the last token to the entity, with and without an intervention."""

    model: LanguageModel
    saes: SAEs
    cfg: InterventionConfig
    prompts: Prompts
    coefficients: Sequence[float]
    chosen: Mapping[str, float]
    """Condition -> the coefficient chosen for it."""

    def tables(
        self, conditions: Sequence[Condition]
    ) -> tuple[dict[str, pd.DataFrame], dict[str, float | int | None]]:
        """Tables `attention` (per layer and head) and `attention_summary` (per condition), metrics.

        Rows of the summary are tested over entities (`n`) against the prompts without intervention,
        on the test split. Each condition is run at its chosen coefficient, or at its largest, and
        its controls among `conditions` at the same one. A condition that removes directions from
        the weights is compared with the model's own weights. Raises InterventionError where no
        prompt has an entity.
        """
        main = [c for c in conditions if c.role in _MAIN_ROLES]
        main = main or [c for c in conditions if c.role == "single"]
        names = metric_names(c.described for c in conditions if c.role != "control")
        tests = [
            (c, self._index(m))
            for m in main
            for c in conditions
            if m.name in (c.name, c.of) and c.tried(self._index(m))
        ]
        head_tables: list[pd.DataFrame] = []
        summary: list[dict[str, Any]] = []
        metrics: dict[str, float | int | None] = {}
        attention_of_row: dict[Any, np.ndarray] = {}
        with progress(len(tests), "attention", "condition") as bar:
            for condition, index in tests:
                row, heads = self._test(condition, index, attention_of_row)
                summary.append(row)
                if any(condition is m for m in main):
                    head_tables.append(heads)
                    metrics[f"effect/attention/{names[condition.name]}"] = row["difference"]
                bar.update(1)
        tables = {
            "attention": pd.concat(head_tables, ignore_index=True),
            "attention_summary": pd.DataFrame(summary),
        }
        return tables, metrics

    def _index(self, main: Condition) -> int:
        """Number of the coefficient at which a condition is run."""
        coefficient = self.chosen.get(main.name, max(self.coefficients, key=abs))
        return list(self.coefficients).index(coefficient)

    def _test(
        self, condition: Condition, index: int, attention_of_row: dict[Any, np.ndarray]
    ) -> tuple[dict[str, Any], pd.DataFrame]:
        """(summary row, table per head) of one condition."""
        pairs = [
            (prompt, ops)
            for prompt in _test_prompts_with_entity(self.prompts, condition)
            if (ops := condition.ops(prompt.example.id, index)) is not None
        ]
        if not pairs:
            raise InterventionError("outcome attention: no test prompt has an entity in it")
        generated = self.cfg.where in ("all", "generated")
        unedited, edited = [], []
        for prompt, ops in pairs:
            entity = _entity_positions(prompt)
            unedited.append(Row(prompt.tokens.ids, about=entity))
            edited.append(Row(prompt.tokens.ids, ops, prompt.positions, generated, about=entity))
        before = _attention(self.model, unedited, {}, attention_of_row)
        weights = condition.weights if self.coefficients[index] else None
        if weights is None:
            after = _attention(self.model, edited, self.saes, attention_of_row)
        else:
            with orthogonalized(self.model, weights, embedding=self.cfg.embedding):
                after = _attention(self.model, edited, self.saes, {})
        test = paired_head_test(
            before.reshape(len(pairs), -1),
            after.reshape(len(pairs), -1),
            np.array([prompt.example.unit for prompt, _ in pairs]),
            seed=self.cfg.seed,
        )
        overall = test.overall
        about = {
            **condition_columns(condition),
            "group": condition.prompts,
            "coefficient": self.coefficients[index],
            "n": overall.n_units,
            "n_prompts": len(pairs),
        }
        row = {
            **about,
            "original": overall.mean_first,
            "edited": overall.mean_second,
            "difference": overall.difference,
            "ci_low": overall.ci_low,
            "ci_high": overall.ci_high,
            "p_value": overall.p_value,
        }
        n_layers, n_heads = before.shape[1:]
        heads = pd.DataFrame(
            {
                "layer": np.repeat(np.arange(n_layers), n_heads),
                "head": np.tile(np.arange(n_heads), n_layers),
                "original": before.mean(0).ravel(),
                "edited": after.mean(0).ravel(),
                "difference": test.difference,
                "p_corrected": test.p_corrected,
            }
        )
        return row, heads.assign(**about)


def _attention(
    model: LanguageModel,
    rows: Sequence[Row],
    saes: SAEs,
    attention_of_row: dict[Any, np.ndarray],
) -> Float[np.ndarray, "n n_layers n_heads"]:
    """Attention of each row's last token to its tokens `about`; equal rows are computed once,
    across calls that share `attention_of_row`."""
    missing = [row for row in rows if row.key not in attention_of_row]
    lengths = [len(row.ids) for row in missing]
    check_positions(model, max(lengths, default=0))
    for part in by_regime(model.text_config, lengths, _ATTENTION_BATCH):
        batch = [missing[k] for k in part]
        ids, mask = padded([r.ids for r in batch], model.pad_id, model.device, padding_side="left")
        width = ids.shape[1]
        keys = torch.zeros_like(ids, dtype=torch.bool)
        for k, row in enumerate(batch):
            keys[k, [width - len(row.ids) + t for t in row.about]] = True
        edits = BatchEdit(batch, width, saes, model.device).functions(width)
        attention = attention_to(model, ids, mask, keys, edits=edits).numpy()
        attention_of_row |= {row.key: a for row, a in zip(batch, attention, strict=True)}
    return np.stack([attention_of_row[row.key] for row in rows])


def _test_prompts_with_entity(prompts: Prompts, condition: Condition) -> list[PositionedPrompt]:
    return [
        p for p in prompts.on(condition.prompts) if p.example.split == "test" and p.example.spans
    ]


def _entity_positions(prompt: PositionedPrompt) -> tuple[int, ...]:
    try:
        return tuple(entity_tokens(prompt.example, prompt.tokens))
    except PositionNotFound as reason:
        raise InterventionError(f"outcome attention: {reason}") from reason
