"""SAEs of several layers, whose latents the causal test changes together."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from saexp import registry
from saexp.analysis.base import AnalysisInputs
from saexp.config import RunConfig
from saexp.errors import ConfigError, SAEError
from saexp.latents.encode import Latents
from saexp.models.loading import LanguageModel
from saexp.results import TaskResult
from saexp.saes.base import SparseAutoencoder
from saexp.tasks.checking import check_sae, settle_factor
from saexp.tasks.gathering import Gathered
from saexp.tasks.loaded import sparse_autoencoder
from saexp.tasks.shared import CONTRASTED, analysed, encoded, encoded_neutral, high_norm_notes
from saexp.tasks.worth import add_scores


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
    for layer, sae in saes.items():
        if sae is own.sae:
            found[layer] = own
            continue
        notes = settle_factor(cfg, sae, neutral)
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
