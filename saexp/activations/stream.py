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

from saexp.activations.forward import TokenBudget
from saexp.data.corpora import Corpus
from saexp.errors import ModelError, StoreError
from saexp.models.hookpoints import Hookpoint
from saexp.models.hooks import run_truncated
from saexp.models.loading import LanguageModel
from saexp.stats.significance import derived_seed

log = logging.getLogger(__name__)

_REFERENCE_ROWS = 16_384
"""Positions from which the median norm, and the mean norm for scaling, are estimated."""


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


class ContextActivations:
    """Activations of contexts at all tokens but special ones, one forward pass after another.

    Positions of high norm are among them: an SAE leaves out those above `limits` at its own
    hookpoint, so that its data do not depend on the other hookpoints that are read.
    """

    def __init__(
        self,
        model: LanguageModel,
        corpus: Corpus,
        contexts: Int[np.ndarray, " n"],
        hookpoints: Sequence[Hookpoint],
        settings: StreamSettings,
    ) -> None:
        self.model, self.corpus, self.contexts = model, corpus, contexts
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
        """The positions of the next pass; a new epoch begins after the last context."""
        if not self.limits:
            self.measure()
        if self.at.context >= len(self._order):
            self.at.epoch, self.at.context = self.at.epoch + 1, 0
            self._order = self._order_of(self.at.epoch)
            log.info("epoch %d: the corpus is read again, in another order", self.at.epoch + 1)
        contexts = self._order[self.at.context : self.at.context + self.per_pass]
        acts, n_tokens = self.forward(contexts)
        self.at.context += len(contexts)
        self.at.n_tokens += n_tokens
        self.at.n_positions += len(next(iter(acts.values())))
        return acts

    def resume(self, progress: Progress, norms: dict[str, list[float]]) -> None:
        """Continue from where another process was."""
        self.at = progress
        self._order = self._order_of(progress.epoch)
        self.limits = dict(zip(self.hookpoints, norms["limits"], strict=True))
        self.mean_norms = dict(zip(self.hookpoints, norms["means"], strict=True))

    @property
    def norms(self) -> dict[str, list[float]]:
        """Limits and mean norms, as `resume` takes them."""
        return {
            "limits": [self.limits[h] for h in self.hookpoints],
            "means": [self.mean_norms[h] for h in self.hookpoints],
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
    """

    def __init__(self, source: ContextActivations, settings: StreamSettings) -> None:
        self.source, self.settings = source, settings
        if settings.buffer_rows < settings.batch_size:
            raise ValueError("the buffer must hold a batch")
        self._storage: dict[Hookpoint, Tensor] = {}
        self._free = torch.zeros(0, dtype=torch.long)
        self._served = _Served(torch.zeros(0, dtype=torch.long))

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
        return {h: values[slots] for h, values in self._storage.items()}

    def _refill(self) -> None:
        """Add passes until the buffer is full, shuffle, and decide what is served."""
        now, settings = self._served, self.settings
        self._free = torch.cat([self._free, now.slots[: now.start]])
        slots = now.slots[now.start :]
        while len(slots) < settings.buffer_rows:
            slots = torch.cat([slots, self._add(next(self.source))])
        seed = derived_seed(settings.seed, "buffer", str(self.source.at.n_refills))
        order = torch.randperm(len(slots), generator=torch.Generator().manual_seed(seed))
        self.source.at.n_refills += 1
        n_kept = int(settings.buffer_rows * settings.mix_fraction)
        n_batches = max(1, (len(slots) - n_kept) // settings.batch_size)
        slots = slots[order] if settings.mix_fraction > 0 else slots
        self._served = _Served(slots, n_batches * settings.batch_size)

    def _add(self, acts: dict[Hookpoint, Tensor]) -> Tensor:
        """Put rows into free slots of the storage; returns the slots."""
        n = len(next(iter(acts.values())))
        if len(self._free) < n:
            self._grow(n - len(self._free), acts)
        slots, self._free = self._free[:n], self._free[n:]
        for hookpoint, rows in acts.items():
            self._storage[hookpoint][slots] = rows
        return slots

    def _grow(self, n: int, acts: dict[Hookpoint, Tensor]) -> None:
        size = len(next(iter(self._storage.values()))) if self._storage else 0
        # The first time room for all that is ever held, so that nothing is copied later.
        more = max(n, self.settings.buffer_rows + len(next(iter(acts.values()))) - size)
        for hookpoint, rows in acts.items():
            added = rows.new_empty(more, rows.shape[1])
            held = self._storage.get(hookpoint)
            self._storage[hookpoint] = added if held is None else torch.cat([held, added])
        self._free = torch.cat([self._free, torch.arange(size, size + more)])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, numbers) from which `resume` continues this stream."""
        now = self._served
        slots = now.slots[now.start :]
        tensors = {h.name: values[slots].contiguous() for h, values in self._storage.items()}
        about = {
            "progress": vars(self.source.at),
            "norms": self.source.norms,
            "n_served": now.n_served - now.start,
        }
        return tensors, about

    def resume(self, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Continue from a state. Raises ValueError where it is that of another stream."""
        names = [h.name for h in self.source.hookpoints]
        if sorted(tensors) != sorted(names):
            raise ValueError("the buffer is of other hookpoints")
        self._storage, self._free = {}, torch.zeros(0, dtype=torch.long)
        self.source.resume(Progress(**about["progress"]), about["norms"])
        slots = self._add({h: tensors[h.name] for h in self.source.hookpoints})
        self._served = _Served(slots, about["n_served"])
