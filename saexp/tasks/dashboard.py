"""task=dashboard: a page of chosen latents."""

import json
import re
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from saexp import registry
from saexp.analysis.base import AnalysisInputs
from saexp.analysis.observations import equally_observed
from saexp.config import PositionsConfig, RunConfig
from saexp.context import RunContext
from saexp.errors import ConfigError, DataError
from saexp.files import RUN_FOLDER, write_text
from saexp.latents.examples import firing_counts, latents_at
from saexp.models.loading import LanguageModel
from saexp.pipeline.collect import Gathered, gather, gather_background, settle_bos
from saexp.pipeline.objects import (
    about_model,
    encoded_neutral,
    high_norm_notes,
    language_model,
    sparse_autoencoder,
)
from saexp.pipeline.run_folder import clean_metrics, skips_table, write_provenance, write_result
from saexp.pipeline.validation import check_sae, neighbours, settle_factor, with_neighbours
from saexp.reports.html import DATA, write_dashboard
from saexp.results import TaskResult
from saexp.saes.catalogue import EMBEDDED, neuronpedia_list, neuronpedia_url
from saexp.saes.sae import SparseAutoencoder
from saexp.tasks import latent_cards
from saexp.wording import is_above_chance, sae_words


@dataclass(frozen=True)
class Chosen:
    """Latents in the order in which they are shown, and how they were found."""

    latents: list[int]
    how: str
    contrast: pd.DataFrame | None = None
    """The contrast's table, where the data has two groups."""
    groups: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    def contrast_of(self, latent: int, alpha: float) -> dict[str, Any] | None:
        """The contrast's numbers of it on the test split, in the latent's own direction.

        `is_above_chance` is at level `alpha` of the test split's q-value. None where there is no
        contrast, or the latent was never active in it.
        """
        if self.contrast is None:
            return None
        rows = self.contrast[self.contrast["latent"] == latent]
        if rows.empty:
            return None
        row = rows.iloc[0]
        own = row["direction"] == self.groups[0]
        low, high = row["ci_low_test"], row["ci_high_test"]
        auroc, separation = float(row["auroc_test"]), float(row["separation_test"])
        if not own:
            auroc, separation = 1 - auroc, -separation
            low, high = 1 - high, 1 - low
        q_value = float(row["q_value_test"])
        numbers: dict[str, Any] = {
            "direction": str(row["direction"]),
            "selected": bool(row["selected"]),
            "auroc": auroc,
            "ci_low": float(low),
            "ci_high": float(high),
            "separation": separation,
            "min_separation": float(row["min_separation_test"]),
            "q_value": float(row["q_value"]),
            "q_value_test": q_value,
            "is_above_chance": is_above_chance(auroc, q_value, alpha),
            "background_freq": float(row["background_freq"]),
        }
        for group in self.groups:
            numbers[f"freq_{group}"] = float(row[f"freq_{group}_test"])
            numbers[f"mean_{group}"] = float(row[f"mean_{group}_test"])
        return {k: None if pd.isna(v) else v for k, v in numbers.items()}


def choose(
    asked: list[int] | int,
    cfg: RunConfig,
    model: LanguageModel,
    sae: SparseAutoencoder,
    gathered: Gathered,
    neutral: Gathered,
) -> Chosen:
    """`asked` are latents, or how many of the best. Raises ConfigError for one the SAE lacks.

    The contrast is made as task=analyze makes it, with room for as many latents as are asked for.
    """
    if isinstance(asked, list):
        wrong = next((f for f in asked if f >= sae.d_sae), None)
        if wrong is not None:
            raise ConfigError(
                f"latents={asked}: {sae.metadata.get('name', 'the SAE')} has latents "
                f"0-{sae.d_sae - 1}, not {wrong}"
            )
    groups = gathered.examples.groups
    table, where, notes = None, cfg.positions.name, []
    if len(groups) == 2:
        at, where = _contrast_rows(cfg, model, sae, gathered)
        others = [n for n in at.examples.notes if n not in gathered.examples.notes]
        try:
            made = _contrast(cfg, sae, at, neutral, 0 if isinstance(asked, list) else asked)
            table, others = made.tables["latents"], [*others, *made.notes]
        except DataError as error:
            if not isinstance(asked, list):
                raise
            notes = [f"no contrast is shown: {error}"]
        notes = [*(f"contrast at {where}: {note}" for note in others), *notes]
    if isinstance(asked, list):
        return Chosen(asked, "as named", table, groups, notes)
    if table is not None:
        best = table[table["selected"]].sort_values(["rank", "q_value"])["latent"].tolist()[:asked]
        if 0 < len(best) < asked:
            notes += [f"the contrast selects {len(best)} latents, not the {asked} asked for"]
        if best:
            how = f"the contrast's best at {where.replace('_', ' ')}"
            return Chosen([int(f) for f in best], how, table, groups, notes)
    why = "the contrast selects no latent" if len(groups) == 2 else "the data set has no groups"
    counts = firing_counts(gathered.store, sae, gathered.ordinary(sae.hookpoints).mask)
    order = np.argsort(-counts, kind="stable")[:asked]
    notes += [f"{why}, so these are the latents that fire on most positions"]
    return Chosen([int(f) for f in order], "the most frequent", table, groups, notes)


def _contrast_rows(
    cfg: RunConfig, model: LanguageModel, sae: SparseAutoencoder, gathered: Gathered
) -> tuple[Gathered, str]:
    """(activations, their positions): where all tokens are shown, the entity's last token, which is
    what task=analyze looks at by default; the run's own positions otherwise."""
    if cfg.positions.name != "all" or not any(e.spans for e in gathered.examples.examples):
        return gathered, cfg.positions.name
    positions = PositionsConfig(name="entity_last", seed=cfg.positions.seed)
    return gather(replace(cfg, positions=positions), model, sae.hookpoints), positions.name


def _contrast(
    cfg: RunConfig, sae: SparseAutoencoder, at: Gathered, neutral: Gathered, n: int
) -> TaskResult:
    """As task=analyze makes it, without encoding the rows that it leaves out."""
    most = max(n, cfg.analyzer.top_k)
    analyzer = replace(cfg.analyzer, name="contrast", top_k=most, placebo=0, options={})
    rows = at.placement.rows
    used, _, notes = equally_observed(rows, at.examples.groups, analyzer.seed)
    inputs = AnalysisInputs(
        latents=latents_at(at.store, sae, rows, used),
        groups=at.examples.groups,
        layer=sae.hookpoint.layer,
        background=encoded_neutral(neutral, sae),
    )
    made: TaskResult = registry.build("analyzer", analyzer).analyze(inputs)
    made.notes = list(dict.fromkeys([*notes, *made.notes]))
    return made


def parse_latents(value: Any) -> list[int] | int:
    """`[12, 160]` as it is, without repeats; N of `top:N`. Raises ConfigError for anything else."""
    top = re.fullmatch(r"top:(\d+)", str(value).strip())
    if top and int(top[1]) > 0:
        return int(top[1])
    listed = value if isinstance(value, list | tuple) else [value]
    good = [re.fullmatch(r"\d+", str(v)) and not isinstance(v, bool) for v in listed]
    if not listed or not all(good):
        raise ConfigError(
            f"latents={value} names no latents; type latents=top:20 or 'latents=[12,160]'"
        )
    return list(dict.fromkeys(int(v) for v in listed))


def dashboard(cfg: RunConfig, context: RunContext) -> TaskResult:
    """Choose, read the store once, look the examples up, write dashboard.json and render it."""
    options, asked = latent_cards.Options.of(cfg), parse_latents(cfg.latents)
    with context.stage("load"):
        model = language_model(cfg)
        sae = sparse_autoencoder(cfg, model)
        model, settled = settle_bos(cfg, model, [sae])
    with context.stage("collect"):
        gathered = gather(cfg, model, sae.hookpoints, context.ahead)
        neutral = gather_background(
            cfg,
            model,
            [*sae.hookpoints, *neighbours(cfg, sae, model)],
            cfg.analyzer.n_background,
            with_neighbours(cfg, context.ahead),
        )
    gathered = replace(gathered, neutral=neutral)
    notes = [*gathered.examples.notes, *neutral.examples.notes, *settle_factor(cfg, sae, neutral)]
    notes += high_norm_notes(gathered, sae, "the dashboard's examples and numbers leave them out")
    result = TaskResult(metrics=gathered.metrics, notes=notes)
    result.merge(settled)
    result.merge(check_sae(cfg, sae, model, gathered, neutral))
    with context.stage("choose"):
        chosen = choose(asked, cfg, model, sae, gathered, neutral)
    result.notes += chosen.notes
    with context.stage("encode"):
        labels, tally = latent_cards.tallied(chosen.latents, sae, gathered, options, cfg.seed)
    with context.stage("examples"):
        examples = latent_cards.examples(tally, sae, gathered, model, options)
    with context.stage("logits"):
        tokens, treated = latent_cards.tokens(chosen.latents, sae, model, options, result.notes)
    alike = latent_cards.alike(tally, sae, options)
    made = [
        {
            **latent_cards.numbers(tally, i),
            **examples[i],
            **tokens[i],
            **alike[i],
            "contrast": chosen.contrast_of(latent, cfg.analyzer.alpha),
            "neuronpedia": neuronpedia_url(sae, latent),
        }
        for i, latent in enumerate(chosen.latents)
    ]
    _save(cfg, context, result, gathered, model, sae, chosen, made)
    content = {
        "how_chosen": chosen.how,
        "groups": labels,
        "rows_of_group": tally.rows_of_group.tolist(),
        "n_rows": tally.n_rows,
        "positions": cfg.positions.name,
        "norm": treated,
        "n_sample": latent_cards.N_SAMPLE,
        "neuronpedia_list": neuronpedia_list(sae, chosen.latents),
        "embed": EMBEDDED,
        "latents": made,
    }
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    write_text(context.folder / DATA, text + "\n", option=RUN_FOLDER)
    with context.stage("report"):
        write_dashboard(context.folder)
    return result


def _save(
    cfg: RunConfig,
    context: RunContext,
    result: TaskResult,
    gathered: Gathered,
    model: LanguageModel,
    sae: SparseAutoencoder,
    chosen: Chosen,
    made: list[dict[str, Any]],
) -> None:
    names = ["latent", "n_active", "density", "mean_active", "max", "neuronpedia"]
    table = pd.DataFrame([{n: card[n] for n in names} for card in made])
    n_silent = int((table["n_active"] == 0).sum())
    result.tables |= {
        "dashboard": table,
        "rows": gathered.placement.rows,
        "skips": skips_table(gathered.placement.skips),
        **({} if chosen.contrast is None else {"contrast": chosen.contrast}),
    }
    result.metrics |= {"dashboard/n_latents": len(table), "dashboard/n_silent": n_silent}
    result.metrics = clean_metrics(result.metrics, result.notes)
    about = {
        **sae.metadata,
        "hookpoint": sae.hookpoint.name,
        "d_sae": sae.d_sae,
        "architecture": sae.architecture,
    }
    finding = (
        f"{model.name}, {sae.hookpoint.name}, {sae_words(about)}: {len(table)} of them "
        f"({chosen.how}) over {len(gathered.placement.rows):,} positions; {n_silent} never "
        "fire there."
    )
    write_result(context, result)
    write_provenance(
        context,
        cfg,
        result.notes,
        gathered.placement.skips,
        finding=[finding],
        device=str(model.device),
        model=about_model(model),
        sae=about,
        store={"key": gathered.store.path.name, "path": str(gathered.store.path)},
        tokens_forwarded=gathered.stats.tokens_forwarded,
        groups=list(gathered.examples.groups),
        dataset={"name": gathered.examples.name, "n_examples": len(gathered.examples)},
    )
