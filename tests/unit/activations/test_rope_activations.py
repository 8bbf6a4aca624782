"""Activations of models whose rotary frequencies depend on the length equal single-row passes."""

import copy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from saexp.activations.collector import ingredients
from tests.random_models import random_lm
from tests.rope_models import CONTEXT, ONE_OF_EACH_KIND, ROPE_MODELS, rope_hf, rope_lm
from tests.unit.activations.collecting import placed, run

BEGINNING = "The player Fenlet Baszad scored twice in the second half"
TEXTS = [
    "The city",
    "The city of New Bresk lies on the wide river",
    *(f"{BEGINNING} {end}" for end in ("of it", "of the game", "of the game.", "and well", "on")),
    BEGINNING,
    f"{BEGINNING} of the game while nobody sang it well and the city lies on the wide river",
    f"{BEGINNING} of the game while nobody sang it well and the old harbour is busy",
    f"{BEGINNING} of the game while one of them sang",
    f"{BEGINNING} of the game while two of them sang",
    "It's raining, isn't it? We'll see what the captain says tomorrow morning.",
]
WHOLE = {"atol": 1e-5, "rtol": 1e-5}


new_model = cache(rope_hf)
"""Copies of it are run, so that it stays new."""


@cache
def hidden_states(name: str, ids: tuple[int, ...]) -> Any:
    """Of the text alone, by a model that has not seen any other."""
    hf = copy.deepcopy(new_model(name))
    with torch.inference_mode():
        return hf(torch.tensor([ids]), output_hidden_states=True).hidden_states


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        *((name, "all") for name in ROPE_MODELS),
        *zip(ONE_OF_EACH_KIND, ("last", "middle"), strict=True),
    ],
)
def test_activations_on_both_sides_of_the_context_equal_single_rows(name, positions, tmp_path):
    placement = placed(TEXTS, positions)
    lengths = [len(t) for t in placement.texts]
    assert min(lengths) < CONTEXT < max(lengths)
    for batch_tokens in (2000, 40):
        store, _ = run(
            rope_lm(name),
            tmp_path / str(batch_tokens),
            placement=placement,
            batch_tokens=batch_tokens,
        )
        for number, text in enumerate(placement.texts):
            of_text = np.flatnonzero(placement.rows["text_id"] == number)
            tokens = placement.rows["token_index"].to_numpy()[of_text].tolist()
            wanted = hidden_states(name, text.ids)
            for layer in range(2):  # transformers norms the last one
                acts = store.acts(layer)[torch.from_numpy(of_text)]
                torch.testing.assert_close(acts, wanted[layer + 1][0, tokens], **WHOLE)


@pytest.mark.parametrize("name", ["phi3_longrope", "llama_dynamic"])
def test_beginnings_are_shared_on_one_side_of_the_context(name, tmp_path):
    short = [f"{BEGINNING} {n}" for n in range(20)]
    assert max(len(t) for t in placed(short).texts) <= CONTEXT
    settings = {"placement": placed(short), "batch_tokens": 128}
    store, stats = run(rope_lm(name), tmp_path / "shared", **settings)
    whole, all_of_it = run(rope_lm(name), tmp_path / "whole", **settings, share_prefixes=False)
    assert stats.tokens_forwarded < all_of_it.tokens_forwarded
    torch.testing.assert_close(store.acts(2), whole.acts(2), **WHOLE)


def test_stores_from_before_are_not_taken_for_these_models_alone():
    """Their values depended on what else was in a batch."""
    placement = placed(TEXTS)
    plain = ingredients(random_lm("llama"), placement, 64, torch.float32)
    new = ingredients(rope_lm("llama_dynamic"), placement, 64, torch.float32)
    assert set(new) - set(plain) == {"rope"}
