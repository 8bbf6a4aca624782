"""One shard being filled, for all its hookpoints, by the thread that writes."""

import logging
from collections.abc import Callable

import numpy as np
import torch
from filelock import BaseFileLock
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saexp.activations.forward import Batch
from saexp.activations.shards import ShardWriter
from saexp.activations.store import ActivationStore
from saexp.errors import StoreError
from saexp.models.hookpoints import Hookpoint

log = logging.getLogger(__name__)

Complain = Callable[[Hookpoint, int, bool], StoreError]
"""(hookpoint, text id, whether it is NaN) -> the error for a value that is not finite."""


_EXPONENT = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
}
"""dtype -> (integer type of its size, bits that are all set in NaN and infinities)."""


def finite_rows(acts: Float[Tensor, "n width"]) -> Bool[np.ndarray, " n"]:
    """Which rows hold only finite values.

    In numpy: torch's operators would start threads of their own here, which spin beside those of
    the forward pass and slow it by a tenth.
    """
    kind, mask = _EXPONENT[acts.dtype]
    bits = acts.contiguous().view(kind).numpy()
    return ((bits & mask) != mask).all(axis=-1)


class Ahead:
    """Hookpoints that are stored on the way, for other runs; what stands in their way stops those
    runs and not this one."""

    def __init__(self, hookpoints: list[Hookpoint]) -> None:
        self.hookpoints = hookpoints
        self.dropped: set[Hookpoint] = set()

    @property
    def left(self) -> list[Hookpoint]:
        """Those still stored."""
        return [h for h in self.hookpoints if h not in self.dropped]

    def drop(self, hookpoint: Hookpoint, reason: str) -> None:
        """Store it no more."""
        if hookpoint not in self.dropped:
            log.warning("%s is not stored on the way: %s", hookpoint.name, reason)
            self.dropped.add(hookpoint)


class ShardJob:
    """Holds the shard's lock until it is finished or given up."""

    def __init__(
        self,
        store: ActivationStore,
        index: int,
        hookpoints: list[Hookpoint],
        dtype: torch.dtype,
        lock: BaseFileLock,
        ahead: Ahead | None = None,
    ) -> None:
        self.store, self.index, self.hookpoints = store, index, hookpoints
        self.dtype, self.lock = dtype, lock
        self.ahead = ahead or Ahead([])
        self.writers: dict[Hookpoint, ShardWriter] = {}

    def write(self, batch: Batch, complain: Complain) -> None:
        """Put a batch's rows into the files; raises what `complain` makes of NaN and Inf.

        Where that is at a hookpoint stored ahead, for other runs, it is left to them.
        """
        if not len(batch.rows):
            return
        for hookpoint, wait in batch.host.items():
            acts = wait()
            finite = finite_rows(acts)
            if not finite.all():
                bad = int(np.flatnonzero(~finite)[0])
                nan = bool(torch.isnan(acts[bad]).any())
                error = complain(hookpoint, int(batch.text_ids[bad]), nan)
                if hookpoint not in self.ahead.hookpoints:
                    raise error
                self.ahead.drop(hookpoint, str(error))
            try:
                self._put(hookpoint, batch.rows, acts)
            except StoreError as error:
                if hookpoint not in self.ahead.hookpoints:
                    raise
                self.ahead.drop(hookpoint, str(error))
            if hookpoint in self.ahead.dropped and hookpoint in self.writers:
                self.writers.pop(hookpoint).discard()

    def _put(self, hookpoint: Hookpoint, rows: Int[np.ndarray, " n"], acts: Tensor) -> None:
        if hookpoint in self.ahead.dropped:
            return
        if hookpoint not in self.writers:
            writer = self.store.writer(hookpoint, self.index, acts.shape[1], self.dtype)
            self.writers[hookpoint] = writer
        self.writers[hookpoint].write(rows, acts)

    def finish(self) -> None:
        """Rename the files into place, list them, and let the shard go."""
        try:
            for hookpoint in self.hookpoints:
                if hookpoint not in self.writers and hookpoint not in self.ahead.dropped:
                    # Nothing but repeats: a file without rows.
                    self.writers[hookpoint] = self.store.writer(
                        hookpoint, self.index, 0, self.dtype
                    )
            entries = {}
            for hookpoint, writer in self.writers.items():
                try:
                    entries[hookpoint] = writer.finish()
                except StoreError as error:
                    if hookpoint not in self.ahead.hookpoints:
                        raise
                    self.ahead.drop(hookpoint, str(error))
            self.store.enter(self.index, entries)
        except BaseException:
            self.abort()
            raise
        self.lock.release()

    def abort(self) -> None:
        """Remove what is not finished and let the shard go."""
        for writer in self.writers.values():
            writer.discard()
        self.lock.release()
