"""One shard being filled, for all its hookpoints, by the thread that writes."""

from collections.abc import Callable

import numpy as np
import torch
from filelock import BaseFileLock
from jaxtyping import Bool, Float
from torch import Tensor

from saexp.activations.forward import Batch
from saexp.activations.shards import ShardWriter
from saexp.activations.store import ActivationStore
from saexp.errors import StoreError
from saexp.models.hookpoints import Hookpoint

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


class ShardJob:
    """Holds the shard's lock until it is finished or given up."""

    def __init__(
        self,
        store: ActivationStore,
        index: int,
        hookpoints: list[Hookpoint],
        dtype: torch.dtype,
        lock: BaseFileLock,
    ) -> None:
        self.store, self.index, self.hookpoints = store, index, hookpoints
        self.dtype, self.lock = dtype, lock
        self.writers: dict[Hookpoint, ShardWriter] = {}

    def write(self, batch: Batch, complain: Complain) -> None:
        """Put a batch's rows into the files; raises what `complain` makes of NaN and Inf."""
        for hookpoint, wait in batch.host.items():
            acts = wait()
            finite = finite_rows(acts)
            if not finite.all():
                bad = int(np.flatnonzero(~finite)[0])
                nan = bool(torch.isnan(acts[bad]).any())
                raise complain(hookpoint, int(batch.text_ids[bad]), nan)
            if hookpoint not in self.writers:
                width = acts.shape[1]
                self.writers[hookpoint] = self.store.writer(
                    hookpoint, self.index, width, self.dtype
                )
            self.writers[hookpoint].write(batch.rows, acts)

    def finish(self) -> None:
        """Rename the files into place, list them, and let the shard go."""
        try:
            for hookpoint in self.hookpoints:
                if hookpoint not in self.writers:
                    # Nothing but repeats: a file without rows.
                    self.writers[hookpoint] = self.store.writer(
                        hookpoint, self.index, 0, self.dtype
                    )
            entries = {h: writer.finish() for h, writer in self.writers.items()}
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
