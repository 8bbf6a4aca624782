"""Activation stores on disk: safetensors shards and a manifest, in a folder named by a hash."""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from saexp.activations.shard_files import (
    MANIFEST,
    Label,
    ShardWriter,
    StoredValues,
    is_intact,
    read_manifest,
    write_manifest,
)
from saexp.data.rows import PositionRows
from saexp.digests import digest_of
from saexp.errors import ModelError, StoreError, counted
from saexp.files import CACHE, USED, Marked, locked, write_atomically, write_table
from saexp.models import Hookpoint

log = logging.getLogger(__name__)


_LONGEST_HEADER = 2**16
_CHUNK_BYTES = 2**22


def files_of_shards(folder: Path) -> list[tuple[Hookpoint, Path]]:
    """Every file with the name of a shard, in order."""
    files = []
    for file in sorted(folder.glob("layer_*/*.safetensors")):
        try:
            hookpoint = Hookpoint.parse(file.parent.name)
        except (ModelError, ValueError):
            continue
        if file.stem.isdecimal() and file.is_file():
            files.append((hookpoint, file))
    return files


def sound_manifest(folder: Path, fresh: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """(manifest, whether it must be written); `fresh` is the manifest of this store without shards.

    The manifest on disk where it is intact and belongs to this store, else one rebuilt from the
    shards, with a warning.
    """
    try:
        manifest = read_manifest(folder)
        if _identity(manifest) == _identity(fresh):
            return manifest, False
        reason = f"{folder / MANIFEST} belongs to another store"
    except StoreError:
        exists = (folder / MANIFEST).exists()
        reason = f"{folder / MANIFEST} is {'damaged' if exists else 'missing'}"
        if not exists and not files_of_shards(folder):
            return dict(fresh), True
    return _rebuilt(folder, fresh, reason), True


def _identity(manifest: Mapping[str, Any]) -> tuple[str, int]:
    return digest_of(manifest["ingredients"]), manifest["n_rows"]


def _rebuilt(folder: Path, fresh: Mapping[str, Any], reason: str) -> dict[str, Any]:
    files = files_of_shards(folder)
    proven = []
    for hookpoint, file in files:
        proof = _proven(file, folder.name, hookpoint)
        if proof is not None:
            proven.append((hookpoint, file, *proof))
    # All shards of a store have the same size, unless it was recreated with another.
    sizes = Counter(label.shard_rows for _, _, label, _ in proven)
    shard_rows = sizes.most_common(1)[0][0] if sizes else fresh["shard_rows"]
    n_shards = -(-fresh["n_rows"] // shard_rows)
    hookpoints: dict[str, dict[str, Any]] = {}
    n_intact = 0
    for hookpoint, file, label, entry in proven:
        if label.shard_rows == shard_rows and label.index < n_shards:
            hookpoints.setdefault(hookpoint.name, {})[file.stem] = entry
            n_intact += 1
    log.warning(
        "%s and is rebuilt from the shards: %s kept, %d collected again where needed",
        *(reason, counted(n_intact, "shard"), len(files) - n_intact),
    )
    return {**fresh, "shard_rows": shard_rows, "hookpoints": hookpoints}


def _proven(file: Path, store: str, hookpoint: Hookpoint) -> tuple[Label, dict[str, Any]] | None:
    """(label, manifest entry) of a shard; None where its header does not match its content."""
    try:
        with file.open("rb") as opened:
            size = opened.read(8)
            length = int.from_bytes(size, "little")
            if length > _LONGEST_HEADER:
                return None
            header = opened.read(length)
            about = json.loads(header)
            label = Label.read(about["__metadata__"])
            n_rows, _ = about["acts"]["shape"]
            of_file, of_values = hashlib.sha256(size + header), hashlib.sha256()
            while chunk := opened.read(_CHUNK_BYTES):
                of_file.update(chunk)
                of_values.update(chunk)
            n_bytes = opened.tell()
        belongs = (label.store, label.hookpoint, label.name) == (store, hookpoint.name, file.stem)
        begin, end = about["acts"]["data_offsets"]
        fits = begin == 0 and n_bytes - 8 - length == end and n_rows <= label.shard_rows
        if not (belongs and fits and of_values.hexdigest() == about["__metadata__"]["sha256"]):
            return None
        return label, {"n_rows": n_rows, "bytes": n_bytes, "sha256": of_file.hexdigest()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


VERSION = 1
_HASH_ON_OPEN_BYTES = 64 * 2**20
"""Shards up to this size are hashed before use; of larger ones the size is checked."""
_CHUNK_ROWS = 8192
LOCKS = ".locks"
"""Folder of the shards' locks."""


def store_key(ingredients: Mapping[str, Any]) -> str:
    """24 hex digits of the SHA-256 of the ingredients' canonical JSON."""
    text = json.dumps({"version": VERSION, **ingredients}, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


class ActivationStore(Marked):
    """The activations of one model on one set of texts and positions.

    From the first use of its values until `close`, or until the object is deleted, a mark keeps it
    from being pruned. A read-only store is read without marks and locks.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], *, verify: bool = False) -> None:
        super().__init__(path)
        self.manifest = manifest
        self.verify = verify
        self._sound: set[tuple[str, int, str]] = set()
        self._reported: set[str] = set()
        """Warnings about damaged files that were logged already."""
        self._rows: PositionRows | pd.DataFrame | None = None
        self._norms: dict[Hookpoint, np.ndarray] = {}

    def __fspath__(self) -> str:
        """The store's folder, so that functions which take a path take a store too."""
        return str(self.path)

    @classmethod
    def open(cls, path: str | PathLike[str], *, verify: bool = False) -> "ActivationStore":
        """Open an existing store; `verify` hashes every shard whatever its size."""
        folder = Path(path)
        return cls(folder, read_manifest(folder), verify=verify)

    @classmethod
    def create_or_open(
        cls,
        cache_dir: str | Path,
        ingredients: Mapping[str, Any],
        rows: PositionRows | pd.DataFrame,
        *,
        shard_rows: int,
        about: Mapping[str, Any] | None = None,
    ) -> "ActivationStore":
        """The store with these ingredients; `rows` replaces a rows table whose labels differ.

        `shard_rows` applies to a new store only. `about` holds readable names, which are saved
        beside the hashes. A missing or damaged manifest is rebuilt from the shards.
        """
        folder = Path(cache_dir) / "activations" / store_key(ingredients)
        fresh = {
            "version": VERSION,
            "key": folder.name,
            "ingredients": dict(ingredients),
            "about": dict(about or {}),
            "n_rows": rows.n_rows if isinstance(rows, PositionRows) else len(rows),
            "shard_rows": shard_rows,
            "hookpoints": {},
        }
        for parent in (folder.parent, folder):
            try:
                # Permission to list the folder, and to open files in it.
                os.scandir(parent).close()
                os.stat(parent / "rows.parquet")
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                reason = f"{parent} cannot be read ({error.strerror})"
                raise StoreError(f"{reason}; choose another {CACHE}") from error
        if folder.is_dir() and not os.access(folder, os.W_OK):
            store = cls(folder, sound_manifest(folder, fresh)[0])
            store.show(rows)
            return store
        with locked(folder / ".create.lock"):
            with locked(folder / ".manifest.lock"):
                # Both locks are held, so temporary files were left by a killed run.
                for leftover in folder.glob(".tmp-*"):
                    leftover.unlink(missing_ok=True)
                manifest, is_new = sound_manifest(folder, fresh)
                store = cls(folder, manifest)
                if is_new or not store._holds(rows):
                    _write_rows(folder / "rows.parquet", rows)
                if is_new:
                    store.manifest = write_manifest(folder, manifest)
            (folder / USED).touch()
            store._mark()
        return store

    @property
    def n_rows(self) -> int:
        """Number of positions."""
        return int(self.manifest["n_rows"])

    @property
    def shard_rows(self) -> int:
        """Rows per shard; the last shard may have fewer."""
        return int(self.manifest["shard_rows"])

    @property
    def rows(self) -> pd.DataFrame:
        """One row per position, in data set order; groups and splits are those of the last run."""
        if self._rows is not None:
            return self._rows.rows if isinstance(self._rows, PositionRows) else self._rows
        return pd.read_parquet(self.path / "rows.parquet")

    def show(self, rows: PositionRows | pd.DataFrame) -> None:
        """Use `rows` as the rows table of this object, without writing it."""
        self._rows = rows

    def _holds(self, rows: PositionRows | pd.DataFrame) -> bool:
        file = self.path / "rows.parquet"
        try:
            if isinstance(rows, PositionRows):
                return rows.equals(file)
            return pd.read_parquet(file).equals(rows)
        except (OSError, ValueError):
            log.warning("%s is missing or damaged and is written again", file)
            return False

    def saved_rows(self, columns: list[str] | None = None) -> pd.DataFrame | None:
        """The rows table on disk, or some columns; None where it is missing or damaged."""
        try:
            rows = pd.read_parquet(self.path / "rows.parquet", columns=columns)
        except (OSError, ValueError):
            return None
        return rows if len(rows) == self.n_rows else None

    @property
    def shard_bounds(self) -> list[tuple[int, int]]:
        """[first, end) rows of each shard."""
        step = self.shard_rows
        return [(a, min(a + step, self.n_rows)) for a in range(0, self.n_rows, step)]

    def _shard(self, hookpoint: Hookpoint, index: int) -> Path:
        return self.path / hookpoint.name / f"{index:05d}.safetensors"

    def _is_sound(self, hookpoint: Hookpoint, index: int) -> bool:
        """Whether a shard is listed in the manifest and unchanged on disk."""
        entry = self.manifest["hookpoints"].get(hookpoint.name, {}).get(f"{index:05d}")
        first, end = self.shard_bounds[index]
        # Earlier versions left rows out that an earlier shard had too.
        if entry is None or entry["n_rows"] != end - first:
            return False
        checked = (hookpoint.name, index, entry["sha256"])
        if checked in self._sound:
            return True
        sound = self._intact(self._shard(hookpoint, index), entry)
        if sound:
            self._sound.add(checked)
        return sound

    def _intact(self, file: Path, entry: Mapping[str, Any]) -> bool:
        hashed = self.verify or entry["bytes"] <= _HASH_ON_OPEN_BYTES
        return is_intact(file, entry, hashed=hashed, reported=self._reported)

    def missing(
        self, hookpoints: Sequence[Hookpoint], shards: Sequence[int] | None = None
    ) -> dict[int, list[Hookpoint]]:
        """Shard index (all, or those in `shards`) -> hookpoints whose file is absent or damaged."""
        missing: dict[int, list[Hookpoint]] = {}
        for index in range(len(self.shard_bounds)) if shards is None else shards:
            absent = [h for h in hookpoints if not self._is_sound(h.stored, index)]
            if absent:
                missing[index] = absent
        return missing

    @property
    def hookpoints(self) -> list[Hookpoint]:
        """Hookpoints with all their shards, sorted."""
        listed = [Hookpoint.parse(name) for name in self.manifest["hookpoints"]]
        return sorted(h for h in listed if not self.missing([h]))

    def shard_lock(self, index: int) -> Path:
        """The holder of this lock computes the shard, for all hookpoints."""
        return self.path / LOCKS / f"{index:05d}.lock"

    def writer(
        self, hookpoint: Hookpoint, index: int, width: int, dtype: torch.dtype
    ) -> ShardWriter:
        """A writer for the rows of one shard; `enter` lists the finished file."""
        first, end = self.shard_bounds[index]
        return self._writer(hookpoint.stored, index, (end - first, width), dtype)

    def _writer(
        self, hookpoint: Hookpoint, index: int, shape: tuple[int, int], dtype: torch.dtype
    ) -> ShardWriter:
        label = Label(self.path.name, hookpoint.name, index, self.shard_rows)
        return ShardWriter(self._shard(hookpoint, index), *shape, dtype, label)

    def enter(self, index: int, entries: Mapping[Hookpoint, Mapping[str, Any]]) -> None:
        """List a finished shard's files in the manifest."""

        def add(manifest: dict[str, Any]) -> None:
            for hookpoint, entry in entries.items():
                shards = manifest["hookpoints"].setdefault(hookpoint.stored.name, {})
                shards[f"{index:05d}"] = dict(entry)

        self._change(add)
        # The checksums are of what was read back from the files.
        self._sound |= {(h.stored.name, index, e["sha256"]) for h, e in entries.items()}

    def _change(self, change: Callable[[dict[str, Any]], None]) -> None:
        with locked(self.path / ".manifest.lock"):
            # A new object, because another thread may reload `self.manifest` meanwhile.
            manifest = read_manifest(self.path)
            change(manifest)
            # Sorted, so that the bytes do not depend on the order of processes.
            listed = manifest["hookpoints"]
            manifest["hookpoints"] = {h: dict(sorted(listed[h].items())) for h in sorted(listed)}
            self.manifest = write_manifest(self.path, manifest)

    def write_shard(
        self, hookpoint: Hookpoint, index: int, acts: Float[Tensor, "n_rows d_model"]
    ) -> None:
        """Write all rows of one shard, whole or not at all, and list it in the manifest."""
        writer = self._writer(hookpoint.stored, index, (len(acts), acts.shape[1]), acts.dtype)
        writer.write(np.arange(len(acts)), acts)
        self.enter(index, {hookpoint: writer.finish()})

    def reload(self) -> None:
        """Read the manifest again: another process may have added shards."""
        self.manifest = read_manifest(self.path)

    def values(self, layer: int, stream: str = "resid_post") -> StoredValues:
        """A view of a hookpoint's activations: indexed by rows, or read in chunks.

        Raises StoreError where the hookpoint was not collected, or only in part.
        """
        return self._values(Hookpoint(layer, stream))

    def _values(self, hookpoint: Hookpoint) -> StoredValues:
        at = self._complete(hookpoint.stored)
        bounds = self.shard_bounds
        files = [self._shard(at, index) for index in range(len(bounds))]
        return StoredValues(files, bounds)

    def acts(self, layer: int, stream: str = "resid_post") -> Float[Tensor, "n_rows d_model"]:
        """All activations of a hookpoint, in row order, memory-mapped.

        Several shards are copied to a temporary file, which is deleted with the tensor; `values`
        reads rows without a copy of the whole. Raises StoreError where the hookpoint was not
        collected, or only in part.
        """
        return self.values(layer, stream).as_tensor()

    def chunks(self, hookpoint: Hookpoint, chunk_rows: int) -> Iterator[tuple[int, Tensor]]:
        """(first row, activations) in order, at most `chunk_rows` rows each."""
        yield from self._values(hookpoint).chunks(chunk_rows)

    def norms(self, hookpoint: Hookpoint) -> Float[np.ndarray, " n_rows"]:
        """Euclidean norm of each row, float64; cached while the store is open."""
        at = hookpoint.stored
        if at not in self._norms:
            # Into one array: small arrays kept between large temporary ones would leave holes in
            # the heap that the next large one does not fit into, as large as all values together.
            norms = np.empty(self.n_rows)
            for first, acts in self.chunks(at, _CHUNK_ROWS):
                norms[first : first + len(acts)] = acts.flatten(1).double().norm(dim=-1).numpy()
            self._norms[at] = norms
        return self._norms[at]

    def _complete(self, hookpoint: Hookpoint) -> Hookpoint:
        if self.missing([hookpoint]):
            complete = ", ".join(h.name for h in self.hookpoints) or "none"
            raise StoreError(
                f"{self.path} does not have all of {hookpoint.name}; it has {complete}"
            )
        self._use()
        return hookpoint


def _write_rows(file: Path, rows: PositionRows | pd.DataFrame) -> None:
    if isinstance(rows, PositionRows):
        write_atomically(file, rows.write)
    else:
        write_table(file, rows)
