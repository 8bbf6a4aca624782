"""task=analyze: collect, encode, contrast, steer, report."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from saexp import registry
from saexp.analysis.base import AnalysisInputs
from saexp.config import RunConfig
from saexp.context import RunContext
from saexp.latents.encode import Latents
from saexp.models.loading import LanguageModel
from saexp.pipeline.collect import Gathered, gather, gather_background, has_neutral, settle_bos
from saexp.pipeline.intervene import (
    AtLayer,
    all_of,
    at_layers,
    check_steerable,
    intervene,
    saes_by_layer,
)
from saexp.pipeline.objects import (
    CONTRASTED,
    about_model,
    analysed,
    encoded,
    encoded_neutral,
    high_norm_notes,
    language_model,
    sparse_autoencoder,
)
from saexp.pipeline.run_folder import clean_metrics, skips_table, write_provenance, write_result
from saexp.pipeline.validation import (
    add_scores,
    attribution,
    check_sae,
    fits_here,
    neighbours,
    settle_factor,
    with_neighbours,
)
from saexp.reports.figures import run_figures
from saexp.reports.html import write_report
from saexp.results import TaskResult
from saexp.saes.sae import SparseAutoencoder
from saexp.tasks.describe import describe

N_SHOWN = 4
"""Selected latents per direction whose values go into activations.parquet."""


def analyze(cfg: RunConfig, context: RunContext) -> TaskResult:
    """The whole path of a run; every step's numbers are on disk before the next begins."""
    if cfg.analyzer.name != "contrast":
        return describe(cfg, context)
    with context.stage("load"):
        model = language_model(cfg)
        sae = sparse_autoencoder(cfg, model)
    return contrast_with(cfg, context, model, sae)


def contrast_with(
    cfg: RunConfig, context: RunContext, model: LanguageModel, sae: SparseAutoencoder
) -> TaskResult:
    """The path of a run with analyzer=contrast, for a model and an SAE that are loaded already."""
    with context.stage("load"):
        saes = saes_by_layer(cfg, model, sae)
        every = all_of(sae, saes)
        model, settled = settle_bos(cfg, model, every)
    with context.stage("collect"):
        streams = [h for s in every for h in s.hookpoints]
        gathered = gather(cfg, model, streams, context.ahead)
        check_steerable(cfg, gathered.examples, model)
        neutral = None
        if has_neutral(cfg, model):
            near = [h for s in every for h in neighbours(cfg, s, model) if h not in streams]
            neutral = gather_background(
                cfg,
                model,
                [*streams, *near],
                cfg.analyzer.n_background,
                with_neighbours(cfg, context.ahead),
            )
    with context.stage("encode"):
        gathered = replace(gathered, neutral=neutral)
        notes = settle_factor(cfg, sae, neutral)
        latents, stream_metrics = encoded(gathered, sae)
        background = encoded_neutral(neutral, sae)
        notes += high_norm_notes(gathered, sae, CONTRASTED)
    with context.stage("check"):
        checked = check_sae(cfg, sae, model, gathered, neutral)
    forwarded = gathered.stats.tokens_forwarded
    if neutral is not None:
        forwarded += neutral.stats.tokens_forwarded
        notes = [*neutral.examples.notes, *notes]
    notes = [*gathered.examples.notes, *notes]
    result = TaskResult(metrics={**gathered.metrics, **stream_metrics}, notes=notes)
    result.merge(settled)
    result.merge(checked)
    result.notes += [] if checked.notes else fits_here(result.metrics)
    result.metrics["collection/tokens_forwarded"] = forwarded
    result.tables["rows"] = gathered.placement.rows
    result.tables["skips"] = skips_table(gathered.placement.skips)
    with context.stage("contrast"):
        analyzer = registry.build("analyzer", cfg.analyzer)
        result.merge(
            analysed(
                analyzer,
                cfg.analyzer,
                AnalysisInputs(
                    latents=latents,
                    groups=gathered.examples.groups,
                    layer=sae.hookpoint.layer,
                    background=background,
                    texts=gathered.placement.texts,
                    neutral_texts=() if neutral is None else neutral.placement.texts,
                ),
            )
        )
    table = result.tables.get("latents")
    if table is not None:
        result.tables["activations"] = _activations(latents, table)
        with context.stage("scores"):
            if cfg.analyzer.scores:
                key = "" if neutral is None else neutral.store.path.name
                result.notes += add_scores(cfg, table, model, sae, background, key)
            if cfg.analyzer.attribution:
                result.merge(attribution(cfg, model, sae, gathered))
    _save(cfg, context, result, gathered, model, every, forwarded)
    if cfg.intervention.name != "none" and table is not None:
        with context.stage("intervene"):
            assert neutral is not None, "check_weights"
            own = AtLayer(sae, latents, table)
            layered, found = at_layers(cfg, saes, own, gathered, neutral, model)
            result.merge(found)
            result.merge(intervene(cfg, latents, table, gathered, model, sae, layered))
    _save(cfg, context, result, gathered, model, every, forwarded)
    with context.stage("report"):
        result.figures = run_figures(context.folder)
        write_report(context.folder, result.figures)
    return result


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


def _save(
    cfg: RunConfig,
    context: RunContext,
    result: TaskResult,
    gathered: Gathered,
    model: LanguageModel,
    saes: list[SparseAutoencoder],
    forwarded: int,
) -> None:
    result.metrics = clean_metrics(result.metrics, result.notes)
    write_result(context, result)
    write_provenance(
        context,
        cfg,
        result.notes,
        gathered.placement.skips,
        device=str(model.device),
        model=about_model(model),
        sae=_about(saes[0]),
        saes=[_about(sae) for sae in saes],
        store={"key": gathered.store.path.name, "path": str(gathered.store.path)},
        tokens_forwarded=forwarded,
        groups=list(gathered.examples.groups),
        dataset={"name": gathered.examples.name, "n_examples": len(gathered.examples)},
    )


def _about(sae: SparseAutoencoder) -> dict[str, Any]:
    return {
        **sae.metadata,
        "hookpoint": sae.hookpoint.name,
        "hookpoint_out": sae.hookpoint_out.name if sae.hookpoint_out else None,
        "d_sae": sae.d_sae,
        "architecture": sae.architecture,
    }
