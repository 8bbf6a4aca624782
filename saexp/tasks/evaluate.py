"""task=evaluate: SAEs spliced in place of the streams they read.

The texts are those of examples, or the contexts of a corpus."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from saexp import registry
from saexp.analysis.evaluation import (
    ABLATIONS,
    Evaluation,
    EvaluationSettings,
    Numbers,
    can_be_scored,
    densities,
    evaluate_saes,
    l0_table,
    numbers,
)
from saexp.analysis.evaluation_passes import Where
from saexp.config import CorpusConfig, EvaluateConfig, RunConfig
from saexp.context import ObjectCache, RunContext
from saexp.data import Example, Skip, skip_notes
from saexp.data.corpora import Corpus
from saexp.data.datasets import background_texts
from saexp.data.tokenization import TokenizedText, tokenize_texts
from saexp.errors import DataError, counted
from saexp.models.forward import context_limit
from saexp.models.loading import LanguageModel
from saexp.pipeline.collect import BosPreference, bos_preference, open_corpus, resolve_bos
from saexp.pipeline.objects import describe_model, language_model, per_layer, sparse_autoencoder
from saexp.pipeline.run_folder import save_run, skips_table, write_provenance
from saexp.pipeline.training_data import text_of
from saexp.reports.sae_quality import (
    evaluation_figures,
    evaluation_sentences,
    write_evaluation_report,
)
from saexp.results import Result
from saexp.saes import SparseAutoencoder
from saexp.saes.validation import POOR
from saexp.stats import MIN_N

log = logging.getLogger(__name__)


_BLOCK = 1024
"""Contexts that are looked at together."""
MOST_UNITS = 4096
"""Resampling units of a corpus at most. With more contexts, neighbours, which may share documents,
are resampled together."""
_TOO_SHORT = "too short: no token has a scored next token"
_WITHOUT_BOS = (
    "texts begin without a BOS token, so their first token, on which many models act oddly, counts "
    "as any other; task.prepend_bos=true if the SAE was trained with one"
)


@dataclass(frozen=True)
class Texts:
    """Tokenized texts, and the examples that could not be used."""

    ids: list[str]
    units: list[str]
    """Resampling unit of each text: its entity, else the text itself; of a corpus at most
    `MOST_UNITS` runs of contexts."""
    tokens: Sequence[TokenizedText]
    n_tokens: int
    """Tokens of all texts, special tokens included."""
    skips: list[Skip]
    notes: list[str]


def read_texts(
    cfg: RunConfig, model: LanguageModel, where: Where, options: EvaluateConfig
) -> Texts:
    """Each distinct text once, tokenized, cut at the end of the model's context.

    Of a corpus, its contexts. Of `options`, `n_texts` (a seeded sample) is used. Raises DataError
    where no text has a prediction to score.
    """
    if isinstance(cfg.dataset, CorpusConfig):
        return _contexts(cfg, model, where, options)
    examples, source_notes = _examples(cfg)
    first = {e.text: e for e in reversed(examples)}
    distinct = [e for e in examples if first[e.text] is e]
    notes = list(source_notes)
    if len(distinct) < len(examples):
        notes.append(f"{len(examples) - len(distinct)} repeated texts are counted once")
    if options.n_texts is not None and options.n_texts < len(distinct):
        order = np.random.default_rng([cfg.seed, 23]).permutation(len(distinct))
        distinct = [distinct[i] for i in sorted(order[: options.n_texts])]
    longest = min(cfg.dataset.max_length, context_limit(model) or cfg.dataset.max_length)
    tokenized = tokenize_texts(model, [e.text for e in distinct], longest)
    pairs = list(zip(distinct, tokenized, strict=True))
    usable = [(e, tokens) for e, tokens in pairs if can_be_scored(tokens, where)]
    skips = [Skip(e.id, _TOO_SHORT) for e, tokens in pairs if not can_be_scored(tokens, where)]
    if not usable:
        raise DataError(f"none of {len(examples)} texts has a token and a next token to predict")
    notes += skip_notes(skips, len(distinct), "text")
    if n_cut := sum(tokens.truncated for _, tokens in usable):
        notes.append(f"{n_cut} texts were cut at {longest} tokens")
    if not any(tokens.special[0] for _, tokens in usable):
        notes.append(_WITHOUT_BOS)
    return Texts(
        ids=[e.id for e, _ in usable],
        units=[e.unit for e, _ in usable],
        tokens=[tokens for _, tokens in usable],
        n_tokens=sum(len(tokens) for _, tokens in usable),
        skips=skips,
        notes=notes,
    )


def _examples(cfg: RunConfig) -> tuple[list[Example], list[str]]:
    """The data set and notes on it; the shipped neutral text for dataset=text without a path."""
    data = cfg.dataset
    if data.name != "text" or data.path is not None or data.text is not None:
        dataset = registry.build("dataset", data)
        return dataset.examples, list(dataset.notes)
    lines = background_texts(data)
    examples = [Example(id=str(n), text=line) for n, line in enumerate(lines, 1)]
    source = "the shipped neutral text" if data.background is None else data.background
    return examples, [f"texts: {source}; your own with dataset.path=FILE (one text a line)"]


class ContextTexts(Sequence[TokenizedText]):
    """Contexts of a corpus as texts without their characters, read from disk when asked for."""

    def __init__(
        self, corpus: Corpus, contexts: Int[np.ndarray, " n"], special: frozenset[int]
    ) -> None:
        self.corpus, self.contexts, self.special = corpus, contexts, special

    def __len__(self) -> int:
        return len(self.contexts)

    def __getitem__(self, index: Any) -> Any:
        """A text, or those of a slice."""
        if isinstance(index, slice):
            return ContextTexts(self.corpus, self.contexts[index], self.special)
        [ids] = self.corpus.ids(self.contexts[index][None])
        return text_of(ids.tolist(), self.special)


def _contexts(cfg: RunConfig, model: LanguageModel, where: Where, options: EvaluateConfig) -> Texts:
    """The contexts of a corpus; memory does not grow with their tokens."""
    corpus = open_corpus(cfg, model)
    contexts = np.arange(len(corpus))
    if options.n_texts is not None and options.n_texts < len(contexts):
        order = np.random.default_rng([cfg.seed, 23]).permutation(len(contexts))
        contexts = np.sort(order[: options.n_texts])
    special = np.asarray(sorted(set(model.tokenizer.all_special_ids)), dtype=np.int64)
    scored, begins_special = [], False
    for start in range(0, len(contexts), _BLOCK):
        block = contexts[start : start + _BLOCK]
        usable, first_special = _can_be_scored(corpus, block, special, where)
        scored.append(usable)
        begins_special |= bool((usable & first_special).any())
    usable = np.concatenate(scored)
    skips = [Skip(str(n), _TOO_SHORT) for n in contexts[~usable].tolist()]
    if not usable.any():
        raise DataError(f"none of {len(contexts)} contexts has a token and a next token to predict")
    notes = [f"{counted(len(corpus), 'context')} of {corpus.context_size} tokens", *corpus.notes]
    notes += skip_notes(skips, len(contexts), "context")
    notes += [] if begins_special else [_WITHOUT_BOS]
    contexts = contexts[usable]
    units = np.arange(len(contexts))
    if len(units) > MOST_UNITS:
        units = units * MOST_UNITS // len(units)
        notes.append(
            f"intervals are by resampling {MOST_UNITS:,} runs of neighbouring contexts, which may "
            "share documents"
        )
    return Texts(
        ids=[str(n) for n in contexts.tolist()],
        units=[str(n) for n in units.tolist()],
        tokens=ContextTexts(corpus, contexts, frozenset(special.tolist())),
        n_tokens=int(corpus.lengths(contexts).sum()),
        skips=skips,
        notes=notes,
    )


def _can_be_scored(
    corpus: Corpus, contexts: Int[np.ndarray, " n"], special: Int[np.ndarray, " k"], where: Where
) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """(`evaluation.can_be_scored` of each context, whether it begins with a special token)."""
    ids, lengths = corpus.ids(contexts), corpus.lengths(contexts)
    is_token = np.arange(ids.shape[1]) < lengths[:, None]
    is_special = np.isin(ids, special) & is_token
    scored = is_token if where.score_special else is_token & ~is_special
    spliced = is_token if where.splice_special else is_token & ~is_special
    pairs = scored[:, 1:] & scored[:, :-1]
    return spliced.any(axis=1) & pairs.any(axis=1), is_special[:, 0]


@dataclass
class Part:
    """Results of one SAE."""

    about: dict[str, Any]
    layer: int
    numbers: Numbers
    densities: pd.DataFrame
    l0: pd.DataFrame
    texts: pd.DataFrame
    resumed: bool
    notes: list[str]


def part_of(
    sae: SparseAutoencoder,
    one: Evaluation,
    n_bootstrap: int,
    seed: int,
    ids: Sequence[str],
    units: Sequence[str] | None = None,
) -> Part:
    """Everything that is kept of one SAE's evaluation; `ids` and `units` are the texts' own."""
    about = {
        "name": sae.metadata.get("name", "the SAE"),
        "architecture": sae.architecture,
        "hookpoint": sae.hookpoint.name,
        "writes": (sae.hookpoint_out or sae.hookpoint).name,
        "d_sae": sae.d_sae,
        "control": sae.metadata.get("control"),
        "fingerprint": sae.metadata.get("fingerprint"),
    }
    texts = one.texts.copy()
    texts.insert(0, "example_id", list(ids))
    return Part(
        about=about,
        layer=sae.hookpoint.layer,
        numbers=numbers(one, n_bootstrap, seed, units=units),
        densities=densities(one),
        l0=l0_table(one),
        texts=texts,
        resumed=one.resumed,
        notes=one.notes,
    )


def label(part: Part, many_layers: bool, many_widths: bool) -> str:
    """Suffix of the metrics that identifies the SAE among several, such as `layer_2_width_256`."""
    words = [f"layer_{part.layer}"] if many_layers or not many_widths else []
    words += [f"width_{part.about['d_sae']}"] if many_widths else []
    return "_".join(words)


def side_by_side(parts: Sequence[Part], *, many_layers: bool, many_widths: bool) -> Result:
    """Metrics, with the SAE's label as ending where there are many, and tables `evaluation` (a row
    per SAE), `densities`, `l0_histogram` and `texts`, each with the label in column `sae`."""
    result, rows = Result(), []
    labels = [label(p, many_layers, many_widths) for p in parts]
    for part, name in zip(parts, labels, strict=True):
        ending = f"_{name}" if many_layers or many_widths else ""
        for metric, value in part.numbers.items():
            # What the unchanged model does is the same for all.
            shared = metric.startswith(("reconstruction/ce_clean", "evaluation/"))
            result.metrics[metric if shared else metric + ending] = value
        values = {metric.partition("/")[2]: value for metric, value in part.numbers.items()}
        rows.append({"sae": name, "layer": part.layer, **part.about, **values})
        result.notes += _remarks(part, name if ending else str(part.about["name"]))
    table = pd.DataFrame(rows)
    empty = [c for c in table.columns if table[c].isna().all()]
    result.tables["evaluation"] = table.astype(dict.fromkeys(empty, float))
    of_parts = {
        "densities": [p.densities for p in parts],
        "l0_histogram": [p.l0 for p in parts],
        "texts": [p.texts for p in parts],
    }
    for name, tables in of_parts.items():
        labelled = [t.assign(sae=of) for t, of in zip(tables, labels, strict=True)]
        result.tables[name] = pd.concat(labelled, ignore_index=True)
    return result


def _remarks(part: Part, name: str) -> list[str]:
    numbers, notes = part.numbers, [f"{name}: {note}" for note in part.notes]
    explained = numbers["reconstruction/explained_variance"]
    if explained is not None and explained < POOR:
        notes.append(
            f"{name} explains only {explained:.2f} of the variance of {part.about['writes']}; "
            "check that it was trained on this model, this stream and similar texts"
        )
    for ablation, ending in ABLATIONS.items():
        if np.isnan(numbers[f"reconstruction/ce_loss_score{ending}"] or 0.0):
            notes.append(
                f"{name}: no score relative to {ablation} ablation, which does not raise the loss"
            )
    if not part.resumed:
        notes.append(
            f"{name}: the blocks of this model pass on more than the residual stream, so every "
            "pass was run from the token ids"
        )
    return notes


GROUP_BYTES = {"cuda": 16 * 2**30, "cpu": 4 * 2**30}
"""Device type -> bytes of SAE weights that are evaluated together. Further SAEs are evaluated in
another group, with a clean pass of its own, after the results of this one are saved."""


@dataclass(frozen=True)
class _Evaluation:
    """What is evaluated, and how."""

    cells: list[RunConfig]
    """One config per SAE."""
    model: LanguageModel
    bos: Result
    """Metric and notes on how texts begin, and notes on the model."""
    texts: Texts
    settings: EvaluationSettings
    n_bootstrap: int


def evaluate(cfg: RunConfig, context: RunContext) -> Result:
    """Loss, divergence, sparsity and faithfulness of the SAEs at `layer` (one or a list).

    With several SAEs, metrics end in `_layer_<n>`, `_width_<d_sae>` or both, and
    evaluation.parquet has a row for each.
    """
    evaluation = _prepared(cfg, context)
    texts, model, cells = evaluation.texts, evaluation.model, evaluation.cells
    first = bos_preference(sparse_autoencoder(cells[0], model, context.objects))
    parts: list[Part] = []
    began, forwarded, result = time.perf_counter(), 0, Result()
    saved, about = result, {}
    for saes in _groups(cells, model, context.objects):
        # Raises where an SAE needs texts that begin otherwise than the first SAE's.
        _resolve_bos(cfg, model, [first, *map(bos_preference, saes)])
        with context.stage("evaluate"):
            measured = evaluate_saes(model, saes, texts.tokens, evaluation.settings)
        with context.stage("summarise"):
            parts += [
                part_of(sae, one, evaluation.n_bootstrap, cfg.seed, texts.ids, texts.units)
                for sae, one in zip(saes, measured, strict=True)
            ]
        forwarded += texts.n_tokens
        result = _result(parts, evaluation, forwarded, time.perf_counter() - began)
        about = _provenance(cfg, result, parts, evaluation)
        saved = save_run(context, cfg, result, texts.skips, about)
        log.info("%d of %d SAEs evaluated", len(parts), len(cells))
    with context.stage("report"):
        # From the files just written, so that the page can be rendered again from them alone.
        finding = evaluation_sentences(context.folder)
        write_provenance(context, cfg, saved, texts.skips, {**about, "finding": finding})
        saved.figures = evaluation_figures(context.folder)
        write_evaluation_report(context.folder, saved.figures)
    return saved


def _prepared(cfg: RunConfig, context: RunContext) -> _Evaluation:
    """The options, model and texts of the task."""
    options = cfg.task
    assert isinstance(options, EvaluateConfig)
    with context.stage("load"):
        model = language_model(cfg, context.objects)
        cells = _cells(cfg, options.width_list)
        first = bos_preference(sparse_autoencoder(cells[0], model, context.objects))
        model, bos = _resolve_bos(cfg, model, [first])
        bos = replace(bos, notes=[*model.notes, *bos.notes])
    where = Where(**{k: v for k, v in vars(options).items() if k.endswith("_special")})
    with context.stage("tokenize"):
        texts = read_texts(cfg, model, where, options)
    settings = EvaluationSettings(
        where=where,
        batch_tokens=options.batch_tokens,
        max_norm_ratio=cfg.positions.max_norm_ratio,
        keep_passes=not isinstance(cfg.dataset, CorpusConfig),
    )
    return _Evaluation(cells, model, bos, texts, settings, options.n_bootstrap)


def _resolve_bos(
    cfg: RunConfig, model: LanguageModel, preferences: Sequence[BosPreference]
) -> tuple[LanguageModel, Result]:
    assert isinstance(cfg.task, EvaluateConfig)
    return resolve_bos(cfg, model, preferences, cfg.task.prepend_bos, "task.prepend_bos")


def _cells(cfg: RunConfig, widths: list[int] | None) -> list[RunConfig]:
    """One config per SAE: every layer, and of each layer every width."""
    layers = per_layer(cfg)
    if widths is None:
        return layers
    return [
        replace(cell, width=width, sae=replace(cell.sae, width=width))
        for cell in layers
        for width in widths
    ]


def _groups(
    cells: Sequence[RunConfig], model: LanguageModel, objects: ObjectCache
) -> Iterator[list[SparseAutoencoder]]:
    """SAEs that are evaluated together; only those of one group are in memory."""
    saes: list[SparseAutoencoder] = []
    limit = GROUP_BYTES.get(model.device.type, GROUP_BYTES["cpu"])
    for cell in cells:
        saes.append(sparse_autoencoder(cell, model, objects))
        if sum(w.nbytes for s in saes for w in s.buffers()) >= limit:
            yield saes
            saes = []
    if saes:
        yield saes


def _result(
    parts: Sequence[Part], evaluation: _Evaluation, forwarded: int, seconds: float
) -> Result:
    """The result of the SAEs evaluated so far."""
    texts, cells = evaluation.texts, evaluation.cells
    result = Result(notes=[*evaluation.bos.notes, *texts.notes])
    result.merge(
        side_by_side(
            parts,
            many_layers=len({str(c.layer) for c in cells}) > 1,
            many_widths=len({str(c.width) for c in cells}) > 1,
        )
    )
    if (n := int(result.metrics["evaluation/n_units"] or 0)) < MIN_N:
        is_texts = n == len(texts.tokens)
        what = counted(n, "text") if is_texts else counted(n, "entity", "entities")
        result.notes.append(f"{what} alone, so no number has an interval; it takes {MIN_N}")
    result.tables["skips"] = skips_table(texts.skips)
    result.metrics |= {
        "evaluation/n_texts": len(texts.tokens),
        "evaluation/seconds": seconds,
        "collection/n_skipped": len(texts.skips),
        "collection/tokens_forwarded": forwarded,
        **evaluation.bos.metrics,
    }
    return result


def _provenance(
    cfg: RunConfig, result: Result, parts: Sequence[Part], evaluation: _Evaluation
) -> dict[str, Any]:
    """Model, SAEs and texts for provenance.json."""
    saes, texts = [p.about for p in parts], evaluation.texts
    joined = {key: ", ".join(dict.fromkeys(str(sae[key]) for sae in saes)) for key in saes[0]}
    return {
        "device": str(evaluation.model.device),
        "model": describe_model(evaluation.model),
        "sae": saes[0] if len(saes) == 1 else joined,
        "saes": saes,
        "store": {"key": "none: texts are forwarded with and without the SAE"},
        "tokens_forwarded": result.metrics["collection/tokens_forwarded"],
        "dataset": {"name": cfg.dataset.name, "n_examples": len(texts.tokens) + len(texts.skips)},
        "where": _described_positions(evaluation.settings),
    }


def _described_positions(settings: EvaluationSettings) -> dict[str, str]:
    """The positions of each measurement in words, for the report."""
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
