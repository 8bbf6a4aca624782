"""task=collect: activations into the store, nothing else."""

from saexp.activations.collector import Part
from saexp.activations.store import ActivationStore
from saexp.config import CollectConfig, RunConfig, parse_layers
from saexp.context import RunContext
from saexp.errors import ConfigError
from saexp.models.hookpoints import Hookpoint
from saexp.pipeline.collect import gather
from saexp.pipeline.objects import about_model, language_model
from saexp.pipeline.run_folder import skips_table, write_provenance, write_result
from saexp.results import TaskResult


def collect(cfg: RunConfig, context: RunContext) -> TaskResult:
    """Store every stream of `task.streams` at every layer, in one pass; with `shard`, a part."""
    if cfg.layer is None:
        raise ConfigError("layer is not set; type layer=12 or 'layer=[0,1,2]'")
    task = cfg.task
    assert isinstance(task, CollectConfig)
    model = language_model(cfg)
    hookpoints = [Hookpoint(n, s) for n in parse_layers(cfg.layer) for s in task.streams]
    with context.stage("collect"):
        part = None if task.shard is None else Part(task.shard, task.n_shards)
        gathered = gather(cfg, model, hookpoints, context.ahead, part)
    skips = gathered.placement.skips
    result = TaskResult(
        metrics=gathered.metrics,
        tables={"rows": gathered.placement.rows, "skips": skips_table(skips)},
        notes=[
            *gathered.examples.notes,
            f"store: {gathered.store.path}",
            *_left(task, gathered.store, hookpoints),
        ],
    )
    write_result(context, result)
    write_provenance(
        context,
        cfg,
        result.notes,
        skips,
        device=str(model.device),
        model=about_model(model),
        store={"key": gathered.store.path.name, "path": str(gathered.store.path)},
        tokens_forwarded=gathered.stats.tokens_forwarded,
    )
    return result


def _left(task: CollectConfig, store: ActivationStore, hookpoints: list[Hookpoint]) -> list[str]:
    """What other parts have still to do."""
    left, n = len(store.missing(hookpoints)), len(store.shard_bounds)
    if task.shard is None or not left:
        return []
    return [f"{n - left} of {n} shards are there; the other parts make the rest"]
