"""Activations on disk, named by what determines them: safetensors shards under one manifest.

<cache_dir>/activations/<key>/manifest.json, rows.parquet, layer_12.resid_post/00000.safetensors
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from saexp.errors import StoreError
from saexp.models.hookpoints import Hookpoint

log = logging.getLogger(__name__)

VERSION = 1
_HASH_ON_OPEN_BYTES = 64 * 2**20
"""Shards up to this size are hashed when a store is opened; larger ones have their size checked."""


def store_key(ingredients: Mapping[str, Any]) -> str:
    """24 hex digits of the SHA-256 of the ingredients' canonical JSON."""
    text = json.dumps({"version": VERSION, **ingredients}, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a temporary file beside `path`, sync it, and rename it into place.

    Raises StoreError, in one line, where the folder cannot be written or the disk is full.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".tmp-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise StoreError(f"cannot write {path}: {reason}; choose another cache_dir=") from error
    finally:
        if temporary is not None and temporary.exists():
            temporary.unlink()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ActivationStore:
    """One store: the activations of one model on one set of texts and positions."""

    def __init__(self, path: Path, manifest: dict[str, Any], *, verify: bool = False) -> None:
        self.path = path
        self.manifest = manifest
        self.verify = verify
        self._sound: set[tuple[str, str]] = set()

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> "ActivationStore":
        """Open an existing store; `verify` hashes every shard whatever its size."""
        folder = Path(path)
        try:
            manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        except FileNotFoundError as error:
            raise StoreError(f"{folder} holds no activation store (no manifest.json)") from error
        except (OSError, ValueError) as error:
            raise StoreError(f"{folder}/manifest.json cannot be read ({error})") from error
        return cls(folder, manifest, verify=verify)

    @classmethod
    def create_or_open(
        cls,
        cache_dir: str | Path,
        ingredients: Mapping[str, Any],
        rows: pd.DataFrame,
        *,
        shard_rows: int,
    ) -> "ActivationStore":
        """The store of these ingredients; `rows` replaces a rows table whose labels differ."""
        folder = Path(cache_dir) / "activations" / store_key(ingredients)
        with locked(folder / ".create.lock"):
            if not (folder / "manifest.json").is_file():
                manifest = {
                    "version": VERSION,
                    "key": folder.name,
                    "ingredients": dict(ingredients),
                    "n_rows": len(rows),
                    "shard_rows": shard_rows,
                    "hookpoints": {},
                }
                write_atomically(folder / "rows.parquet", lambda p: rows.to_parquet(p, index=False))
                _write_json(folder / "manifest.json", manifest)
            store = cls.open(folder)
            if not store._holds(rows):
                write_atomically(folder / "rows.parquet", lambda p: rows.to_parquet(p, index=False))
        return store

    @property
    def n_rows(self) -> int:
        """Number of positions."""
        return int(self.manifest["n_rows"])

    @property
    def rows(self) -> pd.DataFrame:
        """One row per position, in dataset order; groups and splits as of the last run using it."""
        return pd.read_parquet(self.path / "rows.parquet")

    def _holds(self, rows: pd.DataFrame) -> bool:
        try:
            return self.rows.equals(rows)
        except (OSError, ValueError):
            log.warning("%s/rows.parquet is missing or damaged and is written again", self.path)
            return False

    @property
    def shard_bounds(self) -> list[tuple[int, int]]:
        """[first, end) rows of each shard."""
        step = int(self.manifest["shard_rows"])
        return [(a, min(a + step, self.n_rows)) for a in range(0, self.n_rows, step)]

    def _shard(self, hookpoint: Hookpoint, index: int) -> Path:
        return self.path / hookpoint.name / f"{index:05d}.safetensors"

    def _is_sound(self, hookpoint: Hookpoint, index: int) -> bool:
        """Whether a shard is listed and is on disk as it was written."""
        entry = self.manifest["hookpoints"].get(hookpoint.name, {}).get(f"{index:05d}")
        if entry is None:
            return False
        checked = (hookpoint.name, entry["sha256"])
        if checked in self._sound:
            return True
        file = self._shard(hookpoint, index)
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            log.warning("%s is missing or truncated and counts as not collected", file)
            return False
        look = self.verify or entry["bytes"] <= _HASH_ON_OPEN_BYTES
        if look and _sha256(file) != entry["sha256"]:
            log.warning("%s is damaged (checksum) and counts as not collected", file)
            return False
        self._sound.add(checked)
        return True

    def missing(self, hookpoints: Sequence[Hookpoint]) -> dict[int, list[Hookpoint]]:
        """Shard index -> hookpoints whose shard is absent or damaged."""
        found: dict[int, list[Hookpoint]] = {}
        for index in range(len(self.shard_bounds)):
            absent = [h for h in hookpoints if not self._is_sound(h.stored, index)]
            if absent:
                found[index] = absent
        return found

    @property
    def hookpoints(self) -> list[Hookpoint]:
        """Hookpoints that are there whole, sorted."""
        named = [Hookpoint.parse(name) for name in self.manifest["hookpoints"]]
        return sorted(h for h in named if not self.missing([h]))

    def write_shard(
        self, hookpoint: Hookpoint, index: int, acts: Float[Tensor, "n_rows d_model"]
    ) -> None:
        """Write one shard whole or not at all, then enter it in the manifest."""
        hookpoint = hookpoint.stored
        file = self._shard(hookpoint, index)
        write_atomically(file, lambda p: save_file({"acts": acts.contiguous()}, p))
        entry = {"n_rows": len(acts), "bytes": file.stat().st_size, "sha256": _sha256(file)}
        with locked(self.path / ".manifest.lock"):
            self.reload()
            shards = self.manifest["hookpoints"].setdefault(hookpoint.name, {})
            shards[f"{index:05d}"] = entry
            _write_json(self.path / "manifest.json", self.manifest)

    def reload(self) -> None:
        """Read the manifest again: another process may have added shards."""
        self.manifest = json.loads((self.path / "manifest.json").read_text("utf-8"))

    def _read(self, hookpoint: Hookpoint, index: int) -> Tensor:
        with safe_open(self._shard(hookpoint, index), framework="pt") as file:
            return file.get_tensor("acts")

    def acts(self, layer: int, stream: str = "resid_post") -> Float[Tensor, "n_rows d_model"]:
        """All activations of a hookpoint, in row order, memory-mapped.

        Several shards are joined once into one file beside them. Raises StoreError where the
        hookpoint was not, or not wholly, collected.
        """
        hookpoint = self._complete(Hookpoint(layer, stream).stored)
        if len(self.shard_bounds) == 1:
            return self._read(hookpoint, 0)
        sums = "".join(e["sha256"] for _, e in sorted(self._entries(hookpoint).items()))
        name = hashlib.sha256(sums.encode()).hexdigest()[:16]
        joined = self.path / hookpoint.name / f"joined-{name}.bin"
        first = self._read(hookpoint, 0)
        shape = (self.n_rows, first.shape[1])
        n_bytes = shape[0] * shape[1] * first.dtype.itemsize
        if not joined.is_file() or joined.stat().st_size != n_bytes:

            def write(path: Path) -> None:
                with path.open("wb") as file:
                    for index in range(len(self.shard_bounds)):
                        part = self._read(hookpoint, index).contiguous()
                        file.write(part.view(torch.uint8).numpy().data)

            write_atomically(joined, write)
        flat = torch.from_file(str(joined), size=shape[0] * shape[1], dtype=first.dtype)
        return flat.view(shape)

    def chunks(self, hookpoint: Hookpoint, chunk_rows: int) -> Iterator[tuple[int, Tensor]]:
        """(first row, activations) in order, at most `chunk_rows` rows each."""
        hookpoint = self._complete(hookpoint.stored)
        for index, (first, end) in enumerate(self.shard_bounds):
            shard = self._read(hookpoint, index)
            for start in range(0, end - first, chunk_rows):
                yield first + start, shard[start : start + chunk_rows]

    def mean_norm(self, hookpoint: Hookpoint) -> float:
        """Mean Euclidean norm of the rows."""
        total = 0.0
        for _, acts in self.chunks(hookpoint, 8192):
            total += float(acts.double().norm(dim=-1).sum())
        return total / self.n_rows

    def _entries(self, hookpoint: Hookpoint) -> dict[str, Any]:
        return self.manifest["hookpoints"].get(hookpoint.name, {})

    def _complete(self, hookpoint: Hookpoint) -> Hookpoint:
        if self.missing([hookpoint]):
            there = ", ".join(h.name for h in self.hookpoints) or "none"
            raise StoreError(f"{self.path} has not all of {hookpoint.name}; it has {there}")
        return hookpoint


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False)
    write_atomically(path, lambda p: _write_text(p, text))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes; the operating system frees it when a process dies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        lock.acquire()
    except OSError as error:
        reason = error.strerror or str(error)
        raise StoreError(
            f"cannot write {path.parent}: {reason}; choose another cache_dir="
        ) from error
    try:
        yield
    finally:
        lock.release()
