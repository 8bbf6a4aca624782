"""task=collect: activations into the store, nothing else."""

from saexp.activations.collector import Part
from saexp.activations.store import ActivationStore
from saexp.config import CollectConfig, RunConfig, parse_layers
from saexp.context import RunContext
from saexp.errors import ConfigError
from saexp.models.hookpoints import Hookpoint
from saexp.pipeline.collect import collect_examples
from saexp.pipeline.objects import describe_model, language_model
from saexp.pipeline.run_folder import save_run, skips_table
from saexp.results import Result


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
        tables={"rows": collected.placement.rows, "skips": skips_table(skips)},
        notes=[
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
    n_missing, n = len(store.missing(hookpoints)), len(store.shard_bounds)
    if task.shard is None or not n_missing:
        return []
    return [f"{n - n_missing} of {n} shards are there; the other parts make the rest"]
