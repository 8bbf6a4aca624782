"""The cache folder looked at as a whole: which stores there are, whether sound, which to drop."""

import datetime
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from saexp.activations.files import MANIFEST, remove_manifest
from saexp.activations.joined import damaged_joined
from saexp.activations.leases import USED, users
from saexp.activations.rebuild import shard_files
from saexp.activations.store import LOCKS, ActivationStore
from saexp.errors import ConfigError, StoreError
from saexp.files import show_bytes, try_lock
from saexp.models.hookpoints import Hookpoint

_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_SPANS = {"h": 3600, "d": 86400, "w": 7 * 86400}


def folders(cache_dir: str | Path) -> list[Path]:
    """Every folder of a store, readable or not, the one used longest ago first."""
    there = [
        folder
        for folder in Path(cache_dir).glob("activations/*")
        if folder.is_dir() and ((folder / MANIFEST).exists() or shard_files(folder))
    ]
    return sorted(there, key=lambda folder: (last_used(folder), folder.name))


def stores(cache_dir: str | Path) -> list[ActivationStore]:
    """Every readable store of the folder, the one used longest ago first."""
    found = []
    for folder in folders(cache_dir):
        with suppress(StoreError):
            found.append(ActivationStore.open(folder))
    return found


def last_used(folder: Path) -> float:
    """Seconds since the epoch at which a run last used the store of a folder."""
    marks = [folder / USED, folder / MANIFEST, folder]
    return next(mark for mark in marks if mark.exists()).stat().st_mtime


def size(folder: Path) -> int:
    """Bytes of all its files."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def listing(cache_dir: str | Path) -> pd.DataFrame:
    """A row per store: key, model, dataset, positions, n_rows, hookpoints, bytes, last_used."""
    columns = ["key", "model", "dataset", "positions", "n_rows", "dtype", "hookpoints"]
    rows = []
    for store in stores(cache_dir):
        about, made_of = store.manifest.get("about", {}), store.manifest["ingredients"]
        rows.append(
            {
                "key": store.path.name,
                "model": made_of.get("model"),
                "dataset": about.get("dataset"),
                "positions": about.get("positions"),
                "n_rows": store.n_rows,
                "dtype": made_of.get("dtype"),
                "hookpoints": ", ".join(store.manifest["hookpoints"]),
                "bytes": size(store.path),
                "last_used": datetime.datetime.fromtimestamp(last_used(store.path)),
            }
        )
    return pd.DataFrame(rows, columns=[*columns, "bytes", "last_used"])


def for_reading(table: pd.DataFrame) -> str:
    """A listing as text: sizes with their unit, times to the minute."""
    shown = table.rename(columns={"bytes": "size"})
    shown["size"] = [show_bytes(n) for n in table["bytes"]]
    shown["last_used"] = [f"{at:%Y-%m-%d %H:%M}" for at in table["last_used"]]
    return shown.to_string(index=False)


def damaged(store: ActivationStore) -> list[str]:
    """What is not as it was written, `<hookpoint>/<shard>` for each listed shard, and
    `<hookpoint>/joined` for the file that joins a hookpoint's shards; hashes all."""
    looked = ActivationStore.open(store.path, verify=True)
    found = ["rows.parquet"] if looked.saved_rows() is None else []
    for name, shards in looked.manifest["hookpoints"].items():
        at = [Hookpoint.parse(name)]
        found += [f"{name}/{shard}" for shard in shards if looked.missing(at, [int(shard)])]
    return found + [f"{name}/joined" for name in damaged_joined(store.path, looked.manifest)]


def unreadable(cache_dir: str | Path) -> list[Path]:
    """Folders of stores whose manifest is missing or damaged, by name."""
    readable = {store.path for store in stores(cache_dir)}
    return sorted(folder for folder in folders(cache_dir) if folder not in readable)


@dataclass(frozen=True)
class Pruned:
    """What pruning did."""

    removed: list[str]
    """Keys of the stores removed."""
    kept: dict[str, str]
    """Key -> why, of the stores that the limits would have removed."""
    n_bytes: int
    """Bytes of what is left."""


def prune(cache_dir: str | Path, *, max_size: str | None, max_age: str | None) -> Pruned:
    """Remove stores not used for `max_age`, then those used longest ago until `max_size` is met.

    A store that a process reads or writes stays, and so does one that cannot be written. Raises
    ConfigError where no limit is given or one is no size or span.
    """
    if max_size is None and max_age is None:
        raise ConfigError("action=prune needs a limit: type max_size=20GB or max_age=30d")
    n_bytes = None if max_size is None else _parse("max_size", max_size, _UNITS, "20GB")
    span = None if max_age is None else _parse("max_age", max_age, _SPANS, "30d")
    there = folders(cache_dir)
    sizes = {folder: size(folder) for folder in there}
    total, removed, kept = sum(sizes.values()), [], {}
    for folder in there:
        old = span is not None and time.time() - last_used(folder) > span
        if not old and (n_bytes is None or total <= n_bytes):
            continue
        try:
            reason = _remove(folder)
        except StoreError as error:
            reason = str(error)
        if reason is None:
            total -= sizes[folder]
            removed.append(folder.name)
        else:
            kept[folder.name] = reason
    return Pruned(removed, kept, total)


def _parse(key: str, text: str, units: Mapping[str, int], example: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", str(text).lower())
    if not match or match[2] not in units:
        raise ConfigError(
            f"{key}={text} cannot be read; type a number with one of {', '.join(units)}, "
            f"such as {key}={example}"
        )
    return float(match[1]) * units[match[2]]


def _remove(folder: Path) -> str | None:
    """Remove a store that nobody uses; else say why it stays."""
    with ExitStack() as held:
        # Under this lock marks are made, so that none comes after they were looked at.
        if not _hold(held, folder / ".create.lock"):
            return "a process is opening it"
        if reading := users(folder):
            return f"in use by {', '.join(reading)}"
        for lock in sorted((folder / LOCKS).glob("*.lock")):
            if not _hold(held, lock):
                return "a process is writing it"
        # Without its manifest it is no store any more, whatever happens next.
        remove_manifest(folder)
        shutil.rmtree(folder, ignore_errors=True)
    return None


def _hold(held: ExitStack, path: Path) -> bool:
    lock = try_lock(path)
    if lock is not None:
        held.callback(lock.release)
    return lock is not None


def find(cache_dir: str | Path, key: str) -> ActivationStore:
    """The one store whose key begins so. Raises ConfigError where none or several do."""
    keys = {s.path.name: s for s in stores(cache_dir)}
    found = [name for name in keys if name.startswith(str(key))]
    if len(found) != 1:
        told = f"{len(found)} stores begin so" if found else "no store begins so"
        raise ConfigError(f"stores: {key}: {told}; {cache_dir} holds {', '.join(keys) or 'none'}")
    return keys[found[0]]


def verify(chosen: Sequence[ActivationStore]) -> dict[str, list[str]]:
    """Store's key -> its damaged shards, sound stores left out."""
    found = {store.path.name: damaged(store) for store in chosen}
    return {key: shards for key, shards in found.items() if shards}
