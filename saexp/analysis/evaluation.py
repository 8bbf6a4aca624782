"""How good SAEs are: what the model loses with a reconstruction in place of the activation, and how
sparse and faithful the reconstruction is (REFERENCE.md, section 3).

Every SAE is compared on the same texts with the unchanged model and with the stream it writes
replaced by zeros and by its mean. The clean pass is shared by all SAEs, the ablations by those of
one stream. A transcoder reads one stream and is put in place of another.

Shapes: n positions, d_model, d_sae latents, n_texts texts.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saexp.activations.forward import TokenBudget, batches
from saexp.analysis.evaluation_passes import (
    Batch,
    Clean,
    Passes,
    Where,
    make_batch,
    resumes_from,
)
from saexp.context import progress
from saexp.data.tokens import TokenizedText
from saexp.errors import ModelError
from saexp.latents.encode import CHUNK_BYTES, StreamMetrics
from saexp.latents.splice import replaced
from saexp.models.hookpoints import Hookpoint
from saexp.models.loading import LanguageModel
from saexp.saes.base import SparseAutoencoder

_GIB = 2**30
LOGIT_BYTES = {"cuda": _GIB // 2, "cpu": 2**24}
"""Size of one chunk of logits, by device type; three exist at a time."""
KEPT_BYTES = {"cuda": 8 * _GIB, "cpu": 2 * _GIB}
"""Clean passes are kept up to this size between the two rounds, and beyond it run again."""
STREAM_BYTES = {"cuda": 4 * _GIB, "cpu": _GIB // 2}
"""Streams of one batch; where many layers are looked at, its texts are fewer."""
State = tuple[str, Hookpoint | int | None]
"""(`clean`, None), (`zero` or `mean`, stream written), (`sae`, number of the SAE)."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What is done, and how; batches and padding change no number beyond rounding."""

    where: Where = field(default_factory=Where)
    batch_tokens: int | str = "auto"
    """Tokens per batch, padding included."""
    padding_side: str = "right"
    ablations: tuple[str, ...] = ("zero", "mean")
    """What else is put in place of the stream; scores are relative to these."""


@dataclass
class Evaluation:
    """One SAE on all texts."""

    texts: pd.DataFrame
    """Per text the counts n_spliced, n_compared and n_scored, sums over spliced positions named as
    those of StreamMetrics, `ce_<state>` over scored and `kl_<state>` over compared positions, in
    nats; the states are clean, sae, zero and mean."""
    stream: StreamMetrics
    l0_histogram: Int[np.ndarray, " m"]
    """At i, number of spliced positions with i active latents."""
    resumed: bool
    """Whether passes could go on from the changed stream, rather than from the token ids."""


def can_be_scored(text: TokenizedText, where: Where) -> bool:
    """Whether it has a position to splice at, and two neighbouring tokens that count."""
    counted = [where.score_special or not s for s in text.special]
    spliced = where.splice_special or not all(text.special)
    return spliced and any(a and b for a, b in zip(counted, counted[1:], strict=False))


@torch.inference_mode()
def evaluate_saes(
    model: LanguageModel,
    saes: Sequence[SparseAutoencoder],
    texts: Sequence[TokenizedText],
    settings: EvaluationSettings | None = None,
) -> list[Evaluation]:
    """Evaluate SAEs of one model together, at any hookpoints.

    Two rounds over the texts: the clean passes, which give the streams' means over the spliced
    positions, then everything else. Every text must satisfy `can_be_scored`. Raises ModelError
    where a text does not fit into memory.
    """
    assert len(saes) > 0 and len(texts) > 0, "nothing to evaluate"
    return _Evaluator(model, saes, texts, settings or EvaluationSettings()).run()


class _Evaluator:
    def __init__(
        self,
        model: LanguageModel,
        saes: Sequence[SparseAutoencoder],
        texts: Sequence[TokenizedText],
        settings: EvaluationSettings,
    ) -> None:
        self.model, self.saes, self.texts, self.settings = model, saes, texts, settings
        for sae in saes:
            sae.check_reconstructs()
        self.passes = Passes(model)
        self.written = list(dict.fromkeys(_written(s) for s in saes))
        read = [s.hookpoint.stored for s in saes]
        starts = [start for h in self.written if (start := resumes_from(h)) is not None]
        self.wanted = list(dict.fromkeys([*read, *self.written, *starts]))
        self.means: dict[Hookpoint, Tensor] = {}
        self.sums: dict[tuple[State, str], Float[np.ndarray, " n_texts"]] = {}
        self.streams: list[StreamMetrics] = []
        self.histograms = [np.zeros(s.d_sae + 1, dtype=np.int64) for s in saes]

    def _limit(self, sizes: dict[str, int]) -> int:
        return sizes.get(self.model.device.type, sizes["cpu"])

    def run(self) -> list[Evaluation]:
        todo = self._clean_round()
        self.streams = [StreamMetrics(self.means[_written(s)], s.d_sae) for s in self.saes]
        with progress(len(self.texts), "evaluating", "text") as bar:
            while todo:
                batch, clean = todo.popleft()
                try:
                    self._evaluate(batch, clean or self.passes.clean(batch, self.wanted))
                except torch.OutOfMemoryError as error:
                    raise _too_large(batch) from error
                bar.update(len(batch.texts))
        return [self._result(number) for number in range(len(self.saes))]

    def _clean_round(self) -> deque[tuple[Batch, Clean | None]]:
        """All batches with their clean passes, of which the last are dropped where memory ends."""
        model, where = self.model, self.settings.where
        budget = TokenBudget(self.settings.batch_tokens, model.device)
        per_token = len(self.wanted) * model.d_model * model.dtype.itemsize
        budget.tokens = max(1, min(budget.tokens, self._limit(STREAM_BYTES) // per_token))
        plan = batches([len(t) for t in self.texts], budget, model.text_config)
        done: deque[tuple[Batch, Clean | None]] = deque()
        free, n = self._limit(KEPT_BYTES), 0
        totals: dict[Hookpoint, Tensor] = {}
        chosen = next(plan, None)
        with progress(len(self.texts), "clean passes", "text") as bar:
            while chosen is not None:
                batch = make_batch(
                    self.texts,
                    chosen,
                    where,
                    pad_id=model.pad_id,
                    device=model.device,
                    padding_side=self.settings.padding_side,
                )
                try:
                    clean = self.passes.clean(batch, self.wanted)
                except torch.OutOfMemoryError as error:
                    if len(chosen) == 1:
                        raise _too_large(batch) from error
                    torch.cuda.empty_cache()
                    budget.halve(batch.ids.numel())
                    chosen = plan.send(False)
                    continue
                for hookpoint in self.written:
                    values = _at(clean.streams[hookpoint], batch.spliced)
                    total = values.cpu().double().sum(0)
                    totals[hookpoint] = total + totals.get(hookpoint, 0)
                n += int(batch.spliced.sum())
                free -= clean.n_bytes
                done.append((batch, clean if free >= 0 else None))
                bar.update(len(chosen))
                chosen = next(plan, None)
        self.means = {h: total / n for h, total in totals.items()}
        return done

    def _evaluate(self, batch: Batch, clean: Clean) -> None:
        for name in ("spliced", "compared"):
            texts = batch.texts_of(getattr(batch, name))
            self._add(("clean", None), f"n_{name}", texts, torch.ones(len(texts)))
        states: list[tuple[State, Tensor]] = []
        first, most = True, self._limit(STREAM_BYTES)
        for state, hidden in self._changed(batch, clean):
            states.append((state, hidden))
            if sum(h.nbytes for _, h in states) > most:
                self._score(batch, clean, states, first)
                first, states = False, []
        self._score(batch, clean, states, first)

    def _changed(self, batch: Batch, clean: Clean) -> Iterator[tuple[State, Tensor]]:
        """Every state but the clean one, with what the LM head reads in it."""
        for at in self.written:
            mean = self.means[at].float()
            values = {"zero": torch.zeros_like(mean), "mean": mean}
            for name in self.settings.ablations:
                edit = replaced(values[name], batch.ablated)
                yield (name, at), self.passes.changed(batch, clean, at, edit)
        for number, sae in enumerate(self.saes):
            edit = replaced(self._reconstructed(number, batch, clean), batch.spliced)
            yield ("sae", number), self.passes.changed(batch, clean, _written(sae), edit)

    def _reconstructed(self, number: int, batch: Batch, clean: Clean) -> Float[Tensor, "n d"]:
        """What the SAE writes at the spliced positions; measured on the way, chunk by chunk."""
        sae = self.saes[number]
        x = _at(clean.streams[sae.hookpoint.stored], batch.spliced)
        target = _at(clean.streams[_written(sae)], batch.spliced)
        texts = batch.texts_of(batch.spliced)
        rows = max(1, CHUNK_BYTES // (4 * sae.d_sae))
        parts = []
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            some = x[part].to(sae.device)
            acts = sae.encode(some)
            parts.append(sae.decode(acts, some))
            measured = self.streams[number].update(target[part].float(), parts[-1].float(), acts)
            for name, values in measured.items():
                self._add(("sae", number), name, texts[part], values)
            n_active = measured["active"].long().numpy()
            self.histograms[number] += np.bincount(n_active, minlength=sae.d_sae + 1)
        return torch.cat(parts)

    def _score(
        self, batch: Batch, clean: Clean, states: Sequence[tuple[State, Tensor]], first: bool
    ) -> None:
        """Losses and divergences, over a chunk of positions at a time."""
        texts = batch.texts_of(batch.compared)
        n_vocabulary = int(self.model.text_config.vocab_size)
        rows = max(1, self._limit(LOGIT_BYTES) // (4 * n_vocabulary))
        for start in range(0, len(clean.hidden), rows):
            part = slice(start, start + rows)
            log_p = self.passes.logits(clean.hidden[part]).log_softmax(-1)
            p = log_p.exp()
            targets = batch.targets[part].to(log_p.device)
            scored = targets >= 0
            of_scored = texts[part][scored.cpu()]
            if first:
                self._add(("clean", None), "n_scored", of_scored, torch.ones(len(of_scored)))
                self._add(("clean", None), "ce", of_scored, _losses(log_p, targets))
            for state, hidden in states:
                log_q = self.passes.logits(hidden[part]).log_softmax(-1)
                self._add(state, "ce", of_scored, _losses(log_q, targets))
                # KL(clean || new), in the place of log_q.
                self._add(state, "kl", texts[part], log_q.sub_(log_p).mul_(p).sum(-1).neg())

    def _add(self, state: State, name: str, texts: Tensor, values: Tensor) -> None:
        sums = np.bincount(
            texts.numpy(), weights=values.cpu().double().numpy(), minlength=len(self.texts)
        )
        self.sums[state, name] = self.sums.get((state, name), 0.0) + sums

    def _result(self, number: int) -> Evaluation:
        at = _written(self.saes[number])
        of_clean, of_sae = ("clean", None), ("sae", number)
        columns = {
            f"n_{name}": self.sums[of_clean, f"n_{name}"].astype(np.int64)
            for name in ("spliced", "compared", "scored")
        }
        columns |= {name: self.sums[of_sae, name] for name in self.streams[number].sums}
        columns["ce_clean"] = self.sums[of_clean, "ce"]
        states = {"sae": of_sae} | {name: (name, at) for name in self.settings.ablations}
        for name, state in states.items():
            columns[f"ce_{name}"] = self.sums[state, "ce"]
            columns[f"kl_{name}"] = self.sums[state, "kl"]
        histogram = np.trim_zeros(self.histograms[number], "b")
        # Where nothing lies below the stream, whole passes are no loss.
        resumed = self.passes.can_resume[at] or resumes_from(at) is None
        return Evaluation(pd.DataFrame(columns), self.streams[number], histogram, resumed)


def _written(sae: SparseAutoencoder) -> Hookpoint:
    return (sae.hookpoint_out or sae.hookpoint).stored


def _at(stream: Tensor, where: Tensor) -> Float[Tensor, "n d"]:
    return stream[where.to(stream.device)]


def _losses(log_p: Float[Tensor, "n V"], targets: Int[Tensor, " n"]) -> Float[Tensor, " m"]:
    """Next-token loss in nats where there is a target."""
    return -log_p.gather(-1, targets.clamp(min=0)[:, None])[targets >= 0, 0]


def _too_large(batch: Batch) -> ModelError:
    n = batch.ids.numel()
    return ModelError(
        f"a batch of {n} tokens does not fit into memory; type "
        f"task.options.batch_tokens={max(1, n // 2)}, dtype=bfloat16, fewer layers or a smaller "
        "dataset.max_length"
    )
