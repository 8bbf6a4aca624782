"""Shard files and manifests of a store: checksums of their content, and their rows as one array."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor

from saexp.digests import digest_of, read_sha256
from saexp.errors import ModelError, StoreError
from saexp.files import cannot_write, locked, put_in_place, write_atomically, write_json
from saexp.models.hookpoints import Hookpoint

log = logging.getLogger(__name__)


MANIFEST = "manifest.json"
_CHECKSUM, _CHECKED = "sha256", "checked"
"""In a manifest: the digest of what `_checked` returns, and the shards that were listed when it was
written. Those of earlier versions have neither."""


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
    joined = manifest.get("joined", {})
    if not isinstance(joined, dict) or not all(
        _is_entry(entry) and isinstance(entry.get("file"), str) and "/" not in entry["file"]
        for entry in joined.values()
    ):
        return "joined has an entry without file, bytes or sha256"
    return None if _has_right_checksum(manifest) else "checksum"


def _checked(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a manifest that its checksum covers.

    Entries that an earlier version of saexp, without checksums, may add later are left out: further
    shards and joined files, which are compared with the files.
    """
    content = {k: v for k, v in manifest.items() if k not in (_CHECKSUM, "joined")}
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
                done = os.pwrite(self._file, rest, at)
                rest, at = rest[done:], at + done
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
