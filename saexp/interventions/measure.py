"""Outcomes of jobs (prompt, condition, coefficient), each row computed once, and side effects."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from saexp.config import InterventionConfig
from saexp.context import progress
from saexp.data.examples import Example
from saexp.data.positions import Unplaced, entity_tokens
from saexp.data.prompts import space_note
from saexp.data.tokenization import TokenizedText, tokenize
from saexp.errors import InterventionError
from saexp.interventions.batching import (
    batch_tokens_for,
    divergences,
    generate,
    read_logits,
    weight_divergences,
)
from saexp.interventions.conditions import Condition, Placed, Prompts, placed_prompts
from saexp.interventions.generation import padded
from saexp.interventions.operations import BatchEdit, Op, Row, SAEs, Sampling
from saexp.interventions.outcomes import mean_loss, reader_kind
from saexp.interventions.results_cache import ResultCache
from saexp.models.attention import attention_to
from saexp.models.forward import check_positions
from saexp.models.loading import LanguageModel
from saexp.models.rope import by_regime
from saexp.models.weights import Original, orthogonalized
from saexp.stats.permutation import paired_head_test
from saexp.wording import counted

_NEUTRAL_TOKENS = 48
"""Longest neutral text, in tokens."""


@dataclass(frozen=True)
class Job:
    """One cell of the effects table."""

    example: Example
    condition: Condition
    at: int
    """Which coefficient."""
    coefficient: float


@dataclass
class Measurement:
    """Runs jobs on one model as it is now."""

    model: LanguageModel
    saes: SAEs
    asked: Sequence[Any]
    """Outcome objects."""
    cfg: InterventionConfig
    max_length: int
    cache: ResultCache | None
    original: Original | None = None
    """Gives the model its own weights for a while, where some were taken out."""
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for outcome in self.asked:
            if hasattr(outcome, "prepare"):
                outcome.prepare(self.model.tokenizer, self.cfg.max_new_tokens)

    def wants(self, source: str) -> bool:
        """Whether an outcome of this source is asked for."""
        return any(o.source == source for o in self.asked)

    def _row(self, job: Job, placed: Placed) -> Row:
        ops = job.condition.ops(job.example.id, job.at) or ()
        generated = self.cfg.where in ("all", "generated") and not job.condition.per_prompt
        sample = None
        if self.cfg.temperature:
            sample = Sampling(self.cfg.temperature, self.cfg.seed)
        return Row(placed.tokens.ids, ops, placed.positions, generated, sample)

    def outcomes(
        self, jobs: Sequence[Job], prompts: Prompts, examples: Sequence[Example]
    ) -> dict[str, list[Any]]:
        """Columns of the effects table: outcomes by name, and `generated_text`."""
        found: dict[str, list[Any]] = {}
        if self.wants("text"):
            found |= self._texts(jobs, {p.example.id: p for p in prompts.all()})
        for outcome in self.asked:
            if outcome.source == "next":
                found[outcome.name] = self._next(jobs, outcome, examples)
        return found

    def _texts(self, jobs: Sequence[Job], placed: dict[str, Placed]) -> dict[str, list[Any]]:
        rows = [self._row(job, placed[job.example.id]) for job in jobs]
        tokens = generate(
            self.model,
            rows,
            self.saes,
            max_new_tokens=self.cfg.max_new_tokens,
            batch_tokens=batch_tokens_for(self.model, self.cfg.batch_tokens),
            cache=self.cache,
            key="intervention.max_new_tokens",
        )
        # Many rows say the same.
        numbers = list(map(tuple, tokens))
        unlike = list(dict.fromkeys(numbers))
        said = self.model.tokenizer.batch_decode(list(map(list, unlike)), skip_special_tokens=True)
        text_of = dict(zip(unlike, said, strict=True))
        found: dict[str, list[Any]] = {"generated_text": [text_of[made] for made in numbers]}
        for outcome in self.asked:
            if outcome.source != "text":
                continue
            if outcome.name == "perplexity":
                found[outcome.name] = self._perplexity(rows, tokens)
                continue
            seen: dict[tuple[str, tuple[int, ...]], Any] = {}
            keys = [(job.example.id, made) for job, made in zip(jobs, numbers, strict=True)]
            for job, key in zip(jobs, keys, strict=True):
                if key not in seen:
                    seen[key] = outcome.score(text_of[key[1]], job.example, list(key[1]))
            found[outcome.name] = self._comparable(outcome, jobs, [seen[key] for key in keys])
        return found

    def _comparable(self, outcome: Any, jobs: Sequence[Job], values: list[Any]) -> list[Any]:
        """The scores, without prompts that have none in some condition; these are told in a note.

        Were only that condition left out, it would be compared with other prompts than the rest.
        """
        lacking = {j.example.id for j, v in zip(jobs, values, strict=True) if v is None}
        if not lacking:
            return values
        told = getattr(outcome, "lacking", "have no answer to compare with")
        self.notes.append(f"{outcome.name}: {counted(len(lacking), 'prompt')} {told}; left out")
        return [None if j.example.id in lacking else v for j, v in zip(jobs, values, strict=True)]

    def _perplexity(self, rows: Sequence[Row], tokens: Sequence[list[int]]) -> list[float | None]:
        """Generations under the unedited model, with its own weights."""
        wholes = [
            Row((*r.ids, *t), about=(len(t),)) for r, t in zip(rows, tokens, strict=True) if t
        ]

        def reader(row: Row, logits: Float[Tensor, "n V"]) -> np.ndarray:
            return mean_loss(logits[:-1], row.ids[-row.about[0] :])

        own = self.original
        with own() if own else nullcontext():
            losses = read_logits(
                self.model,
                wholes,
                None,
                reader,
                kind="loss of the last tokens" + (", own weights" if own else ""),
                batch_tokens=batch_tokens_for(self.model, self.cfg.batch_tokens),
                n_last=lambda r: r.about[0] + 1,
                cache=self.cache,
                what="perplexity",
            )
        found = iter(losses)
        return [float(np.exp(next(found)[0])) if t else None for t in tokens]

    def _next(
        self, jobs: Sequence[Job], outcome: Any, examples: Sequence[Example]
    ) -> list[float | None]:
        prompts = placed_prompts(
            examples, self.model, self.cfg, self.max_length, lambda e: outcome.prompt(e.as_prompt())
        )
        self.notes += prompts.notes(f"prompts without {outcome.name}")
        placed = {p.example.id: p for p in prompts.all()}
        wanted: dict[str, tuple[tuple[int, ...], ...]] = {}
        reasons: dict[str, int] = {}
        for name, prompt in placed.items():
            try:
                both = outcome.tokens(prompt.example, self.model.tokenizer)
                wanted[name] = tuple(map(tuple, both))
            except Unplaced as reason:
                reasons[str(reason)] = reasons.get(str(reason), 0) + 1
        self.notes += [
            f"{n} prompts without {outcome.name}: {why}" for why, n in sorted(reasons.items())
        ]
        if getattr(outcome, "reads_answers", False):
            spaced = space_note([placed[name].example for name in wanted])
            self.notes += [note for note in spaced if note not in self.notes]
        usable = [i for i, job in enumerate(jobs) if job.example.id in wanted]
        # Samples have no say in the logits after the prompt.
        rows = [
            replace(
                self._row(jobs[i], placed[jobs[i].example.id]),
                sample=None,
                generated=False,
                about=wanted[jobs[i].example.id],
            )
            for i in usable
        ]
        kind = reader_kind(outcome)
        found = read_logits(
            self.model,
            rows,
            self.saes,
            lambda row, logits: np.asarray([outcome.value(logits[-1], *row.about)]),
            kind=kind or "",
            batch_tokens=batch_tokens_for(self.model, self.cfg.batch_tokens),
            cache=self.cache if kind else None,
            what=outcome.name,
        )
        values: list[float | None] = [None] * len(jobs)
        for i, value in zip(usable, found, strict=True):
            values[i] = float(value[0])
        return values

    def neutral_tokens(self, neutral: Sequence[str]) -> list[TokenizedText]:
        """The texts that costs are measured on, to a fixed length; a note says how many are cut."""
        model, some = self.model, list(neutral)[: self.cfg.n_neutral]
        texts = tokenize(some, model.tokenizer, _NEUTRAL_TOKENS, model.prepend_bos)
        if n := sum(text.truncated for text in texts):
            note = (
                f"neutral_kl is measured on the first {_NEUTRAL_TOKENS} tokens of each neutral "
                f"text; {n} of {len(texts)} are longer"
            )
            self.notes += [] if note in self.notes else [note]
        return texts

    def neutral_kl(
        self, edits: Sequence[tuple[Op, ...]], neutral: Sequence[str]
    ) -> Float[np.ndarray, "n_edits n_texts"]:
        """KL(unedited || edited) per token of each neutral text, every token edited."""
        texts = self.neutral_tokens(neutral)
        positions = [tuple(i for i, s in enumerate(t.special) if not s) for t in texts]
        rows = [
            Row(text.ids, ops, changed)
            for ops in edits
            for text, changed in zip(texts, positions, strict=True)
        ]
        found = divergences(
            self.model,
            rows,
            self.saes,
            batch_tokens=batch_tokens_for(self.model, self.cfg.batch_tokens),
            cache=self.cache,
        )
        return np.asarray(found, dtype=np.float64).reshape(len(edits), len(texts))

    def costs(self, jobs: Sequence[Job], neutral: Sequence[str]) -> list[dict[str, Any]]:
        """`neutral_kl` per condition and coefficient, its mean over texts.

        Operations that belong to one prompt (patches) have no cost; that of edited weights is in
        `weight_costs`.
        """
        cells = {
            (j.condition.name, j.coefficient): (j.condition, j.condition.edits[j.at])
            for j in jobs
            if j.condition.role != "baseline" and j.condition.edits and j.condition.weights is None
        }
        if not cells:
            return []
        values = self.neutral_kl([ops for _, ops in cells.values()], neutral)
        return [
            cost_row(condition, coefficient, own)
            for ((_, coefficient), (condition, _)), own in zip(cells.items(), values, strict=True)
        ]


def cost_row(
    condition: Condition, coefficient: float, values: Float[np.ndarray, " n_texts"]
) -> dict[str, Any]:
    """A row of table `costs`."""
    return {
        "condition": condition.name,
        "role": condition.role,
        "control_kind": condition.control_kind,
        "of": condition.of,
        "direction": condition.direction,
        "coefficient": coefficient,
        "neutral_kl": float(values.mean()),
        "neutral_kl_sd": float(values.std(ddof=1)) if len(values) > 1 else float("nan"),
        "n_texts": len(values),
    }


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
