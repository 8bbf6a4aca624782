"""Probabilities that a model's answer begins with one of several phrases, under an intervention."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saexp.data.examples import Example
from saexp.data.tokenization import PositionNotFound, answer_text
from saexp.interventions.cached_generation import LogitReader, read_logits
from saexp.interventions.results_cache import ResultCache
from saexp.interventions.stream_edits import Row, SAEs
from saexp.models.loading import LanguageModel


def phrase_tokens(
    tokenizer: Any, example: Example, phrases: Sequence[str]
) -> list[tuple[int, ...]]:
    """The tokens of each phrase after `example.text`, a space between them where one belongs.

    A phrase whose tokens begin with those of another one is left out, so that the phrases exclude
    each other. Raises PositionNotFound where a phrase merges with the prompt's last token.
    """
    options = {"add_special_tokens": False}
    before = list(tokenizer(example.text, **options)["input_ids"])
    tokens: list[tuple[int, ...]] = []
    for phrase in phrases:
        whole = list(tokenizer(example.text + answer_text(example, phrase), **options)["input_ids"])
        if whole[: len(before)] != before or len(whole) == len(before):
            raise PositionNotFound(f"'{phrase}' merges with the prompt's last token")
        tokens.append(tuple(whole[len(before) :]))
    tokens = list(dict.fromkeys(tokens))
    return [t for t in tokens if not any(t != u and t[: len(u)] == u for u in tokens)]


def phrase_log_probabilities(
    model: LanguageModel,
    saes: SAEs,
    rows: Sequence[Row],
    phrases: Sequence[Sequence[tuple[int, ...]]],
    *,
    batch_tokens: int,
    cache: ResultCache | None,
    label: str,
) -> list[float]:
    """Per row the natural logarithm of the probability that one of its phrases follows.

    `phrases[i]` are token sequences of which none begins with another, so that their probabilities
    add up. Under a row's operations, tokens of a phrase count as generated ones.
    """
    wholes = [
        replace(row.followed_by(ids), sample=None, generated=False, about=(len(ids),))
        for row, some in zip(rows, phrases, strict=True)
        for ids in some
    ]
    reader = LogitReader(
        _log_probability, "log-probability of the last tokens", lambda r: r.about[0] + 1, label
    )
    values = read_logits(model, wholes, saes, reader, batch_tokens=batch_tokens, cache=cache)
    logs = iter(float(value[0]) for value in values)
    return [float(np.logaddexp.reduce([next(logs) for _ in some])) for some in phrases]


def _log_probability(row: Row, logits: Float[Tensor, "n V"]) -> np.ndarray:
    """Of the row's last tokens, from the logits before each of them."""
    ids = torch.tensor(row.ids[-row.about[0] :], device=logits.device)
    logs = logits[:-1].log_softmax(-1).gather(1, ids[:, None])
    return np.asarray([float(logs.double().sum())])
