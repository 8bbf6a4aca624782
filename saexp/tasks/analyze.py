"""task=analyze: collect, encode, contrast, steer, report."""

import numpy as np
import pandas as pd

from saexp import registry
from saexp.analysis.base import AnalysisInputs
from saexp.config import RunConfig
from saexp.context import RunContext
from saexp.data.examples import ExampleSet
from saexp.errors import ConfigError
from saexp.interventions.edits import LatentFacts
from saexp.interventions.run import run_intervention
from saexp.latents.encode import Latents, encode_store
from saexp.latents.summary import active_quantile
from saexp.models.loading import LanguageModel
from saexp.reports.figures import run_figures
from saexp.reports.html import write_report
from saexp.results import TaskResult
from saexp.saes.base import SparseAutoencoder
from saexp.tasks.checking import check_sae, neighbours, with_neighbours
from saexp.tasks.gathering import Gathered, gather, gather_background
from saexp.tasks.loaded import language_model, sparse_autoencoder
from saexp.tasks.saving import clean_metrics, skips_table, write_provenance, write_result

N_SHOWN = 4
"""Selected latents per direction whose values go into activations.parquet."""


def analyze(cfg: RunConfig, context: RunContext) -> TaskResult:
    """The whole path of a run; every step's numbers are on disk before the next begins."""
    with context.stage("load"):
        model = language_model(cfg)
        sae = sparse_autoencoder(cfg, model)
    with context.stage("collect"):
        gathered = gather(cfg, model, [sae.hookpoint], context.ahead)
        _check_steerable(cfg, gathered.examples)
        neutral = gather_background(
            cfg,
            model,
            [sae.hookpoint, *neighbours(cfg, sae, model)],
            cfg.analyzer.n_background,
            with_neighbours(cfg, context.ahead),
        )
    with context.stage("encode"):
        latents, stream_metrics = encode_store(gathered.store, sae, gathered.placement.rows)
        background, _ = encode_store(neutral.store, sae, neutral.placement.rows)
    with context.stage("check"):
        checked = check_sae(cfg, sae, model, gathered, neutral)
    forwarded = gathered.stats.tokens_forwarded + neutral.stats.tokens_forwarded
    result = TaskResult(metrics={**gathered.metrics, **stream_metrics})
    result.merge(checked)
    result.metrics["collection/tokens_forwarded"] = forwarded
    result.tables["rows"] = gathered.placement.rows
    result.tables["skips"] = skips_table(gathered.placement.skips)
    with context.stage("contrast"):
        analyzer = registry.build("analyzer", cfg.analyzer)
        result.merge(
            analyzer.analyze(
                AnalysisInputs(
                    latents=latents,
                    groups=gathered.examples.groups,
                    layer=sae.hookpoint.layer,
                    background=background,
                )
            )
        )
    table = result.tables.get("latents")
    if table is not None:
        result.tables["activations"] = _activations(latents, table)
    _save(cfg, context, result, gathered, model, sae, forwarded)
    if cfg.intervention.name != "none" and table is not None:
        with context.stage("intervene"):
            intervention = registry.build("intervention", cfg.intervention)
            facts = _facts(latents, table, gathered, sae, cfg)
            test = [e for e in gathered.examples.examples if e.split == "test"]
            result.merge(
                run_intervention(
                    intervention, facts, model, sae, test, cfg.dataset.max_length, cfg.cache_dir
                )
            )
    _save(cfg, context, result, gathered, model, sae, forwarded)
    with context.stage("report"):
        result.figures = run_figures(context.folder)
        write_report(context.folder, result.figures)
    return result


def _check_steerable(cfg: RunConfig, examples: ExampleSet) -> None:
    """Say before the long work what the intervention would lack."""
    if cfg.intervention.name == "none":
        return
    for name in cfg.intervention.outcomes:
        registry.resolve("outcome", name)
    if not cfg.intervention.where.startswith("entity"):
        return
    if not any(e.as_prompt().spans for e in examples.examples):
        raise ConfigError(
            f"intervention.where={cfg.intervention.where} needs entities in the prompts, and this "
            "data set has none; type intervention.where=last, or intervention=none"
        )


def _activations(latents: Latents, table: pd.DataFrame) -> pd.DataFrame:
    """Values of the leading selected latents at every row, for histograms and examples."""
    chosen = table[table["selected"] & (table["rank"] <= N_SHOWN)]["latent"].tolist()
    columns = ["example_id", "group", "split", "entity_type", "text"]
    parts = []
    for latent in chosen:
        values = np.asarray(latents.csr[:, [latent]].todense()).ravel()
        parts.append(latents.rows[columns].assign(latent=latent, value=values))
    if not parts:
        return pd.DataFrame(columns=[*columns, "latent", "value"])
    return pd.concat(parts, ignore_index=True)


def _facts(
    latents: Latents,
    table: pd.DataFrame,
    gathered: Gathered,
    sae: SparseAutoencoder,
    cfg: RunConfig,
) -> LatentFacts:
    """What edits need, measured on the train split."""
    first, second = gathered.examples.groups
    train = (latents.rows["split"] == "train").fillna(False).to_numpy(dtype=bool)
    csr = latents.csr[train]
    ids = table["latent"].to_numpy()
    facts = table[["latent", "direction", "selected", "rank", "q_value"]].copy()
    facts[f"mean_{first}"], facts[f"mean_{second}"] = (
        table[f"mean_{first}"],
        table[f"mean_{second}"],
    )
    facts["frequency"] = (table[f"freq_{first}"] + table[f"freq_{second}"]) / 2
    facts["norm"] = sae.directions(ids.tolist()).float().norm(dim=-1).cpu().numpy()
    facts["max_act"] = active_quantile(csr, ids, 1.0)
    facts["p99_act"] = active_quantile(csr, ids, 0.99)
    return LatentFacts(
        table=facts,
        groups=(first, second),
        mean_norm=gathered.store.mean_norm(sae.hookpoint),
        alpha=cfg.analyzer.alpha,
        directions=sae.directions,
    )


def _save(
    cfg: RunConfig,
    context: RunContext,
    result: TaskResult,
    gathered: Gathered,
    model: LanguageModel,
    sae: SparseAutoencoder,
    forwarded: int,
) -> None:
    result.metrics = clean_metrics(result.metrics, result.notes)
    write_result(context.folder, result)
    write_provenance(
        context,
        cfg,
        result.notes,
        gathered.placement.skips,
        device=str(model.device),
        model={
            "name": model.name,
            "revision": model.cfg.revision,
            "fingerprint": model.fingerprint,
            "n_layers": model.n_layers,
            "d_model": model.d_model,
        },
        sae={
            **sae.metadata,
            "hookpoint": sae.hookpoint.name,
            "d_sae": sae.d_sae,
            "architecture": sae.architecture,
        },
        store={"key": gathered.store.path.name, "path": str(gathered.store.path)},
        tokens_forwarded=forwarded,
        groups=list(gathered.examples.groups),
        dataset={"name": gathered.examples.name, "n_examples": len(gathered.examples)},
    )
