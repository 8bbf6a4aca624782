"""What a model does without intervention, and the outcomes and side effects of interventions.

Outcomes are measured per prompt, condition and coefficient."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from saexp.config import InterventionConfig
from saexp.data import Example
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
from saexp.interventions.outcomes import (
    Accuracy,
    Refusal,
    mean_loss,
    phrase_log_probabilities,
    phrase_tokens,
    reader_kind,
)
from saexp.interventions.results_cache import ResultCache
from saexp.interventions.stream_edits import Op, Row, SAEs, Sampling, Vector
from saexp.models.loading import LanguageModel
from saexp.models.unembedding import Original

BASELINE_COLUMNS = (
    "example_id",
    "group",
    "split",
    "entity_type",
    "unit",
    "prompt",
    "condition",
    "role",
    "control_kind",
    "of",
    "direction",
    "latent",
    "coefficient",
    "answers",
)
"""Columns of the table `baselines` besides the outcomes; those that `summarise` reads included."""


def knowledge(
    baselines: pd.DataFrame, example_of: Mapping[str, Example]
) -> tuple[pd.Series, dict[str, float | int | None]]:
    """(whether each generation contains a correct answer, metrics per group of prompts).

    Prompts without an answer, or whose answer in the data is a refusal, are missing in the series
    and do not count in `baseline/n_questions_<group>`. A group without questions has no
    `baseline/accuracy_<group>`; without any question there are no metrics.
    """
    accuracy, refusal = Accuracy(), Refusal()
    values: list[bool | None] = []
    for name, text in zip(baselines["example_id"], baselines["generated_text"], strict=True):
        example = example_of[name]
        is_question = not any(refusal.score(a, example) for a in example.answers)
        values.append(accuracy.score(text, example) if is_question else None)
    correct = pd.Series(values, index=baselines.index, dtype="boolean")
    metrics: dict[str, float | int | None] = {}
    for group, part in correct.groupby(baselines["group"], sort=False):
        n = int(part.notna().sum())
        metrics |= {
            f"baseline/n_questions_{group}": n,
            f"baseline/n_correct_{group}": int(part.sum()),
        }
        if n:
            metrics[f"baseline/accuracy_{group}"] = float(part.mean())
    if correct.isna().all():
        return correct, {}
    return correct, metrics


def constant_rates(baselines: pd.DataFrame, rates: Sequence[str]) -> dict[str, int]:
    """Rate -> its value, for rates that are the same on every prompt without intervention.

    Only prompts of the train split count, or all where it has none. Empty where these prompts
    belong to fewer than two groups: that a model never refuses questions on known entities does not
    show that it never refuses.
    """
    seen = _seen(baselines)
    if seen["group"].nunique() < 2:
        return {}
    values = {rate: seen[rate].dropna() for rate in rates}
    return {r: int(v.iloc[0]) for r, v in values.items() if len(v) and v.nunique() == 1}


def _seen(baselines: pd.DataFrame) -> pd.DataFrame:
    """The prompts on which outcomes are chosen: those of the train split, or all if it is empty."""
    train = baselines[baselines["split"] == "train"]
    return baselines if train.empty else train


def constant_note(
    constant: Mapping[str, int],
    instead: Sequence[str],
    baselines: pd.DataFrame,
    null: Sequence[str],
) -> str:
    """Which outcomes are left out and why, what is measured `instead`, and the `null` metrics."""
    sizes = _seen(baselines).groupby("group", sort=False).size()
    n = " and ".join(f"{size} {group}" for group, size in sizes.items())
    left_out = " and ".join(f"{r.replace('_', ' ')} is {v}" for r, v in constant.items())
    note = f"without intervention {left_out} on all prompts ({n}), so it is not tested: "
    if instead:
        note += f"{' and '.join(instead)} took its place"
    else:
        note += "no outcome is left, and nothing was changed"
    return (
        f"{note}; {', '.join(null)}: null (intervention.alternatives=[...] sets other outcomes for "
        "this case, null tests every outcome)"
    )


def fitting(baselines: pd.DataFrame, alternatives: Sequence[Any]) -> list[Any]:
    """The alternative outcomes with values without intervention that, if rates, vary."""
    constant = constant_rates(baselines, [a.name for a in alternatives if a.kind == "rate"])
    names = [a.name for a in alternatives if a.name in baselines]
    values = {name: baselines[name].notna().any() for name in names}
    return [a for a in alternatives if values.get(a.name) and a.name not in constant]


def with_texts(effects: pd.DataFrame, baselines: pd.DataFrame | None) -> pd.DataFrame:
    """The effects with a column `generated_text`, also where the outcomes needed no generation.

    Then the rows without intervention have the texts of `baselines`, all others none.
    """
    if "generated_text" in effects or baselines is None:
        return effects
    text_of = baselines.drop_duplicates("example_id").set_index("example_id")["generated_text"]
    texts = effects["example_id"].map(text_of).where(effects["role"] == "baseline")
    return effects.assign(generated_text=texts)


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


def jobs_by_weights(jobs: Sequence[Job]) -> dict[Vector | None, list[int]]:
    """Indices of the jobs that run under the same weights."""
    vectors: dict[int, Vector] = {}
    indices_of: dict[Vector | None, list[int]] = {}
    for i, job in enumerate(jobs):
        tensor: Tensor | None = job.condition.weights if job.coefficient else None
        key = None if tensor is None else vectors.setdefault(id(tensor), Vector(tensor))
        indices_of.setdefault(key, []).append(i)
    return indices_of


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
