"""The cache folder looked at as a whole: which stores there are, whether sound, which to drop."""

import datetime
import json
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pandas as pd

from saexp.activations.files import try_lock
from saexp.activations.store import USED, ActivationStore
from saexp.errors import ConfigError, StoreError
from saexp.models.hookpoints import Hookpoint

_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_SPANS = {"h": 3600, "d": 86400, "w": 7 * 86400}


def stores(cache_dir: str | Path) -> list[ActivationStore]:
    """Every readable store of the folder, the one used longest ago first."""
    found = []
    for manifest in Path(cache_dir).glob("activations/*/manifest.json"):
        with suppress(StoreError):
            found.append(ActivationStore.open(manifest.parent))
    return sorted(found, key=last_used)


def last_used(store: ActivationStore) -> float:
    """Seconds since the epoch at which a run last used the store."""
    mark = store.path / USED
    return (mark if mark.is_file() else store.path / "manifest.json").stat().st_mtime


def size(store: ActivationStore) -> int:
    """Bytes of all its files."""
    return sum(f.stat().st_size for f in store.path.rglob("*") if f.is_file())


def listing(cache_dir: str | Path) -> pd.DataFrame:
    """A row per store: key, model, dataset, positions, n_rows, hookpoints, bytes, last_used."""
    columns = ["key", "model", "dataset", "positions", "n_rows", "dtype", "hookpoints"]
    rows = []
    for store in stores(cache_dir):
        about, made_of = store.manifest.get("about", {}), store.manifest["ingredients"]
        rows.append(
            {
                "key": store.path.name,
                "model": made_of["model"],
                "dataset": about.get("dataset"),
                "positions": about.get("positions"),
                "n_rows": store.n_rows,
                "dtype": made_of["dtype"],
                "hookpoints": ", ".join(store.manifest["hookpoints"]),
                "bytes": size(store),
                "last_used": datetime.datetime.fromtimestamp(last_used(store)),
            }
        )
    return pd.DataFrame(rows, columns=[*columns, "bytes", "last_used"])


def damaged(store: ActivationStore) -> list[str]:
    """`<hookpoint>/<shard>` of every listed shard that is not as it was written; hashes all."""
    looked = ActivationStore.open(store.path, verify=True)
    return [
        f"{name}/{shard}"
        for name, shards in looked.manifest["hookpoints"].items()
        for shard in shards
        if looked.missing([Hookpoint.parse(name)], [int(shard)])
    ]


def prune(cache_dir: str | Path, *, max_size: str | None, max_age: str | None) -> list[str]:
    """Remove stores not used for `max_age`, then those used longest ago until `max_size` is met.

    A store that a process is working on stays. Returns the keys removed. Raises ConfigError where
    no limit is given or one is no size or span.
    """
    if max_size is None and max_age is None:
        raise ConfigError("action=prune needs a limit: type max_size=20GB or max_age=30d")
    n_bytes = None if max_size is None else _parse("max_size", max_size, _UNITS, "20GB")
    span = None if max_age is None else _parse("max_age", max_age, _SPANS, "30d")
    there = stores(cache_dir)
    sizes = {s.path: size(s) for s in there}
    total, removed = sum(sizes.values()), []
    for store in there:
        old = span is not None and time.time() - last_used(store) > span
        if not old and (n_bytes is None or total <= n_bytes):
            continue
        if _remove(store):
            total -= sizes[store.path]
            removed.append(store.path.name)
    return removed


def _parse(key: str, text: str, units: Mapping[str, int], example: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", str(text).lower())
    if not match or match[2] not in units:
        raise ConfigError(
            f"{key}={text} cannot be read; type a number with one of {', '.join(units)}, "
            f"such as {key}={example}"
        )
    return float(match[1]) * units[match[2]]


def _remove(store: ActivationStore) -> bool:
    locks = []
    try:
        for index in range(len(store.shard_bounds)):
            lock = try_lock(store.shard_lock(index))
            if lock is None:
                return False
            locks.append(lock)
        # Without its manifest it is no store any more, whatever happens next.
        (store.path / "manifest.json").unlink()
        shutil.rmtree(store.path, ignore_errors=True)
        return True
    finally:
        for lock in locks:
            lock.release()


def find(cache_dir: str | Path, key: str) -> ActivationStore:
    """The one store whose key begins so. Raises ConfigError where none or several do."""
    keys = {s.path.name: s for s in stores(cache_dir)}
    found = [name for name in keys if name.startswith(str(key))]
    if len(found) != 1:
        told = f"{len(found)} stores begin so" if found else "no store begins so"
        raise ConfigError(f"stores: {key}: {told}; {cache_dir} holds {', '.join(keys) or 'none'}")
    return keys[found[0]]


def differences(first: ActivationStore, second: ActivationStore) -> list[str]:
    """Why one was not used in place of the other: a line per ingredient of the key that differs."""
    a, b = first.manifest["ingredients"], second.manifest["ingredients"]
    return [
        f"{name}: {json.dumps(a.get(name))} and {json.dumps(b.get(name))}"
        for name in sorted({*a, *b})
        if a.get(name) != b.get(name)
    ]


def verify(chosen: Sequence[ActivationStore]) -> dict[str, list[str]]:
    """Store's key -> its damaged shards, sound stores left out."""
    found = {store.path.name: damaged(store) for store in chosen}
    return {key: shards for key, shards in found.items() if shards}
