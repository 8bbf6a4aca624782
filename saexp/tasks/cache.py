"""task=cache: list, verify, prune and compare the activation stores of `cache_dir`."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from saexp.activations import stores
from saexp.activations.stores import differences, headline
from saexp.config import CacheConfig, RunConfig
from saexp.context import RunContext
from saexp.errors import ConfigError, StoreError
from saexp.files import show_bytes
from saexp.pipeline.run_folder import write_provenance, write_result
from saexp.results import TaskResult

log = logging.getLogger(__name__)


def manage(cfg: RunConfig, context: RunContext) -> TaskResult:
    """Do `action`; the table of what is there afterwards is saved as stores.parquet.

    Of action=compare, its lines are saved as compared.parquet too, and nothing else is told.
    Raises StoreError, after listing everything in the log, where action=verify finds damage.
    """
    task = cfg.task
    assert isinstance(task, CacheConfig)
    notes: list[str] = []
    compared: dict[str, pd.DataFrame] = {}
    damage = None
    if task.action == "verify":
        lost = stores.unreadable(cfg.cache_dir)
        bad = stores.verify(stores.stores(cfg.cache_dir))
        notes += [f"{key}: damaged {', '.join(files)}" for key, files in bad.items()]
        damage = _damage(bad, lost)
        notes += [] if damage else ["all sound"]
    elif task.action == "prune":
        pruned = stores.prune(cfg.cache_dir, max_size=task.max_size, max_age=task.max_age)
        notes.append(f"removed {', '.join(pruned.removed) or 'nothing'}")
        notes += [f"{key} stays: {reason}" for key, reason in pruned.kept.items()]
    elif task.action == "compare":
        if len(task.stores) != 2:
            raise ConfigError(
                """task.action=compare takes two keys; type 'task.stores=["17e1","9e9a"]'"""
            )
        first, second = (stores.find(cfg.cache_dir, key) for key in task.stores)
        told = differences(first, second) or ["the same ingredients"]
        compared["compared"] = pd.DataFrame({"difference": told})
        notes += [headline(first), headline(second), *told]
    table = stores.listing(cfg.cache_dir)
    notes += [
        f"{folder.name}: missing or damaged manifest.json, {show_bytes(stores.size(folder))}"
        for folder in stores.unreadable(cfg.cache_dir)
    ]
    if not compared:
        notes.insert(0, f"{len(table)} stores, {show_bytes(int(table['bytes'].sum()))}")
    result = TaskResult(
        metrics={"cache/n_stores": len(table), "cache/bytes": int(table["bytes"].sum())},
        tables={"stores": table, **compared},
        notes=notes,
    )
    write_result(context, result)
    write_provenance(context, cfg, notes, [])
    if damage is not None:
        for line in [*stores.for_reading(table).splitlines(), *notes]:
            log.info("%s", line)
        raise StoreError(damage)
    return result


def _damage(bad: Mapping[str, Sequence[str]], lost: Sequence[Path]) -> str | None:
    """One line: what is damaged, and what to type."""
    parts = []
    if bad:
        named = "; ".join(f"{key}: {', '.join(files)}" for key, files in bad.items())
        parts.append(
            f"damaged: {named}; run what needs them with verify=true, which computes them again"
        )
    if lost:
        named = ", ".join(map(str, lost))
        parts.append(
            f"manifest.json cannot be read in {named}: the command that made it makes it anew from "
            "its shards"
        )
    return "; ".join(parts) or None
