"""What a model answers, and what it still answers through the SAE's reconstruction."""

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saexp.activations.forward import TokenBudget, batches
from saexp.analysis.base import AnalysisInputs, Analyzer, read_options, whole
from saexp.config import AnalyzerConfig
from saexp.context import progress
from saexp.data.examples import Example, Skip
from saexp.data.positions import Unplaced
from saexp.data.prompts import (
    answer_text,
    answer_token,
    as_read,
    foil_of,
    in_template,
    space_note,
    tokenize_prompts,
)
from saexp.data.tokenization import TokenizedText, token_texts
from saexp.errors import DataError
from saexp.latents.encode import spliced
from saexp.models.forward import check_positions
from saexp.models.hookpoints import Hookpoint
from saexp.models.hooks import EditFunction, edit, position_ids
from saexp.models.loading import LanguageModel
from saexp.results import TaskResult
from saexp.stats.intervals import mean_interval, paired_difference_interval, wilson

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """One prompt, and the tokens that are compared after it."""

    example: Example
    """With the prompt that the model reads, in the chat template where it has one set, as text."""
    tokens: TokenizedText
    answer_id: int
    foil_id: int | None
    foil_reason: str | None = None
    """Why a foil that the data has is not used."""


def questions(
    examples: Sequence[Example], model: LanguageModel, max_length: int
) -> tuple[list[Question], list[Skip]]:
    """Every example that can be asked, and why the others can't; the first answer counts."""
    own, skips = [], []
    for example in examples:
        if example.answers:
            own.append(example.as_prompt())
        else:
            skips.append(Skip(example.id, "no answer"))
    prompts = as_read(model, [e.text for e in own])
    found = []
    for example, prompt, tokens in zip(
        own, prompts, tokenize_prompts(model, prompts, max_length), strict=True
    ):
        read = in_template(example, prompt) if model.cfg.chat else example
        try:
            if tokens.truncated:
                raise Unplaced(f"prompt longer than {max_length} tokens")
            answer_id = answer_token(model.tokenizer, read, read.answers[0])
        except Unplaced as reason:
            skips.append(Skip(example.id, str(reason)))
            continue
        found.append(Question(read, tokens, answer_id, *_foil(model, read, answer_id)))
    return found, skips


def _foil(model: LanguageModel, read: Example, answer_id: int) -> tuple[int | None, str | None]:
    """The foil's first token, or why there is none."""
    foil = foil_of(read)
    if foil is None:
        return None, None
    try:
        foil_id = answer_token(model.tokenizer, read, foil, "foil")
    except Unplaced as reason:
        return None, str(reason)
    if foil_id == answer_id:
        return None, "foil begins with the answer's first token"
    return foil_id, None


Splice = Callable[[Tensor], dict[Hookpoint, EditFunction]]
"""Mask of ordinary tokens -> edits that put the reconstruction there."""
Bounds = tuple[float | None, float | None]
"""Limits of an interval, or nothing where there is none."""
STATES = ("clean", "sae")
MEASURES = ("rank", "logit", "probability", "logit_difference", "top1")
_LOGIT_BYTES = 512 * 2**20
"""Largest tensor of logits."""


class CapabilityAnalyzer(Analyzer):
    """Registry kind `analyzer`, name `capability`."""

    reads_acts = False
    ordinary_only = True

    def __init__(self, cfg: AnalyzerConfig) -> None:
        super().__init__(cfg)
        options = read_options(cfg, {"n_top": 10, "batch_tokens": 8192})
        self.n_top = whole("n_top", options["n_top"])
        self.batch_tokens = whole("batch_tokens", options["batch_tokens"])

    def analyze(self, inputs: AnalysisInputs) -> TaskResult:
        """Metrics `capability/…`, tables `prompts`, `top_tokens`, `capability`, `unanswered`.

        `rank` 1 is the token with the largest logit (1 + the number of tokens with a larger one),
        `top1` whether it is; `logit_difference` is answer less foil. Means over entities, an
        entity's prompts averaged first (a prompt that has none is an entity by itself); `change` is
        sae less clean prompt by prompt. 95 % intervals: Wilson's of rates, Newcombe's paired one of
        their change, the studentised bootstrap of means, which needs 10 entities; none for a single
        entity. Raises DataError where no prompt has an answer that can be asked for.
        """
        model, sae = inputs.model, inputs.sae
        assert model is not None and sae is not None, "capability needs the model and the SAE"
        asked, skips = questions(inputs.examples, model, inputs.max_length)
        why = Counter(s.reason for s in skips)
        if not asked:
            listed = "; ".join(f"{reason} ({n})" for reason, n in why.items()) or "it is empty"
            raise DataError(
                f"none of {len(inputs.examples)} examples has an answer that can be asked for: "
                f"{listed}; give rows an 'answer', or type dataset=ioi "
                """or dataset=prompt 'dataset.text="…"' 'dataset.answer=" …"'"""
            )
        excluded: list[int] = []

        def splice(ordinary: Tensor) -> dict[Hookpoint, EditFunction]:
            return spliced(sae, ordinary, limits=inputs.norm_limits, excluded=excluded.append)

        prompts, tops = self._ask(model, splice, asked)
        notes = [f"{n} of {len(inputs.examples)} examples not asked: {r}" for r, n in why.items()]
        notes += _about_foils(asked)
        notes += space_note([question.example for question in asked])
        metrics, summary = self._summary(prompts, np.array([q.example.unit for q in asked]))
        metrics["capability/n_not_asked"] = len(skips)
        if n_excluded := sum(excluded):
            notes.append(
                f"{n_excluded} tokens of the {len(asked)} prompts have a norm too high for an "
                "ordinary position and keep their activations where the reconstruction is spliced "
                "in (positions.max_norm_ratio)"
            )
        unasked = pd.DataFrame(
            [(s.example_id, s.reason) for s in skips], columns=["example_id", "reason"]
        )
        tables = {"prompts": prompts, "top_tokens": tops, "capability": summary}
        return TaskResult(metrics=metrics, tables={**tables, "unanswered": unasked}, notes=notes)

    def _ask(
        self, model: LanguageModel, splice: Splice, asked: Sequence[Question]
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """One row per prompt, and its best tokens; prompts of similar length side by side."""
        rows: list[dict[str, Any]] = [_about(q, model) for q in asked]
        tops: list[list[dict[str, Any]]] = [[] for _ in asked]
        lengths = [len(q.tokens) for q in asked]
        check_positions(model, max(lengths))
        keeps = "logits_to_keep" in inspect.signature(model.hf.forward).parameters
        per_token = 4 * int(model.text_config.vocab_size)
        most = max(1, _LOGIT_BYTES // per_token)
        with progress(len(asked), "asking", "prompt") as bar:
            budget = TokenBudget(self.batch_tokens, model.device)
            for batch in batches(lengths, budget, model.text_config):
                size = most if keeps else max(1, most // lengths[batch[0]])
                for start in range(0, len(batch), size):
                    part = batch[start : start + size]
                    some = [asked[i] for i in part]
                    for state in STATES:
                        change = splice if state == "sae" else None
                        logits = _last_logits(model, change, some, keeps)
                        for i, question, row in zip(part, some, logits, strict=True):
                            rows[i] |= _measured(row, question, state)
                            tops[i] += self._best(row, question, state, model.tokenizer)
                    bar.update(len(part))
        log.info("asked %d prompts, each with and without the SAE", len(asked))
        prompts = pd.DataFrame(rows).astype(
            {"group": "string", "foil_token": "string", "foil_token_id": "Int64"}
        )
        return prompts, pd.DataFrame([r for best in tops for r in best])

    def _best(
        self, logits: Float[Tensor, " V"], question: Question, state: str, tokenizer: Any
    ) -> list[dict[str, Any]]:
        top = logits.topk(min(self.n_top, len(logits)))
        log_sum = float(logits.logsumexp(0))
        texts = token_texts(tokenizer, top.indices.tolist())
        return [
            {
                "example_id": question.example.id,
                "state": state,
                "rank": rank,
                "token_id": token,
                "token": texts[token],
                "logit": value,
                "probability": float(np.exp(value - log_sum)),
                "is_answer": token == question.answer_id,
                "is_foil": token == question.foil_id,
            }
            for rank, (token, value) in enumerate(
                zip(top.indices.tolist(), top.values.tolist(), strict=True), 1
            )
        ]

    def _summary(
        self, prompts: pd.DataFrame, units: np.ndarray
    ) -> tuple[dict[str, float | int | None], pd.DataFrame]:
        codes = pd.factorize(units)[0]
        metrics: dict[str, float | int | None] = {
            "capability/n_prompts": len(prompts),
            "capability/n_units": int(codes.max()) + 1,
        }
        rows = []
        for measure in MEASURES:
            clean, sae = (prompts[f"{measure}_{s}"].astype(float) for s in STATES)
            for state, values in (("clean", clean), ("sae", sae), ("change", sae - clean)):
                of_unit = values.groupby(codes).mean().dropna().to_numpy()
                if not len(of_unit):
                    continue
                if measure != "top1":
                    bounds = self._of_mean(of_unit)
                elif state == "change":
                    bounds = _of_paired_rates(clean, sae, codes)
                else:
                    bounds = _of_rate(of_unit)
                mean = float(of_unit.mean())
                name = f"capability/{measure}_{state}"
                metrics |= {name: mean, f"{name}_ci_low": bounds[0], f"{name}_ci_high": bounds[1]}
                n_prompts = int(values.notna().sum())
                rows.append((measure, state, n_prompts, len(of_unit), mean, *bounds))
        columns = ["measure", "state", "n", "n_units", "mean", "ci_low", "ci_high"]
        table = pd.DataFrame(rows, columns=columns)
        return metrics, table.astype({c: float for c in columns[4:]})

    def _of_mean(self, of_unit: Float[np.ndarray, " n"]) -> Bounds:
        low, high = mean_interval(of_unit[:, None], self.cfg.seed, n_resamples=self.cfg.n_bootstrap)
        return (float(low[0]), float(high[0])) if np.isfinite(low[0]) else (None, None)


def _of_rate(of_unit: Float[np.ndarray, " n"]) -> Bounds:
    """Wilson's interval; the rates of units with several prompts vary no more than 0 and 1."""
    if len(of_unit) < 2:
        return None, None
    low, high = wilson(of_unit.sum(), len(of_unit))
    return float(low), float(high)


def _of_paired_rates(clean: pd.Series, sae: pd.Series, codes: Int[np.ndarray, " n"]) -> Bounds:
    """Newcombe's paired interval of the change, each unit counting once."""
    outcomes = [sae * clean, sae * (1 - clean), (1 - sae) * clean, (1 - sae) * (1 - clean)]
    counts = [float(outcome.groupby(codes).mean().sum()) for outcome in outcomes]
    return (None, None) if len(np.unique(codes)) < 2 else paired_difference_interval(*counts)


@torch.inference_mode()
def _last_logits(
    model: LanguageModel,
    splice: Splice | None,
    asked: Sequence[Question],
    keeps: bool,
) -> Float[Tensor, "b V"]:
    """Logits after each prompt's last token, float32 on the CPU."""
    width = max(len(q.tokens) for q in asked)
    ids = torch.full((len(asked), width), model.pad_id)
    mask = torch.zeros_like(ids)
    ordinary = torch.zeros(ids.shape, dtype=torch.bool)
    for i, question in enumerate(asked):
        start = width - len(question.tokens)
        ids[i, start:] = torch.tensor(question.tokens.ids)
        mask[i, start:] = 1
        ordinary[i, start:] = ~torch.tensor(question.tokens.special)
    mask = mask.to(model.device)
    with nullcontext() if splice is None else edit(model, splice(ordinary)):
        out = model.hf(
            input_ids=ids.to(model.device),
            attention_mask=mask,
            position_ids=position_ids(mask),
            use_cache=False,
            **({"logits_to_keep": 1} if keeps else {}),
        )
    return out.logits[:, -1].float().cpu()


def _about(question: Question, model: LanguageModel) -> dict[str, Any]:
    example, answer_id, foil_id = question.example, question.answer_id, question.foil_id
    texts = token_texts(model.tokenizer, [i for i in (answer_id, foil_id) if i is not None])
    return {
        "example_id": example.id,
        "group": example.group,
        "prompt": example.text,
        "answer": answer_text(example, example.answers[0]),
        "answer_token": texts[answer_id],
        "answer_token_id": answer_id,
        "foil_token": None if foil_id is None else texts[foil_id],
        "foil_token_id": pd.NA if foil_id is None else foil_id,
    }


def _measured(logits: Float[Tensor, " V"], question: Question, state: str) -> dict[str, Any]:
    own = logits[question.answer_id]
    rank = 1 + int((logits > own).sum())
    foil = np.nan if question.foil_id is None else float(own - logits[question.foil_id])
    return {
        f"rank_{state}": rank,
        f"logit_{state}": float(own),
        f"probability_{state}": float((own - logits.logsumexp(0)).exp()),
        f"logit_difference_{state}": foil,
        f"top1_{state}": rank == 1,
    }


def _about_foils(asked: Sequence[Question]) -> list[str]:
    why = Counter(q.foil_reason for q in asked if q.foil_reason is not None)
    return [f"{n} prompts have no logit difference: {reason}" for reason, n in why.items()]
