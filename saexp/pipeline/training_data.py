"""What SAEs are trained on, stored activations of examples split by text; and what measures them
while they are trained, the loss of the language model with them spliced in.
"""

import hashlib
import math
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saexp.activations.reader import OrdinaryRows, ShuffledReader
from saexp.activations.shard_files import StoredValues
from saexp.analysis.evaluation import EvaluationSettings, can_be_scored, evaluate_saes, numbers
from saexp.config import RunConfig, SAETrainerConfig
from saexp.context import RunContext
from saexp.data import Skip
from saexp.data.rows import CorpusRows
from saexp.data.tokenization import TokenizedText
from saexp.distributed import ALONE, Processes
from saexp.errors import ConfigError
from saexp.models import Hookpoint
from saexp.models.loading import LanguageModel
from saexp.pipeline.collect import collect_examples
from saexp.saes.loading import load_sae
from saexp.saes.training import Streams, Training
from saexp.saes.training_pass import Batches, Reader, ReaderBatches

N_MEASURED = 65_536
"""Largest number of held-out positions that are measured."""


@dataclass(frozen=True)
class HeldOut:
    """Activations that an SAE was not trained on."""

    acts: Tensor | StoredValues
    target: Tensor | StoredValues | None
    """The stream that a transcoder predicts."""
    chosen: np.ndarray
    """The rows of `acts` that are measured."""
    rows: pd.DataFrame
    """Text and token of each of these."""
    ordinary: np.ndarray
    """Which of these do not have a high norm."""


@runtime_checkable
class TrainingData(Protocol):
    """The data of one pass."""

    context_size: int
    """Longest text in tokens."""
    skips: Sequence[Skip]
    """Examples that could not be used."""
    n_evaluated: int
    """Tokens that evaluations sent through the model."""
    n_elsewhere: int
    """Tokens that the other processes of the run sent through the model."""

    @property
    def tokens_forwarded(self) -> int:
        """Tokens that this run sent through the language model."""
        ...

    def width(self, hookpoint: Hookpoint) -> int:
        """Size of the activations at a hookpoint."""
        ...

    def key(self, streams: Streams) -> list[Any]:
        """What determines the batches of these streams, beside the trainer's settings."""
        ...

    def batches(self, trainings: Sequence[Training], checkpoints: Path) -> Batches:
        """The batches of a pass; `checkpoints` is the folder with those of all trainings."""
        ...

    def prepare_held_out(self, hookpoints: Sequence[Hookpoint]) -> None:
        """Compute what `held_out` needs of these hookpoints, if that is not done yet."""
        ...

    def held_out(self, training: Training) -> HeldOut:
        """What a finished training is measured on."""
        ...

    def evaluation_texts(self) -> list[TokenizedText]:
        """Held-out texts, on which the loss with the reconstruction spliced in is measured."""
        ...

    def n_trained_on(self, training: Training) -> int:
        """Different positions that the SAE was trained on."""
        ...

    def notes(self, training: Training) -> list[str]:
        """Remarks about the data of one SAE."""
        ...

    def metrics(self, training: Training) -> dict[str, float | int | None]:
        """Numbers about the data."""
        ...

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the activations are from, for provenance.json."""
        ...


class StoredData:
    """Stored activations at the positions of examples; whole texts are held out.

    SAEs of different streams leave out positions of high norm in their own streams.
    """

    def __init__(
        self,
        cfg: RunConfig,
        context: RunContext,
        model: LanguageModel,
        hookpoints: Sequence[Hookpoint],
        processes: Processes = ALONE,
    ) -> None:
        self.cfg, self._processes = cfg, processes
        self.collected = collect_examples(cfg, model, list(hookpoints), context.prefetch)
        placement = self.collected.placement
        self.context_size = (
            placement.longest if isinstance(placement, CorpusRows) else cfg.dataset.max_length
        )
        self.skips = placement.skips
        self.n_evaluated = self.n_elsewhere = 0
        self._special = frozenset(model.tokenizer.all_special_ids)
        texts = placement.text_ids(np.arange(placement.n_rows))
        self._train, self._held_out = _split(texts, cfg.sae_trainer.held_out, cfg.seed)
        self._ordinary: dict[Streams, OrdinaryRows] = {}

    @property
    def tokens_forwarded(self) -> int:
        """Tokens that this run collected, and those of evaluations."""
        return self.collected.stats.tokens_forwarded + self.n_evaluated + self.n_elsewhere

    def _values(self, hookpoint: Hookpoint) -> StoredValues:
        return self.collected.store.values(hookpoint.layer, hookpoint.stream)

    def ordinary(self, streams: Streams) -> OrdinaryRows:
        """Which rows do not have a high norm in these streams."""
        if streams not in self._ordinary:
            self._ordinary[streams] = self.collected.ordinary(list(streams))
        return self._ordinary[streams]

    def train_rows(self, streams: Streams) -> np.ndarray:
        """The rows that an SAE of these streams is trained on."""
        return self._train[self.ordinary(streams).mask[self._train]]

    def width(self, hookpoint: Hookpoint) -> int:
        """Size of the stored activations."""
        return self._values(hookpoint).shape[1]

    def key(self, streams: Streams) -> list[Any]:
        """The store and the rows."""
        rows = self.train_rows(streams).astype("<i8").tobytes()
        return [self.collected.store.path.name, hashlib.sha256(rows).hexdigest()]

    def batches(self, trainings: Sequence[Training], checkpoints: Path) -> Batches:  # noqa: ARG002
        """Batches of shuffled rows, in a new order each epoch."""
        readers = {t.streams: self._reader(t.streams) for t in trainings}
        return ReaderBatches(
            readers,
            self._processes,
            batch_size=self.cfg.sae_trainer.batch_size,
            n_rows={streams: len(self.train_rows(streams)) for streams in readers},
        )

    def _reader(self, streams: Streams) -> Reader:
        """Batches of the stream, or of both streams concatenated along the last axis."""
        values, rows = [self._values(h) for h in streams], self.train_rows(streams)
        trainer = self.cfg.sae_trainer

        def start(step: int) -> Iterator[Tensor]:
            readers = [
                ShuffledReader(
                    acts, rows, trainer.batch_size, trainer.seed, step, processes=self._processes
                )
                for acts in values
            ]
            if len(readers) == 1:
                return readers[0]
            return (torch.cat(parts, dim=-1) for parts in zip(*readers, strict=True))

        return start

    def prepare_held_out(self, hookpoints: Sequence[Hookpoint]) -> None:
        """Nothing: they are stored."""

    def held_out(self, training: Training) -> HeldOut:
        """A seeded choice of the held-out rows."""
        acts, *targets = (self._values(h) for h in training.streams)
        chosen = _sample(self._held_out, N_MEASURED, self.cfg.seed)
        return HeldOut(
            acts=acts,
            target=targets[0] if targets else None,
            chosen=chosen,
            rows=self.collected.placement.at(chosen),
            ordinary=self.ordinary(training.streams).mask[chosen],
        )

    def evaluation_texts(self) -> list[TokenizedText]:
        """The texts of the held-out rows; of a corpus at most as many tokens as are measured."""
        placement = self.collected.placement
        texts = pd.unique(placement.text_ids(self._held_out))
        if isinstance(placement, CorpusRows):
            texts = _sample(texts, -(-N_MEASURED // placement.longest), self.cfg.seed)
        return [text_of(placement.ids(int(n)), self._special) for n in texts]

    def n_trained_on(self, training: Training) -> int:
        """Number of rows, which are read again as often as needed."""
        return len(self.train_rows(training.streams))

    def notes(self, training: Training) -> list[str]:
        """Notes on the examples and on high norms."""
        ordinary = self.ordinary(training.streams)
        return [
            *self.collected.examples.notes,
            *ordinary.notes("training and the measured numbers leave them out"),
        ]

    def metrics(self, training: Training) -> dict[str, float | int | None]:
        """`collection/…`, and how often the rows were read."""
        n_seen = training.n_steps * training.cfg.batch_size
        return {
            **self.collected.metrics,
            "collection/tokens_forwarded": self.tokens_forwarded,
            "train/epochs": n_seen / len(self.train_rows(training.streams)),
        }

    @property
    def provenance(self) -> dict[str, Any]:
        """Store and data set."""
        return {**self.collected.provenance, "tokens_forwarded": self.tokens_forwarded}


def text_of(ids: Sequence[int], special: Collection[int]) -> TokenizedText:
    """Token ids as a text without its characters, as an evaluation reads it."""
    flags = tuple(i in special for i in ids)
    return TokenizedText("", tuple(ids), ((0, 0),) * len(ids), flags, truncated=False)


def _split(text_ids: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows to train on, rows held out): a seeded choice of whole texts."""
    texts = np.unique(text_ids)
    n = max(1, round(fraction * len(texts)))
    if n >= len(texts):
        raise ConfigError(
            f"{len(texts)} texts are too few to train on some and hold {fraction:g} of them out"
        )
    held_out_texts = np.random.default_rng(seed).permutation(texts)[:n]
    held_out = np.isin(text_ids, held_out_texts)
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _sample(rows: np.ndarray, n: int, seed: int) -> np.ndarray:
    if len(rows) <= n:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, n, replace=False))


N_EVALUATED = 8192
"""Largest number of held-out tokens of one evaluation."""
HELD_OUT_NUMBERS = {
    "train/ce_loss_score": "reconstruction/ce_loss_score",
    "train/held_out_l0": "sparsity/l0",
}
"""Number of a training record -> metric of task=evaluate."""
_FAR = 1.5
"""A note reports a held-out L0 that differs from k, or from the curve's L0, by this factor."""
_DIFFERENT = 0.15
"""A note reports a difference of explained variances or dead fractions above this."""
_CURVE = {
    "l0": "sparsity/l0",
    "explained_variance": "reconstruction/explained_variance",
    "dead_fraction": "sparsity/dead_fraction",
}
"""Name of a training curve -> metric of the same quantity on held-out positions."""


class HeldOutEvaluation:
    """Evaluates SAEs of a pass as they are, on held-out text that is the same each time."""

    def __init__(self, cfg: RunConfig, model: LanguageModel, data: TrainingData) -> None:
        self.cfg, self.model, self.data = cfg, model, data
        self.settings = EvaluationSettings(
            batch_tokens=cfg.store.batch_tokens,
            ablations=("zero",),
            max_norm_ratio=cfg.positions.max_norm_ratio,
        )
        texts = [t for t in data.evaluation_texts() if can_be_scored(t, self.settings.where)]
        order = np.random.default_rng(cfg.seed).permutation(len(texts))
        n_tokens = np.cumsum([len(texts[i]) for i in order])
        n = max(1, int(np.searchsorted(n_tokens, N_EVALUATED, side="right")))
        self.texts = [texts[i] for i in order[:n]]

    @property
    def is_possible(self) -> bool:
        """Whether there is text, and the model predicts tokens."""
        return bool(self.texts) and self.model.hf.get_output_embeddings() is not None

    def __call__(self, trainings: Sequence[Training]) -> list[dict[str, float]]:
        """`train/…` numbers of each; one that is not defined is left out."""
        with tempfile.TemporaryDirectory(prefix="saexp-") as folder:
            saes = []
            for number, training in enumerate(trainings):
                snapshot_folder = Path(folder) / str(number)
                snapshot_folder.mkdir()
                training.snapshot(snapshot_folder)
                saes.append(load_sae(snapshot_folder).to(self.model.device))
        evaluations = evaluate_saes(self.model, saes, self.texts, self.settings)
        self.data.n_evaluated += sum(map(len, self.texts))
        results = []
        for evaluation in evaluations:
            measured = numbers(evaluation, 0, self.cfg.seed)
            values = {name: measured[metric] for name, metric in HELD_OUT_NUMBERS.items()}
            results.append(
                {k: float(v) for k, v in values.items() if v is not None and math.isfinite(v)}
            )
        return results


def off_target(trainer: SAETrainerConfig, l0: float | int | None) -> list[str]:
    """A note where a BatchTopK SAE has a held-out L0 far from its k."""
    k = trainer.options.get("k")
    if not k or not l0 or "batchtopk" not in trainer.name or k / _FAR <= l0 <= k * _FAR:
        return []
    return [
        f"L0 is {l0:.1f} on held-out positions, where k is {k:g}: the threshold that stands in for "
        "the k largest of a batch is an average over the training and has not converged; train "
        "longer (sae_trainer.n_samples)"
    ]


def off_curve(
    last: Mapping[str, float | int],
    measured: Mapping[str, float | None],
    n_steps: int,
    dead_window: int,
    *,
    l0_reported: bool = False,
) -> list[str]:
    """A note where held-out numbers differ from the end of the training curve.

    `last` is the curve's last record; L0 is left out where another note reports it
    (`l0_reported`), and the dead fraction after at most `dead_window` steps, as no latent can be
    dead on the curve before.
    """
    differences = []
    for name, key in _CURVE.items():
        here, there = measured[key], last[f"train/{name}"]
        if here is None or (name == "dead_fraction" and n_steps <= dead_window):
            continue
        if name == "l0":
            differs = not l0_reported and not there / _FAR <= here <= there * _FAR
        else:
            differs = abs(here - there) > _DIFFERENT
        if differs:
            differences.append(
                f"{name.replace('_', ' ')} {here:.3g}, the curve ends at {there:.3g}"
            )
    if not differences:
        return []
    dead = ""
    if n_steps > dead_window:
        dead = (
            f"; there a latent is dead after sae_trainer.dead_feature_window={dead_window} "
            "inactive steps"
        )
    return [
        f"{measured['sparsity/n_positions']:,} held-out positions disagree with the training "
        f"curve: {'; '.join(differences)} (of the last batch{dead}); the held-out numbers count, "
        "and more or more varied texts bring them closer"
    ]
