"""task=cache: list, verify, prune and compare the activation stores of `cache_dir`."""

from saexp.activations import cache
from saexp.activations.files import show_bytes
from saexp.config import RunConfig
from saexp.context import RunContext
from saexp.errors import ConfigError
from saexp.registry import did_you_mean
from saexp.results import TaskResult
from saexp.tasks.saving import write_provenance, write_result

ACTIONS = ("list", "verify", "prune", "compare")


def manage(cfg: RunConfig, context: RunContext) -> TaskResult:
    """Do `action`; the table of what is there afterwards is saved as stores.parquet."""
    if cfg.action not in ACTIONS:
        raise ConfigError(f"action={cfg.action}: {did_you_mean(cfg.action, ACTIONS)}")
    notes = []
    if cfg.action == "verify":
        bad = cache.verify(cache.stores(cfg.cache_dir))
        notes += [f"{key}: damaged {', '.join(shards)}" for key, shards in bad.items()]
        notes += ["the next run that needs them computes them again"] if bad else ["all sound"]
    elif cfg.action == "prune":
        removed = cache.prune(cfg.cache_dir, max_size=cfg.max_size, max_age=cfg.max_age)
        notes.append(f"removed {', '.join(removed) or 'nothing'}")
    elif cfg.action == "compare":
        if len(cfg.stores) != 2:
            raise ConfigError("""action=compare takes two keys; type 'stores=["17e1","9e9a"]'""")
        first, second = (cache.find(cfg.cache_dir, key) for key in cfg.stores)
        notes += cache.differences(first, second) or ["the same ingredients"]
    table = cache.listing(cfg.cache_dir)
    notes = [f"{len(table)} stores, {show_bytes(int(table['bytes'].sum()))}", *notes]
    result = TaskResult(
        metrics={"cache/n_stores": len(table), "cache/bytes": int(table["bytes"].sum())},
        tables={"stores": table},
        notes=notes,
    )
    write_result(context.folder, result)
    write_provenance(context, cfg, notes, [])
    return result
