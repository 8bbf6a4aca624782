"""What SAEs are trained on: activations of a corpus, computed while they are trained."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from saexp.activations.stream import PROCESS, ActivationStream, ContextActivations, StreamSettings
from saexp.config import RunConfig
from saexp.config.groups import CorpusConfig
from saexp.context import ObjectCache, progress
from saexp.data import Skip
from saexp.data.corpora import Corpus, context_size, tokenized
from saexp.data.documents import TokenizerInfo
from saexp.data.tokenization import TokenizedText
from saexp.digests import digest_of
from saexp.distributed import ALONE, Processes
from saexp.errors import ConfigError, counted, duration_words
from saexp.files import is_writable
from saexp.models import Hookpoint
from saexp.models.forward import TokenBudget, context_limit
from saexp.models.loading import LanguageModel
from saexp.pipeline.collect import begins_with_bos
from saexp.pipeline.training_data import N_MEASURED, HeldOut, text_of
from saexp.saes.training import (
    Checkpoints,
    DamagedCheckpoint,
    Streams,
    Training,
    Widths,
    read_object,
)
from saexp.saes.training_pass import Batches

log = logging.getLogger(__name__)

BUFFER, STATE = "buffer.safetensors", "stream.json"
N_BLOCKS = 16
"""Runs of neighbouring contexts that are held out; fewer runs have fewer documents in common with
the other contexts."""
MakeStream = Callable[[Sequence[Hookpoint]], ActivationStream]


def name_of(streams: Streams) -> str:
    """`layer_2.mlp_in>layer_2.mlp_out`."""
    return ">".join(h.name for h in streams)


class StreamBatches:
    """Batches of a mixed stream of activations, with a checkpoint of the stream.

    Positions of high norm in an SAE's own streams are left out of its batches, which are smaller by
    their number. Each of several processes has a part of each batch.
    """

    def __init__(
        self,
        make: MakeStream,
        checkpoints: Checkpoints,
        n_steps: int,
        n_tokens: int,
        processes: Processes = ALONE,
        n_held_out: int = 0,
    ) -> None:
        """`n_tokens` are those of an epoch; `n_held_out` are measured after the training."""
        self._make, self._checkpoints = make, checkpoints
        self._n_steps, self._n_tokens, self._n_held_out = n_steps, n_tokens, n_held_out
        self._processes = processes
        self._has_checkpoints = processes.of_first(checkpoints.writable)
        self._streams: list[Streams] = []
        self._stream: ActivationStream | None = None
        self._n_high: dict[str, int] = {}
        self._n_served = 0
        self._seconds_per_position: float | None = None

    @property
    def stream(self) -> ActivationStream:
        """The stream, from `seek` on."""
        assert self._stream is not None, "seek begins the stream"
        return self._stream

    def seek(self, step: int, streams: Sequence[Streams]) -> int:
        """Continue at the newest intact checkpoint of the stream up to this step, else at 0."""
        self._streams = list(streams)
        self._begin()
        resumed_step = self._checkpoints.resume(self._load, latest=step)
        self._processes.require_same("the checkpoint of the stream", resumed_step)
        if resumed_step < step:
            log.info("the corpus is read again from step %d to %d", resumed_step, step)
        return resumed_step

    def _begin(self) -> None:
        self._stream = self._make(list(dict.fromkeys(h for s in self._streams for h in s)))
        self._n_high, self._n_served = {name_of(s): 0 for s in self._streams}, 0

    def next(self) -> Mapping[Streams, Tensor]:
        """The next positions of the buffer."""
        # Norms are measured once, before anything is read; this is not part of a refill.
        self._measure_norms()
        began, n_read = time.perf_counter(), self.stream.source.at.n_positions
        rows = {h: values.float() for h, values in next(self.stream).items()}
        n_read = self.stream.source.at.n_positions - n_read
        if self._seconds_per_position is None and n_read:
            self._seconds_per_position = (time.perf_counter() - began) / n_read
        limits = self.stream.source.limits
        ordinary = {h: x.norm(dim=-1) <= limits[h] for h, x in rows.items()}
        keeps = [torch.stack([ordinary[h] for h in streams]).all(0) for streams in self._streams]
        n_ordinary = self._processes.totals([int(keep.sum()) for keep in keeps])
        batches, n_rows = {}, self.stream.settings.batch_size
        for streams, keep, n in zip(self._streams, keeps, n_ordinary, strict=True):
            batch = torch.cat([rows[h] for h in streams], dim=-1)
            # As elsewhere: where no position is ordinary, all are read.
            n_high = n_rows - n if n else 0
            batches[streams] = batch[keep] if n_high else batch
            self._n_high[name_of(streams)] += n_high
        self._n_served += n_rows
        return batches

    def mean_norms(self, widths: Widths) -> dict[Hookpoint, float]:
        """Means over the ordinary positions of the first contexts."""
        self._measure_norms()
        return {h: self.stream.mean_norms[h] for h in widths}

    def _measure_norms(self) -> None:
        """Measure norms and, by the time that this takes, log a forecast before the first step.

        Does nothing where they are known.
        """
        source, settings = self.stream.source, self.stream.settings
        if source.mean_norms:
            return
        began, n = time.perf_counter(), source.n_forwarded
        _ = self.stream.mean_norms
        n = source.n_forwarded - n
        if not n:  # Of several processes the first one measures.
            return
        rate = n * self._processes.size / (time.perf_counter() - began)
        n_read = max(self._n_steps * settings.batch_size, settings.buffer_rows)
        log.info(
            "collecting: the first step follows after %s positions (sae_trainer.buffer_rows), in "
            "about %s at %.0f tokens/s; all %s of the training take at least about %s, and the %s "
            "held-out tokens measured afterwards %s",
            *(f"{settings.buffer_rows:,}", duration_words(settings.buffer_rows / rate), rate),
            *(f"{n_read:,}", duration_words(n_read / rate)),
            *(f"{self._n_held_out:,}", duration_words(self._n_held_out / rate)),
        )

    @property
    def seconds_per_step(self) -> float | None:
        """The time of the first refill of the buffer, by positions. A training that is continued
        has a full buffer at first."""
        if self._seconds_per_position is None:
            return None
        return self._seconds_per_position * self.stream.settings.batch_size

    def seen(self, streams: Streams, step: int) -> dict[str, float | int]:  # noqa: ARG002
        """Positions of the batches so far, those of high norm included; the positions of an epoch
        are its tokens times the fraction that was served of the tokens read."""
        at, n = self.stream.source.at, self._n_served
        return {
            "train/tokens": n,
            "train/epoch": n * at.n_tokens / (at.n_positions * self._n_tokens),
        }

    def checkpoint(self, step: int) -> None:
        """Write the buffer and where the corpus is read; nothing at the end, where none follows."""
        if step < self._n_steps and self._has_checkpoints:
            state = self.stream.state()
            self._checkpoints.write(step, lambda folder: self._write(folder, *state))

    def remove(self) -> None:
        """Remove the checkpoints of the stream."""
        self._checkpoints.remove()

    def _write(self, folder: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        save_file(tensors, folder / BUFFER)
        names = [h.name for h in self.stream.source.hookpoints]
        read = {"hookpoints": names, "n_high": self._n_high, "n_rows": self._n_served}
        assert not read.keys() & about.keys()
        state = {**about, **read}
        (folder / STATE).write_text(json.dumps(state) + "\n", encoding="utf-8")

    def _load(self, folder: Path, step: int) -> None:  # noqa: ARG002
        try:
            state, tensors = read_object(folder / STATE), load_file(folder / BUFFER)
            hookpoints = self.stream.source.hookpoints
            if not {h.name for h in hookpoints} <= set(state["hookpoints"]):
                raise DamagedCheckpoint(f"{STATE}: of other hookpoints")
            at = [state["hookpoints"].index(h.name) for h in hookpoints]
            norms = {name: [values[i] for i in at] for name, values in state["norms"].items()}
            buffer = {h.name: tensors[h.name] for h in hookpoints}
            buffer |= {PROCESS: tensors[PROCESS]} if PROCESS in tensors else {}
            self.stream.resume(buffer, {**state, "norms": norms})
            self._n_high = {name: int(state["n_high"][name]) for name in self._n_high}
            self._n_served = int(state["n_rows"])
        except Exception:
            self._begin()
            raise

    def describe(self, streams: Streams) -> dict[str, Any]:
        """Tokens read, epochs, positions of high norm, and the limits of ordinary ones."""
        at, limits = self.stream.source.at, self.stream.source.limits
        finite = {h.name: limits[h] if np.isfinite(limits[h]) else None for h in streams}
        return {
            "n_tokens": at.n_tokens,
            "n_positions": at.n_positions,
            "n_high_norm": self._n_high[name_of(streams)],
            "n_served": self._n_served,
            "limits": finite,
        }


class StreamedData:
    """A corpus of which a part is held out, read through the language model while SAEs train."""

    def __init__(
        self,
        cfg: RunConfig,
        model: LanguageModel,
        objects: ObjectCache,
        processes: Processes = ALONE,
    ) -> None:
        if not isinstance(cfg.dataset, CorpusConfig):
            raise ConfigError(
                f"sae_trainer.source=stream reads a corpus, not dataset={cfg.dataset.name}; type "
                "dataset=corpus dataset.path=<text files>, or sae_trainer.source=store"
            )
        self.cfg, self.model, self._objects, self._processes = cfg, model, objects, processes
        self._dataset = cfg.dataset
        size = context_size(cfg.dataset, context_limit(model), model.name)
        info = TokenizerInfo(model.tokenizer, model.tokenizer_fingerprint, begins_with_bos(model))
        self.corpus = tokenized(cfg.dataset, info, size, cfg.cache_dir)
        self.context_size = self.corpus.context_size
        self.skips: Sequence[Skip] = []
        trainer = cfg.sae_trainer
        self._train, self._held_out = split(self.corpus, trainer.held_out, cfg.seed)
        self.n_train_tokens = int(self.corpus.lengths(self._train).sum())
        self.settings = self._stream_settings()
        self._sources: list[ContextActivations] = []
        self._values: dict[Hookpoint, Tensor] = {}
        """Held-out activations."""
        self.n_evaluated = self.n_elsewhere = 0

    def _stream_settings(self) -> StreamSettings:
        trainer = self.cfg.sae_trainer
        if trainer.buffer_rows < trainer.batch_size:
            raise ConfigError(
                f"sae_trainer.buffer_rows={trainer.buffer_rows} is less than a batch; type "
                f"sae_trainer.buffer_rows={16 * trainer.batch_size}"
            )
        # More than an epoch in the buffer would be the same positions several times.
        rows = min(trainer.buffer_rows, max(self.n_train_tokens, trainer.batch_size))
        return StreamSettings(
            buffer_rows=rows,
            batch_size=trainer.batch_size,
            mix_fraction=trainer.mix_fraction,
            max_norm_ratio=self.cfg.positions.max_norm_ratio,
            batch_tokens=self.cfg.store.batch_tokens,
            seed=trainer.seed,
        )

    @property
    def tokens_forwarded(self) -> int:
        """Tokens that this run sent through the model, those of evaluations included."""
        own = sum(source.n_forwarded for source in self._sources)
        return own + self.n_evaluated + self.n_elsewhere

    def width(self, hookpoint: Hookpoint) -> int:
        """Size of the activations: d_model, or what the attention's projection reads."""
        if hookpoint.stream != "attn_z":
            return self.model.d_model
        module: Any = self.model.module(hookpoint).module
        return int(getattr(module, "in_features", None) or module.weight.shape[0])

    def key(self, streams: Streams) -> list[Any]:  # noqa: ARG002
        """The model, the contexts, and how they are read and mixed."""
        settings = self.settings
        return [
            self.corpus.key,
            self.model.fingerprint,
            str(self.model.dtype),
            hashlib.sha256(self._train.astype("<i8").tobytes()).hexdigest(),
            [settings.buffer_rows, settings.mix_fraction, settings.max_norm_ratio, settings.seed],
            TokenBudget(settings.batch_tokens, self.model.device).tokens,
        ]

    def _source(
        self,
        contexts: Int[np.ndarray, " n"],
        hookpoints: Sequence[Hookpoint],
        processes: Processes = ALONE,
    ) -> ContextActivations:
        self.model.check_streams(hookpoints)
        source = ContextActivations(
            self.model, self.corpus, contexts, hookpoints, self.settings, processes
        )
        self._sources.append(source)
        return source

    def batches(self, trainings: Sequence[Training], checkpoints: Path) -> Batches:
        """Batches of one stream; its checkpoints are beside those of the trainings."""
        # Of this pass alone: another one may be under way with other SAEs.
        key = digest_of("stream", *sorted(t.checkpoints.folder.name for t in trainings))[:24]
        writable = self._processes.is_first and is_writable(self.cfg.cache_dir)
        return StreamBatches(
            lambda hookpoints: ActivationStream(
                self._source(self._train, hookpoints, self._processes), self.settings
            ),
            Checkpoints(checkpoints / key, writable=writable),
            trainings[0].n_steps,
            self.n_train_tokens,
            self._processes,
            int(self.corpus.lengths(self._held_out).sum()),
        )

    def held_out(self, training: Training) -> HeldOut:
        """All positions of the held-out contexts."""
        values = self._held_out_values(training.streams)
        rows = self._rows()
        ordinary = np.ones(len(rows), dtype=bool)
        for hookpoint in training.streams:
            limit = training.data["limits"][hookpoint.name]
            if limit is not None:
                norms = values[hookpoint].double().flatten(1).norm(dim=-1)
                ordinary &= (norms <= limit).cpu().numpy()
        return HeldOut(
            acts=values[training.streams[0]],
            target=values[training.streams[1]] if len(training.streams) > 1 else None,
            chosen=np.arange(len(rows)),
            rows=rows,
            ordinary=ordinary if ordinary.any() else np.ones(len(rows), dtype=bool),
        )

    def prepare_held_out(self, hookpoints: Sequence[Hookpoint]) -> None:
        """Compute the held-out activations of several hookpoints in one pass."""
        self._held_out_values(tuple(dict.fromkeys(hookpoints)))

    def _held_out_values(self, hookpoints: Sequence[Hookpoint]) -> dict[Hookpoint, Tensor]:
        """Hookpoint -> activations at the positions of `_rows`, computed once per process."""
        values = self._values
        for hookpoint in hookpoints:
            known = self._objects.get(self._held_out_key(hookpoint))
            if hookpoint not in values and known is not None:
                values[hookpoint] = known
        lacking = [h for h in hookpoints if h not in values]
        if lacking:
            source = self._source(self._held_out, lacking)
            parts: dict[Hookpoint, list[Tensor]] = {h: [] for h in lacking}
            n_tokens = int(self.corpus.lengths(self._held_out).sum())
            with progress(n_tokens, "held-out text", "token") as bar:
                for start in range(0, len(self._held_out), source.per_pass):
                    some = self._held_out[start : start + source.per_pass]
                    acts, n = source.forward(some)
                    for hookpoint, x in acts.items():
                        parts[hookpoint].append(x.cpu())
                    bar.update(n)
            for hookpoint, listed in parts.items():
                values[hookpoint] = x = torch.cat(listed)
                self._objects.put(self._held_out_key(hookpoint), x, x.nbytes)
        return values

    def _held_out_key(self, hookpoint: Hookpoint) -> str:
        contexts = hashlib.sha256(self._held_out.astype("<i8").tobytes()).hexdigest()
        return digest_of("held out", *self.key(()), contexts, hookpoint.name)

    def _rows(self) -> pd.DataFrame:
        """Context and token of each held-out position, special tokens left out."""
        ids = self.corpus.ids(self._held_out, -1)
        special = sorted(set(self.model.tokenizer.all_special_ids))
        context, token = np.nonzero((ids >= 0) & ~np.isin(ids, special))
        return pd.DataFrame(
            {
                "text_id": self._held_out[context],
                "token_index": token,
                "token_id": ids[context, token],
            }
        )

    def evaluation_texts(self) -> list[TokenizedText]:
        """The held-out contexts."""
        special = frozenset(self.model.tokenizer.all_special_ids)
        contexts = (self.corpus.ids(np.asarray([n]))[0].tolist() for n in self._held_out)
        return [text_of(ids, special) for ids in contexts]

    def n_trained_on(self, training: Training) -> int:
        """Positions that were read, at most those that there are."""
        read, tokens = training.data["n_positions"], training.data["n_tokens"]
        return min(read, round(read * self.n_train_tokens / tokens))

    def epochs(self, training: Training) -> float:
        """How often the corpus was read."""
        return training.data["n_tokens"] / self.n_train_tokens

    def notes(self, training: Training) -> list[str]:
        """What was read of the corpus, what was not, and positions of high norm."""
        n, epochs = training.data["n_tokens"], self.epochs(training)
        note = (
            f"{n:,} tokens were read, {epochs:.2f} times the {self.n_train_tokens:,} of the corpus "
            "that are trained on"
        )
        if epochs > 1:
            note += (
                "; it ends before sae_trainer.n_samples, and was read again from its beginning in "
                "another order"
            )
        notes = [*self.corpus.notes, note]
        n_left = len(self.corpus) - len(self._train) - len(self._held_out)
        if n_left:
            notes.append(
                f"{counted(n_left, 'context')} may have documents in common with the "
                f"{len(self._held_out):,} held-out ones and are not trained on"
            )
        n_high, n_served = training.data["n_high_norm"], training.data["n_served"]
        if n_high:
            notes.append(
                f"{n_high:,} of {n_served:,} activations ({n_high / n_served:.2%}) at "
                f"{name_of(training.streams)} have a norm above "
                f"{self.settings.max_norm_ratio:g} times the median (attention sinks?); training "
                "and the measured numbers leave them out (positions.max_norm_ratio=null treats "
                "them as any other)"
            )
        return notes

    def metrics(self, training: Training) -> dict[str, float | int | None]:
        """Tokens sent through the model by this run, and tokens and epochs of the training."""
        return {
            "collection/n_skipped": 0,
            "collection/tokens_forwarded": self.tokens_forwarded,
            "train/n_tokens": training.data["n_tokens"],
            "train/epochs": self.epochs(training),
        }

    @property
    def provenance(self) -> dict[str, Any]:
        """The corpus."""
        return {
            "corpus": {
                "key": self.corpus.key,
                "path": str(self.corpus.path),
                "n_contexts": len(self.corpus),
                "n_tokens": self.corpus.n_tokens,
                "context_size": self.corpus.context_size,
                "n_held_out": len(self._held_out),
            },
            "tokens_forwarded": self.tokens_forwarded,
            "dataset": {"name": self._dataset.name, "n_examples": len(self.corpus)},
        }


def split(
    corpus: Corpus, fraction: float, seed: int
) -> tuple[Int[np.ndarray, " n_train"], Int[np.ndarray, " n_held_out"]]:
    """(contexts to train on, contexts held out), both ascending.

    At most as many are held out as measuring needs, in `N_BLOCKS` runs at seeded places. A context
    that may share a document with a held-out one is in neither. Raises ConfigError where nothing is
    left to train on.
    """
    n = len(corpus)
    wanted = min(max(1, round(fraction * n)), -(-N_MEASURED // corpus.context_size))
    n_blocks = max(1, min(N_BLOCKS, wanted // 4))
    rng = np.random.default_rng(seed)
    edges = np.linspace(0, n, n_blocks + 1).astype(np.int64)
    sizes = np.diff(np.linspace(0, wanted, n_blocks + 1).astype(np.int64))
    held_out, usable = np.zeros(n, dtype=bool), np.ones(n, dtype=bool)
    for first, end, size in zip(edges[:-1], edges[1:], sizes, strict=True):
        start = int(rng.integers(first, max(first, end - size) + 1))
        held_out[start : start + size] = True
        low, high = _sharing(corpus, start, start + int(size))
        usable[low:high] = False
    train = np.flatnonzero(usable & ~held_out)
    if not len(train) or not held_out.any():
        raise ConfigError(
            f"the corpus has {counted(n, 'context')}, and none is left to train on that shares no "
            "document with a held-out one; type a smaller dataset.context_size=, more text, or "
            "dataset.document=paragraph"
        )
    return train, np.flatnonzero(held_out)


def _sharing(corpus: Corpus, start: int, end: int) -> tuple[int, int]:
    """The run of contexts around `start` to `end` that may share a document with one of these."""
    if not corpus.is_packed:
        return start, end
    documents = corpus.documents
    # A context ends in the document in which the next one begins, or in the one before that.
    low = int(np.searchsorted(documents, documents[start], side="left"))
    low = max(0, low - 1) if start else 0
    last = documents[end] if end < len(documents) else documents[-1]
    return low, int(np.searchsorted(documents, last, side="right"))
