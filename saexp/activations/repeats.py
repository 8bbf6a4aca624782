"""Rows that another row's values hold already, and the values of all rows as one array."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor


class Repeats:
    """Which file holds which row. A row whose text and token came in an earlier shard is kept there
    alone, so that its text is not forwarded again; all else is kept in the shard of its row.

    That follows from the rows alone: no shard has to wait for another. Memory: 16 bytes a row.
    """

    def __init__(self, rows: pd.DataFrame, shard_rows: int) -> None:
        self.shard_rows = shard_rows
        text, token = (rows[c].to_numpy(np.int64) for c in ("text_id", "token_index"))
        places = text * (int(token.max(initial=0)) + 1) + token
        _, first, which = np.unique(places, return_index=True, return_inverse=True)
        earliest, own = first[which], np.arange(len(rows))
        self.source = np.where(earliest // shard_rows < own // shard_rows, earliest, own)
        """Row -> the row that its values are kept as."""
        before = np.concatenate([[0], np.cumsum(self.source == own)])
        self.offset = before[:-1] - before[own // shard_rows * shard_rows]
        """Row -> where in its shard's file it is, for rows that are kept as themselves."""

    def kept(self, first: int, end: int) -> Int[np.ndarray, " n"]:
        """Those of rows [first, end), which are one shard's, that are in its file, in its order."""
        rows = np.arange(first, end)
        return rows[self.source[first:end] == rows]


class StoredValues:
    """A hookpoint's shards read as one array; `repeats` is asked for where one lacks rows."""

    def __init__(
        self,
        files: Sequence[Path],
        bounds: Sequence[tuple[int, int]],
        repeats: Callable[[], Repeats],
    ) -> None:
        self.files, self.bounds, self._repeats = files, bounds, repeats

    def shard(self, index: int) -> Float[Tensor, "n width"]:
        """What a file holds, memory-mapped."""
        with safe_open(self.files[index], framework="pt") as file:
            return file.get_tensor("acts")

    def chunks(self, chunk_rows: int) -> Iterator[tuple[int, Tensor]]:
        """(first row, values) in order, at most `chunk_rows` rows each."""
        for index, (first, end) in enumerate(self.bounds):
            shard = self.shard(index)
            whole = len(shard) == end - first
            for start in range(first, end, chunk_rows):
                stop = min(start + chunk_rows, end)
                yield (
                    start,
                    shard[start - first : stop - first] if whole else self._some(start, stop),
                )

    def _some(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop), each from the file that it is kept in."""
        repeats = self._repeats()
        source = repeats.source[start:stop]
        holders = source // repeats.shard_rows
        found: Tensor | None = None
        for index in np.unique(holders).tolist():
            shard, (first, end) = self.shard(index), self.bounds[index]
            here = np.flatnonzero(holders == index)
            rows = source[here]
            at = rows - first if len(shard) == end - first else repeats.offset[rows]
            if found is None:
                found = shard.new_empty(stop - start, shard.shape[1])
            found[torch.from_numpy(here)] = shard[torch.from_numpy(at)]
        assert found is not None
        return found
