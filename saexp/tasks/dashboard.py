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
from saexp.config import DashboardConfig, PositionsConfig, RunConfig
from saexp.context import RunContext
from saexp.errors import ConfigError, DataError
from saexp.files import RUN_FOLDER, write_text
from saexp.latents.examples import firing_counts, latents_at
from saexp.pipeline.collect import Collected, collect_examples
from saexp.pipeline.objects import describe_sae, encoded_neutral
from saexp.pipeline.run_folder import save_run, skips_table
from saexp.pipeline.session import RunData, Session, resolve_factor
from saexp.pipeline.validation import check_sae
from saexp.reports.latents import DATA, write_dashboard
from saexp.results import Result
from saexp.saes.catalogue import EMBEDDED, neuronpedia_list, neuronpedia_url
from saexp.saes.sae import SparseAutoencoder
from saexp.tasks import latent_cards
from saexp.wording import is_above_chance, sae_words


@dataclass(frozen=True)
class Chosen:
    """Latents in the order in which they are shown, and how they were chosen."""

    latents: list[int]
    how: str
    contrast: pd.DataFrame | None = None
    """The contrast's table, where the data has two groups."""
    groups: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    def contrast_of(self, latent: int, alpha: float) -> dict[str, Any] | None:
        """The contrast's test-split numbers of a latent, in the latent's own direction.

        `is_above_chance` is at level `alpha` of the test split's q-value. None where there is no
        contrast, or where the latent was never active in it.
        """
        if self.contrast is None:
            return None
        rows = self.contrast[self.contrast["latent"] == latent]
        if rows.empty:
            return None
        row = rows.iloc[0]
        is_first = row["direction"] == self.groups[0]
        low, high = row["ci_low_test"], row["ci_high_test"]
        auroc, separation = float(row["auroc_test"]), float(row["separation_test"])
        if not is_first:
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
    requested: list[int] | int, session: Session, sae: SparseAutoencoder, data: RunData
) -> Chosen:
    """`requested` are latents, or how many of the best. Raises ConfigError for one the SAE lacks.

    The contrast is that of task=analyze, with `top_k` raised to the number of latents requested.
    """
    if isinstance(requested, list):
        wrong = next((f for f in requested if f >= sae.d_sae), None)
        if wrong is not None:
            raise ConfigError(
                f"task.latents={requested}: {sae.metadata.get('name', 'the SAE')} has latents "
                f"0-{sae.d_sae - 1}, not {wrong}"
            )
    examples = data.examples
    groups = examples.examples.groups
    table, positions, notes = None, session.cfg.positions.name, []
    if len(groups) == 2:
        rows, positions = _contrast_rows(session, sae, examples)
        others = [n for n in rows.examples.notes if n not in examples.examples.notes]
        try:
            top_k = 0 if isinstance(requested, list) else requested
            result = _contrast(session, sae, rows, data.neutral, top_k)
            table, others = result.tables["latents"], [*others, *result.notes]
        except DataError as error:
            if not isinstance(requested, list):
                raise
            notes = [f"no contrast is shown: {error}"]
        notes = [*(f"contrast at {positions}: {note}" for note in others), *notes]
    if isinstance(requested, list):
        return Chosen(requested, "as named", table, groups, notes)
    if table is not None:
        selected = table[table["selected"]].sort_values(["rank", "q_value"])["latent"]
        best = [int(f) for f in selected.tolist()[:requested]]
        if 0 < len(best) < requested:
            notes += [f"the contrast selects {len(best)} latents, not the {requested} requested"]
        if best:
            how = f"the contrast's best at {positions.replace('_', ' ')}"
            return Chosen(best, how, table, groups, notes)
    why = "the contrast selects no latent" if len(groups) == 2 else "the data set has no groups"
    counts = firing_counts(examples.store, sae, examples.ordinary(sae.hookpoints).mask)
    order = np.argsort(-counts, kind="stable")[:requested]
    notes += [f"{why}, so these are the latents that are active at most positions"]
    return Chosen([int(f) for f in order], "the most frequent", table, groups, notes)


def _contrast_rows(
    session: Session, sae: SparseAutoencoder, examples: Collected
) -> tuple[Collected, str]:
    """(activations, their positions) that the contrast compares.

    Where all tokens are shown, the entity's last token, the default of task=analyze; otherwise the
    run's own positions.
    """
    cfg = session.cfg
    if cfg.positions.name != "all" or not any(e.spans for e in examples.examples.examples):
        return examples, cfg.positions.name
    positions = PositionsConfig(name="entity_last", seed=cfg.positions.seed)
    cfg = replace(cfg, positions=positions)
    return collect_examples(cfg, session.model, sae.hookpoints), positions.name


def _contrast(
    session: Session, sae: SparseAutoencoder, rows: Collected, neutral: Collected | None, n: int
) -> Result:
    """The contrast of task=analyze, without encoding the rows that it leaves out."""
    cfg = session.cfg.analyzer
    cfg = replace(cfg, name="contrast", top_k=max(n, cfg.top_k), placebo=0)
    table, groups = rows.placement.rows, rows.examples.groups
    used, _, notes = equally_observed(table, groups, cfg.seed)
    inputs = AnalysisInputs(
        latents=latents_at(rows.store, sae, table, used),
        groups=groups,
        layer=sae.hookpoint.layer,
        background=encoded_neutral(neutral, sae, session.context.objects),
    )
    result: Result = registry.build("analyzer", cfg).analyze(inputs)
    return replace(result, notes=list(dict.fromkeys([*notes, *result.notes])))


def parse_latents(value: Any) -> list[int] | int:
    """The latents of `[12, 160]` without repeats, or N of `top:N`. Raises ConfigError otherwise."""
    top = re.fullmatch(r"top:(\d+)", str(value).strip())
    if top and int(top[1]) > 0:
        return int(top[1])
    listed = value if isinstance(value, list | tuple) else [value]
    valid = [re.fullmatch(r"\d+", str(v)) and not isinstance(v, bool) for v in listed]
    if not listed or not all(valid):
        raise ConfigError(
            f"task.latents={value} is not a list of latents; type task.latents=top:20 or "
            "'task.latents=[12,160]'"
        )
    return list(dict.fromkeys(int(v) for v in listed))


def dashboard(cfg: RunConfig, context: RunContext) -> Result:
    """Choose latents, encode the store once, look up examples, write and render dashboard.json."""
    options = cfg.task
    assert isinstance(options, DashboardConfig)
    requested = parse_latents(options.latents)
    with context.stage("load"):
        session = Session.open(cfg, context)
    with context.stage("collect"):
        data = session.collect()
    examples, model = data.examples, session.model
    sae, notes = resolve_factor(cfg, session.sae_of(cfg), data.neutral)
    notes += examples.ordinary(sae.hookpoints).notes(
        "the dashboard's examples and numbers leave them out"
    )
    result = Result(metrics=examples.metrics, notes=data.result.notes)
    result.merge(session.bos)
    result.notes += notes
    result.merge(check_sae(cfg, sae, model, data))
    with context.stage("choose"):
        chosen = choose(requested, session, sae, data)
    result.notes += chosen.notes
    with context.stage("encode"):
        labels, tally = latent_cards.tally_latents(chosen.latents, sae, examples, options, cfg.seed)
    with context.stage("examples"):
        cards = latent_cards.examples(tally, sae, examples, model, options)
    with context.stage("logits"):
        tokens, norm, token_notes = latent_cards.tokens(chosen.latents, sae, model, options)
    result.notes += token_notes
    similar = latent_cards.similar_latents(tally, sae, options)
    latents = [
        {
            **latent_cards.numbers(tally, i),
            **cards[i],
            **tokens[i],
            **similar[i],
            "contrast": chosen.contrast_of(f, cfg.analyzer.alpha),
            "neuronpedia": neuronpedia_url(sae, f),
        }
        for i, f in enumerate(chosen.latents)
    ]
    result = _save(session, result, data, sae, chosen, latents)
    content = {
        "how_chosen": chosen.how,
        "groups": labels,
        "rows_of_group": tally.rows_of_group.tolist(),
        "n_rows": tally.n_rows,
        "positions": cfg.positions.name,
        "norm": norm,
        "n_sample": latent_cards.N_SAMPLE,
        "neuronpedia_list": neuronpedia_list(sae, chosen.latents),
        "embed": EMBEDDED,
        "latents": latents,
    }
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    write_text(context.folder / DATA, text + "\n", option=RUN_FOLDER)
    with context.stage("report"):
        write_dashboard(context.folder)
    return result


def _save(
    session: Session,
    result: Result,
    data: RunData,
    sae: SparseAutoencoder,
    chosen: Chosen,
    latents: list[dict[str, Any]],
) -> Result:
    """Write tables and provenance; returns the result as it was written."""
    names = ["latent", "n_active", "density", "mean_active", "max", "neuronpedia"]
    table = pd.DataFrame([{n: card[n] for n in names} for card in latents])
    n_inactive, placement = int((table["n_active"] == 0).sum()), data.examples.placement
    result.tables |= {
        "dashboard": table,
        "rows": placement.rows,
        "skips": skips_table(placement.skips),
        **({} if chosen.contrast is None else {"contrast": chosen.contrast}),
    }
    result.metrics |= {"dashboard/n_latents": len(table), "dashboard/n_inactive": n_inactive}
    about = session.provenance(data, [describe_sae(sae)])
    finding = (
        f"{session.model.name}, {sae.hookpoint.name}, {sae_words(about['sae'])}: {len(table)} of "
        f"them ({chosen.how}) over {len(placement.rows):,} positions; {n_inactive} are never "
        "active there."
    )
    about |= {"finding": [finding], "tokens_forwarded": data.examples.stats.tokens_forwarded}
    return save_run(session.context, session.cfg, result, placement.skips, about)
