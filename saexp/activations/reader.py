"""Reads stored rows: shards as one array, repeated rows, and shuffled batches."""

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor

from saexp.activations.shards import is_intact
from saexp.files import cannot_write, locked, write_atomically


class Repeats:
    """Which file holds which row.

    A row that repeats the text and token of a row of an earlier shard is stored in that shard only,
    so that its text is not forwarded again. This follows from the rows table, so that no shard has
    to wait for another. Memory: 16 bytes per row.
    """

    def __init__(self, rows: pd.DataFrame, shard_rows: int) -> None:
        self.shard_rows = shard_rows
        text, token = (rows[c].to_numpy(np.int64) for c in ("text_id", "token_index"))
        keys = text * (int(token.max(initial=0)) + 1) + token
        _, first, which = np.unique(keys, return_index=True, return_inverse=True)
        earliest, own = first[which], np.arange(len(rows))
        self.source = np.where(earliest // shard_rows < own // shard_rows, earliest, own)
        """Row -> the row under which its values are stored."""
        before = np.concatenate([[0], np.cumsum(self.source == own)])
        self.offset = before[:-1] - before[own // shard_rows * shard_rows]
        """Row -> its index in the shard's file, for rows that are not repeats."""

    def kept(self, first: int, end: int) -> Int[np.ndarray, " n"]:
        """The rows of one shard, [first, end), that its file holds, in order."""
        rows = np.arange(first, end)
        return rows[self.source[first:end] == rows]


class StoredValues:
    """The shards of a hookpoint as one array; `repeats` is called where a file lacks rows."""

    def __init__(
        self,
        files: Sequence[Path],
        bounds: Sequence[tuple[int, int]],
        repeats: Callable[[], Repeats],
    ) -> None:
        self.files, self.bounds, self._repeats = files, bounds, repeats

    def shard(self, index: int) -> Float[Tensor, "n width"]:
        """The content of a file, memory-mapped."""
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
        """Rows [start, stop), each read from the file that holds it."""
        repeats = self._repeats()
        source = repeats.source[start:stop]
        holders = source // repeats.shard_rows
        values: Tensor | None = None
        for index in np.unique(holders).tolist():
            shard, (first, end) = self.shard(index), self.bounds[index]
            here = np.flatnonzero(holders == index)
            rows = source[here]
            at = rows - first if len(shard) == end - first else repeats.offset[rows]
            if values is None:
                values = shard.new_empty(stop - start, shard.shape[1])
            values[torch.from_numpy(here)] = shard[torch.from_numpy(at)]
        assert values is not None
        return values


def joined_name(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Name of the file that joins these shards; it depends on their content."""
    sums = "".join(entry["sha256"] for _, entry in sorted(entries.items()))
    return f"joined-{hashlib.sha256(sums.encode()).hexdigest()[:16]}.bin"


def damaged_joined(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Path]:
    """Hookpoint -> its joined file, where that is damaged; all joined files are hashed."""
    listed = manifest.get("joined", {}).items()
    files = {name: (folder / name / entry["file"], entry) for name, entry in listed}
    return {
        name: file
        for name, (file, entry) in files.items()
        if file.is_file() and not is_intact(file, entry, hashed=True)
    }


def drop_damaged(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Remove damaged joined files; they are rebuilt from the shards when they are needed."""
    for file in damaged_joined(folder, manifest).values():
        try:
            file.unlink()
        except OSError as error:
            raise cannot_write(file, error) from error


def _write(path: Path, parts: Iterable[Tensor]) -> None:
    with path.open("wb") as file:
        for part in parts:
            file.write(part.contiguous().view(torch.uint8).numpy().data)


def join(path: Path, parts: Iterable[Tensor]) -> None:
    """Write the values of the parts one after another, whole or not at all."""
    with locked(path.parents[1] / ".joined.lock"):
        for left in path.parent.glob(".tmp-*.bin"):
            left.unlink(missing_ok=True)
        write_atomically(path, lambda temporary: _write(temporary, parts))


def join_elsewhere(parts: Iterable[Tensor], mapped: Callable[[Path], Tensor]) -> Tensor:
    """As `join`, into a temporary file that is deleted with the tensor."""
    try:
        with tempfile.NamedTemporaryFile(prefix="saexp-", suffix=".bin") as file:
            path = Path(file.name)
            _write(path, parts)
            return mapped(path)
    except OSError as error:
        raise cannot_write(Path(tempfile.gettempdir()) / "saexp-*.bin", error) from error


class ShuffledReader:
    """Iterator of `[batch_size, d]` float32 batches from a memory-mapped tensor.

    Each epoch is a new permutation of `rows`, determined by the seed and the epoch's number, so
    that a reader that starts at step n continues exactly like one that reached it. Memory: the
    permutation (8 bytes per row) and one batch. A batch may span two epochs.
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
        parts, n_left = [], self.batch_size
        while n_left:
            epoch, start = divmod(self.position, len(self.rows))
            if epoch != self._epoch:
                rng = np.random.default_rng([self.seed, epoch])
                self._order, self._epoch = self.rows[rng.permutation(len(self.rows))], epoch
            part = self._order[start : start + n_left]
            parts.append(part)
            n_left -= len(part)
            self.position += len(part)
        chosen = np.concatenate(parts)
        # Ascending, so that the disk is read in order.
        order = np.argsort(chosen, kind="stable")
        ascending = self.acts[torch.from_numpy(chosen[order])].float()
        batch = torch.empty_like(ascending)
        batch[torch.from_numpy(order)] = ascending
        return batch
