"""The causal test: conditions on held-out prompts, generated in one go, scored and summed up."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from saexp.config import InterventionConfig, parse_coefficients
from saexp.data.examples import Example
from saexp.data.positions import Unplaced, entity_tokens
from saexp.data.tokens import TokenizedText, tokenize
from saexp.errors import InterventionError
from saexp.intervals import wilson
from saexp.interventions.cache import GenerationCache
from saexp.interventions.edits import Condition, LatentFacts
from saexp.interventions.engine import Row, generate
from saexp.models.loading import LanguageModel
from saexp.registry import resolve
from saexp.results import TaskResult
from saexp.saes.base import SparseAutoencoder

log = logging.getLogger(__name__)


def edited_positions(where: str, example: Example, tokens: TokenizedText) -> tuple[int, ...]:
    """Prompt tokens that `where` stands for. Raises Unplaced where the prompt has none."""
    ordinary = [i for i, special in enumerate(tokens.special) if not special]
    if where in ("all", "prompt"):
        return tuple(ordinary)
    if where == "last":
        return (len(tokens) - 1,)
    if where == "generated":
        return ()
    entity = entity_tokens(example, tokens)
    if where == "entity":
        return tuple(entity)
    return (entity[-1],) if where == "entity_last" else tuple(range(entity[-1], len(tokens)))


def choose_prompts(examples: Sequence[Example], n: int, seed: int) -> list[Example]:
    """At most `n` examples per group, spread evenly over entity types, a seeded choice."""
    rng = np.random.default_rng([seed, 31])
    chosen: list[Example] = []
    for group in sorted({str(e.group) for e in examples}):
        of_type: dict[str, list[Example]] = {}
        for index in rng.permutation(len(examples)):
            example = examples[index]
            if example.group == group:
                of_type.setdefault(str(example.entity_type), []).append(example)
        queues = [of_type[t] for t in sorted(of_type)]
        turn = [q[i] for i in range(max(map(len, queues))) for q in queues if i < len(q)]
        chosen += turn[:n]
    return chosen


class CausalTest:
    """Runs an intervention (Steer, Clamp, …) on a model."""

    def __init__(
        self,
        cfg: InterventionConfig,
        model: LanguageModel,
        sae: SparseAutoencoder,
        cache_dir: str | Path,
    ) -> None:
        self.cache_dir = cache_dir
        self.cfg, self.model, self.sae = cfg, model, sae
        self.outcomes = [resolve("outcome", name)() for name in cfg.outcomes]

    def run(
        self, conditions: list[Condition], examples: Sequence[Example], max_length: int
    ) -> TaskResult:
        """Tables `effects` (a row per prompt, condition, coefficient) and `effects_summary`.

        Metrics `effect/<outcome>/<condition>_at_<coefficient>`. Prompts without the positions asked
        for are left out, counted and named in the notes.
        """
        prompts = [
            e.as_prompt() for e in choose_prompts(examples, self.cfg.n_prompts, self.cfg.seed)
        ]
        prompts = [self._in_chat(p) for p in prompts]
        tokenized = tokenize([p.text for p in prompts], self.model.tokenizer, max_length)
        usable: dict[str, list[tuple[Example, TokenizedText, tuple[int, ...]]]] = {}
        reasons: dict[str, int] = {}
        for prompt, tokens in zip(prompts, tokenized, strict=True):
            try:
                if tokens.truncated:
                    raise Unplaced("prompt longer than dataset.max_length")
                places = edited_positions(self.cfg.where, prompt, tokens)
            except Unplaced as reason:
                reasons[str(reason)] = reasons.get(str(reason), 0) + 1
                continue
            usable.setdefault(str(prompt.group), []).append((prompt, tokens, places))
        notes = [f"{n} prompts not steered: {why}" for why, n in sorted(reasons.items())]
        if not usable:
            raise InterventionError(
                f"no prompt can be steered ({'; '.join(notes) or 'none given'})"
            )
        coefficients = parse_coefficients(self.cfg.coefficient)
        rows, about = self._plan(conditions, usable, coefficients)
        cache = self._cache()
        try:
            tokens_out = generate(
                self.model,
                rows,
                self.sae,
                self.sae.hookpoint,
                max_new_tokens=self.cfg.max_new_tokens,
                batch_tokens=self.cfg.batch_tokens,
                cache=cache,
            )
        finally:
            if cache is not None:
                cache.close()
        texts = self.model.tokenizer.batch_decode(tokens_out, skip_special_tokens=True)
        effects = self._score(about, texts)
        summary = summarise(effects, [o.name for o in self.outcomes])
        return TaskResult(
            metrics=_metrics(summary, [o.name for o in self.outcomes]),
            tables={"effects": effects, "effects_summary": summary},
            notes=notes,
        )

    def _cache(self) -> GenerationCache | None:
        """Generations of the same weights on the same kind of device; none for weights unknown."""
        weights = self.sae.metadata.get("fingerprint")
        if weights is None:
            return None
        determined_by = {
            "model": self.model.fingerprint,
            "dtype": str(self.model.dtype),
            "device": self.model.device.type,
            "eos": self.model.eos_ids,
            "sae": weights,
            "sae_dtype": str(self.sae.W_dec.dtype),
            "hookpoint": self.sae.hookpoint.name,
            "max_new_tokens": self.cfg.max_new_tokens,
        }
        return GenerationCache(self.cache_dir, determined_by)

    def _in_chat(self, example: Example) -> Example:
        if not self.model.cfg.chat:
            return example
        from dataclasses import replace

        wrapped = replace(example, prompt=self.model.chat_text(example.text))
        return wrapped.as_prompt()

    def _plan(
        self,
        conditions: list[Condition],
        usable: dict[str, list[tuple[Example, TokenizedText, tuple[int, ...]]]],
        coefficients: Sequence[float],
    ) -> tuple[list[Row], list[tuple[Example, dict[str, Any]]]]:
        generated = self.cfg.where in ("all", "generated")
        rows: list[Row] = []
        about: list[tuple[Example, dict[str, Any]]] = []
        for group, prompts in usable.items():
            for prompt, tokens, _ in prompts:
                rows.append(Row(tokens.ids))
                base = {"condition": f"baseline_{group}", "role": "baseline", "of": ""}
                about.append((prompt, {**base, "direction": "", "latent": "", "coefficient": 0.0}))
        for condition in conditions:
            for prompt, tokens, places in usable.get(condition.prompts, []):
                for coefficient, edit in zip(coefficients, condition.edits, strict=True):
                    rows.append(Row(tokens.ids, edit, places, generated))
                    described = {
                        "condition": condition.name,
                        "role": condition.role,
                        "of": condition.of,
                        "direction": condition.direction,
                        "latent": "+".join(map(str, condition.latents)),
                        "coefficient": coefficient,
                    }
                    about.append((prompt, described))
        return rows, about

    def _score(self, about: list[tuple[Example, dict[str, Any]]], texts: list[str]) -> pd.DataFrame:
        table = []
        scored: dict[tuple[str, str], dict[str, Any]] = {}
        for (prompt, described), text in zip(about, texts, strict=True):
            if (prompt.id, text) not in scored:
                scored[prompt.id, text] = {o.name: o.score(text, prompt) for o in self.outcomes}
            row = {
                "example_id": prompt.id,
                "group": prompt.group,
                "entity_type": prompt.entity_type,
                "unit": prompt.unit,
                "prompt": prompt.text,
                **described,
                "coefficient_unit": self.cfg.unit
                if self.cfg.name == "steer"
                else "share of the way",
                "hookpoint": self.sae.hookpoint.name,
                "layer": self.sae.hookpoint.layer,
                "where": self.cfg.where,
                "generated_text": text,
                "answers": " | ".join(prompt.answers),
            }
            table.append(row | scored[prompt.id, text])
        return pd.DataFrame(table)


def summarise(effects: pd.DataFrame, outcomes: Sequence[str]) -> pd.DataFrame:
    """Rate, Wilson interval and change against baseline per condition and coefficient."""
    keys = ["condition", "role", "of", "direction", "latent", "group", "coefficient"]
    baseline = effects[effects["role"] == "baseline"]
    rows = []
    for key, part in effects.groupby(keys, sort=False):
        row: dict[str, Any] = {**dict(zip(keys, key, strict=True)), "n": len(part)}
        before = baseline[baseline["group"] == row["group"]]
        for name in outcomes:
            k = int(part[name].sum())
            low, high = wilson(k, len(part))
            row |= {name: k / len(part), f"{name}_ci_low": low, f"{name}_ci_high": high}
            row[f"{name}_change"] = row[name] - float(before[name].mean())
        rows.append(row)
    return pd.DataFrame(rows)


def _metrics(summary: pd.DataFrame, outcomes: Sequence[str]) -> dict[str, float | int | None]:
    """Baselines, selected latents at each coefficient, and the extreme of their controls."""
    metrics: dict[str, float | int | None] = {}
    for name in outcomes:
        for row in summary.to_dict("records"):
            at = f"{row['condition']}_at_{row['coefficient']:g}"
            if row["role"] == "baseline":
                metrics[f"effect/{name}/{row['condition']}"] = row[name]
            elif row["role"] != "control":
                metrics[f"effect/{name}/{at}"] = row[name]
        controls = summary[summary["role"] == "control"]
        for (of, coefficient), part in controls.groupby(["of", "coefficient"], sort=False):
            at = f"effect/{name}/{of}_controls"
            metrics[f"{at}_min_at_{coefficient:g}"] = float(part[name].min())
            metrics[f"{at}_max_at_{coefficient:g}"] = float(part[name].max())
    return metrics


def run_intervention(
    intervention: Any,
    facts: LatentFacts,
    model: LanguageModel,
    sae: SparseAutoencoder,
    examples: Sequence[Example],
    max_length: int,
    cache_dir: str | Path,
) -> TaskResult:
    """Make an intervention's conditions and run them; none where nothing is selected."""
    cfg = intervention.cfg
    conditions, notes = intervention.conditions(facts, parse_coefficients(cfg.coefficient))
    if not conditions:
        return TaskResult(notes=["no latent is selected, so nothing was steered"])
    test = CausalTest(cfg, model, sae, cache_dir)
    result = test.run(conditions, examples, max_length)
    result.notes = [*notes, *result.notes]
    return result
