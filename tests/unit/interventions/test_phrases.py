"""Probabilities of phrases after a prompt against sums over sequences and a hand-written loop."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saexp.data import Example
from saexp.interventions.outcomes import Hedging, phrase_log_probabilities, phrase_tokens
from saexp.interventions.stream_edits import Add, Row, Vector
from saexp.models import Hookpoint
from saexp.models.loading import LanguageModel
from tests.random_models import D_MODEL, TEXTS, VOCABULARY, random_lm, tokenizer

AT = Hookpoint(1, "resid_post")
OPTIONS: dict[str, Any] = {"batch_tokens": 256, "cache": None, "label": "dont_know"}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return random_lm("llama")


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(tokenizer()(text)["input_ids"])


def test_the_probabilities_of_all_continuations_of_two_tokens_add_up_to_one(
    model: LanguageModel,
) -> None:
    row = Row(ids_of(TEXTS[0]))
    first = range(VOCABULARY)
    pairs = [(a,) for a in first if a != 5]
    pairs += [(5, b) for b in range(VOCABULARY)]
    (value,) = phrase_log_probabilities(model, {}, [row], [pairs], **OPTIONS)
    assert value == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("generated", [False, True])
def test_under_steering_it_is_that_of_a_hand_written_loop(
    model: LanguageModel, generated: bool
) -> None:
    vector = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1))
    ids, phrases = ids_of(TEXTS[1])[:12], [(7, 8, 9), (7, 10), (11,)]
    positions = (1, len(ids) - 1)
    row = Row(ids, (Add(AT, Vector(vector), 2.0),), positions, generated)

    def add(changed: list[int]) -> Callable[..., object]:
        def hook(_m: object, _a: object, out: Tensor | tuple[Tensor, ...]) -> object:
            stream = (out if isinstance(out, Tensor) else out[0]).clone()
            stream[0, changed] += 2.0 * vector
            return stream if isinstance(out, Tensor) else (stream, *out[1:])

        return hook

    def log_probability(tokens: tuple[int, ...]) -> float:
        total = 0.0
        for n, token in enumerate(tokens):
            known = torch.tensor([[*ids, *tokens[:n]]])
            changed = [*positions, *(range(len(ids), known.shape[1]) if generated else ())]
            handle = model.blocks[AT.layer].register_forward_hook(add(changed))
            with torch.inference_mode():
                logits = model.hf(input_ids=known).logits[0, -1]
            handle.remove()
            total += float(logits.log_softmax(-1)[token])
        return total

    expected = np.logaddexp.reduce([log_probability(p) for p in phrases])
    values = phrase_log_probabilities(model, {}, [row, Row(ids)], [phrases] * 2, **OPTIONS)
    assert values[0] == pytest.approx(expected, abs=1e-4)
    assert abs(values[1] - values[0]) > 1e-3


def test_phrases_follow_the_prompt_with_a_space_and_exclude_each_other() -> None:
    example = Example(id="1", text="Where was the player born? Answer:")
    tokens = phrase_tokens(tokenizer(), example, ["I do", "I do not", "No"])
    assert [tokenizer().decode(t) for t in tokens] == [" I do", " No"]
    (asked,) = phrase_tokens(tokenizer(), Example(id="2", text="Answer: "), ["No"])
    assert tokenizer().decode(asked) == "No"


@pytest.mark.parametrize(
    ("text", "hedges"),
    [
        ("He was born in Akron, Ohio.", False),
        ("The film was released in May 1963.", False),
        ("I believe he was born in Akron.", True),
        ("It may have been directed by someone else.", True),
        ("Perhaps Rome?", True),
        ("I\u2019m not entirely sure, but Rome.", True),
        ("To the best of my knowledge, it is in France.", True),
        ("It is said to be in France.", True),
        ("The likely Lads sing it.", True),
        ("You might want to listen to it; it lies on the Thames.", False),
        ("I do not know.", False),
    ],
)
def test_hedging(text: str, hedges: bool) -> None:
    example = Example(id="1", text="?", entity="Call Me Maybe")
    assert Hedging().score(text, example) is hedges
    assert Hedging().score(f"Call Me Maybe. {text}", example) is hedges
