"""The causal test as a stage of a run: which latents of which layers an intervention changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool

from saexp import registry
from saexp.analysis import used_rows
from saexp.config import PositionsConfig, RunConfig
from saexp.config.groups import PLACES, SELECTED
from saexp.data import ExampleSet
from saexp.data.datasets import background_texts
from saexp.errors import ConfigError
from saexp.interventions.conditions import position_prompts, tested_examples
from saexp.interventions.controls import effect_fraction
from saexp.interventions.directions import LatentStatistics, StreamRows
from saexp.interventions.run import run_intervention
from saexp.latents import Latents
from saexp.latents.statistics import active_quantile, moments
from saexp.models.forward import check_positions, position_limit
from saexp.models.loading import LanguageModel
from saexp.pipeline import EncodedLayer, RunData, Session
from saexp.pipeline.collect import Collected
from saexp.pipeline.validation import check_sae, score_latents
from saexp.registry import resolve
from saexp.results import Result
from saexp.stats.significance import ALPHA, detectable_change


@dataclass(frozen=True)
class EditedLayer:
    """An SAE whose latents are changed, and what is known of them."""

    encoded: EncodedLayer
    table: pd.DataFrame | None
    """The latent table of an analyzer that selects latents; None under another one."""


def intervene(
    session: Session, layer: EncodedLayer, table: pd.DataFrame | None, data: RunData
) -> Result:
    """Run `intervention` on the run's own prompts.

    `table` is the latent table of an analyzer that selects latents. Without one, the config must
    list the latents; else a note says that nothing was run. Where latents of several layers are
    changed, table `layer_latents` has those of each, and the run's own layer takes part only if it
    is among them.
    """
    cfg, size_notes = _at_size(session.cfg, session.model)
    session = replace(session, cfg=cfg)
    own = EditedLayer(layer, table if session.selects_latents else None)
    layers, result = _edited_layers(session, own, data)
    if own.table is None and needs_selected_latents(cfg):
        result.notes.append(
            f"intervention={cfg.intervention.name} was not run: analyzer={cfg.analyzer.name} "
            "selects no latents; name some, 'intervention.latents=[12,34]'"
        )
        return result
    result.notes += size_notes
    facts_of = {
        n: _latent_facts(cfg, edited, data.examples, session.model.n_layers)
        for n, edited in (layers or {layer.layer: own}).items()
    }
    facts = next(iter(facts_of.values()))
    if layers:
        saes = {edited.encoded.sae.hookpoint: edited.encoded.sae for edited in layers.values()}
        facts = replace(facts, layers=facts_of, saes=saes)
    result.merge(_unit(cfg, facts_of))
    effects = run_intervention(
        registry.build("intervention", cfg.intervention),
        facts,
        session.model,
        layer.sae,
        data.examples.examples.examples,
        background_texts(cfg.dataset),
        cfg.dataset.max_length,
        cfg.cache_dir,
    )
    result.merge(effects)
    result.merge(_effect_checks(cfg, effects.tables))
    return result


_LARGE = 10**7
"""Parameters outside the embeddings above which a causal test on a CPU is small by default."""


def _at_size(cfg: RunConfig, model: LanguageModel) -> tuple[RunConfig, list[str]]:
    """The config with the numbers of `intervention.size`, and a note on those that are smaller."""
    edit = cfg.intervention
    # Of a block: four matrices of attention, and an MLP of about four times the width.
    n_parameters = 12 * model.n_layers * model.d_model**2
    is_large = model.device.type == "cpu" and n_parameters > _LARGE
    if edit.size == "full" or (edit.size == "auto" and not is_large):
        return cfg, []
    smaller, changed = edit.smaller()
    if not changed:
        return cfg, []
    numbers = ", ".join(
        f"{name} {_in_words(new)} (not {_in_words(default)})"
        for name, (default, new) in changed.items()
    )
    reason = f", as a model of {n_parameters / 1e6:.0f} million parameters is slow on a CPU"
    return replace(cfg, intervention=smaller), [
        f"intervention.size={edit.size}{reason if edit.size == 'auto' else ''}: a small causal "
        f"test, with {numbers}; it detects large effects only; intervention.size=full takes the "
        "numbers in parentheses"
    ]


def _in_words(value: object) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _edited_layers(
    session: Session, own: EditedLayer, data: RunData
) -> tuple[dict[int, EditedLayer], Result]:
    """Every layer that the intervention names: encoded, SAE checked, analyzed if the run's own is.

    Empty where it names none. The result has table `layer_latents`, with the latents of each layer
    that are changed, and the notes of each layer.
    """
    cfg, layers, result = session.cfg, dict[int, EditedLayer](), Result()
    for n, sae in session.edited_saes.items():
        if n == own.encoded.layer:
            layers[n] = own
            continue
        encoded = session.encode_with(sae, data)
        notes = [*encoded.notes, *check_sae(cfg, encoded.sae, session.model, data).notes]
        table = None
        if own.table is not None:
            analysis = session.analyze(encoded, data, texts=False)
            table, notes = analysis.tables["latents"], [*notes, *analysis.notes]
            if cfg.intervention.min_output_score is not None and cfg.analyzer.scores:
                table, score_notes = score_latents(session, encoded, data, table)
                notes += score_notes
        result.notes += [f"layer {n}: {note}" for note in notes]
        layers[n] = EditedLayer(encoded, table)
    tables = {n: layer.table for n, layer in layers.items() if layer.table is not None}
    if tables:
        changed = [_changed_latents(cfg, n, table) for n, table in tables.items()]
        result.tables["layer_latents"] = pd.concat(changed, ignore_index=True)
    return layers, result


def _changed_latents(cfg: RunConfig, layer: int, table: pd.DataFrame) -> pd.DataFrame:
    latents = cfg.intervention.latents_at(layer)
    is_changed = table["latent"].isin(latents) if isinstance(latents, list) else table["selected"]
    return table[is_changed].sort_values("rank", kind="stable")


_EDITS_LATENTS = ("steer", "clamp", "scale", "ablate", "project_out", "orthogonalize")
_LATENT_DIRECTIONS = {"latents", "denoised_difference"}
"""Directions that are computed from latents."""


def _effect_checks(cfg: RunConfig, tables: Mapping[str, pd.DataFrame]) -> Result:
    """Detectable effects, and where configured, how often controls would pass the test."""
    result, summary = Result(), tables.get("effects_summary")
    controls = tables.get("controls")
    if summary is None or controls is None:
        return result
    result.merge(effect_power(tables["effects"], summary))
    names = [*cfg.intervention.outcomes, *(cfg.intervention.alternatives or [])]
    outcome = next((o for o in names if f"{o}_change" in summary), None)
    if cfg.analyzer.placebo and outcome is not None:
        result.merge(effect_fraction(summary, controls, outcome, cfg.analyzer.alpha))
    return result


def effect_power(effects: pd.DataFrame, summary: pd.DataFrame) -> Result:
    """Metrics `power/rate_change` and `power/p_controls_floor`, from the tables of that name.

    `power/rate_change` is the smallest change of the first rate that the paired test over entities
    finds in 80 % of runs: from the unsteered rate on test prompts (`power/rate_baseline`), with as
    many entities (`power/rate_n`), of the group of prompts for which it is largest. Null, with a
    note, where no change would be found. `power/p_controls_floor` is the smallest value that the
    rank p-values against controls can take. Nothing without rates or without controls.
    """
    result = Result()
    rates = [c for c in effects if str(effects[c].dtype) in ("bool", "boolean")]
    tested = summary[summary["split"] == "test"]
    ending = "_p_controls"
    outcomes = [c.removesuffix(ending) for c in map(str, tested) if c.endswith(ending)]
    rate = next((o for o in outcomes if o in rates), None)
    if rate is not None:
        _rate_power(tested[tested["role"] == "baseline"], rate, result)
    floors = tested[[f"{o}_p_controls_floor" for o in outcomes]].to_numpy(dtype=float)
    if np.isfinite(floors).any():
        result.metrics["power/p_controls_floor"] = float(np.nanmax(floors))
    return result


def _rate_power(baselines: pd.DataFrame, rate: str, result: Result) -> None:
    worst: tuple[float, float, int] | None = None
    for row in baselines[baselines[rate].notna()].to_dict("records"):
        start, n = float(row[rate]), int(row[f"{rate}_n"])
        change = detectable_change(n, start, ALPHA)
        size = float("inf") if change is None else abs(change)
        if worst is None or size > worst[0]:
            worst = size, start, n
    if worst is None:
        return
    size, start, n = worst
    result.metrics |= {
        "power/rate_change": None if np.isinf(size) else size,
        "power/rate_baseline": start,
        "power/rate_n": n,
    }
    if np.isinf(size):
        result.notes.append(
            f"no change of {rate.replace('_', ' ')} from {start:.2f} is found in 80% of runs with "
            f"{n} entities (power/rate_change)"
        )


def _unit(cfg: RunConfig, facts_of: Mapping[int, LatentStatistics]) -> Result:
    """The unit of the coefficient, where it is the stream's median norm."""
    if cfg.intervention.name != "steer" or cfg.intervention.unit != "resid_norm":
        return Result()
    norms = ", ".join(f"{f.median_norm:.4g} at {f.written.name}" for f in facts_of.values())
    suffix = {n: f"_layer_{n}" if len(facts_of) > 1 else "" for n in facts_of}
    return Result(
        metrics={f"intervention/resid_norm{suffix[n]}": f.median_norm for n, f in facts_of.items()},
        notes=[
            "coefficients are in units of the stream's median norm over ordinary positions: "
            f"{norms}"
        ],
    )


def needs_selected_latents(cfg: RunConfig) -> bool:
    """Whether the intervention changes latents that the analyzer must select."""
    edit = cfg.intervention
    if edit.name not in _EDITS_LATENTS or not _LATENT_DIRECTIONS.intersection(edit.directions):
        return False
    if isinstance(edit.latents, dict):
        return SELECTED in edit.latents.values()
    return not isinstance(edit.latents, list)


def _listed_latents(cfg: RunConfig, layer: int) -> list[int]:
    """Latents of this layer that `intervention.latents` lists."""
    latents = cfg.intervention.latents_at(layer)
    return latents if isinstance(latents, list) else []


def _with_inactive(table: pd.DataFrame, listed: list[int]) -> pd.DataFrame:
    """The latent table with rows for listed latents that are never active, which it lacks.

    A decoder direction can be added whether or not its latent is active on these texts.
    """
    missing = [f for f in dict.fromkeys(listed) if f not in set(table["latent"])]
    if not missing:
        return table
    measured = [str(c) for c in table if str(c).startswith(("freq_", "mean_"))]
    columns = ["latent", "direction", "selected", "rank", *measured]
    columns += ["output_score"] if "output_score" in table else []
    rows = pd.DataFrame({"latent": missing, "direction": "", "selected": False})
    rows = rows.assign(**dict.fromkeys(measured, 0.0)).reindex(columns=columns)
    dtypes = table[columns].dtypes.to_dict()
    return pd.concat([table[columns], rows.astype(dtypes)], ignore_index=True)


def _unselected_table(cfg: RunConfig, layer: EncodedLayer, groups: Sequence[str]) -> pd.DataFrame:
    """The columns of a latent table that edits read, with nothing selected.

    It has the latents that are active on the train split (on all rows where there is none), and
    those that the config lists.
    """
    latents = layer.latents
    labels, train = latents.rows["group"].to_numpy(), _train_rows(latents)
    overall = moments(latents.csr, train)
    listed = np.array(_listed_latents(cfg, layer.layer), dtype=np.int64)
    ids = np.union1d(np.flatnonzero(overall.active), listed)
    table = pd.DataFrame({"latent": ids, "direction": "", "selected": False})
    table["rank"] = pd.array([pd.NA] * len(table), dtype="Int64")
    table["freq_all"] = overall.frequency[ids]
    for group in groups:
        of_group = moments(latents.csr, train & (labels == group))
        table[f"freq_{group}"] = of_group.frequency[ids]
        table[f"mean_{group}"] = of_group.mean[ids]
    return table


def _train_rows(latents: Latents) -> Bool[np.ndarray, " n_rows"]:
    """Which rows are of the train split; all where none is."""
    train = (latents.rows["split"] == "train").fillna(False).to_numpy(dtype=bool)
    return train if train.any() else np.ones(len(train), dtype=bool)


def check_steerable(cfg: RunConfig, examples: ExampleSet, model: LanguageModel) -> None:
    """Raise ConfigError before the long work where the intervention cannot be applied."""
    if cfg.intervention.name == "none":
        return
    _check_positions(cfg, examples)
    if position_limit(model) is None:
        return
    chosen = tested_examples(cfg.intervention, examples.examples)
    prompts = position_prompts(chosen, model, cfg.intervention, cfg.dataset.max_length).all()
    generates = any(resolve("outcome", o).source == "text" for o in cfg.intervention.outcomes)
    n_new = cfg.intervention.max_new_tokens if generates else 0
    longest = max((len(p.tokens) for p in prompts), default=0)
    check_positions(model, longest, n_new, "intervention.max_new_tokens")


def _check_positions(cfg: RunConfig, examples: ExampleSet) -> None:
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


def _latent_facts(
    cfg: RunConfig, edited: EditedLayer, collected: Collected, n_layers: int
) -> LatentStatistics:
    """What edits read of one SAE's latents, measured on the train split."""
    latents, sae, seed = edited.encoded.latents, edited.encoded.sae, cfg.analyzer.seed
    groups = collected.examples.groups
    if edited.table is None:
        table = _unselected_table(cfg, edited.encoded, groups)
    else:
        table = _with_inactive(edited.table, _listed_latents(cfg, edited.encoded.layer))
    train = (latents.rows["split"] == "train").fillna(False).to_numpy(dtype=bool)
    written = sae.hookpoint_out or sae.hookpoint
    ordinary = collected.ordinary(sae.hookpoints)
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
    frequencies = [f"freq_{g}" for g in groups] or ["freq_all"]
    facts["frequency"] = table[frequencies].mean(axis=1)
    facts["norm"] = sae.directions(ids.tolist()).float().norm(dim=-1).cpu().numpy()
    facts["max_act"] = active_quantile(csr, ids, 1.0)
    facts["p99_act"] = active_quantile(csr, ids, 0.99)

    def stream() -> StreamRows:
        acts = collected.store.values(written.layer, written.stream)
        rows = np.flatnonzero(train)
        if groups:
            rows = np.intersect1d(rows, used_rows(latents.rows, groups, seed))
        labels = latents.rows.iloc[rows]
        return StreamRows(
            acts[torch.from_numpy(rows)].float().numpy(),
            labels["group"].to_numpy(dtype=object),
            labels["unit"].to_numpy(dtype=object),
        )

    return LatentStatistics(
        table=facts,
        groups=groups,
        median_norm=ordinary.median_norm(written),
        directions=sae.directions,
        hookpoint=sae.hookpoint,
        written=written,
        stream=stream,
        seed=seed,
        n_layers=n_layers,
    )
