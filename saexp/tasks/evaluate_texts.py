"""The texts of task=evaluate: any data set's, or the neutral text that ships."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from saexp import registry
from saexp.analysis.evaluation import can_be_scored
from saexp.analysis.evaluation_passes import Where
from saexp.config import RunConfig
from saexp.data.datasets import background_texts
from saexp.data.examples import Example, Skip
from saexp.data.prompts import tokenize_texts
from saexp.data.tokens import TokenizedText
from saexp.errors import DataError
from saexp.models.context_length import context_limit
from saexp.models.loading import LanguageModel
from saexp.tasks.gathering import skip_notes


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
