"""task=analyze: collect, encode, validate the SAE, analyze, intervene, report."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from saexp import registry
from saexp.analysis import as_analyzer
from saexp.config import RunConfig
from saexp.context import RunContext
from saexp.data import Skip
from saexp.latents import Latents
from saexp.pipeline import EncodedLayer, RunData, Session
from saexp.pipeline.intervene import check_steerable, intervene, needs_selected_latents
from saexp.pipeline.objects import describe_sae
from saexp.pipeline.run_folder import save_run, unexplained_notes, write_provenance
from saexp.pipeline.validation import attribute_latents, score_latents, validate_sae
from saexp.reports.analysis import findings, report_figures, save_figures, write_report
from saexp.reports.saved_run import SavedRun
from saexp.results import Result

N_SHOWN = 4
"""Selected latents per direction whose activations go into activations.parquet."""


def analyze(cfg: RunConfig, context: RunContext) -> Result:
    """Run an analyzer on the latents of one layer, or of each layer where it takes several."""
    with context.stage("load"):
        analyzer = as_analyzer(registry.build("analyzer", cfg.analyzer))
        session = Session.open(cfg, context, analyzer)
    return analyze_session(session)


def analyze_session(session: Session) -> Result:
    """All stages after loading; results are on disk before the intervention begins."""
    cfg, context = session.cfg, session.context
    with context.stage("collect"):
        data = session.collect()
        if session.selects_latents or not needs_selected_latents(cfg):
            check_steerable(cfg, data.examples.examples, session.model)
    result, entries, layer = data.result + session.bos, [], None
    skips = data.examples.placement.skips
    for cell in session.cells:
        layer, part = _analyze_layer(session, cell, data)
        result = _joined(result, part)
        entries.append(describe_sae(layer.sae))
    about = session.provenance(data, entries)
    if cfg.intervention.name != "none" and layer is not None:
        save_run(context, cfg, result, skips, about)
        with context.stage("intervene"):
            result.merge(_intervene(session, layer, data, result))
    # Where the analyzer selects no latent, its own note says so.
    result.notes += unexplained_notes(result, cfg.analyzer.name if session.selects_latents else "")
    result = save_run(context, cfg, result, skips, about)
    save_figures(context.folder, result.figures)
    with context.stage("report"):
        result.figures = _write_page(cfg, context, result, skips, about)
    return result


def _analyze_layer(session: Session, cell: RunConfig, data: RunData) -> tuple[EncodedLayer, Result]:
    """One layer encoded, and the results of its validation and analysis.

    Where the run has several layers, metrics and figures end in `_layer_<n>`.
    """
    context = session.context
    with context.stage("encode"):
        layer = session.encode(cell, data)
    with context.stage("check"):
        result = layer.result + validate_sae(session, layer, data)
    with context.stage(session.cfg.analyzer.name):
        result.merge(session.analyze(layer, data))
    if session.selects_latents and "latents" in result.tables:
        with context.stage("scores"):
            result = _with_scores(session, layer, data, result)
    if session.takes_several_layers:
        for table in result.tables.values():
            if "layer" not in table:
                table.insert(0, "layer", layer.layer)
    if len(session.cells) > 1:
        suffix = f"_layer_{layer.layer}"
        result.metrics = {name + suffix: value for name, value in result.metrics.items()}
        result.figures = {name + suffix: figure for name, figure in result.figures.items()}
    return layer, result


def _joined(result: Result, part: Result) -> Result:
    """The result with that of a further layer: tables one below the other, equal notes once."""
    both = result.tables.keys() & part.tables.keys()
    tables = {
        name: pd.concat([result.tables[name], part.tables[name]], ignore_index=True)
        for name in both
    }
    return Result(
        metrics={**result.metrics, **part.metrics},
        tables={**result.tables, **part.tables, **tables},
        figures={**result.figures, **part.figures},
        notes=[*result.notes, *(n for n in part.notes if n not in result.notes)],
    )


def _with_scores(session: Session, layer: EncodedLayer, data: RunData, result: Result) -> Result:
    """The result with scores and attributions of the selected latents, and their activations."""
    cfg, table = session.cfg, result.tables["latents"]
    activations = {"activations": _activations(layer.latents, table)}
    result = replace(result, tables={**result.tables, **activations})
    if cfg.analyzer.scores:
        table, notes = score_latents(session, layer, data, table)
        result = replace(
            result, tables={**result.tables, "latents": table}, notes=[*result.notes, *notes]
        )
    if cfg.analyzer.attribution:
        result.merge(attribute_latents(session, layer, data))
    return result


def _activations(latents: Latents, table: pd.DataFrame) -> pd.DataFrame:
    """Activations of the leading selected latents at every row, for histograms and examples."""
    leading = table[table["selected"] & (table["rank"] <= N_SHOWN)]["latent"].tolist()
    columns = ["example_id", "group", "split", "entity_type", "text"]
    parts = []
    for latent in leading:
        values = np.asarray(latents.csr[:, [latent]].todense()).ravel()
        parts.append(latents.rows[columns].assign(latent=latent, value=values))
    if not parts:
        return pd.DataFrame(columns=[*columns, "latent", "value"])
    return pd.concat(parts, ignore_index=True)


def _intervene(session: Session, layer: EncodedLayer, data: RunData, result: Result) -> Result:
    """The causal test; of a run with several layers, a note."""
    if len(session.cells) > 1:
        note = (
            f"intervention={session.cfg.intervention.name} was not run: it takes one layer, and "
            f"layer= names {len(session.cells)}"
        )
        return Result(notes=[note])
    return intervene(session, layer, result.tables.get("latents"), data)


def _write_page(
    cfg: RunConfig,
    context: RunContext,
    result: Result,
    skips: Sequence[Skip],
    about: Mapping[str, Any],
) -> dict[str, go.Figure]:
    """report.html from the saved files alone, so that it can be rendered again; its figures."""
    folder = context.folder
    if cfg.analyzer.name != "contrast":
        about = {**about, "finding": findings(folder)}
        write_provenance(context, cfg, result, skips, about)
    run = SavedRun(folder)
    figures = report_figures(run)
    write_report(run, figures)
    return figures
