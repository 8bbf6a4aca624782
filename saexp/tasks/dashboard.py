"""task=dashboard: a page of chosen latents, and the content of its cards as plain values."""

import json
import re
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saexp import registry
from saexp.analysis import AnalysisInputs, equally_observed
from saexp.analysis.latent_scores import nearest_directions
from saexp.config import DashboardConfig, PositionsConfig, RunConfig
from saexp.context import RunContext
from saexp.data.rows import RowLabels
from saexp.data.tokenization import token_texts
from saexp.errors import ConfigError, DataError, ModelError
from saexp.files import RUN_FOLDER, write_text
from saexp.latents.statistics import (
    OfRows,
    Tally,
    Window,
    Windows,
    at_quantiles,
    count_active_rows,
    latents_at,
    tally_store,
    values_at,
)
from saexp.models.loading import LanguageModel
from saexp.models.unembedding import ADDED, Unembedding
from saexp.pipeline import RunData, Session, resolve_factor
from saexp.pipeline.collect import Collected, collect_examples
from saexp.pipeline.objects import collect_searched, describe_sae, encoded_neutral
from saexp.pipeline.run_folder import save_run
from saexp.pipeline.validation import check_sae
from saexp.reports.latents import DATA, write_dashboard
from saexp.results import Result, is_above_chance, model_words, sae_words
from saexp.saes import SparseAutoencoder
from saexp.saes.catalogue import EMBEDDED, neuronpedia_list, neuronpedia_url

OTHER = "other rows"
"""Label of rows that are of neither group."""
N_SAMPLE = 1000
"""Activations per latent that quantile examples are sampled from."""
TREATED = (
    "The decoder row, read by each token's unembedding through the final norm's linear part (its "
    "gain, and a LayerNorm's subtraction of the mean): the direct path alone. The norm's division "
    "by the stream's size is left out, one positive factor for all tokens, so ranks are exact and "
    "values are relative. The norm's bias and a cap on the logits are left out too; they change no "
    "rank of the direction's own part."
)


def _labels(collected: Collected) -> tuple[list[str], OfRows]:
    """(labels, label number of rows); one label where the data has no groups."""
    groups = list(collected.examples.groups)
    if not groups:
        return ["all rows"], np.zeros_like
    number = collected.table.rows["group"].map({g: i for i, g in enumerate(groups)})
    of_row = number.fillna(len(groups)).to_numpy(dtype=np.int64)
    others = [OTHER] if (of_row == len(groups)).any() else []
    return [*groups, *others], of_row.__getitem__


def tally_latents(
    latents: list[int],
    sae: SparseAutoencoder,
    collected: Collected,
    options: DashboardConfig,
    seed: int,
) -> tuple[list[str], Tally]:
    """(group labels, statistics of the chosen latents over all ordinary rows)."""
    labels, label_of = _labels(collected)
    tally = Tally(
        np.array(latents, dtype=np.int64),
        d_sae=sae.d_sae,
        n_groups=len(labels),
        n_top=options.n_top,
        n_sample=N_SAMPLE,
        correlate=options.n_correlated > 0,
        seed=seed,
    )
    text_of, ordinary = collected.placement.text_ids, collected.ordinary(sae.hookpoints).mask
    return labels, tally_store(collected.store, sae, text_of, label_of, tally, ordinary)


def numbers(tally: Tally, i: int) -> dict[str, Any]:
    n, histogram = int(tally.active[i].sum()), tally.histogram(i)
    return {
        "latent": int(tally.latents[i]),
        "n_active": n,
        "density": n / tally.n_rows,
        "active_of_group": tally.active[i].tolist(),
        "mean_active": float(tally.total[i]) / n if n else None,
        "max": float(tally.maximum[i]),
        "histogram": {"width": histogram.width, "counts": histogram.counts.tolist()},
    }


def example_cards(
    tally: Tally,
    sae: SparseAutoencoder,
    collected: Collected,
    options: DashboardConfig,
) -> list[dict[str, Any]]:
    """Per latent, the examples of highest activation and those at quantiles.

    Every ordinary token comes with its activation.
    """
    placement = collected.placement
    windows = Windows(
        placement,
        before=options.before,
        after=options.after,
        shown=collected.ordinary(sae.hookpoints).mask,
    )
    rows_of: dict[int, np.ndarray] = {}
    shown: list[list[tuple[float | None, list[tuple[int, Window]]]]] = []
    for i, latent in enumerate(tally.latents):
        top = tally.top(i)
        parts = at_quantiles(
            tally.sample(i), options.quantiles, options.n_quantile, set(top["text"])
        )
        windows_of: list[tuple[float | None, list[tuple[int, Window]]]] = []
        for quantile, part in [(None, top), *parts]:
            windows_of.append((quantile, [(int(r), windows.around(int(r))) for r in part["row"]]))
        shown.append(windows_of)
        rows = {r for _, part in windows_of for _, w in part for r in w.rows if r is not None}
        rows_of[int(latent)] = np.array(sorted(rows), dtype=np.int64)
    values_of = values_at(collected.store, sae, rows_of)
    examples = []
    for latent, windows_of in zip(tally.latents, shown, strict=True):
        rows, values = rows_of[int(latent)].tolist(), values_of[int(latent)].tolist()
        value = dict(zip(rows, values, strict=True))
        parts = [
            (q, [_example(placement.labels(r), w, value[r], value) for r, w in part])
            for q, part in windows_of
        ]
        at = [{"quantile": q, "examples": part} for q, part in parts[1:] if part]
        examples.append({"top": parts[0][1], "quantiles": at})
    return examples


def _example(
    about: RowLabels, window: Window, peak: float, value: dict[int, float]
) -> dict[str, Any]:
    return {
        "tokens": window.tokens,
        "values": [None if r is None else _short(value[r]) for r in window.rows],
        "peak": window.peak,
        "cut": list(window.cut),
        "value": _short(peak),
        "id": about.example_id,
        "group": about.group,
        "split": about.split,
    }


def _short(value: float) -> float:
    """Rounded to the four digits that the page shows."""
    return float(f"{value:.4g}")


def promoted_tokens(
    latents: list[int],
    sae: SparseAutoencoder,
    model: LanguageModel,
    options: DashboardConfig,
) -> tuple[list[dict[str, Any]], str | None, list[str]]:
    """(promoted and suppressed tokens per latent, how the final norm was treated, notes).

    Where the SAE does not read a part of the residual stream, or the model has no linear readout,
    a note says so and nothing is shown.
    """
    cards: list[dict[str, Any]] = [{} for _ in latents]
    if not options.n_tokens:
        return cards, None, []
    written = sae.hookpoint_out or sae.hookpoint
    if written.stream not in ADDED:
        note = (
            f"promoted tokens are not shown: {written.stream} is not what the residual stream is "
            "made of"
        )
        return cards, None, [note]
    try:
        out = Unembedding(model)
    except ModelError as error:
        return cards, None, [f"promoted tokens are not shown: {error}"]
    directions = sae.directions(latents).detach().float()
    for side, sign in (("promoted", 1), ("suppressed", -1)):
        ids = _tokens_of(model.tokenizer, out, sign * directions, options.n_tokens)
        shown = token_texts(model.tokenizer, [t for one in ids for t in one])
        for i, one in enumerate(ids):
            read = out.readout(torch.tensor(one)).cpu()
            values = (read @ directions[i].cpu().to(read.dtype)).tolist()
            pairs = zip(one, values, strict=True)
            cards[i][side] = [[shown[t], _short(v)] for t, v in pairs]
    return cards, TREATED, []


def _tokens_of(tokenizer: Any, out: Unembedding, directions: Tensor, k: int) -> list[list[int]]:
    """The k tokens whose logits each direction raises most, of those that the tokenizer has."""
    n = len(tokenizer)
    padding = max(0, len(out.weight) - n)
    ranked = out.top_tokens(directions, k + padding).tolist()
    return [[t for t in one if t < n][:k] for one in ranked]


def similar_latents(
    tally: Tally, sae: SparseAutoencoder, options: DashboardConfig
) -> list[dict[str, Any]]:
    """Per latent, those with a similar direction, and those with correlated activations."""
    latents = tally.latents
    directions = sae.directions(latents.tolist())
    near = nearest_directions(directions, sae.W_dec, options.n_similar, exclude=latents)
    cards = []
    for i, latent in enumerate(latents):
        row = tally.correlations_of(i) if tally.correlate else np.zeros(0)
        cards.append(
            {
                "similar": _pairs(near.latents[i], near.cosines[i]),
                "correlated": _most_correlated(row, int(latent), options.n_correlated),
            }
        )
    return cards


def _pairs(latents: np.ndarray, values: np.ndarray) -> list[list[Any]]:
    return [[int(f), _short(float(v))] for f, v in zip(latents, values, strict=True)]


def _most_correlated(row: np.ndarray, own: int, n: int) -> list[list[Any]]:
    """The n latents with the largest correlation, without itself and those that never vary."""
    if not len(row):
        return []
    order = np.argsort(-np.where(np.isnan(row), -np.inf, row), kind="stable")
    largest = order[(order != own) & ~np.isnan(row[order])][:n]
    return _pairs(largest, row[largest])


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
    counts = count_active_rows(examples.store, sae, examples.ordinary(sae.hookpoints).mask)
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
    with context.stage("search"):
        examples, searched = collect_searched(
            session.cfg, options.texts, model, sae.hookpoints, examples
        )
    with context.stage("encode"):
        labels, tally = tally_latents(chosen.latents, sae, examples, options, cfg.seed)
    with context.stage("examples"):
        cards = example_cards(tally, sae, examples, options)
    with context.stage("logits"):
        promoted, norm, token_notes = promoted_tokens(chosen.latents, sae, model, options)
    result.notes += token_notes
    similar = similar_latents(tally, sae, options)
    latents = [
        {
            **numbers(tally, i),
            **cards[i],
            **promoted[i],
            **similar[i],
            "contrast": chosen.contrast_of(f, cfg.analyzer.alpha),
            "neuronpedia": neuronpedia_url(sae, f),
        }
        for i, f in enumerate(chosen.latents)
    ]
    data = replace(data, examples=examples)
    result = _save(session, result, data, sae, chosen, latents, searched)
    content = {
        "how_chosen": chosen.how,
        "groups": labels,
        "rows_of_group": tally.rows_of_group.tolist(),
        "n_rows": tally.n_rows,
        "positions": cfg.positions.name,
        "norm": norm,
        "n_sample": N_SAMPLE,
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
    searched: str,
) -> Result:
    """Write tables and provenance; returns the result as it was written."""
    names = ["latent", "n_active", "density", "mean_active", "max", "neuronpedia"]
    table = pd.DataFrame([{n: card[n] for n in names} for card in latents])
    n_inactive, placement = int((table["n_active"] == 0).sum()), data.examples.placement
    result.tables |= {
        "dashboard": table,
        **data.examples.tables,
        **({} if chosen.contrast is None else {"contrast": chosen.contrast}),
    }
    result.metrics |= {"dashboard/n_latents": len(table), "dashboard/n_inactive": n_inactive}
    about = session.provenance(data, [describe_sae(sae)])
    finding = (
        f"{model_words(session.model.name)}, {sae.hookpoint.name}, {sae_words(about['sae'])}: "
        f"{len(table)} of them ({chosen.how}) over {placement.n_rows:,} positions; "
        f"{n_inactive} are never active there."
    )
    about |= {
        "finding": [finding, searched],
        "tokens_forwarded": data.examples.stats.tokens_forwarded,
    }
    return save_run(session.context, session.cfg, result, placement.skips, about)
