"""task=dashboard: a page of chosen latents: when each fires, what it promotes, what is like it."""

import json
import re
from dataclasses import replace
from typing import Any

import pandas as pd

from saexp.config import RunConfig
from saexp.context import RunContext
from saexp.errors import ConfigError
from saexp.files import RUN_FOLDER, write_text
from saexp.models.loading import LanguageModel
from saexp.reports.dashboard import DATA, write_dashboard
from saexp.results import TaskResult
from saexp.saes.base import SparseAutoencoder
from saexp.saes.neuronpedia import EMBEDDED, neuronpedia_list, neuronpedia_url
from saexp.tasks import cards
from saexp.tasks.bos import settle_bos
from saexp.tasks.checking import check_sae, neighbours, settle_factor, with_neighbours
from saexp.tasks.choosing import Chosen, choose
from saexp.tasks.gathering import Gathered, gather, gather_background
from saexp.tasks.loaded import about_model, language_model, sparse_autoencoder
from saexp.tasks.saving import clean_metrics, skips_table, write_provenance, write_result
from saexp.tasks.shared import high_norm_notes
from saexp.wording import sae_words


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
    options, asked = cards.Options.of(cfg), parse_latents(cfg.latents)
    with context.stage("load"):
        model = language_model(cfg)
        sae = sparse_autoencoder(cfg, model)
        settled = settle_bos(cfg, model, [sae])
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
        labels, tally = cards.tallied(chosen.latents, sae, gathered, options, cfg.seed)
    with context.stage("examples"):
        examples = cards.examples(tally, sae, gathered, model, options)
    with context.stage("logits"):
        tokens, treated = cards.tokens(chosen.latents, sae, model, options, result.notes)
    alike = cards.alike(tally, sae, options)
    made = [
        {
            **cards.numbers(tally, i),
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
        "n_sample": cards.N_SAMPLE,
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
