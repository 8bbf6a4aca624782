"""Shard files and manifests of a store: checksums of their content, and their rows as one array."""

import hashlib
import json
import logging
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from safetensors import safe_open
from torch import Tensor

from saexp.digests import digest_of, read_sha256
from saexp.errors import ModelError, StoreError
from saexp.files import cannot_write, put_in_place, write_json
from saexp.models import Hookpoint

log = logging.getLogger(__name__)


MANIFEST = "manifest.json"
_CHECKSUM, _CHECKED = "sha256", "checked"
"""In a manifest: the digest of what `_checked` returns, and the shards that were listed when it was
written. Those of earlier versions have neither."""
_JOINED = "joined"
"""In manifests of earlier versions: files with the values of all shards of a hookpoint."""


def is_intact(
    file: Path, entry: Mapping[str, Any], *, hashed: bool, reported: set[str] | None = None
) -> bool:
    """Whether a file still matches its entry (`bytes`, `sha256`); the checksum only with `hashed`.

    A damaged file is logged, unless the message is in `reported`.
    """
    try:
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            problem = "is missing or truncated"
        elif hashed and read_sha256(file) != entry["sha256"]:
            problem = "is damaged (checksum)"
        else:
            # A file that is not hashed must be readable, too.
            file.open("rb").close()
            return True
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    line = f"{file} {problem} and counts as not collected"
    if reported is None or line not in reported:
        log.warning("%s", line)
    if reported is not None:
        reported.add(line)
    return False


def read_manifest(folder: Path) -> dict[str, Any]:
    """A store's manifest. Raises StoreError where there is none or it is damaged."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise StoreError(f"{folder} holds no activation store (no {MANIFEST})") from error
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, " ".join(str(error).split())) from error
    if not isinstance(manifest, dict):
        raise _unreadable(path, "not a JSON object")
    if (problem := _problem(manifest)) is not None:
        raise _unreadable(path, problem)
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Write a manifest with its checksum, whole or not at all; returns what was written."""
    listed = {name: sorted(shards) for name, shards in manifest["hookpoints"].items()}
    content = {**manifest, _CHECKED: listed}
    content.pop(_JOINED, None)
    sealed = {**content, _CHECKSUM: digest_of(_checked(content))}
    if (folder / MANIFEST).is_dir():
        remove_manifest(folder)
    write_json(folder / MANIFEST, sealed)
    return sealed


def remove_manifest(folder: Path) -> None:
    """Remove a store's manifest, even where it is a folder."""
    path = folder / MANIFEST
    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def _unreadable(path: Path, reason: str) -> StoreError:
    return StoreError(
        f"{path} cannot be read ({reason}); the command that made the store rebuilds it from the "
        "shards"
    )


def _problem(manifest: dict[str, Any]) -> str | None:
    """What is wrong with a manifest; None where it is valid."""
    expected = {"ingredients": dict, "hookpoints": dict}
    absent = [key for key, kind in expected.items() if not isinstance(manifest.get(key), kind)]
    absent += [key for key in ("n_rows", "shard_rows") if not _counts(manifest.get(key))]
    if absent:
        return f"no {', '.join(absent)} in it"
    if not manifest["shard_rows"]:
        return "shard_rows is 0"
    if not isinstance(manifest.get("about", {}), dict):
        return "about is not an object"
    if (problem := _problem_of_shards(manifest)) is not None:
        return problem
    return None if _has_right_checksum(manifest) else "checksum"


def _checked(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a manifest that its checksum covers.

    Entries that an earlier version of saexp may have added without a checksum are left out: further
    shards, which are compared with the files, and files that joined shards, which are not used.
    """
    content = {k: v for k, v in manifest.items() if k not in (_CHECKSUM, _JOINED)}
    content["hookpoints"] = {
        name: {shard: manifest["hookpoints"][name][shard] for shard in shards}
        for name, shards in manifest[_CHECKED].items()
    }
    return content


def _has_right_checksum(manifest: Mapping[str, Any]) -> bool:
    """Whether the checksum is right; manifests of earlier versions have none."""
    if _CHECKSUM not in manifest and _CHECKED not in manifest:
        return True
    try:
        return manifest.get(_CHECKSUM) == digest_of(_checked(manifest))
    except (LookupError, TypeError, AttributeError):
        return False


def _problem_of_shards(manifest: dict[str, Any]) -> str | None:
    n_shards = -(-manifest["n_rows"] // manifest["shard_rows"])
    for name, shards in manifest["hookpoints"].items():
        try:
            if Hookpoint.parse(name).name != name:
                return f"'{name}' is not a hookpoint"
        except (ModelError, ValueError):
            return f"'{name}' is not a hookpoint"
        if not isinstance(shards, dict):
            return f"no shards in {name}"
        for index, entry in shards.items():
            if not (5 <= len(index) < 10 and index.isdecimal() and int(index) < n_shards):
                return f"{name} has no shard '{index}'"
            if not _is_entry(entry):
                return f"{name}/{index} lacks bytes or sha256"
    return None


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and _counts(entry.get("bytes"))
        and isinstance(entry.get("sha256"), str)
    )


def _counts(value: Any) -> bool:
    """Whether a value is a non-negative integer and not a boolean."""
    return type(value) is int and value >= 0


_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_UNKNOWN = "0" * 64
"""Placeholder for a checksum until it is known."""


@dataclass(frozen=True)
class Label:
    """The metadata in a shard's header, apart from the checksum of its values."""

    store: str
    """The store's key."""
    hookpoint: str
    index: int
    shard_rows: int
    """Rows per shard of the store."""

    @property
    def name(self) -> str:
        """`00003`, the shard's name."""
        return f"{self.index:05d}"

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata as safetensors stores it."""
        return {
            "store": self.store,
            "hookpoint": self.hookpoint,
            "shard": self.name,
            "shard_rows": str(self.shard_rows),
        }

    @classmethod
    def read(cls, metadata: Mapping[str, str]) -> "Label":
        """Parse metadata. Raises LookupError, TypeError or ValueError where it is not a shard's."""
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

    Nothing is at `path` before `finish`. The name of the temporary file depends on `path` only, so
    that the next holder of the shard's lock overwrites what a killed process left.
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
            # A full disk is an error now, not after an hour.
            os.posix_fallocate(self._file, 0, self._start + self.n_bytes)
        os.pwrite(self._file, len(header).to_bytes(8, "little") + header, 0)

    def _guarded(self, do: Callable[[], Any]) -> Any:
        try:
            return do()
        except OSError as error:
            self.discard()
            raise cannot_write(self.path, error, self.n_bytes) from error

    def write(self, rows: Int[np.ndarray, " n"], acts: Float[Tensor, "n width"]) -> None:
        """Write values at these rows; adjacent rows are written together."""
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        # Reordered by numpy, not by torch's threads: see collection.finite_rows.
        data = acts.to(self.dtype).contiguous().view(torch.uint8).numpy()[order]
        breaks = np.flatnonzero(np.diff(ordered) != 1) + 1
        ends = [*breaks.tolist(), len(ordered)]
        self._guarded(lambda: self._write_runs(ordered, data, ends))
        self._written[rows] = True

    def _write_runs(self, rows: np.ndarray, data: np.ndarray, ends: list[int]) -> None:
        assert self._file is not None
        first = 0
        for end in ends:
            rest = data[first:end].reshape(-1).data
            at = self._start + int(rows[first]) * self.row_bytes
            while len(rest):
                n_written = os.pwrite(self._file, rest, at)
                rest, at = rest[n_written:], at + n_written
            first = end

    def finish(self) -> dict[str, Any]:
        """Complete, sync and rename the file; returns its entry for the manifest."""
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
        """Remove the temporary file."""
        self._close()
        # A file that cannot be removed could not be created either.
        with suppress(OSError):
            self.temporary.unlink(missing_ok=True)


class StoredValues:
    """The shards of a hookpoint as one array `[n_rows, width]`, read without joining them.

    Slices and chunks are memory-mapped; rows by number are copied.

    Example:
        >>> values = store.values(layer=2)
        >>> values.shape
        (5760, 64)
        >>> values[torch.tensor([3, 5000])]  # a copy of these rows, in this order
        >>> for first, acts in values.chunks(8192): ...
    """

    def __init__(self, files: Sequence[Path], bounds: Sequence[tuple[int, int]]) -> None:
        self.files, self.bounds = files, bounds
        self._shard_rows = bounds[0][1]
        self._mapped: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self.bounds[-1][1]

    @property
    def shape(self) -> tuple[int, int]:
        """(number of rows, width)."""
        return len(self), self.shard(0).shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the stored activations."""
        return self.shard(0).dtype

    def shard(self, index: int) -> Float[Tensor, "n width"]:
        """The content of a file, memory-mapped."""
        if index not in self._mapped:
            with safe_open(self.files[index], framework="pt") as file:
                self._mapped[index] = file.get_tensor("acts")
        return self._mapped[index]

    def __getitem__(
        self, rows: Shaped[Tensor, "..."] | Shaped[np.ndarray, "..."] | Sequence[int] | slice | int
    ) -> Float[Tensor, "m width"]:
        """The values at row numbers (not negative), a mask, or a slice, in the order of `rows`.

        A copy, or for a slice of step 1 within one shard a view of the memory-mapped file. Raises
        IndexError for a row that there is not, and for other indices.
        """
        if not isinstance(rows, slice):
            return self._gather(self._row_numbers(rows))
        start, stop, step = rows.indices(len(self))
        index = start // self._shard_rows
        if step == 1 and start < stop <= self.bounds[index][1]:
            first = self.bounds[index][0]
            return self.shard(index)[start - first : stop - first]
        return self._gather(np.arange(start, stop, step))

    def _row_numbers(self, indices: Any) -> Int[np.ndarray, " m"]:
        is_tuple = isinstance(indices, tuple)
        rows = np.empty((0, 0)) if is_tuple else np.asarray(indices)
        if rows.shape == (0,):
            # An empty list has no integers that numpy could see.
            rows = rows.astype(np.int64)
        if rows.ndim != 1 or rows.dtype.kind not in "biu":
            what = "several" if is_tuple else f"{rows.ndim}-d {rows.dtype}"
            raise IndexError(
                f"{what} indices; type row numbers in one dimension, such as values[[3]], a mask, "
                "or a slice"
            )
        if rows.dtype == bool:
            if len(rows) != len(self):
                raise IndexError(f"a mask of {len(rows)} values for {len(self)} rows")
            return np.flatnonzero(rows)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)}")
        return rows.astype(np.int64)

    def _gather(self, rows: Int[np.ndarray, " n"]) -> Float[Tensor, "n width"]:
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        ascending = self.shard(0).new_empty(len(rows), self.shape[1])
        holders = ordered // self._shard_rows
        for index in np.unique(holders).tolist():
            first, end = np.searchsorted(holders, [index, index + 1]).tolist()
            offsets = ordered[first:end] - self.bounds[index][0]
            try:
                self._read(index, offsets, ascending[first:end])
            except (OSError, EOFError) as error:
                reason = getattr(error, "strerror", None) or "it ends early"
                raise StoreError(
                    f"{self.files[index]} cannot be read ({reason}); run the command again, which "
                    "collects what is missing"
                ) from error
        if np.array_equal(ordered, rows):
            return ascending
        values = torch.empty_like(ascending)
        values[torch.from_numpy(order)] = ascending
        return values

    def _read(
        self, index: int, offsets: Int[np.ndarray, " n"], into: Float[Tensor, "n width"]
    ) -> None:
        """Copy rows of a shard, in ascending order.

        Pages of a mapped file count as memory of this process, and random rows touch nearly all of
        them: each group of rows is unmapped before the next. Raises OSError, and EOFError for a
        file that ends early.
        """
        content, row_bytes = into.view(torch.uint8).numpy(), into.shape[1] * into.itemsize
        with self.files[index].open("rb", buffering=0) as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
            end = begin + (int(offsets[-1]) + 1) * row_bytes
            if os.fstat(file.fileno()).st_size < end:
                raise EOFError
            mapped = mmap.mmap(file.fileno(), end, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM") and end > len(offsets) * _READ_AROUND_BYTES:
            # The rows are far apart: nothing is read around them.
            mapped.madvise(mmap.MADV_RANDOM)
        rows = np.frombuffer(mapped, np.uint8, offset=begin).reshape(-1, row_bytes)
        for first in range(0, len(offsets), _MAPPED_ROWS):
            group = slice(first, first + _MAPPED_ROWS)
            # With "clip", numpy writes to `out` without a copy.
            np.take(rows, offsets[group], axis=0, out=content[group], mode="clip")
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def as_tensor(self) -> Float[Tensor, "n_rows width"]:
        """All rows as one memory-mapped tensor; several shards are copied to a temporary file."""
        if len(self.bounds) == 1:
            return self.shard(0)
        return copied_to_one_file(self, self.files[0].parent)

    def chunks(self, chunk_rows: int) -> Iterator[tuple[int, Float[Tensor, "n width"]]]:
        """(first row, values) in order, at most `chunk_rows` rows each, never of two shards."""
        for index, (first, end) in enumerate(self.bounds):
            for start in range(first, end, chunk_rows):
                yield start, self[start : min(start + chunk_rows, end)]
            # Unmapped, so that a pass over a large store does not occupy the memory.
            self._mapped.pop(index, None)


_COPIED_ROWS = 8192
_MAPPED_ROWS = 256
"""Rows that are copied before their pages are unmapped; each may map 64 KB around it."""
_READ_AROUND_BYTES = 2**17
"""What a system reads around a page that is not in memory."""


def copied_to_one_file(values: StoredValues, folder: Path) -> Float[Tensor, "n_rows width"]:
    """All values as one tensor, memory-mapped from a temporary file that is deleted with it.

    The file is in `folder`, or in the system's temporary folder where that cannot be written.
    Writing to the tensor does not change the file. Raises StoreError where the disk is full.
    """
    if not os.access(folder, os.W_OK):
        folder = Path(tempfile.gettempdir())
    shape, dtype = values.shape, values.dtype
    n_bytes = shape[0] * shape[1] * dtype.itemsize
    try:
        # Without a name from the start, so that a killed process leaves no file behind.
        with tempfile.TemporaryFile(dir=folder) as file:
            for _, acts in values.chunks(_COPIED_ROWS):
                file.write(acts.contiguous().view(torch.uint8).numpy().data)
            file.flush()
            content = mmap.mmap(file.fileno(), n_bytes, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise cannot_write(folder / "a temporary file", error, n_bytes) from error
    return torch.frombuffer(content, dtype=dtype).view(shape)
