"""task=analyze with any analyzer but `contrast`: collect, encode, check, describe, report."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from saexp import registry
from saexp.analysis.base import AnalysisInputs
from saexp.config import DatasetConfig, RunConfig
from saexp.context import RunContext
from saexp.errors import ConfigError
from saexp.models.hookpoints import Hookpoint
from saexp.models.loading import LanguageModel
from saexp.pipeline.collect import Gathered, Wish, gather, gather_background, settle_bos, wish
from saexp.pipeline.intervene import (
    AtLayer,
    all_of,
    at_layers,
    check_steerable,
    intervene,
    saes_by_layer,
    selects,
)
from saexp.pipeline.objects import (
    ANALYSED,
    DESCRIBED,
    about_model,
    encoded,
    encoded_neutral,
    high_norm_notes,
    language_model,
    per_layer,
    sparse_autoencoder,
)
from saexp.pipeline.run_folder import clean_metrics, skips_table, write_provenance, write_result
from saexp.pipeline.validation import check_sae, neighbours, settle_factor, with_neighbours
from saexp.reports.analyses import analysis_figures, findings, save_figures, write_analysis_report
from saexp.results import TaskResult
from saexp.saes.sae import SparseAutoencoder

log = logging.getLogger(__name__)

_OWN_TABLES = ("rows", "skips", "check")
"""Tables that every run leaves; an analyzer's may not be called so."""


def describe(cfg: RunConfig, context: RunContext) -> TaskResult:
    """Run an analyzer on the latents of one layer, or of each layer where it takes several.

    What an analyzer may have beside `analyze(inputs) -> TaskResult`, all of it optional:
    `several_layers`, true where `layer` may be a list; `reads_acts`, false where it does without
    the activations themselves; `ordinary_only`, true where it leaves out the high-norm rows that
    `inputs.ordinary` marks; `transfer`, path of a second data set with the same groups, whose
    inputs are then handed to `analyze` as `transfer=`. Of several layers, tables get a column
    `layer` and metrics the ending `_layer_<n>`.
    """
    with context.stage("load"):
        model = language_model(cfg)
        analyzer = registry.build("analyzer", cfg.analyzer)
        several = bool(getattr(analyzer, "several_layers", False))
        cells = per_layer(cfg) if several else [cfg]
        layered = {}
        if len(cells) == 1:
            layered = saes_by_layer(cfg, model, sparse_autoencoder(cfg, model))
        hookpoints, near, wishes = _hookpoints(cells, model, layered)
        model, settled = settle_bos(cfg, model, wishes)
    with context.stage("collect"):
        gathered = gather(cfg, model, hookpoints, context.ahead)
        if not selects(cfg):
            check_steerable(cfg, gathered.examples, model)
        wanted = [*hookpoints, *(h for h in near if h not in hookpoints)]
        ahead = with_neighbours(cfg, context.ahead)
        neutral = gather_background(cfg, model, wanted, cfg.analyzer.n_background, ahead)
        gathered = dataclasses.replace(gathered, neutral=neutral)
        second = _second(cfg, analyzer, model, gathered, hookpoints)
    others = [neutral] if second is None else [neutral, second]
    forwarded = sum(g.stats.tokens_forwarded for g in (gathered, *others))
    result = TaskResult(metrics={**gathered.metrics}, notes=list(gathered.examples.notes))
    result.notes += neutral.examples.notes
    if second is not None:
        result.notes += [f"transfer: {note}" for note in second.examples.notes]
    result.merge(settled)
    result.metrics["collection/tokens_forwarded"] = forwarded
    result.tables["rows"] = gathered.placement.rows
    result.tables["skips"] = skips_table(gathered.placement.skips)
    parts, saes = [], []
    for cell in cells:
        sae = sparse_autoencoder(cell, model)
        part = _one_layer(cell, context, analyzer, model, sae, gathered, neutral, second)
        if len(cells) > 1:
            ending = f"_layer_{sae.hookpoint.layer}"
            part.metrics = {k + ending: v for k, v in part.metrics.items()}
            part.figures = {k + ending: v for k, v in part.figures.items()}
        parts.append(part)
        saes.append(_about(sae))
    for part in parts:
        result.metrics.update(part.metrics)
        result.notes += [n for n in part.notes if n not in result.notes]
        result.figures.update(part.figures)
    result.tables.update(_joined(parts))
    if cfg.intervention.name != "none":
        result.merge(_changed(cells, context, model, gathered, neutral, layered))
    result.metrics = clean_metrics(result.metrics, result.notes)
    result.notes += _undefined(result)
    write_result(context, result)
    save_figures(context.folder, result.figures)
    about = {
        "device": str(model.device),
        "model": about_model(model),
        "sae": _together(saes),
        "saes": saes,
        "store": {"key": gathered.store.path.name, "path": str(gathered.store.path)},
        "tokens_forwarded": forwarded,
        "groups": list(gathered.examples.groups),
        "dataset": {"name": gathered.examples.name, "n_examples": len(gathered.examples)},
        "tables": [name for name in result.tables if name not in _OWN_TABLES],
    }
    skips = gathered.placement.skips
    write_provenance(context, cfg, result.notes, skips, **about)
    with context.stage("report"):
        # From the files just written, so that the page can be made again from them alone.
        about["finding"] = findings(context.folder)
        write_provenance(context, cfg, result.notes, skips, **about)
        result.figures = analysis_figures(context.folder)
        write_analysis_report(context.folder, result.figures)
    return result


def _changed(
    cells: Sequence[RunConfig],
    context: RunContext,
    model: LanguageModel,
    gathered: Gathered,
    neutral: Gathered,
    saes: Mapping[int, SparseAutoencoder],
) -> TaskResult:
    """The causal test of latents that are named, on the run's own prompts."""
    cfg = cells[0]
    if len(cells) > 1:
        note = (
            f"intervention={cfg.intervention.name} was not run: it takes one layer, and "
            f"layer= names {len(cells)}"
        )
        return TaskResult(notes=[note])
    sae = sparse_autoencoder(cfg, model)
    with context.stage("intervene"):
        latents, _ = encoded(gathered, sae)
        own = AtLayer(sae, latents, None)
        layered, result = at_layers(cfg, saes, own, gathered, neutral, model)
        result.merge(intervene(cfg, latents, None, gathered, model, sae, layered))
        return result


def _hookpoints(
    cells: Sequence[RunConfig],
    model: LanguageModel,
    layered: Mapping[int, SparseAutoencoder],
) -> tuple[list[Hookpoint], list[Hookpoint], list[Wish]]:
    """What the SAEs read, the neighbours that their check looks at, and their word on BOS."""
    wanted, near, wishes = [], [], []
    for cell in cells:
        for sae in all_of(sparse_autoencoder(cell, model), layered):
            wanted += sae.hookpoints
            near += neighbours(cell, sae, model)
            wishes.append(wish(sae))
    return wanted, list(dict.fromkeys(near)), wishes


def _second(
    cfg: RunConfig,
    analyzer: Any,
    model: LanguageModel,
    gathered: Gathered,
    hookpoints: list[Hookpoint],
) -> Gathered | None:
    """The analyzer's second data set at the same positions, where it names one."""
    path = getattr(analyzer, "transfer", None)
    if path is None:
        return None
    dataset = DatasetConfig(
        name="csv" if Path(path).suffix == ".csv" else "jsonl",
        path=str(path),
        model_name=cfg.dataset.model_name,
        groups=list(gathered.examples.groups) or None,
        missing_values=cfg.dataset.missing_values,
        split=cfg.dataset.split,
        answer_space=cfg.dataset.answer_space,
        max_length=cfg.dataset.max_length,
        truncation=cfg.dataset.truncation,
        seed=cfg.dataset.seed,
    )
    second = gather(dataclasses.replace(cfg, dataset=dataset), model, hookpoints)
    return dataclasses.replace(second, neutral=gathered.neutral)


def _one_layer(
    cfg: RunConfig,
    context: RunContext,
    analyzer: Any,
    model: LanguageModel,
    sae: SparseAutoencoder,
    gathered: Gathered,
    neutral: Gathered,
    second: Gathered | None,
) -> TaskResult:
    with context.stage("encode"):
        notes = settle_factor(cfg, sae, neutral)
        background = encoded_neutral(neutral, sae)
        inputs, metrics = _inputs(cfg, analyzer, model, sae, gathered)
        inputs.background, inputs.neutral_texts = background, neutral.placement.texts
        only = getattr(analyzer, "ordinary_only", False)
        notes += high_norm_notes(gathered, sae, DESCRIBED if only else ANALYSED)
        more = {}
        if second is not None:
            other, _ = _inputs(cfg, analyzer, model, sae, second)
            more["transfer"] = dataclasses.replace(other, groups=inputs.groups)
    with context.stage("check"):
        checked = check_sae(cfg, sae, model, gathered, neutral)
    part = TaskResult(metrics={**metrics}, notes=notes)
    part.merge(checked)
    with context.stage(cfg.analyzer.name):
        found = analyzer.analyze(inputs, **more)
    name = cfg.analyzer.name
    if not isinstance(found, TaskResult):
        raise ConfigError(
            f"analyzer={name} gave {type(found).__name__}; analyze(inputs) must give a TaskResult"
        )
    for kind, taken in (("tables", _OWN_TABLES), ("metrics", part.metrics)):
        both = sorted(getattr(found, kind).keys() & set(taken))
        if both:
            raise ConfigError(
                f"analyzer={name}: {kind} called {', '.join(both)} are the run's own; rename them"
            )
    part.merge(found)
    if getattr(analyzer, "several_layers", False):
        for table in part.tables.values():
            if "layer" not in table:
                table.insert(0, "layer", sae.hookpoint.layer)
    return part


def _inputs(
    cfg: RunConfig,
    analyzer: Any,
    model: LanguageModel,
    sae: SparseAutoencoder,
    gathered: Gathered,
) -> tuple[AnalysisInputs, dict[str, float | None]]:
    at = sae.hookpoint
    latents, metrics = encoded(gathered, sae)
    ordinary = gathered.ordinary(sae.hookpoints)
    reads = getattr(analyzer, "reads_acts", True)
    inputs = AnalysisInputs(
        latents=latents,
        groups=gathered.examples.groups,
        layer=at.layer,
        acts=gathered.store.acts(at.layer, at.stream) if reads else None,
        texts=gathered.placement.texts,
        examples=gathered.examples.examples,
        model=model,
        sae=sae,
        max_length=cfg.dataset.max_length,
        ordinary=ordinary.mask,
        norm_limits=ordinary.limits,
    )
    return inputs, metrics


def _joined(parts: Sequence[TaskResult]) -> dict[str, pd.DataFrame]:
    """Each table of all layers under one another."""
    names = dict.fromkeys(name for part in parts for name in part.tables)
    return {
        name: pd.concat([p.tables[name] for p in parts if name in p.tables], ignore_index=True)
        for name in names
    }


def _undefined(result: TaskResult) -> list[str]:
    """One line that names the metrics that are null and in no note yet."""
    told = " ".join(result.notes)
    names = [k for k, v in result.metrics.items() if v is None and k not in told]
    bounds = [n for n in names if "_ci_" in n]
    listed = [n for n in names if n not in bounds]
    if bounds:
        listed.append(f"{len(bounds)} bounds of intervals (…_ci_low, …_ci_high)")
    if not listed:
        return []
    return [f"not defined with so few positions, units or resamples: {', '.join(listed)}"]


def _about(sae: SparseAutoencoder) -> dict[str, Any]:
    return {
        **sae.metadata,
        "hookpoint": sae.hookpoint.name,
        "hookpoint_out": sae.hookpoint_out.name if sae.hookpoint_out else None,
        "d_sae": sae.d_sae,
        "architecture": sae.architecture,
    }


def _together(saes: list[dict[str, Any]]) -> dict[str, Any]:
    """The one SAE, or the names and weights of all in one entry."""
    if len(saes) == 1:
        return saes[0]
    joined = {
        key: ", ".join(dict.fromkeys(str(sae.get(key)) for sae in saes))
        for key in ("name", "hookpoint", "d_sae", "architecture", "fingerprint")
    }
    controls = dict.fromkeys(sae["control"] for sae in saes if "control" in sae)
    control = {"control": ", ".join(controls)} if controls else {}
    return {**joined, **control, "n_saes": len(saes)}
