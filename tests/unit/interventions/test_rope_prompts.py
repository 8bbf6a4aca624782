"""Attention and values patched in, of prompts on both sides of the context, equal single rows."""

import numpy as np
import pytest
import torch

from saexp.data import Example
from saexp.data.tokenization import tokenize
from saexp.interventions import _captured
from saexp.interventions.attention import _attention, _entity_positions
from saexp.interventions.conditions import PositionedPrompt
from saexp.interventions.stream_edits import Row
from saexp.models import Hookpoint
from tests.random_models import tokenizer
from tests.rope_models import CONTEXT, ROPE_MODELS, rope_lm

TEXTS = [
    "The city",
    "The player Fenlet Baszad scored twice",
    "The player Fenlet Baszad scored twice in the second half of the game.",
    "The city of New Bresk lies on the wide river; its old harbour is busy.",
    "The player Fenlet Baszad scored twice in the second half, and the city sang it well.",
]
AT = Hookpoint(1, "resid_post")


def placed() -> list[PositionedPrompt]:
    tokens = tokenize(TEXTS, tokenizer(), 64)
    assert min(map(len, tokens)) < CONTEXT < max(map(len, tokens))
    return [
        PositionedPrompt(Example(id=str(n), text=t.text, spans=((4, 8),)), t, (1, len(t) - 1))
        for n, t in enumerate(tokens)
    ]


@pytest.mark.parametrize("name", ROPE_MODELS)
def test_values_to_patch_in_equal_single_rows(name):
    captured = _captured(placed(), [AT], rope_lm(name))[AT]
    for prompt in placed():
        with torch.inference_mode():
            out = rope_lm(name).hf(torch.tensor([prompt.tokens.ids]), output_hidden_states=True)
        wanted = out.hidden_states[AT.layer + 1][0, list(prompt.positions)]
        torch.testing.assert_close(captured[prompt.example.id].values, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ROPE_MODELS)
def test_attention_to_an_entity_equals_single_rows(name):
    def measured(some: list[PositionedPrompt]) -> np.ndarray:
        rows = [Row(p.tokens.ids, about=_entity_positions(p)) for p in some]
        return _attention(rope_lm(name), rows, {}, {})

    single = np.concatenate([measured([prompt]) for prompt in placed()])
    np.testing.assert_allclose(measured(placed()), single, atol=1e-6)
