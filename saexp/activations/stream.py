"""Activations of a corpus, computed while an SAE is trained on them and never stored.

The model reads the contexts in a seeded order. A buffer mixes the positions of many contexts by the
rule of sae-lens (`mixing_buffer`): when it is full it is shuffled, a part of it is served in
batches, and the rest is kept to be mixed with what comes next.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saexp.activations.shared_prefixes import TokenBudget
from saexp.context import progress
from saexp.data.corpora import Corpus
from saexp.distributed import ALONE, Processes
from saexp.errors import ModelError, StoreError
from saexp.models import Hookpoint
from saexp.models.hooks import run_truncated
from saexp.models.loading import LanguageModel
from saexp.stats.significance import derived_seed

log = logging.getLogger(__name__)

_REFERENCE_ROWS = 16_384
"""Positions from which the median norm, and the mean norm for scaling, are estimated."""
PROCESS = "process"
"""Tensor of a state with the process that held each row."""
_SPARE = 1.05
"""Room for rows of one of several processes, as a multiple of its part of the buffer."""


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """How a stream is read and mixed."""

    buffer_rows: int
    """Positions in the buffer when it is shuffled."""
    batch_size: int
    """Positions per batch."""
    mix_fraction: float = 0.5
    """Fraction of the buffer that is kept when the rest is served."""
    max_norm_ratio: float | None = None
    """Positions are ordinary whose norm is at most this times the median at a hookpoint."""
    batch_tokens: int | str = "auto"
    """Tokens per forward pass of the language model."""
    seed: int = 0
    dtype: torch.dtype | None = None
    """dtype of the buffer; None: the model's."""


@dataclass
class Progress:
    """Where a stream is, and what it has done."""

    epoch: int = 0
    context: int = 0
    """Contexts of this epoch that were read."""
    n_refills: int = 0
    n_tokens: int = 0
    """Tokens that went through the model, special ones included."""
    n_positions: int = 0
    """Positions that were read."""


@dataclass(frozen=True)
class Pass:
    """What one forward pass gives."""

    acts: dict[Hookpoint, Float[Tensor, "rows width"]]
    """The rows of this process."""
    counts: list[int]
    """Number of rows of each process; those of the first come first."""


class ContextActivations:
    """Activations of contexts at all tokens but special ones, one forward pass after another.

    Positions of high norm are among them: an SAE leaves out those above `limits` at its own
    hookpoint, so that its data do not depend on the other hookpoints that are read. Several
    processes share the contexts of each pass.
    """

    def __init__(
        self,
        model: LanguageModel,
        corpus: Corpus,
        contexts: Int[np.ndarray, " n"],
        hookpoints: Sequence[Hookpoint],
        settings: StreamSettings,
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.corpus, self.contexts = model, corpus, contexts
        self.processes = processes
        self.hookpoints, self.settings = list(hookpoints), settings
        self.at = Progress()
        self.n_forwarded = 0
        """Tokens that this process sent through the model."""
        self.limits: dict[Hookpoint, float] = {}
        """Largest norm of an ordinary position."""
        self.mean_norms: dict[Hookpoint, float] = {}
        """Mean norm of the ordinary positions of the reference."""
        self._special = torch.tensor(sorted(set(model.tokenizer.all_special_ids)))
        tokens = TokenBudget(settings.batch_tokens, model.device).tokens
        self.per_pass = max(1, tokens // corpus.context_size)
        self._order = self._order_of(0)

    def _order_of(self, epoch: int) -> Int[np.ndarray, " n"]:
        """The contexts in the order of an epoch."""
        rng = np.random.default_rng([self.settings.seed, epoch])
        return self.contexts[rng.permutation(len(self.contexts))]

    def measure(self) -> None:
        """Estimate norms from the first contexts of the order, before anything is served."""
        if self.processes.is_first:
            self._measure()
        self._set_norms(self.processes.of_first(self.norms))

    def _measure(self) -> None:
        norms: dict[Hookpoint, list[Tensor]] = {h: [] for h in self.hookpoints}
        n_rows, start = 0, 0
        while n_rows < _REFERENCE_ROWS and start < len(self._order):
            values, _ = self.forward(self._order[start : start + self.per_pass])
            for hookpoint, acts in values.items():
                norms[hookpoint].append(acts.double().norm(dim=-1))
            n_rows += len(next(iter(values.values())))
            start += self.per_pass
        for hookpoint, parts in norms.items():
            every = torch.cat(parts)
            median, ratio = float(every.median()), self.settings.max_norm_ratio
            limit = median * ratio if ratio is not None and median else float("inf")
            self.limits[hookpoint] = limit
            self.mean_norms[hookpoint] = float(every[every <= limit].mean())

    def forward(
        self, contexts: Int[np.ndarray, " n"]
    ) -> tuple[dict[Hookpoint, Float[Tensor, "rows width"]], int]:
        """(activations at all tokens but special ones, tokens forwarded).

        Raises StoreError for NaN and infinities, ModelError where memory runs out.
        """
        lengths = self.corpus.lengths(contexts)
        self.n_forwarded += int(lengths.sum())
        ids = torch.from_numpy(self.corpus.ids(contexts, self.model.pad_id))
        mask = (torch.arange(ids.shape[1]) < torch.from_numpy(lengths)[:, None]).long()
        row, token = (mask.bool() & ~torch.isin(ids, self._special)).nonzero(as_tuple=True)
        device = self.model.device
        try:
            values = run_truncated(
                self.model,
                ids.to(device),
                mask.to(device),
                self.hookpoints,
                (row.to(device), token.to(device)),
            )
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"out of memory at {ids.numel()} tokens per pass; type a smaller "
                f"store.batch_tokens={ids.numel() // 2}"
            ) from error
        dtype = self.settings.dtype or self.model.dtype
        acts = {h: values[h].to(dtype) for h in self.hookpoints}
        for hookpoint, rows in acts.items():
            if not bool(rows.isfinite().all()):
                raise self._not_finite(hookpoint, rows, ids[row])
        return acts, int(lengths.sum())

    def _not_finite(self, hookpoint: Hookpoint, rows: Tensor, ids: Tensor) -> StoreError:
        """The error that names the text; `ids` are the token ids of each row's context."""
        bad = int((~rows.isfinite().all(dim=-1)).nonzero()[0])
        text = self.model.tokenizer.decode(ids[bad].tolist(), skip_special_tokens=True)
        hint = "dtype=float32" if self.model.dtype != torch.float32 else "another model or corpus"
        return StoreError(f"NaN or Inf at {hookpoint.name} in the text '{text[:60]}'; try {hint}")

    def __iter__(self) -> Iterator[dict[Hookpoint, Tensor]]:
        return self

    def __next__(self) -> dict[Hookpoint, Float[Tensor, "rows width"]]:
        """The positions of the next pass, of this process."""
        return self.read().acts

    def read(self) -> Pass:
        """The next pass; a new epoch begins after the last context."""
        if not self.limits:
            self.measure()
        if self.at.context >= len(self._order):
            self.at.epoch, self.at.context = self.at.epoch + 1, 0
            self._order = self._order_of(self.at.epoch)
            log.info("epoch %d: the corpus is read again, in another order", self.at.epoch + 1)
        contexts = self._order[self.at.context : self.at.context + self.per_pass]
        parts = np.array_split(contexts, self.processes.size)
        own = parts[self.processes.rank]
        # A process without a context computes one for its widths.
        acts, _ = self.forward(own if len(own) else contexts[:1])
        if not len(own):
            acts = {h: rows[:0] for h, rows in acts.items()}
        counts = [len(next(iter(acts.values())))]
        if self.processes.are_several:
            counts = [self._n_positions(part) for part in parts]
        self.at.context += len(contexts)
        self.at.n_tokens += int(self.corpus.lengths(contexts).sum())
        self.at.n_positions += sum(counts)
        return Pass(acts, counts)

    def _n_positions(self, contexts: Int[np.ndarray, " n"]) -> int:
        """Number of tokens that are not special."""
        ids = self.corpus.ids(contexts, -1)
        return int(((ids >= 0) & ~np.isin(ids, self._special.numpy())).sum())

    def resume(self, progress: Progress, norms: dict[str, list[float]]) -> None:
        """Continue from where another process was."""
        self.at = progress
        self._order = self._order_of(progress.epoch)
        self._set_norms(norms)

    def _set_norms(self, norms: dict[str, list[float]]) -> None:
        self.limits = dict(zip(self.hookpoints, norms["limits"], strict=True))
        self.mean_norms = dict(zip(self.hookpoints, norms["means"], strict=True))

    @property
    def norms(self) -> dict[str, list[float]]:
        """Limits and mean norms, as `resume` takes them."""
        return {
            "limits": [self.limits[h] for h in self.hookpoints if h in self.limits],
            "means": [self.mean_norms[h] for h in self.hookpoints if h in self.mean_norms],
        }


@dataclass
class _Served:
    """Rows of the buffer in the order in which they are served, then those that are kept."""

    slots: Tensor
    n_served: int = 0
    """Rows that are to be served before the next refill."""
    start: int = 0
    """Rows that were served since the last refill."""


class ActivationStream:
    """Batches `{hookpoint: [batch_size, width]}` of mixed activations, without an end.

    Rows of all hookpoints are the same positions. `state` and `resume` continue a stream exactly:
    the same batches come as without the interruption.

    Several processes have one buffer: all know the order of its slots, each holds the rows that it
    computed, and serves those of a batch that it holds. Together these are the batch of a single
    process.
    """

    def __init__(self, source: ContextActivations, settings: StreamSettings) -> None:
        self.source, self.settings, self.processes = source, settings, source.processes
        if settings.buffer_rows < settings.batch_size:
            raise ValueError("the buffer must hold a batch")
        self._served = _Served(torch.zeros(0, dtype=torch.long))
        self._clear()

    def _clear(self) -> None:
        """No slots and no rows."""
        self._storage: dict[Hookpoint, Tensor] = {}
        """The rows of this process, in any order."""
        self._free = torch.zeros(0, dtype=torch.long)
        """Slots without a row."""
        self._holder = torch.zeros(0, dtype=torch.int16)
        """Slot -> process with its row."""
        self._row = torch.zeros(0, dtype=torch.long)
        """Slot -> row of the storage, where this process has it."""
        self._free_rows = torch.zeros(0, dtype=torch.long)

    @property
    def mean_norms(self) -> dict[Hookpoint, float]:
        """Mean norm of ordinary positions, from the first contexts."""
        if not self.source.mean_norms:
            self.source.measure()
        return self.source.mean_norms

    def __iter__(self) -> Iterator[dict[Hookpoint, Tensor]]:
        return self

    def __next__(self) -> dict[Hookpoint, Float[Tensor, "batch width"]]:
        now = self._served
        if now.start >= now.n_served:
            self._refill()
            now = self._served
        slots = now.slots[now.start : now.start + self.settings.batch_size]
        now.start += self.settings.batch_size
        rows = self._rows_in(slots)
        return {h: values[rows] for h, values in self._storage.items()}

    def _rows_in(self, slots: Tensor) -> Tensor:
        """The rows of the storage in these slots, in their order."""
        if self.processes.are_several:
            slots = slots[self._holder[slots] == self.processes.rank]
        return self._row[slots]

    def _refill(self) -> None:
        """Add passes until the buffer is full, shuffle, and decide what is served."""
        now, settings = self._served, self.settings
        free = now.slots[: now.start]
        self._free = torch.cat([self._free, free])
        self._free_rows = torch.cat([self._free_rows, self._rows_in(free)])
        slots = now.slots[now.start :]
        with progress(settings.buffer_rows - len(slots), "filling the buffer", "position") as bar:
            while len(slots) < settings.buffer_rows:
                one = self.source.read()
                holders = torch.arange(len(one.counts), dtype=torch.int16)
                holders = holders.repeat_interleave(torch.tensor(one.counts))
                slots = torch.cat([slots, self._add(one.acts, holders)])
                bar.update(len(holders))
        seed = derived_seed(settings.seed, "buffer", str(self.source.at.n_refills))
        order = torch.randperm(len(slots), generator=torch.Generator().manual_seed(seed))
        self.source.at.n_refills += 1
        n_kept = int(settings.buffer_rows * settings.mix_fraction)
        n_batches = max(1, (len(slots) - n_kept) // settings.batch_size)
        slots = slots[order] if settings.mix_fraction > 0 else slots
        self._served = _Served(slots, n_batches * settings.batch_size)

    def _add(self, acts: dict[Hookpoint, Tensor], holders: Int[Tensor, " n"]) -> Tensor:
        """Put rows into free slots; returns the slots.

        `holders` says whose each row is; `acts` has those of this process.
        """
        n = len(holders)
        if len(self._free) < n:
            self._add_slots(n)
        slots, self._free = self._free[:n], self._free[n:]
        self._holder[slots] = holders
        own = slots[holders == self.processes.rank]
        if len(self._free_rows) < len(own) or not self._storage:
            self._add_storage(len(own), n, acts)
        rows, self._free_rows = self._free_rows[: len(own)], self._free_rows[len(own) :]
        self._row[own] = rows
        for hookpoint, values in acts.items():
            self._storage[hookpoint][rows] = values.to(self._storage[hookpoint].device)
        return slots

    def _add_slots(self, n: int) -> None:
        size = len(self._row)
        more = max(n - len(self._free), self.settings.buffer_rows + n - size)
        self._row = torch.cat([self._row, torch.zeros(more, dtype=torch.long)])
        self._holder = torch.cat([self._holder, torch.zeros(more, dtype=torch.int16)])
        self._free = torch.cat([self._free, torch.arange(size, size + more)])

    def _add_storage(self, n_own: int, n: int, acts: dict[Hookpoint, Tensor]) -> None:
        size = len(next(iter(self._storage.values()))) if self._storage else 0
        # The first time room for all that is ever held, so that nothing is copied later.
        capacity = self.settings.buffer_rows + n
        if self.processes.are_several:
            capacity = int(_SPARE * capacity / self.processes.size) + 1
        more = max(n_own - len(self._free_rows), capacity - size)
        for hookpoint, rows in acts.items():
            added = rows.new_empty(more, rows.shape[1])
            stored = self._storage.get(hookpoint)
            self._storage[hookpoint] = added if stored is None else torch.cat([stored, added])
        self._free_rows = torch.cat([self._free_rows, torch.arange(size, size + more)])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, numbers) from which `resume` continues this stream.

        Called by all processes; the tensors of the first one have the rows of all.
        """
        now = self._served
        slots = now.slots[now.start :]
        rows = self._rows_in(slots)
        tensors = {h.name: values[rows].contiguous() for h, values in self._storage.items()}
        about = {
            "progress": vars(self.source.at),
            "norms": self.source.norms,
            "n_served": now.n_served - now.start,
        }
        if self.processes.are_several and tensors:
            tensors = self._of_all(tensors, self._holder[slots])
            about["n_processes"] = self.processes.size
        return tensors, about

    def _of_all(self, tensors: dict[str, Tensor], holders: Tensor) -> dict[str, Tensor]:
        """At the first process: the rows of all in the order of the slots, and whose they are."""
        counts = torch.bincount(holders.long(), minlength=self.processes.size).tolist()
        result = {}
        for name, own in tensors.items():
            parts = self.processes.at_first(own, counts)
            if parts:
                rows = parts[0].new_empty(len(holders), own.shape[1])
                for rank, part in enumerate(parts):
                    rows[holders == rank] = part
                result[name] = rows
        return {**result, PROCESS: holders.clone()}

    def resume(self, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Continue from a state, also from that of more or fewer processes.

        Raises ValueError where it is that of another stream.
        """
        names = [h.name for h in self.source.hookpoints]
        if sorted(set(tensors) - {PROCESS}) != sorted(names):
            raise ValueError("the buffer is of other hookpoints")
        self._clear()
        self.source.resume(Progress(**about["progress"]), about["norms"])
        size, n = self.processes.size, len(tensors[names[0]])
        holders = (torch.arange(n) % size).short()
        if about.get("n_processes", 1) == size and PROCESS in tensors:
            holders = tensors[PROCESS]
        own, device = holders == self.processes.rank, self.source.model.device
        acts = {h: tensors[h.name][own] for h in self.source.hookpoints}
        slots = self._add({h: rows.to(device) for h, rows in acts.items()}, holders)
        self._served = _Served(slots, about["n_served"])
