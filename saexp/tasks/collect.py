"""task=collect and task=cache: fill the activation stores; list, verify, prune and compare them."""

import datetime
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from saexp.activations import LOCKS, ActivationStore, files_of_shards
from saexp.activations.collector import Part
from saexp.activations.shard_files import MANIFEST, remove_manifest
from saexp.config import CacheConfig, CollectConfig, RunConfig, parse_layers
from saexp.context import RunContext
from saexp.errors import ConfigError, StoreError, counted
from saexp.files import USED, show_bytes, try_lock, users
from saexp.models import Hookpoint
from saexp.pipeline.collect import collect_examples
from saexp.pipeline.objects import describe_model, language_model
from saexp.pipeline.run_folder import save_run
from saexp.results import Result

log = logging.getLogger(__name__)


_SHOWN_DIGITS = 8
"""Hex digits shown of a hash."""
_SHOWN_CHARACTERS = 60
"""Characters shown of a setting."""


def headline(store: ActivationStore) -> str:
    """One line that describes a store."""
    about, ingredients = store.manifest.get("about", {}), store.manifest["ingredients"]
    parts = [ingredients.get("model"), about.get("dataset"), about.get("positions")]
    parts += [counted(store.n_rows, "row"), ingredients.get("dtype"), *store.manifest["hookpoints"]]
    return f"{store.path.name}: {', '.join(str(part) for part in parts if part)}"


def differences(first: ActivationStore, second: ActivationStore) -> list[str]:
    """One line per ingredient of the key that differs; hashes are shown with what they are of."""
    a, b = first.manifest["ingredients"], second.manifest["ingredients"]
    lines = []
    for name in sorted({*a, *b}):
        if a.get(name) == b.get(name):
            continue
        if name in _DESCRIPTIONS and name in a and name in b:
            one, two = (_DESCRIPTIONS[name](s, o) for s, o in ((first, second), (second, first)))
            line = f"{name}: {one} ({_short(a[name])}) and {two} ({_short(b[name])})"
            lines.append(line + (_common(first, second) if name == "texts" else ""))
        else:
            lines.append(f"{name}: {json.dumps(a.get(name))} and {json.dumps(b.get(name))}")
    return lines


def _short(digest: Any) -> str:
    return str(digest)[:_SHOWN_DIGITS]


def _model(store: ActivationStore, _: ActivationStore) -> str:
    return str(store.manifest["ingredients"].get("model"))


def _texts(store: ActivationStore, other: ActivationStore) -> str:
    about = store.manifest.get("about", {})
    settings = _settings(store, other, "dataset_settings")
    n, bos = about.get("n_texts"), about.get("begins_with_bos")
    if n is not None:
        settings.append(counted(n, "text"))
    if bos is not None and bos != other.manifest.get("about", {}).get("begins_with_bos", bos):
        settings.append(f"{'with' if bos else 'without'} BOS in front")
    return ", ".join([str(about.get("dataset", "unnamed")), *settings])


def _positions(store: ActivationStore, other: ActivationStore) -> str:
    name = str(store.manifest.get("about", {}).get("positions", "unnamed"))
    settings = _settings(store, other, "positions_settings")
    return ", ".join([name, *settings, counted(store.n_rows, "row")])


def _settings(store: ActivationStore, other: ActivationStore, kind: str) -> list[str]:
    """Settings that differ from the other store's, as `key=value`."""
    own, others = (s.manifest.get("about", {}).get(kind, {}) for s in (store, other))
    different = {k: str(v) for k, v in own.items() if k not in others or others[k] != v}
    n = _SHOWN_CHARACTERS
    return [f"{k}={v if len(v) <= n else v[:n] + '…'}" for k, v in different.items()]


_DESCRIPTIONS: Mapping[str, Callable[[ActivationStore, ActivationStore], str]] = {
    "texts": _texts,
    "positions": _positions,
    "weights": _model,
    "tokenizer": _model,
}
"""Ingredient that is a hash -> function of (store, other store) that describes what is hashed."""


def _common(first: ActivationStore, second: ActivationStore) -> str:
    """What the two stores' texts have in common; empty where a rows table is damaged."""
    tables = [s.saved_rows(["text"]) for s in (first, second)]
    if any(rows is None for rows in tables):
        return ""
    one, two = (list(dict.fromkeys(rows["text"])) for rows in tables if rows is not None)
    if one == two:
        return "; the same texts, other tokens"
    if set(one) == set(two):
        return "; the same texts in another order"
    return f"; {counted(len(set(one) & set(two)), 'text')} in both"


_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_SPANS = {"h": 3600, "d": 86400, "w": 7 * 86400}


def folders(cache_dir: str | Path) -> list[Path]:
    """Folders of all stores, readable or not, the least recently used first."""
    with_files = [
        folder
        for folder in Path(cache_dir).glob("activations/*")
        if folder.is_dir() and ((folder / MANIFEST).exists() or files_of_shards(folder))
    ]
    return sorted(with_files, key=lambda folder: (last_used(folder), folder.name))


def stores(cache_dir: str | Path) -> list[ActivationStore]:
    """All readable stores, the least recently used first."""
    readable = []
    for folder in folders(cache_dir):
        with suppress(StoreError):
            readable.append(ActivationStore.open(folder))
    return readable


def last_used(folder: Path) -> float:
    """Time of the last use of a store by a run, in seconds since the epoch."""
    marks = [folder / USED, folder / MANIFEST, folder]
    return next(mark for mark in marks if mark.exists()).stat().st_mtime


def size(folder: Path) -> int:
    """Size of a folder in bytes."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def listing(cache_dir: str | Path) -> pd.DataFrame:
    """A row per store: key, model, dataset, positions, n_rows, hookpoints, bytes, last_used."""
    columns = ["key", "model", "dataset", "positions", "n_rows", "dtype", "hookpoints"]
    rows = []
    for store in stores(cache_dir):
        about, ingredients = store.manifest.get("about", {}), store.manifest["ingredients"]
        rows.append(
            {
                "key": store.path.name,
                "model": ingredients.get("model"),
                "dataset": about.get("dataset"),
                "positions": about.get("positions"),
                "n_rows": store.n_rows,
                "dtype": ingredients.get("dtype"),
                "hookpoints": ", ".join(store.manifest["hookpoints"]),
                "bytes": size(store.path),
                "last_used": datetime.datetime.fromtimestamp(last_used(store.path)),
            }
        )
    return pd.DataFrame(rows, columns=[*columns, "bytes", "last_used"])


def format_listing(table: pd.DataFrame) -> str:
    """Format a listing as text, with units of sizes and times to the minute."""
    shown = table.rename(columns={"bytes": "size"})
    shown["size"] = [show_bytes(n) for n in table["bytes"]]
    shown["last_used"] = [f"{at:%Y-%m-%d %H:%M}" for at in table["last_used"]]
    return shown.to_string(index=False)


def damaged(store: ActivationStore) -> list[str]:
    """Damaged files: `<hookpoint>/<shard>` for a listed shard. All files are hashed."""
    checked = ActivationStore.open(store.path, verify=True)
    files = ["rows.parquet"] if checked.saved_rows() is None else []
    for name, shards in checked.manifest["hookpoints"].items():
        at = [Hookpoint.parse(name)]
        files += [f"{name}/{shard}" for shard in shards if checked.missing(at, [int(shard)])]
    return files


def unreadable(cache_dir: str | Path) -> list[Path]:
    """Folders of stores whose manifest is missing or damaged, sorted by name."""
    readable = {store.path for store in stores(cache_dir)}
    return sorted(folder for folder in folders(cache_dir) if folder not in readable)


@dataclass(frozen=True)
class Pruned:
    """Result of pruning."""

    removed: list[str]
    """Keys of the stores removed."""
    skipped: dict[str, str]
    """Key -> reason, for stores that exceed the limits and could not be removed."""
    n_bytes: int
    """Bytes of the remaining stores."""


def prune(cache_dir: str | Path, *, max_size: str | None, max_age: str | None) -> Pruned:
    """Remove stores not used for `max_age`, then the least recently used until `max_size` is met.

    Files of earlier versions that nothing reads are removed from every store first. A store that a
    process reads or writes is kept, and so is a read-only one. Raises ConfigError where no limit is
    set or a limit cannot be parsed.
    """
    if max_size is None and max_age is None:
        raise ConfigError(
            "task.action=prune needs a limit: type task.max_size=20GB or task.max_age=30d"
        )
    n_bytes = None if max_size is None else _parse("task.max_size", max_size, _UNITS, "20GB")
    span = None if max_age is None else _parse("task.max_age", max_age, _SPANS, "30d")
    candidates = folders(cache_dir)
    for folder in candidates:
        _remove_joined_files(folder)
    sizes = {folder: size(folder) for folder in candidates}
    total, removed, skipped = sum(sizes.values()), [], {}
    for folder in candidates:
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
            skipped[folder.name] = reason
    return Pruned(removed, skipped, total)


def _remove_joined_files(folder: Path) -> None:
    """Remove the second copies of shards that earlier versions wrote, which nothing reads."""
    for file in folder.glob("layer_*/*.bin"):
        # A read-only store keeps its files.
        with suppress(OSError):
            file.unlink()


def _parse(key: str, text: str, units: Mapping[str, int], example: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", str(text).lower())
    if not match or match[2] not in units:
        raise ConfigError(
            f"{key}={text} cannot be read; type a number with one of {', '.join(units)}, "
            f"such as {key}={example}"
        )
    return float(match[1]) * units[match[2]]


def _remove(folder: Path) -> str | None:
    """Remove a store that no process uses; otherwise return why it is kept."""
    with ExitStack() as locks:
        # Marks are made under this lock, so that none can appear after this check.
        if not _hold(locks, folder / ".create.lock"):
            return "a process is opening it"
        if reading := users(folder):
            return f"in use by {', '.join(reading)}"
        for lock in sorted((folder / LOCKS).glob("*.lock")):
            if not _hold(locks, lock):
                return "a process is writing it"
        # Without its manifest the folder is no longer a store, even if what follows fails.
        remove_manifest(folder)
        shutil.rmtree(folder, ignore_errors=True)
    return None


def _hold(locks: ExitStack, path: Path) -> bool:
    lock = try_lock(path)
    if lock is not None:
        locks.callback(lock.release)
    return lock is not None


def find(cache_dir: str | Path, key: str) -> ActivationStore:
    """The store whose key begins with `key`. Raises ConfigError where none or several do."""
    keys = {s.path.name: s for s in stores(cache_dir)}
    matches = [name for name in keys if name.startswith(str(key))]
    if len(matches) != 1:
        problem = f"{len(matches)} keys begin with it" if matches else "no key begins with it"
        raise ConfigError(f"stores={key}: {problem}; {cache_dir} holds {', '.join(keys) or 'none'}")
    return keys[matches[0]]


def verify(chosen: Sequence[ActivationStore]) -> dict[str, list[str]]:
    """Key of each damaged store -> its damaged files."""
    files = {store.path.name: damaged(store) for store in chosen}
    return {key: names for key, names in files.items() if names}


def collect(cfg: RunConfig, context: RunContext) -> Result:
    """Store every stream of `task.streams` at every layer in one pass, or one `shard` of it."""
    if cfg.layer is None:
        raise ConfigError("layer is not set; type layer=12 or 'layer=[0,1,2]'")
    task = cfg.task
    assert isinstance(task, CollectConfig)
    model = language_model(cfg, context.objects)
    hookpoints = [Hookpoint(n, s) for n in parse_layers(cfg.layer) for s in task.streams]
    with context.stage("collect"):
        part = None if task.shard is None else Part(task.shard, task.n_shards)
        collected = collect_examples(cfg, model, hookpoints, context.prefetch, part)
    skips, store = collected.placement.skips, collected.store
    result = Result(
        metrics=collected.metrics,
        tables=collected.tables,
        notes=[
            *model.notes,
            *collected.examples.notes,
            f"store: {store.path}",
            *_missing_shards_notes(task, store, hookpoints),
        ],
    )
    about = {"device": str(model.device), "model": describe_model(model), **collected.provenance}
    return save_run(context, cfg, result, skips, about)


def _missing_shards_notes(
    task: CollectConfig, store: ActivationStore, hookpoints: list[Hookpoint]
) -> list[str]:
    """A note on the shards that other parts have still to compute."""
    if task.shard is None:
        return []
    n_missing, n = len(store.missing(hookpoints)), len(store.shard_bounds)
    if not n_missing:
        return []
    return [f"{n - n_missing} of {n} shards are there; the other parts make the rest"]


def manage(cfg: RunConfig, context: RunContext) -> Result:
    """Do `action`, and save the table of the stores that remain as stores.parquet.

    action=compare saves its lines as compared.parquet too, and reports nothing else. Raises
    StoreError, after listing everything in the log, where action=verify finds damage.
    """
    task = cfg.task
    assert isinstance(task, CacheConfig)
    notes: list[str] = []
    compared: dict[str, pd.DataFrame] = {}
    damage = None
    if task.action == "verify":
        damaged_manifests = unreadable(cfg.cache_dir)
        damaged = verify(stores(cfg.cache_dir))
        notes += [f"{key}: damaged {', '.join(files)}" for key, files in damaged.items()]
        damage = _damage(damaged, damaged_manifests)
        notes += [] if damage else ["all sound"]
    elif task.action == "prune":
        pruned = prune(cfg.cache_dir, max_size=task.max_size, max_age=task.max_age)
        notes.append(f"removed {', '.join(pruned.removed) or 'nothing'}")
        notes += [f"{key} stays: {reason}" for key, reason in pruned.skipped.items()]
    elif task.action == "compare":
        if len(task.stores) != 2:
            raise ConfigError(
                """task.action=compare takes two keys; type 'task.stores=["17e1","9e9a"]'"""
            )
        first, second = (find(cfg.cache_dir, key) for key in task.stores)
        lines = differences(first, second) or ["the same ingredients"]
        compared["compared"] = pd.DataFrame({"difference": lines})
        notes += [headline(first), headline(second), *lines]
    table = listing(cfg.cache_dir)
    notes += [
        f"{folder.name}: missing or damaged manifest.json, {show_bytes(size(folder))}"
        for folder in unreadable(cfg.cache_dir)
    ]
    if not compared:
        notes.insert(0, f"{len(table)} stores, {show_bytes(int(table['bytes'].sum()))}")
    result = Result(
        metrics={"cache/n_stores": len(table), "cache/bytes": int(table["bytes"].sum())},
        tables={"stores": table, **compared},
        notes=notes,
    )
    result = save_run(context, cfg, result, [], {})
    if damage is not None:
        for line in [*format_listing(table).splitlines(), *notes]:
            log.info("%s", line)
        raise StoreError(damage)
    return result


def _damage(damaged: Mapping[str, Sequence[str]], unreadable: Sequence[Path]) -> str | None:
    """One line that says what is damaged and what to type; None if nothing is."""
    parts = []
    if damaged:
        files = "; ".join(f"{key}: {', '.join(names)}" for key, names in damaged.items())
        parts.append(
            f"damaged: {files}; run what needs them with verify=true, which computes them again"
        )
    if unreadable:
        folders = ", ".join(map(str, unreadable))
        parts.append(
            f"manifest.json cannot be read in {folders}: the command that wrote it writes it again "
            "from its shards"
        )
    return "; ".join(parts) or None
