"""task=collect and task=cache: fill the activation stores; list, verify, prune and compare them."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from saexp.activations import store_management as stores
from saexp.activations.collector import Part
from saexp.activations.store import ActivationStore
from saexp.activations.store_management import differences, headline
from saexp.config import CacheConfig, CollectConfig, RunConfig, parse_layers
from saexp.context import RunContext
from saexp.errors import ConfigError, StoreError
from saexp.files import show_bytes
from saexp.models.hookpoints import Hookpoint
from saexp.pipeline.collect import collect_examples
from saexp.pipeline.objects import describe_model, language_model
from saexp.pipeline.run_folder import save_run
from saexp.results import Result

log = logging.getLogger(__name__)


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
        unreadable = stores.unreadable(cfg.cache_dir)
        damaged = stores.verify(stores.stores(cfg.cache_dir))
        notes += [f"{key}: damaged {', '.join(files)}" for key, files in damaged.items()]
        damage = _damage(damaged, unreadable)
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
        lines = differences(first, second) or ["the same ingredients"]
        compared["compared"] = pd.DataFrame({"difference": lines})
        notes += [headline(first), headline(second), *lines]
    table = stores.listing(cfg.cache_dir)
    notes += [
        f"{folder.name}: missing or damaged manifest.json, {show_bytes(stores.size(folder))}"
        for folder in stores.unreadable(cfg.cache_dir)
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
        for line in [*stores.format_listing(table).splitlines(), *notes]:
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
