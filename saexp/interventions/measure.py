"""Outcomes of interventions per prompt, condition and coefficient, and their side effects."""

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from saexp.config import InterventionConfig
from saexp.data.examples import Example
from saexp.data.tokenization import PositionNotFound, TokenizedText, space_note, tokenize
from saexp.errors import counted
from saexp.interventions.cached_generation import (
    LogitReader,
    batch_tokens_for,
    divergences,
    generate,
    read_logits,
    weight_divergences,
)
from saexp.interventions.conditions import Condition, PositionedPrompt, Prompts, position_prompts
from saexp.interventions.outcomes import mean_loss, reader_kind
from saexp.interventions.phrases import phrase_log_probabilities, phrase_tokens
from saexp.interventions.results_cache import ResultCache
from saexp.interventions.stream_edits import Op, Row, SAEs, Sampling
from saexp.models.loading import LanguageModel
from saexp.models.unembedding import Original

_NEUTRAL_TOKENS = 48
"""Longest neutral text, in tokens."""


@dataclass(frozen=True)
class Job:
    """One cell of the effects table."""

    example: Example
    condition: Condition
    at: int
    """Number of the coefficient."""
    coefficient: float


@dataclass
class Measurement:
    """Measures outcomes of jobs on one model with its present weights."""

    model: LanguageModel
    saes: SAEs
    requested: Sequence[Any]
    """Outcome objects."""
    cfg: InterventionConfig
    max_length: int
    cache: ResultCache | None
    original: Original | None = None
    """Context with the model's own weights, where directions are removed from its weights."""
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for outcome in self.requested:
            if hasattr(outcome, "prepare"):
                outcome.prepare(self.model.tokenizer, self.cfg.max_new_tokens)

    def wants(self, source: str) -> bool:
        """Whether an outcome of this source is requested."""
        return any(o.source == source for o in self.requested)

    def _row(self, job: Job, placed: PositionedPrompt) -> Row:
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
        columns: dict[str, list[Any]] = {}
        if self.wants("text"):
            columns |= self._texts(jobs, {p.example.id: p for p in prompts.all()})
        for outcome in self.requested:
            if outcome.source == "next":
                columns[outcome.name] = self._next(jobs, outcome, examples)
            elif outcome.source == "phrases":
                columns[outcome.name] = self._phrases(jobs, outcome, prompts)
        return columns

    def _texts(
        self, jobs: Sequence[Job], placed: dict[str, PositionedPrompt]
    ) -> dict[str, list[Any]]:
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
        # Many continuations are equal; each is decoded to text and scored once.
        continuations = list(map(tuple, tokens))
        distinct = list(dict.fromkeys(continuations))
        texts = self.model.tokenizer.batch_decode(
            list(map(list, distinct)), skip_special_tokens=True
        )
        text_of = dict(zip(distinct, texts, strict=True))
        columns: dict[str, list[Any]] = {"generated_text": [text_of[c] for c in continuations]}
        for outcome in self.requested:
            if outcome.source != "text":
                continue
            if outcome.name == "perplexity":
                columns[outcome.name] = self._perplexity(rows, tokens)
                continue
            scores: dict[tuple[str, tuple[int, ...]], Any] = {}
            keys = [(job.example.id, c) for job, c in zip(jobs, continuations, strict=True)]
            for job, key in zip(jobs, keys, strict=True):
                if key not in scores:
                    scores[key] = outcome.score(text_of[key[1]], job.example, list(key[1]))
            columns[outcome.name] = self._comparable(outcome, jobs, [scores[key] for key in keys])
        return columns

    def _comparable(self, outcome: Any, jobs: Sequence[Job], values: list[Any]) -> list[Any]:
        """The scores, None for every prompt that has none in some condition; a note counts these.

        If such a prompt were left out of one condition only, conditions would be compared on
        different prompts.
        """
        unscored = {j.example.id for j, v in zip(jobs, values, strict=True) if v is None}
        if not unscored:
            return values
        reason = getattr(outcome, "lacking", "have no answer to compare with")
        self.notes.append(f"{outcome.name}: {counted(len(unscored), 'prompt')} {reason}; left out")
        return [None if j.example.id in unscored else v for j, v in zip(jobs, values, strict=True)]

    def _perplexity(self, rows: Sequence[Row], tokens: Sequence[list[int]]) -> list[float | None]:
        """Perplexity of the generations under the model without intervention."""
        wholes = [
            Row((*r.ids, *t), about=(len(t),)) for r, t in zip(rows, tokens, strict=True) if t
        ]

        def loss(row: Row, logits: Float[Tensor, "n V"]) -> np.ndarray:
            return mean_loss(logits[:-1], row.ids[-row.about[0] :])

        own = self.original
        kind = "loss of the last tokens" + (", own weights" if own else "")
        reader = LogitReader(loss, kind, lambda row: row.about[0] + 1, "perplexity")
        with own() if own else nullcontext():
            losses = read_logits(
                self.model,
                wholes,
                None,
                reader,
                batch_tokens=batch_tokens_for(self.model, self.cfg.batch_tokens),
                cache=self.cache,
            )
        remaining = iter(losses)
        return [float(np.exp(next(remaining)[0])) if t else None for t in tokens]

    def _next(
        self, jobs: Sequence[Job], outcome: Any, examples: Sequence[Example]
    ) -> list[float | None]:
        prompts = position_prompts(
            examples, self.model, self.cfg, self.max_length, lambda e: outcome.prompt(e.as_prompt())
        )
        self.notes += prompts.notes(f"prompts without {outcome.name}")
        placed = {p.example.id: p for p in prompts.all()}
        compared: dict[str, tuple[tuple[int, ...], ...]] = {}
        reasons: dict[str, int] = {}
        for name, prompt in placed.items():
            try:
                tokens = outcome.tokens(prompt.example, self.model.tokenizer)
                compared[name] = tuple(map(tuple, tokens))
            except PositionNotFound as reason:
                reasons[str(reason)] = reasons.get(str(reason), 0) + 1
        self.notes += [
            f"{n} prompts without {outcome.name}: {why}" for why, n in sorted(reasons.items())
        ]
        if getattr(outcome, "reads_answers", False):
            about_spaces = space_note([placed[name].example for name in compared])
            self.notes += [note for note in about_spaces if note not in self.notes]
        usable = [i for i, job in enumerate(jobs) if job.example.id in compared]
        # Logits after the prompt do not depend on sampling.
        rows = [
            replace(
                self._row(jobs[i], placed[jobs[i].example.id]),
                sample=None,
                generated=False,
                about=compared[jobs[i].example.id],
            )
            for i in usable
        ]
        kind = reader_kind(outcome)
        reader = LogitReader(
            lambda row, logits: np.asarray([outcome.value(logits[-1], *row.about)]),
            kind or "",
            label=outcome.name,
        )
        results = read_logits(
            self.model,
            rows,
            self.saes,
            reader,
            batch_tokens=batch_tokens_for(self.model, self.cfg.batch_tokens),
            cache=self.cache if kind else None,
        )
        values: list[float | None] = [None] * len(jobs)
        for i, value in zip(usable, results, strict=True):
            values[i] = float(value[0])
        return values

    def _phrases(self, jobs: Sequence[Job], outcome: Any, prompts: Prompts) -> list[float | None]:
        """Log-probabilities that the answer begins with one of an outcome's phrases."""
        placed = {p.example.id: p for p in prompts.all()}
        phrases: dict[str, list[tuple[int, ...]]] = {}
        reasons: Counter[str] = Counter()
        for name, prompt in placed.items():
            try:
                phrases[name] = phrase_tokens(self.model.tokenizer, prompt.example, outcome.phrases)
            except PositionNotFound as reason:
                reasons[str(reason)] += 1
        self.notes += [
            f"{n} prompts without {outcome.name}: {why}" for why, n in sorted(reasons.items())
        ]
        usable = [i for i, job in enumerate(jobs) if job.example.id in phrases]
        results = phrase_log_probabilities(
            self.model,
            self.saes,
            [self._row(jobs[i], placed[jobs[i].example.id]) for i in usable],
            [phrases[jobs[i].example.id] for i in usable],
            batch_tokens=batch_tokens_for(self.model, self.cfg.batch_tokens),
            cache=self.cache,
            label=outcome.name,
        )
        values: list[float | None] = [None] * len(jobs)
        for i, value in zip(usable, results, strict=True):
            values[i] = value
        return values

    def neutral_tokens(self, neutral: Sequence[str]) -> list[TokenizedText]:
        """The texts on which costs are measured, truncated; a note counts the truncated ones."""
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
        kl = divergences(
            self.model,
            rows,
            self.saes,
            batch_tokens=batch_tokens_for(self.model, self.cfg.batch_tokens),
            cache=self.cache,
        )
        return np.asarray(kl, dtype=np.float64).reshape(len(edits), len(texts))

    def costs(self, jobs: Sequence[Job], neutral: Sequence[str]) -> list[dict[str, Any]]:
        """`neutral_kl` per condition and coefficient, averaged over texts.

        Operations of a single prompt (patches) have no cost; `weight_costs` has that of edited
        weights.
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
            cost_row(condition, coefficient, kl)
            for ((_, coefficient), (condition, _)), kl in zip(cells.items(), values, strict=True)
        ]


def condition_columns(condition: Condition) -> dict[str, Any]:
    """The columns of a table that describe a condition."""
    return {
        "condition": condition.name,
        "role": condition.role,
        "control_kind": condition.control_kind,
        "of": condition.of,
        "direction": condition.direction,
    }


def cost_row(
    condition: Condition, coefficient: float, values: Float[np.ndarray, " n_texts"]
) -> dict[str, Any]:
    """A row of table `costs`."""
    return {
        **condition_columns(condition),
        "coefficient": coefficient,
        "neutral_kl": float(values.mean()),
        "neutral_kl_sd": float(values.std(ddof=1)) if len(values) > 1 else float("nan"),
        "n_texts": len(values),
    }


def weight_costs(
    measurement: Measurement,
    jobs: Sequence[Job],
    neutral: Sequence[str],
    original: Original | None,
) -> list[dict[str, Any]]:
    """Rows of table `costs` for edited weights: KL(own weights || edited weights) on neutral text.

    All jobs run under the model's present weights; `original` opens a context with its own ones. It
    is None where the present weights are its own; the cost is 0 then.
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
        kl = weight_divergences(
            model,
            prompts,
            original,
            batch_tokens=batch_tokens_for(model, measurement.cfg.batch_tokens),
            cache=measurement.cache,
        )
        values = np.asarray(kl)
    return [
        cost_row(condition, coefficient, values) for (_, coefficient), condition in cells.items()
    ]
