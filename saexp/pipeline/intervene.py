"""The causal test as a stage of a run."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool

from saexp import registry
from saexp.analysis.base import AnalysisInputs
from saexp.analysis.observations import used_rows
from saexp.config import PositionsConfig, RunConfig
from saexp.config.interventions import PLACES, SELECTED
from saexp.data.datasets import background_texts
from saexp.data.examples import ExampleSet
from saexp.errors import ConfigError, SAEError
from saexp.interventions.conditions import placed_prompts
from saexp.interventions.controls import effect_share
from saexp.interventions.directions import LatentFacts, StreamRows
from saexp.interventions.effects import effect_power
from saexp.interventions.run import run_intervention, tested_examples
from saexp.latents.encode import Latents
from saexp.latents.statistics import active_quantile, moments
from saexp.models.forward import check_positions, position_limit
from saexp.models.loading import LanguageModel
from saexp.pipeline.collect import Gathered
from saexp.pipeline.objects import (
    CONTRASTED,
    analysed,
    encoded,
    encoded_neutral,
    high_norm_notes,
    sparse_autoencoder,
)
from saexp.pipeline.validation import add_scores, check_sae, settle_factor
from saexp.registry import resolve
from saexp.results import TaskResult
from saexp.saes.sae import SparseAutoencoder


@dataclass(frozen=True)
class AtLayer:
    """An SAE, its latents at the run's rows, and what is known of them."""

    sae: SparseAutoencoder
    latents: Latents
    table: pd.DataFrame | None
    """The contrast's; None under another analyzer."""


def saes_by_layer(
    cfg: RunConfig, model: LanguageModel, own: SparseAutoencoder
) -> dict[int, SparseAutoencoder]:
    """The SAE of every layer that `intervention.latents` names; none where it names no layer.

    Each is resolved as a sweep over `layer` would. Raises ConfigError for a layer that the model or
    the SAEs lack, and for a latent beyond its layer's SAE.
    """
    about = cfg.intervention
    if about.name == "none":
        return {}
    found: dict[int, SparseAutoencoder] = {}
    for layer in about.latent_layers(model.n_layers):
        model.check_layer(layer)
        cell = dataclasses.replace(cfg, layer=layer, sae=dataclasses.replace(cfg.sae, layer=layer))
        try:
            sae = own if layer == own.hookpoint.layer else sparse_autoencoder(cell, model)
        except SAEError as error:
            raise ConfigError(f"intervention.latents names layer {layer}: {error}") from error
        found[layer] = sae
    for layer, sae in (found or {own.hookpoint.layer: own}).items():
        asked = about.latents_at(layer)
        for latent in asked if isinstance(asked, list) else []:
            if latent >= sae.d_sae:
                raise ConfigError(
                    f"intervention.latents: latent {latent}, but the SAE of layer {layer} has "
                    f"latents 0-{sae.d_sae - 1}"
                )
    return found


def all_of(
    own: SparseAutoencoder, saes: Mapping[int, SparseAutoencoder]
) -> list[SparseAutoencoder]:
    """The run's own SAE, then those of other layers."""
    return [own, *(s for s in saes.values() if s is not own)]


def at_layers(
    cfg: RunConfig,
    saes: Mapping[int, SparseAutoencoder],
    own: AtLayer,
    gathered: Gathered,
    neutral: Gathered,
    model: LanguageModel,
) -> tuple[dict[int, AtLayer], TaskResult]:
    """Every layer as the run's own: SAE checked, rows encoded, contrasted where the run is.

    Table `layer_latents`, with a contrast: its rows of the latents that are changed, by layer.
    """
    found: dict[int, AtLayer] = {}
    result = TaskResult()
    for layer, loaded in saes.items():
        if loaded is own.sae:
            found[layer] = own
            continue
        sae, notes = settle_factor(cfg, loaded, neutral)
        notes += check_sae(cfg, sae, model, gathered, neutral).notes
        latents, _ = encoded(gathered, sae)
        notes += high_norm_notes(gathered, sae, CONTRASTED)
        table = None
        if own.table is not None:
            table, told = _contrast(cfg, sae, latents, gathered, neutral, model)
            notes += told
        result.notes += [f"layer {layer}: {note}" for note in notes]
        found[layer] = AtLayer(sae, latents, table)
    parts = [_changed(cfg, n, at.table) for n, at in found.items() if at.table is not None]
    if parts:
        result.tables["layer_latents"] = pd.concat(parts, ignore_index=True)
    return found, result


def _contrast(
    cfg: RunConfig,
    sae: SparseAutoencoder,
    latents: Latents,
    gathered: Gathered,
    neutral: Gathered,
    model: LanguageModel,
) -> tuple[pd.DataFrame, list[str]]:
    """The latent table of one layer, with scores where they decide what is changed."""
    background = encoded_neutral(neutral, sae)
    inputs = AnalysisInputs(
        latents=latents,
        groups=gathered.examples.groups,
        layer=sae.hookpoint.layer,
        background=background,
    )
    result = analysed(registry.build("analyzer", cfg.analyzer), cfg.analyzer, inputs)
    table, notes = result.tables["latents"], result.notes
    if cfg.intervention.min_output_score is not None and cfg.analyzer.scores:
        notes = [*notes, *add_scores(cfg, table, model, sae, background, neutral.store.path.name)]
    return table, notes


def _changed(cfg: RunConfig, layer: int, table: pd.DataFrame) -> pd.DataFrame:
    asked = cfg.intervention.latents_at(layer)
    mine = table["latent"].isin(asked) if isinstance(asked, list) else table["selected"]
    return table[mine].sort_values("rank", kind="stable")


_NEEDS_LATENTS = ("steer", "clamp", "scale", "ablate", "project_out", "orthogonalize")
_OF_LATENTS = {"latents", "denoised_difference"}
"""Directions that are made of latents."""


def intervene(
    cfg: RunConfig,
    latents: Latents,
    table: pd.DataFrame | None,
    gathered: Gathered,
    model: LanguageModel,
    sae: SparseAutoencoder,
    layered: Mapping[int, AtLayer] | None = None,
) -> TaskResult:
    """Run `intervention` on the run's own prompts.

    `table` is the contrast's; without one, latents must be named: nothing else selects any. Where
    latents of several layers are changed, `layered` has the SAE of each, and the run's own counts
    only if it is among them.
    """
    if table is None and selects(cfg):
        return TaskResult(
            notes=[
                f"intervention={cfg.intervention.name} was not run: analyzer={cfg.analyzer.name} "
                "selects no latents; name some, 'intervention.latents=[12,34]'"
            ]
        )
    intervention = registry.build("intervention", cfg.intervention)
    of_layer = {
        n: _facts(cfg, at, gathered, model)
        for n, at in (layered or {sae.hookpoint.layer: AtLayer(sae, latents, table)}).items()
    }
    facts = next(iter(of_layer.values()))
    if layered:
        saes = {at.sae.hookpoint: at.sae for at in layered.values()}
        facts = replace(facts, layers=of_layer, saes=saes)
    result = _unit(cfg, of_layer)
    result.merge(
        run_intervention(
            intervention,
            facts,
            model,
            sae,
            gathered.examples.examples,
            background_texts(cfg.dataset),
            cfg.dataset.max_length,
            cfg.cache_dir,
        )
    )
    result.merge(_checks(cfg, result.tables))
    return result


def _checks(cfg: RunConfig, tables: Mapping[str, pd.DataFrame]) -> TaskResult:
    """What effects could have been found, and where asked for how often controls would pass."""
    result, summary = TaskResult(), tables.get("effects_summary")
    controls = tables.get("controls")
    if summary is None or controls is None:
        return result
    result.merge(effect_power(tables["effects"], summary))
    outcome = next((o for o in cfg.intervention.outcomes if f"{o}_change" in summary), None)
    if cfg.analyzer.placebo and outcome is not None:
        result.merge(effect_share(summary, controls, outcome, cfg.analyzer.alpha))
    return result


def _unit(cfg: RunConfig, of_layer: Mapping[int, LatentFacts]) -> TaskResult:
    """What one unit of the coefficient is, where it is the stream's median norm."""
    if cfg.intervention.name != "steer" or cfg.intervention.unit != "resid_norm":
        return TaskResult()
    told = ", ".join(f"{f.median_norm:.4g} at {f.written.name}" for f in of_layer.values())
    ending = {n: f"_layer_{n}" if len(of_layer) > 1 else "" for n in of_layer}
    return TaskResult(
        metrics={f"intervention/resid_norm{ending[n]}": f.median_norm for n, f in of_layer.items()},
        notes=[
            f"coefficients are in units of the stream's median norm over ordinary positions: {told}"
        ],
    )


def selects(cfg: RunConfig) -> bool:
    """Whether the intervention changes latents that a contrast must select."""
    about = cfg.intervention
    wants = about.name in _NEEDS_LATENTS and bool(_OF_LATENTS.intersection(about.directions))
    if isinstance(about.latents, dict):
        return wants and SELECTED in about.latents.values()
    return wants and not isinstance(about.latents, list)


def _named(cfg: RunConfig, at: AtLayer) -> list[int]:
    """Latents of this SAE that `intervention.latents` lists."""
    asked = cfg.intervention.latents_at(at.sae.hookpoint.layer)
    return asked if isinstance(asked, list) else []


def _with_inactive(table: pd.DataFrame, named: list[int]) -> pd.DataFrame:
    """The contrast's table with rows for named latents that are active nowhere, which it lacks.

    A decoder direction can be written whether or not its latent is active on these texts.
    """
    lacking = [f for f in dict.fromkeys(named) if f not in set(table["latent"])]
    if not lacking:
        return table
    measured = [str(c) for c in table if str(c).startswith(("freq_", "mean_"))]
    about = ["latent", "direction", "selected", "rank", *measured]
    about += ["output_score"] if "output_score" in table else []
    rows = pd.DataFrame({"latent": lacking, "direction": "", "selected": False})
    rows = rows.assign(**dict.fromkeys(measured, 0.0)).reindex(columns=about)
    kinds = table[about].dtypes.to_dict()
    return pd.concat([table[about], rows.astype(kinds)], ignore_index=True)


def _without_contrast(cfg: RunConfig, at: AtLayer, gathered: Gathered) -> pd.DataFrame:
    """The columns of a latent table that edits read, with nothing selected.

    Of every latent that is active on the train split (on all rows where it has none), and of those
    that are named.
    """
    latents = at.latents
    groups, labels = gathered.examples.groups, latents.rows["group"].to_numpy()
    train = _train_rows(latents)
    everywhere = moments(latents.csr, train)
    named = _named(cfg, at)
    fired = np.union1d(np.flatnonzero(everywhere.active), np.array(named, dtype=np.int64))
    table = pd.DataFrame({"latent": fired, "direction": "", "selected": False})
    table["rank"] = pd.array([pd.NA] * len(table), dtype="Int64")
    table["freq_all"] = everywhere.frequency[fired]
    for group in groups:
        mine = moments(latents.csr, train & (labels == group))
        table[f"freq_{group}"], table[f"mean_{group}"] = mine.frequency[fired], mine.mean[fired]
    return table


def _train_rows(latents: Latents) -> Bool[np.ndarray, " n_rows"]:
    """Which rows are of the train split; all where none is."""
    train = (latents.rows["split"] == "train").fillna(False).to_numpy(dtype=bool)
    return train if train.any() else np.ones(len(train), dtype=bool)


def check_steerable(cfg: RunConfig, examples: ExampleSet, model: LanguageModel) -> None:
    """Say before the long work what the intervention would lack."""
    if cfg.intervention.name == "none":
        return
    _check_places(cfg, examples)
    if position_limit(model) is None:
        return
    chosen = tested_examples(cfg.intervention, examples.examples)
    prompts = placed_prompts(chosen, model, cfg.intervention, cfg.dataset.max_length).all()
    generates = any(resolve("outcome", o).source == "text" for o in cfg.intervention.outcomes)
    n_new = cfg.intervention.max_new_tokens if generates else 0
    longest = max((len(p.tokens) for p in prompts), default=0)
    check_positions(model, longest, n_new, "intervention.max_new_tokens")


def _check_places(cfg: RunConfig, examples: ExampleSet) -> None:
    where = cfg.intervention.where
    if where not in PLACES:
        registry.build("positions", PositionsConfig(name=where, **cfg.intervention.where_options))
    if not where.startswith("entity"):
        return
    if not any(e.as_prompt().spans for e in examples.examples):
        raise ConfigError(
            f"intervention.where={cfg.intervention.where} needs entities in the prompts, and this "
            "data set has none; type intervention.where=last, or intervention=none"
        )


def _facts(cfg: RunConfig, at: AtLayer, gathered: Gathered, model: LanguageModel) -> LatentFacts:
    """What edits need of one SAE, measured on the train split."""
    latents, sae = at.latents, at.sae
    table = (
        _without_contrast(cfg, at, gathered)
        if at.table is None
        else _with_inactive(at.table, _named(cfg, at))
    )
    groups = gathered.examples.groups
    train = (latents.rows["split"] == "train").fillna(False).to_numpy(dtype=bool)
    written = sae.hookpoint_out or sae.hookpoint
    ordinary = gathered.ordinary(sae.hookpoints)
    measured = train & ordinary.mask if (train & ordinary.mask).any() else ordinary.mask
    csr = latents.csr[measured]
    ids = table["latent"].to_numpy()
    facts = table[["latent", "direction", "selected", "rank"]].copy()
    least = cfg.intervention.min_output_score
    if least is not None:
        if "output_score" not in table:
            raise ConfigError(
                f"intervention.min_output_score={least}: latents have no output scores here; it "
                "needs analyzer=contrast with analyzer.scores=true"
            )
        facts["selected"] &= (table["output_score"] >= least).fillna(False)
    for group in groups:
        facts[f"mean_{group}"] = table[f"mean_{group}"]
    named = [f"freq_{g}" for g in groups] or ["freq_all"]
    facts["frequency"] = table[named].mean(axis=1)
    facts["norm"] = sae.directions(ids.tolist()).float().norm(dim=-1).cpu().numpy()
    facts["max_act"] = active_quantile(csr, ids, 1.0)
    facts["p99_act"] = active_quantile(csr, ids, 0.99)

    def stream() -> StreamRows:
        acts = gathered.store.acts(written.layer, written.stream)
        rows = np.flatnonzero(train)
        if groups:
            rows = np.intersect1d(rows, used_rows(latents.rows, groups, cfg.analyzer.seed))
        named = latents.rows.iloc[rows]
        return StreamRows(
            acts[torch.from_numpy(rows)].float().numpy(),
            named["group"].to_numpy(dtype=object),
            named["unit"].to_numpy(dtype=object),
        )

    return LatentFacts(
        table=facts,
        groups=groups,
        median_norm=ordinary.median_norm(written),
        directions=sae.directions,
        hookpoint=sae.hookpoint,
        written=written,
        stream=stream,
        seed=cfg.analyzer.seed,
        n_layers=model.n_layers,
    )
