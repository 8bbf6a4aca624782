"""A shard under way: its rows go straight to a temporary file, in any order, at constant memory."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saexp.digests import read_sha256
from saexp.errors import StoreError
from saexp.files import cannot_write, put_in_place

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_UNKNOWN = "0" * 64
"""In the place of a checksum, until there is one."""


@dataclass(frozen=True)
class Label:
    """What a shard's header says of it, beside the checksum of its values."""

    store: str
    """The store's key."""
    hookpoint: str
    index: int
    shard_rows: int
    """Of the store."""

    @property
    def name(self) -> str:
        """`00003`, the shard's name."""
        return f"{self.index:05d}"

    @property
    def metadata(self) -> dict[str, str]:
        """As safetensors has it."""
        return {
            "store": self.store,
            "hookpoint": self.hookpoint,
            "shard": self.name,
            "shard_rows": str(self.shard_rows),
        }

    @classmethod
    def read(cls, metadata: Mapping[str, str]) -> "Label":
        """Raises LookupError, TypeError or ValueError for what is no shard's metadata."""
        label = cls(
            metadata["store"],
            metadata["hookpoint"],
            int(metadata["shard"]),
            int(metadata["shard_rows"]),
        )
        if label.shard_rows < 1:
            raise ValueError(f"shard_rows {label.shard_rows}")
        return label


class ShardWriter:
    """Writes one `.safetensors` file with the tensor `acts`, row by row, and a label.

    Nothing is at `path` before `finish`. The temporary file's name follows from `path`, so that
    whoever holds the shard's lock next takes over what a killed process left.
    Raises StoreError where the disk is full or the folder cannot be written.
    """

    def __init__(
        self, path: Path, n_rows: int, width: int, dtype: torch.dtype, label: Label
    ) -> None:
        self.path = path
        self.row_bytes = width * dtype.itemsize
        self.dtype = dtype
        self.n_bytes = n_rows * self.row_bytes
        self.temporary = path.with_name(f".tmp-{path.name}")
        self._written = np.zeros(n_rows, dtype=bool)
        about = {
            "__metadata__": {**label.metadata, "sha256": _UNKNOWN},
            "acts": {
                "dtype": _NAMES[dtype],
                "shape": [n_rows, width],
                "data_offsets": [0, self.n_bytes],
            },
        }
        header = json.dumps(about, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._start = 8 + len(header)
        self._checksum_at = 8 + header.index(_UNKNOWN.encode())
        self._file: int | None = None
        self._guarded(lambda: self._open(header))

    def _open(self, header: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
        self._file = os.open(self.temporary, flags, 0o644)
        if hasattr(os, "posix_fallocate"):
            # Whether there is room is known now, not after an hour.
            os.posix_fallocate(self._file, 0, self._start + self.n_bytes)
        os.pwrite(self._file, len(header).to_bytes(8, "little") + header, 0)

    def _guarded(self, do: Callable[[], Any]) -> Any:
        try:
            return do()
        except OSError as error:
            self.discard()
            raise cannot_write(self.path, error, self.n_bytes) from error

    def write(self, rows: Int[np.ndarray, " n"], acts: Float[Tensor, "n width"]) -> None:
        """Put values at these rows; neighbouring rows go in one write."""
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        # Reordered by numpy, not by torch's threads: see job.finite_rows.
        data = acts.to(self.dtype).contiguous().view(torch.uint8).numpy()[order]
        breaks = np.flatnonzero(np.diff(ordered) != 1) + 1
        ends = [*breaks.tolist(), len(ordered)]
        self._guarded(lambda: self._write_runs(ordered, data, ends))
        self._written[rows] = True

    def _write_runs(self, rows: np.ndarray, data: np.ndarray, ends: list[int]) -> None:
        assert self._file is not None
        first = 0
        for end in ends:
            left = data[first:end].reshape(-1).data
            at = self._start + int(rows[first]) * self.row_bytes
            while len(left):
                done = os.pwrite(self._file, left, at)
                left, at = left[done:], at + done
            first = end

    def finish(self) -> dict[str, Any]:
        """Sync, name and rename the file; returns its entry for the manifest."""
        missing = int((~self._written).sum())
        if missing:
            self.discard()
            raise StoreError(f"{missing} rows of {self.path} were never written; report this")
        return self._guarded(self._finish)

    def _finish(self) -> dict[str, Any]:
        assert self._file is not None
        with self.temporary.open("rb") as file:
            file.seek(self._start)
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        os.pwrite(self._file, checksum.encode(), self._checksum_at)
        self._close()
        entry = {
            "n_rows": len(self._written),
            "bytes": self._start + self.n_bytes,
            "sha256": read_sha256(self.temporary),
        }
        put_in_place(self.temporary, self.path)
        return entry

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def discard(self) -> None:
        """Remove what is there so far."""
        self._close()
        # What cannot be removed could not be made either.
        with suppress(OSError):
            self.temporary.unlink(missing_ok=True)
