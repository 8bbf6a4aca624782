"""Capability: answers of a model, unchanged and with the SAE's reconstruction spliced in."""

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

from saexp.analysis import AnalysisInputs, Analyzer
from saexp.config import CapabilityConfig
from saexp.context import progress
from saexp.data import Example, Skip
from saexp.data.tokenization import (
    PositionNotFound,
    TokenizedText,
    answer_text,
    answer_token,
    as_chat_prompt,
    foil_of,
    format_prompts,
    space_note,
    token_texts,
    tokenize_prompts,
)
from saexp.errors import DataError, counted
from saexp.latents import splice_edits
from saexp.models import Hookpoint
from saexp.models.forward import (
    TokenBudget,
    batches,
    check_positions,
    keep_last_logits,
    padded,
)
from saexp.models.hooks import EditFunction, edit, position_ids
from saexp.models.loading import LanguageModel
from saexp.results import Result
from saexp.stats import mean_interval, paired_difference_interval, wilson

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """A prompt and the next tokens that are compared."""

    example: Example
    """Its text is the prompt as the model reads it, in the chat template where one is set."""
    tokens: TokenizedText
    answer_id: int
    foil_id: int | None
    foil_reason: str | None = None
    """Reason that the foil of the data set is not used."""


def questions(
    examples: Sequence[Example], model: LanguageModel, max_length: int
) -> tuple[list[Question], list[Skip]]:
    """(questions, skips of the other examples with reasons); the first answer is used."""
    answered, skips = [], []
    for example in examples:
        if example.answers:
            answered.append(example.as_prompt())
        else:
            skips.append(Skip(example.id, "no answer"))
    prompts = format_prompts(model, [e.text for e in answered])
    asked = []
    for example, prompt, tokens in zip(
        answered, prompts, tokenize_prompts(model, prompts, max_length), strict=True
    ):
        read = as_chat_prompt(example, prompt) if model.cfg.chat else example
        try:
            if tokens.truncated:
                raise PositionNotFound(f"prompt longer than {max_length} tokens")
            answer_id = answer_token(model.tokenizer, read, read.answers[0])
        except PositionNotFound as reason:
            skips.append(Skip(example.id, str(reason)))
            continue
        asked.append(Question(read, tokens, answer_id, *_foil(model, read, answer_id)))
    return asked, skips


def _foil(model: LanguageModel, read: Example, answer_id: int) -> tuple[int | None, str | None]:
    """(first token of the foil, None) or (None, reason); (None, None) without a foil."""
    foil = foil_of(read)
    if foil is None:
        return None, None
    try:
        foil_id = answer_token(model.tokenizer, read, foil, "foil")
    except PositionNotFound as reason:
        return None, str(reason)
    if foil_id == answer_id:
        return None, "foil begins with the answer's first token"
    return foil_id, None


Splice = Callable[[Tensor], dict[Hookpoint, EditFunction]]
"""Mask of ordinary tokens -> edits that splice in the reconstruction there."""
Bounds = tuple[float | None, float | None]
"""Limits of an interval; None where there is no interval."""
STATES = ("clean", "sae")
MEASURES = ("rank", "logit", "probability", "logit_difference", "top1")
_LOGIT_BYTES = 512 * 2**20
"""Limit on the size of one tensor of logits."""


class CapabilityAnalyzer(Analyzer):
    """Registry kind `analyzer`, name `capability`."""

    reads_acts = False
    ordinary_only = True
    runs_model = True

    def __init__(self, cfg: CapabilityConfig) -> None:
        super().__init__(cfg)
        self.n_top, self.batch_tokens = cfg.n_top, cfg.batch_tokens

    def analyze(self, inputs: AnalysisInputs) -> Result:
        """Metrics `capability/…`, tables `prompts`, `top_tokens`, `capability`, `unanswered`.

        `rank` is 1 + the number of tokens with a larger logit than the answer, `top1` whether the
        rank is 1, and `logit_difference` the logit of the answer minus that of the foil. `change`
        is the value with the SAE minus the clean one, prompt by prompt. Means are over entities,
        after averaging the prompts of each (a prompt without entity counts as one). 95% intervals:
        Wilson's for rates, Newcombe's paired interval for their change, and the studentised
        bootstrap, which needs 10 entities, for the other measures. A single entity has no interval.
        Raises DataError where no prompt has an answer whose first token can be determined.
        """
        model, sae = inputs.model, inputs.sae
        assert model is not None and sae is not None, "capability needs the model and the SAE"
        asked, skips = questions(inputs.examples, model, inputs.max_length)
        reasons = Counter(s.reason for s in skips)
        if not asked:
            listed = "; ".join(f"{reason} ({n})" for reason, n in reasons.items())
            raise DataError(
                f"none of {len(inputs.examples)} examples has a usable answer: "
                f"{listed or 'there are no examples'}; give rows an 'answer', or type dataset=ioi "
                """or dataset=prompt 'dataset.text="…"' 'dataset.answer=" …"'"""
            )
        excluded: list[int] = []

        def splice(ordinary: Tensor) -> dict[Hookpoint, EditFunction]:
            return splice_edits(sae, ordinary, limits=inputs.norm_limits, excluded=excluded.append)

        prompts, tops = self._ask(model, splice, asked)
        n_examples = len(inputs.examples)
        notes = [f"{n} of {n_examples} examples not asked: {r}" for r, n in reasons.items()]
        notes += _foil_notes(asked)
        notes += space_note([question.example for question in asked])
        metrics, summary = self._summary(prompts, np.array([q.example.unit for q in asked]))
        metrics["capability/n_not_asked"] = len(skips)
        if n_excluded := sum(excluded):
            notes.append(
                f"{counted(n_excluded, 'token')} of the prompts with an unusually high norm "
                f"{'keeps its' if n_excluded == 1 else 'keep their'} activations when the "
                "reconstruction is spliced in (positions.max_norm_ratio)"
            )
        unanswered = pd.DataFrame(
            [(s.example_id, s.reason) for s in skips], columns=["example_id", "reason"]
        )
        tables = {
            "prompts": prompts,
            "top_tokens": tops,
            "capability": summary,
            "unanswered": unanswered,
        }
        return Result(metrics=metrics, tables=tables, notes=notes)

    def _ask(
        self, model: LanguageModel, splice: Splice, asked: Sequence[Question]
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """(one row per prompt, its most probable tokens); prompts are batched by length."""
        rows: list[dict[str, Any]] = [_columns(q, model) for q in asked]
        tops: list[list[dict[str, Any]]] = [[] for _ in asked]
        lengths = [len(q.tokens) for q in asked]
        check_positions(model, max(lengths))
        keeps = bool(keep_last_logits(model, 1))
        per_token = 4 * int(model.text_config.vocab_size)
        most = max(1, _LOGIT_BYTES // per_token)
        with progress(len(asked), "asking", "prompt") as bar:
            budget = TokenBudget(self.batch_tokens, model.device)
            for batch in batches(lengths, budget, model.text_config):
                size = most if keeps else max(1, most // lengths[batch[0]])
                for start in range(0, len(batch), size):
                    part = batch[start : start + size]
                    batched = [asked[i] for i in part]
                    for state in STATES:
                        change = splice if state == "sae" else None
                        logits = _last_logits(model, change, batched)
                        for i, question, row in zip(part, batched, logits, strict=True):
                            rows[i] |= _measures(row, question, state)
                            tops[i] += self._top_tokens(row, question, state, model.tokenizer)
                    bar.update(len(part))
        log.info("asked %d prompts, each with and without the SAE", len(asked))
        prompts = pd.DataFrame(rows).astype(
            {"group": "string", "foil_token": "string", "foil_token_id": "Int64"}
        )
        return prompts, pd.DataFrame([row for of_prompt in tops for row in of_prompt])

    def _top_tokens(
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
                    bounds = self._mean_bounds(of_unit)
                elif state == "change":
                    bounds = _paired_rate_bounds(clean, sae, codes)
                else:
                    bounds = _rate_bounds(of_unit)
                mean = float(of_unit.mean())
                name = f"capability/{measure}_{state}"
                metrics |= {name: mean, f"{name}_ci_low": bounds[0], f"{name}_ci_high": bounds[1]}
                n_prompts = int(values.notna().sum())
                rows.append((measure, state, n_prompts, len(of_unit), mean, *bounds))
        columns = ["measure", "state", "n", "n_units", "mean", "ci_low", "ci_high"]
        table = pd.DataFrame(rows, columns=columns)
        return metrics, table.astype({c: float for c in columns[4:]})

    def _mean_bounds(self, of_unit: Float[np.ndarray, " n"]) -> Bounds:
        low, high = mean_interval(of_unit[:, None], self.cfg.seed, n_resamples=self.cfg.n_bootstrap)
        return (float(low[0]), float(high[0])) if np.isfinite(low[0]) else (None, None)


def _rate_bounds(of_unit: Float[np.ndarray, " n"]) -> Bounds:
    """Wilson's interval, which is conservative for units with several prompts, whose rates vary
    less than outcomes 0 and 1."""
    if len(of_unit) < 2:
        return None, None
    low, high = wilson(of_unit.sum(), len(of_unit))
    return float(low), float(high)


def _paired_rate_bounds(clean: pd.Series, sae: pd.Series, codes: Int[np.ndarray, " n"]) -> Bounds:
    """Newcombe's paired interval of the change, with each unit counted once."""
    outcomes = [sae * clean, sae * (1 - clean), (1 - sae) * clean, (1 - sae) * (1 - clean)]
    counts = [float(outcome.groupby(codes).mean().sum()) for outcome in outcomes]
    return (None, None) if len(np.unique(codes)) < 2 else paired_difference_interval(*counts)


@torch.inference_mode()
def _last_logits(
    model: LanguageModel,
    splice: Splice | None,
    asked: Sequence[Question],
) -> Float[Tensor, "b V"]:
    """Logits after each prompt's last token, float32 on the CPU."""
    ids, mask = padded([q.tokens.ids for q in asked], model.pad_id, padding_side="left")
    is_token = mask.bool()
    ordinary = is_token.clone()
    ordinary[is_token] = ~torch.tensor([flag for q in asked for flag in q.tokens.special])
    mask = mask.to(model.device)
    with nullcontext() if splice is None else edit(model, splice(ordinary)):
        out = model.hf(
            input_ids=ids.to(model.device),
            attention_mask=mask,
            position_ids=position_ids(mask),
            use_cache=False,
            **keep_last_logits(model, 1),
        )
    return out.logits[:, -1].float().cpu()


def _columns(question: Question, model: LanguageModel) -> dict[str, Any]:
    """The columns of a prompt that do not depend on the state."""
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


def _measures(logits: Float[Tensor, " V"], question: Question, state: str) -> dict[str, Any]:
    answer = logits[question.answer_id]
    rank = 1 + int((logits > answer).sum())
    difference = np.nan if question.foil_id is None else float(answer - logits[question.foil_id])
    return {
        f"rank_{state}": rank,
        f"logit_{state}": float(answer),
        f"probability_{state}": float((answer - logits.logsumexp(0)).exp()),
        f"logit_difference_{state}": difference,
        f"top1_{state}": rank == 1,
    }


def _foil_notes(asked: Sequence[Question]) -> list[str]:
    reasons = Counter(q.foil_reason for q in asked if q.foil_reason is not None)
    return [
        f"{counted(n, 'prompt has', 'prompts have')} no logit difference: {reason}"
        for reason, n in reasons.items()
    ]
