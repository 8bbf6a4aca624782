"""The texts of an evaluation: those of examples, or the contexts of a corpus."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from saexp import registry
from saexp.analysis.evaluation import can_be_scored
from saexp.analysis.evaluation_passes import Where
from saexp.config import CorpusConfig, EvaluateConfig, RunConfig
from saexp.data.corpora import Corpus
from saexp.data.datasets import background_texts
from saexp.data.examples import Example, Skip, skip_notes
from saexp.data.tokenization import TokenizedText, tokenize_texts
from saexp.errors import DataError, counted
from saexp.models.forward import context_limit
from saexp.models.loading import LanguageModel
from saexp.pipeline.collect import open_corpus
from saexp.pipeline.training_data import text_of

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
