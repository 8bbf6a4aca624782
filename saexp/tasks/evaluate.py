"""task=evaluate: SAEs spliced in place of the streams they read."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from saexp import registry
from saexp.analysis.evaluation import EvaluationSettings, can_be_scored, evaluate_saes
from saexp.analysis.evaluation_passes import Where
from saexp.analysis.evaluation_tables import Part, part_of, side_by_side
from saexp.config import RunConfig, parse_width
from saexp.context import RunContext
from saexp.data.datasets import background_texts
from saexp.data.examples import Example, Skip
from saexp.data.prompts import tokenize_texts
from saexp.data.tokenization import TokenizedText
from saexp.errors import ConfigError, DataError
from saexp.models.forward import context_limit
from saexp.models.loading import LanguageModel
from saexp.pipeline.collect import settle_bos, skip_notes, wish
from saexp.pipeline.objects import about_model, language_model, per_layer, sparse_autoencoder
from saexp.pipeline.run_folder import clean_metrics, skips_table, write_provenance, write_result
from saexp.registry import did_you_mean
from saexp.reports.evaluation import (
    evaluation_figures,
    evaluation_sentences,
    write_evaluation_report,
)
from saexp.results import TaskResult
from saexp.saes.sae import SparseAutoencoder
from saexp.stats.intervals import MIN_N
from saexp.wording import counted

log = logging.getLogger(__name__)


@dataclass
class Texts:
    """What is forwarded, and what is not."""

    ids: list[str]
    tokens: list[TokenizedText]
    skips: list[Skip]
    notes: list[str] = field(default_factory=list)
    units: list[str] = field(default_factory=list)
    """What each text is resampled with: its entity, else itself."""


def read_texts(
    cfg: RunConfig, model: LanguageModel, where: Where, options: dict[str, Any]
) -> Texts:
    """Each distinct text once, tokenised, cut where the model's context ends.

    Of `options`, `n_texts` (a seeded choice) is used. Raises DataError where no text has a
    prediction to score.
    """
    examples, note = _examples(cfg)
    first = {e.text: e for e in reversed(examples)}
    distinct = [e for e in examples if first[e.text] is e]
    found = Texts([], [], [], note)
    if len(distinct) < len(examples):
        found.notes.append(f"{len(examples) - len(distinct)} repeated texts are counted once")
    if options["n_texts"] is not None and options["n_texts"] < len(distinct):
        order = np.random.default_rng([cfg.seed, 23]).permutation(len(distinct))
        distinct = [distinct[i] for i in sorted(order[: options["n_texts"]])]
    longest = min(cfg.dataset.max_length, context_limit(model) or cfg.dataset.max_length)
    tokenized = tokenize_texts(model, [e.text for e in distinct], longest)
    for example, tokens in zip(distinct, tokenized, strict=True):
        if can_be_scored(tokens, where):
            found.ids.append(example.id)
            found.units.append(example.unit)
            found.tokens.append(tokens)
        else:
            found.skips.append(Skip(example.id, "too short: no token has a scored next token"))
    if not found.tokens:
        raise DataError(f"none of {len(examples)} texts has a token and a next token to predict")
    found.notes.extend(skip_notes(found.skips, len(distinct), "text"))
    if cut := sum(t.truncated for t in found.tokens):
        found.notes.append(f"{cut} texts were cut at {longest} tokens")
    if not any(t.special[0] for t in found.tokens):
        found.notes.append(
            "texts begin without a BOS token, so their first token, on which many models act oddly,"
            " counts as any other; task.options.prepend_bos=true if the SAE was trained with one"
        )
    return found


def _examples(cfg: RunConfig) -> tuple[list[Example], list[str]]:
    """The data set, or without a path for dataset=text the neutral text that saexp ships."""
    data = cfg.dataset
    if data.name != "text" or data.path is not None or data.text is not None:
        made = registry.build("dataset", data)
        return made.examples, list(made.notes)
    lines = background_texts(data)
    examples = [Example(id=str(n), text=line) for n, line in enumerate(lines, 1)]
    source = "the shipped neutral text" if data.background is None else data.background
    return examples, [f"texts: {source}; your own with dataset.path=FILE (one text a line)"]


GROUP_BYTES = {"cuda": 16 * 2**30, "cpu": 4 * 2**30}
"""Weights of SAEs evaluated together, by device type; further ones begin with a clean pass of
their own, after the numbers of these were saved."""
_OPTIONS: dict[str, Any] = {
    "widths": None,
    "n_texts": None,
    "batch_tokens": "auto",
    "prepend_bos": None,
    "splice_special": False,
    "ablate_special": False,
    "score_special": False,
    "n_bootstrap": 1000,
}
_BOS_KEY = "task.options.prepend_bos"
_LEAST = {"n_texts": 1, "batch_tokens": 1, "n_bootstrap": 0}


@dataclass(frozen=True)
class _Asked:
    """What is evaluated, and how."""

    cells: list[RunConfig]
    """A run per SAE."""
    texts: Texts
    settings: EvaluationSettings
    n_bootstrap: int


def evaluate(cfg: RunConfig, context: RunContext) -> TaskResult:
    """Loss, divergence, sparsity and faithfulness of the SAEs at `layer` (one or a list).

    Of several SAEs, metrics get the ending `_layer_<n>`, `_width_<d_sae>` or both, and
    evaluation.parquet has a row for each.
    """
    options = _options(cfg)
    with context.stage("load"):
        model = language_model(cfg)
        cells = _cells(cfg, options["widths"])
        settle = partial(settle_bos, cfg, model, asked=options["prepend_bos"], key=_BOS_KEY)
        first = wish(sparse_autoencoder(cells[0], model))
        model, settled = settle([first])
    where = Where(**{k: v for k, v in options.items() if k.endswith("_special")})
    with context.stage("tokenize"):
        texts = read_texts(cfg, model, where, options)
        texts.notes[:0] = settled.notes
    settings = EvaluationSettings(
        where=where,
        batch_tokens=options["batch_tokens"],
        max_norm_ratio=cfg.positions.max_norm_ratio,
    )
    asked = _Asked(cells, texts, settings, options["n_bootstrap"])
    parts: list[Part] = []
    began, forwarded, result = time.perf_counter(), 0, TaskResult()
    for saes in _groups(cells, model):
        # SAEs that want other texts than the first are refused.
        settle([first, *saes])
        with context.stage("evaluate"):
            found = evaluate_saes(model, saes, texts.tokens, settings)
        with context.stage("summarise"):
            parts += [
                part_of(sae, one, asked.n_bootstrap, cfg.seed, texts.ids, texts.units)
                for sae, one in zip(saes, found, strict=True)
            ]
        forwarded += sum(map(len, texts.tokens))
        result = _result(parts, asked, forwarded, time.perf_counter() - began)
        result.metrics |= settled.metrics
        _save(cfg, context, result, model, parts, asked)
        log.info("%d of %d SAEs evaluated", len(parts), len(cells))
    with context.stage("report"):
        # From the files just written, so that the page can be made again from them alone.
        finding = evaluation_sentences(context.folder)
        _save(cfg, context, result, model, parts, asked, finding=finding)
        result.figures = evaluation_figures(context.folder)
        write_evaluation_report(context.folder, result.figures)
    return result


def _options(cfg: RunConfig) -> dict[str, Any]:
    """`task.options` over the defaults, checked. Raises ConfigError."""
    for key in cfg.task.options:
        if key not in _OPTIONS:
            hint = did_you_mean(key, _OPTIONS)
            raise ConfigError(f"task.options.{key}: task=evaluate has no such setting; {hint}")
    found = {**_OPTIONS, **cfg.task.options}
    for key, value in found.items():
        flag = isinstance(_OPTIONS[key], bool) or (key == "prepend_bos" and value is not None)
        if flag and not isinstance(value, bool):
            raise ConfigError(f"task.options.{key}={value}; type true or false")
    for key, least in _LEAST.items():
        value = found[key]
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value != _OPTIONS[key] and (not whole or value < least):
            raise ConfigError(
                f"task.options.{key}={value} is no whole number of at least {least}; "
                f"type such as task.options.{key}=1000"
            )
    if (widths := found["widths"]) is not None:
        listed = widths if isinstance(widths, list) else [widths]
        found["widths"] = list(dict.fromkeys(parse_width(w) for w in listed)) or None
    return found


def _cells(cfg: RunConfig, widths: list[int] | None) -> list[RunConfig]:
    """The run cut into runs of one SAE each: every layer, and of each layer every width."""
    layers = per_layer(cfg)
    if widths is None:
        return layers
    return [
        replace(cell, width=width, sae=replace(cell.sae, width=width))
        for cell in layers
        for width in widths
    ]


def _groups(cells: Sequence[RunConfig], model: LanguageModel) -> Iterator[list[SparseAutoencoder]]:
    """SAEs that are evaluated together; only those of one group are in memory."""
    saes: list[SparseAutoencoder] = []
    limit = GROUP_BYTES.get(model.device.type, GROUP_BYTES["cpu"])
    for cell in cells:
        saes.append(sparse_autoencoder(cell, model))
        if sum(w.nbytes for s in saes for w in s.buffers()) >= limit:
            yield saes
            saes = []
    if saes:
        yield saes


def _result(parts: Sequence[Part], asked: _Asked, forwarded: int, seconds: float) -> TaskResult:
    """Of the SAEs that are done."""
    texts, cells = asked.texts, asked.cells
    result = TaskResult(notes=[*texts.notes])
    result.merge(
        side_by_side(
            parts,
            many_layers=len({str(c.layer) for c in cells}) > 1,
            many_widths=len({str(c.width) for c in cells}) > 1,
        )
    )
    if (n := int(result.metrics["evaluation/n_units"] or 0)) < MIN_N:
        whole = n == len(texts.tokens)
        what = counted(n, "text") if whole else counted(n, "entity", "entities")
        result.notes.append(f"{what} alone, so no number has an interval; it takes {MIN_N}")
    result.tables["skips"] = skips_table(texts.skips)
    result.metrics |= {
        "evaluation/n_texts": len(texts.tokens),
        "evaluation/seconds": seconds,
        "collection/n_skipped": len(texts.skips),
        "collection/tokens_forwarded": forwarded,
    }
    result.metrics = clean_metrics(result.metrics, result.notes)
    return result


def _save(
    cfg: RunConfig,
    context: RunContext,
    result: TaskResult,
    model: LanguageModel,
    parts: Sequence[Part],
    asked: _Asked,
    **more: Any,
) -> None:
    write_result(context, result)
    saes, texts = [p.about for p in parts], asked.texts
    one = {key: ", ".join(dict.fromkeys(str(sae[key]) for sae in saes)) for key in saes[0]}
    write_provenance(
        context,
        cfg,
        result.notes,
        texts.skips,
        device=str(model.device),
        model=about_model(model),
        sae=saes[0] if len(saes) == 1 else one,
        saes=saes,
        store={"key": "none: texts are forwarded with and without the SAE"},
        tokens_forwarded=result.metrics["collection/tokens_forwarded"],
        dataset={"name": cfg.dataset.name, "n_examples": len(texts.tokens) + len(texts.skips)},
        where=_told(asked.settings),
        **more,
    )


def _told(settings: EvaluationSettings) -> dict[str, str]:
    """Which positions are meant, in words, for the report."""
    where, ratio = settings.where, settings.max_norm_ratio
    special, every = "all but special tokens (BOS …) and padding", "all but padding"
    high = "" if ratio is None else f"; not those with a norm above {ratio:g} times the median"
    pairs = "predictions made at a token, of the next, neither of them special or padding"
    any_pair = "predictions made at a token, of the next, neither of them padding"
    return {
        "spliced": (every if where.splice_special else special) + high,
        "ablated": (every if where.ablate_special else special) + high,
        "scored": any_pair if where.score_special else pairs,
        "compared": every if where.score_special else special,
    }
