"""Evaluation of SAEs: the loss of the model with reconstructions spliced in, sparsity and fidelity.

Every SAE is compared, on the same texts, with the unchanged model and with the stream it writes
replaced by zeros and by its mean. Clean passes are shared by all SAEs, ablations by the SAEs of a
stream. A transcoder reads one stream and replaces another.

Shapes: n positions, d_model, d_sae latents, n_texts texts.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saexp.activations.reader import high_norm_notes
from saexp.analysis.evaluation_passes import (
    Batch,
    Clean,
    HighNorm,
    Means,
    Passes,
    Streams,
    Where,
    make_batch,
    resumes_from,
    values_at,
)
from saexp.context import progress
from saexp.data.tokenization import TokenizedText
from saexp.errors import ModelError
from saexp.latents import StreamMetrics, chunk_rows, replacement_edit
from saexp.models.forward import TokenBudget, batches
from saexp.models.loading import LanguageModel
from saexp.saes import SparseAutoencoder
from saexp.stats import ratio_interval

_GIB = 2**30
LOGIT_BYTES = {"cuda": _GIB // 2, "cpu": 2**24}
"""Size of one chunk of logits, by device type; three exist at a time."""
KEPT_BYTES = {"cuda": 8 * _GIB, "cpu": 2 * _GIB}
"""Limit on the clean passes kept between the two rounds, by device type; others are repeated."""
STREAM_BYTES = {"cuda": 4 * _GIB, "cpu": _GIB // 2}
"""Limit on the streams of one batch, by device type."""
State = tuple[str, Streams | int | None]
"""(`clean`, None), (`zero`, `mean` or `spliced`, streams of an SAE), (`sae`, number of the SAE)."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Settings of an evaluation; batches and padding change results by rounding only."""

    where: Where = field(default_factory=Where)
    batch_tokens: int | str = "auto"
    """Tokens per batch, padding included."""
    padding_side: str = "right"
    ablations: tuple[str, ...] = ("zero", "mean")
    """Replacements of the stream that the scores are relative to."""
    max_norm_ratio: float | None = None
    """Positions with a norm above this multiple of the median are neither spliced nor ablated."""
    keep_passes: bool = True
    """Keep clean passes between the two rounds, up to KEPT_BYTES; false: repeat them, so that
    memory does not grow with the texts."""


@dataclass
class Evaluation:
    """Results of one SAE on all texts."""

    texts: pd.DataFrame
    """Per text the counts n_spliced, n_high_norm (left as they are), n_compared and n_scored, sums
    over spliced positions named as those of StreamMetrics (`…_of_all`: with those of high norm),
    `ce_<state>` over scored and `kl_<state>` over compared positions, in nats; the states are
    clean, sae, zero and mean."""
    stream: StreamMetrics
    l0_histogram: Int[np.ndarray, " m"]
    """Entry i is the number of spliced positions with i active latents."""
    resumed: bool
    """Whether passes were resumed at the changed stream instead of the token ids."""
    notes: list[str] = field(default_factory=list)
    """Notes on positions that were neither spliced nor ablated."""


def can_be_scored(text: TokenizedText, where: Where) -> bool:
    """Whether a text has a position to splice at and two neighbouring tokens that are scored."""
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
        self.places = list(dict.fromkeys(_streams(s) for s in saes))
        starts = [start for p in self.places if (start := resumes_from(p[-1])) is not None]
        self.wanted = list(dict.fromkeys([*(h for p in self.places for h in p), *starts]))
        self.lengths = [len(text) for text in texts]
        self.high_norm = HighNorm(self.places, settings.max_norm_ratio, sum(self.lengths))
        self.means: dict[Streams, Means] = {}
        self.sums: dict[tuple[State, str], Float[np.ndarray, " n_texts"]] = {}
        self.streams: list[StreamMetrics] = []
        self.histograms = [np.zeros(s.d_sae + 1, dtype=np.int64) for s in saes]

    def _limit(self, sizes: dict[str, int]) -> int:
        return sizes.get(self.model.device.type, sizes["cpu"])

    def run(self) -> list[Evaluation]:
        todo = self._clean_round()
        self.high_norm.resolve()
        self.means = self.high_norm.means((p.batch, p.clean.streams) for p in todo)
        means = [self.means[_streams(s)] for s in self.saes]
        self.streams = [
            StreamMetrics(m.ordinary, s.d_sae, m.of_all)
            for m, s in zip(means, self.saes, strict=True)
        ]
        with progress(len(self.texts), "evaluating", "text") as bar:
            for number in range(len(todo)):
                again = todo.popleft()
                batch = again.batch
                try:
                    self._evaluate(number, batch, again.clean)
                except torch.OutOfMemoryError as error:
                    raise _too_large(batch) from error
                bar.update(len(batch.texts))
        return [self._result(number) for number in range(len(self.saes))]

    def _batch(self, chosen: Sequence[int]) -> Batch:
        model, settings = self.model, self.settings
        return make_batch(
            self.texts,
            chosen,
            settings.where,
            pad_id=model.pad_id,
            device=model.device,
            padding_side=settings.padding_side,
        )

    def _clean_round(self) -> deque["_CleanPass"]:
        """All clean passes; those beyond the limit of kept passes are repeated when needed."""
        model = self.model
        budget = TokenBudget(self.settings.batch_tokens, model.device)
        per_token = len(self.wanted) * model.d_model * model.dtype.itemsize
        budget.tokens = max(1, min(budget.tokens, self._limit(STREAM_BYTES) // per_token))
        plan = batches(self.lengths, budget, model.text_config)
        done: deque[_CleanPass] = deque()
        free = self._limit(KEPT_BYTES) if self.settings.keep_passes else 0
        chosen = next(plan, None)
        with progress(len(self.texts), "clean passes", "text") as bar:
            while chosen is not None:
                batch = self._batch(chosen)
                try:
                    clean = self.passes.clean(batch, self.wanted)
                except torch.OutOfMemoryError as error:
                    if len(chosen) == 1:
                        raise _too_large(batch) from error
                    torch.cuda.empty_cache()
                    budget.halve(batch.ids.numel())
                    chosen = plan.send(False)
                    continue
                self.high_norm.add(batch, clean.streams)
                free -= clean.n_bytes
                cached = (batch, clean) if free >= 0 else None
                done.append(_CleanPass(self, np.asarray(chosen), cached))
                bar.update(len(chosen))
                chosen = next(plan, None)
        return done

    def _evaluate(self, number: int, batch: Batch, clean: Clean) -> None:
        self._count(("clean", None), "n_compared", batch.texts_of(batch.compared))
        for hookpoints in self.places:
            ordinary = self.high_norm.ordinary(hookpoints, number, batch)
            self._count(("spliced", hookpoints), "n_spliced", batch.texts_of(ordinary))
            self._count(
                ("spliced", hookpoints), "n_high_norm", batch.texts_of(batch.spliced & ~ordinary)
            )
        states: list[tuple[State, Tensor]] = []
        first, most = True, self._limit(STREAM_BYTES)
        for state, hidden in self._changed(number, batch, clean):
            states.append((state, hidden))
            if sum(h.nbytes for _, h in states) > most:
                self._score(batch, clean, states, first)
                first, states = False, []
        self._score(batch, clean, states, first)

    def _changed(self, number: int, batch: Batch, clean: Clean) -> Iterator[tuple[State, Tensor]]:
        """Every state but the clean one, with the input of the LM head in it."""
        for hookpoints in self.places:
            mean = self.means[hookpoints].ordinary.float()
            values = {"zero": torch.zeros_like(mean), "mean": mean}
            high = batch.spliced & ~self.high_norm.ordinary(hookpoints, number, batch)
            for name in self.settings.ablations:
                edit = replacement_edit(values[name], batch.ablated & ~high)
                yield (name, hookpoints), self.passes.changed(batch, clean, hookpoints[-1], edit)
        for index, sae in enumerate(self.saes):
            hookpoints = _streams(sae)
            written = self._reconstructed(index, number, batch, clean)
            edit = replacement_edit(written, self.high_norm.ordinary(hookpoints, number, batch))
            yield ("sae", index), self.passes.changed(batch, clean, hookpoints[-1], edit)

    def _reconstructed(
        self, index: int, number: int, batch: Batch, clean: Clean
    ) -> Float[Tensor, "n d"]:
        """Reconstruction at ordinary spliced positions; updates the metrics chunk by chunk."""
        sae, stream = self.saes[index], self.streams[index]
        hookpoints = _streams(sae)
        x, target = (
            values_at(clean.streams[h], batch.spliced) for h in (hookpoints[0], hookpoints[-1])
        )
        texts, ordinary = batch.texts_of(batch.spliced), self.high_norm.masks[hookpoints][number]
        rows = chunk_rows(sae)
        parts = []
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            some, aim, is_ordinary = x[part].to(sae.device), target[part].float(), ordinary[part]
            acts = sae.encode(some)
            reconstruction = sae.decode(acts, some)
            parts.append(reconstruction[is_ordinary])
            measured = stream.update(
                aim[is_ordinary], reconstruction[is_ordinary].float(), acts[is_ordinary]
            )
            for name, values in measured.items():
                self._add(("sae", index), name, texts[part][is_ordinary], values)
            if not bool(is_ordinary.all()):
                high = stream.update_high_norm(
                    aim[~is_ordinary], reconstruction[~is_ordinary].float()
                )
                for name, values in high.items():
                    self._add(("sae", index), name, texts[part][~is_ordinary], values)
            n_active = measured["active"].long().numpy()
            self.histograms[index] += np.bincount(n_active, minlength=sae.d_sae + 1)
        return torch.cat(parts)

    def _score(
        self, batch: Batch, clean: Clean, states: Sequence[tuple[State, Tensor]], first: bool
    ) -> None:
        """Add losses and divergences, in chunks of positions."""
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
                self._count(("clean", None), "n_scored", of_scored)
                self._add(("clean", None), "ce", of_scored, _losses(log_p, targets))
            for state, hidden in states:
                log_q = self.passes.logits(hidden[part]).log_softmax(-1)
                self._add(state, "ce", of_scored, _losses(log_q, targets))
                # KL(clean || new), in the place of log_q.
                self._add(state, "kl", texts[part], log_q.sub_(log_p).mul_(p).sum(-1).neg())

    def _add(self, state: State, name: str, texts: Tensor, values: Tensor) -> None:
        # Of the texts in the batch alone: there may be very many others.
        indices, of_position = np.unique(texts.numpy(), return_inverse=True)
        if (state, name) not in self.sums:
            self.sums[state, name] = np.zeros(len(self.texts))
        added = np.bincount(of_position, values.cpu().double().numpy(), len(indices))
        self.sums[state, name][indices] += added

    def _count(self, state: State, name: str, texts: Tensor) -> None:
        self._add(state, name, texts, torch.ones(len(texts)))

    def _result(self, number: int) -> Evaluation:
        hookpoints = _streams(self.saes[number])
        of_clean, of_sae = ("clean", None), ("sae", number)
        counts = {"n_spliced": ("spliced", hookpoints), "n_high_norm": ("spliced", hookpoints)}
        counts |= {"n_compared": of_clean, "n_scored": of_clean}
        columns: dict[str, np.ndarray] = {
            name: self.sums[of, name].astype(np.int64) for name, of in counts.items()
        }
        columns |= {name: self.sums[of_sae, name] for name in self.streams[number].sums}
        if self.streams[number].mean_of_all is None:
            columns |= {f"{name}_of_all": columns[name] for name in ("error", "spread")}
            columns["spread_high_norm"] = np.zeros(len(self.texts))
        columns["ce_clean"] = self.sums[of_clean, "ce"]
        states = {"sae": of_sae} | {name: (name, hookpoints) for name in self.settings.ablations}
        for name, state in states.items():
            columns[f"ce_{name}"] = self.sums[state, "ce"]
            columns[f"kl_{name}"] = self.sums[state, "kl"]
        histogram = np.trim_zeros(self.histograms[number], "b")
        # Where no block lies below the stream, whole passes do the same work.
        at = hookpoints[-1]
        resumed = self.passes.can_resume[at] or resumes_from(at) is None
        measured = self.streams[number].result()
        notes = high_norm_notes(
            self.high_norm.n_excluded(hookpoints),
            int((columns["n_spliced"] + columns["n_high_norm"]).sum()),
            at,
            self.settings.max_norm_ratio,
            measured["reconstruction/high_norm_variance_fraction"] or 0.0,
            "they keep their activations where others are spliced or ablated, and sparsity and "
            "reconstruction metrics leave them out",
        )
        return Evaluation(pd.DataFrame(columns), self.streams[number], histogram, resumed, notes)


class _CleanPass:
    """A clean pass that is kept, or else repeated."""

    def __init__(
        self, evaluator: _Evaluator, chosen: np.ndarray, cached: tuple[Batch, Clean] | None
    ) -> None:
        self._evaluator, self._chosen, self._cached = evaluator, chosen, cached

    @property
    def batch(self) -> Batch:
        """The texts of the pass."""
        return self._cached[0] if self._cached else self._evaluator._batch(self._chosen.tolist())

    @property
    def clean(self) -> Clean:
        """Its streams. Raises torch.OutOfMemoryError."""
        evaluator = self._evaluator
        return (
            self._cached[1]
            if self._cached
            else evaluator.passes.clean(self.batch, evaluator.wanted)
        )


def _streams(sae: SparseAutoencoder) -> Streams:
    return tuple(h.stored for h in sae.hookpoints)


def _losses(log_p: Float[Tensor, "n V"], targets: Int[Tensor, " n"]) -> Float[Tensor, " m"]:
    """Next-token loss in nats where there is a target."""
    return -log_p.gather(-1, targets.clamp(min=0)[:, None])[targets >= 0, 0]


def _too_large(batch: Batch) -> ModelError:
    n = batch.ids.numel()
    return ModelError(
        f"a batch of {n} tokens does not fit into memory; type "
        f"task.batch_tokens={max(1, n // 2)}, dtype=bfloat16, fewer layers or a smaller "
        "dataset.max_length"
    )


Numbers = dict[str, float | int | None]
Sums = np.ndarray | np.floating | np.integer
ABLATIONS = {"zero": "", "mean": "_mean"}
"""What takes the stream's place -> ending of the scores that compare with it."""


def fractions(sums: Mapping[str, Sums]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Metric name -> (numerator, denominator), from sums over positions (Evaluation.texts).

    Both are linear in the sums, which are arrays of any one shape: those of single texts add up to
    those of all. ce_loss_score = (CE_ablated - CE_sae) / (CE_ablated - CE_clean); kl_score =
    (KL_ablated - KL_sae) / KL_ablated; ablated by zeros, with the ending `_mean` by the mean.
    ce_increase = CE_sae - CE_clean. Variance is around the mean of all texts.
    """
    s = {name: np.asarray(values, dtype=np.float64) for name, values in sums.items()}
    there = {name: ending for name, ending in ABLATIONS.items() if f"ce_{name}" in s}
    ratios = {f"reconstruction/ce_{k}": (s[f"ce_{k}"], s["n_scored"]) for k in ("clean", "sae")}
    ratios |= {f"reconstruction/ce_{k}": (s[f"ce_{k}"], s["n_scored"]) for k in there}
    ratios |= {f"reconstruction/kl_{k}": (s[f"kl_{k}"], s["n_compared"]) for k in ("sae", *there)}
    ratios["reconstruction/ce_increase"] = (s["ce_sae"] - s["ce_clean"], s["n_scored"])
    for name, ending in there.items():
        ce, kl = s[f"ce_{name}"], s[f"kl_{name}"]
        ratios[f"reconstruction/ce_loss_score{ending}"] = (ce - s["ce_sae"], ce - s["ce_clean"])
        ratios[f"reconstruction/kl_score{ending}"] = (kl - s["kl_sae"], kl)
    n, spread, spread_of_all = s["n_spliced"], s["spread"], s["spread_of_all"]
    ratios |= {
        "reconstruction/explained_variance": (spread - s["error"], spread),
        "reconstruction/explained_variance_legacy": (s["legacy"], n),
        "reconstruction/explained_variance_all_positions": (
            spread_of_all - s["error_of_all"],
            spread_of_all,
        ),
        "reconstruction/high_norm_variance_fraction": (s["spread_high_norm"], spread_of_all),
        "reconstruction/mse": (s["error"], n),
        "reconstruction/cosine": (s["cosine"], n),
        "reconstruction/l2_ratio": (s["ratio"], n),
        "reconstruction/relative_bias": (s["output"], s["product"]),
        "sparsity/l0": (s["active"], n),
        "sparsity/mean_active": (s["value"], s["active"]),
    }
    return ratios


def numbers(
    evaluation: Evaluation,
    n_bootstrap: int,
    seed: int,
    confidence: float = 0.95,
    *,
    units: Sequence[str] | None = None,
) -> Numbers:
    """Every metric of one SAE, those of `fractions` with `_ci_low` and `_ci_high`.

    Intervals are by the studentised bootstrap of the ratio (`ratio_interval`) over `units`, each
    with the sums of its texts; without units every text is one. A score is NaN where the ablation
    costs nothing, as is every number that is not defined. Intervals are None for fewer than `MIN_N`
    units, without resamples, and for a number that has no spread.
    """
    table = evaluation.texts
    of_text = (
        np.arange(len(table)) if units is None else pd.factorize(np.asarray(units, dtype=object))[0]
    )
    of_unit = table.groupby(of_text, sort=False).sum()
    values = {str(name): of_unit[name].to_numpy(dtype=np.float64) for name in of_unit.columns}
    parts = fractions(values)
    above, below = (np.stack([pair[i] for pair in parts.values()], axis=1) for i in (0, 1))
    low, high = ratio_interval(above, below, seed, n_resamples=n_bootstrap, confidence=confidence)
    result: Numbers = {}
    for i, (name, (numerator, denominator)) in enumerate(parts.items()):
        total = denominator.sum()
        defined = total > 0 if "score" in name else total != 0
        result[name] = float(numerator.sum() / total) if defined else float("nan")
        for side, limit in (("low", low[i]), ("high", high[i])):
            is_number = defined and np.isfinite(limit)
            result[f"{name}_ci_{side}"] = float(limit) if is_number else None
    measured = evaluation.stream.result()
    for name in ("max_active", "dead_fraction", "n_positions"):
        result[f"sparsity/{name}"] = measured[f"sparsity/{name}"]
    for name in ("explained_variance_median", "median_norm", "n_high_norm"):
        result[f"reconstruction/{name}"] = measured[f"reconstruction/{name}"]
    result["sparsity/n_dead"] = int((evaluation.stream.n_active == 0).sum())
    result["evaluation/n_units"] = len(of_unit)
    result["evaluation/n_scored"] = int(values["n_scored"].sum())
    result["evaluation/n_compared"] = int(values["n_compared"].sum())
    return result


def densities(evaluation: Evaluation) -> pd.DataFrame:
    """Per latent: positions and share of spliced positions where it fires, mean there, maximum."""
    stream = evaluation.stream
    n_active = stream.n_active.numpy()
    return pd.DataFrame(
        {
            "latent": np.arange(len(n_active)),
            "n_active": n_active,
            "frequency": n_active / stream.n,
            "mean_active": stream.totals.numpy() / np.maximum(n_active, 1),
            "max_active": stream.maxima.numpy(),
        }
    )


def l0_table(evaluation: Evaluation) -> pd.DataFrame:
    """Per number of active latents, at how many spliced positions there are so many."""
    counts = evaluation.l0_histogram
    return pd.DataFrame({"n_active": np.arange(len(counts)), "n_positions": counts})
