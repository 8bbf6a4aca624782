"""Rows of a stored hookpoint in a seeded random order, epoch after epoch, from any step on."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


class ShuffledReader:
    """Iterator of `[batch_size, d]` float32 batches from a memory-mapped tensor.

    Each epoch is a new permutation of `rows`, made from the seed and the epoch's number alone, so
    that a reader that starts at step n gives what the first one would have given then. Memory: the
    permutation (8 bytes a row) and one batch. A batch may span two epochs.
    """

    def __init__(
        self,
        acts: Float[Tensor, "n_rows d"],
        rows: Int[np.ndarray, " n"],
        batch_size: int,
        seed: int,
        step: int = 0,
    ) -> None:
        self.acts, self.rows, self.batch_size, self.seed = acts, rows, batch_size, seed
        self.position = step * batch_size
        self._epoch = -1
        self._order = rows

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Float[Tensor, "batch d"]:
        parts, wanted = [], self.batch_size
        while wanted:
            epoch, start = divmod(self.position, len(self.rows))
            if epoch != self._epoch:
                rng = np.random.default_rng([self.seed, epoch])
                self._order, self._epoch = self.rows[rng.permutation(len(self.rows))], epoch
            part = self._order[start : start + wanted]
            parts.append(part)
            wanted -= len(part)
            self.position += len(part)
        chosen = np.concatenate(parts)
        # Ascending, so that the disk is read forwards.
        order = np.argsort(chosen, kind="stable")
        found = self.acts[torch.from_numpy(chosen[order])].float()
        batch = torch.empty_like(found)
        batch[torch.from_numpy(order)] = found
        return batch
