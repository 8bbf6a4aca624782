"""Which lengths have the same rotary frequencies, against those that transformers computes."""

import itertools

import pytest
import torch

from saexp.models.forward import (
    by_regime,
    changes_while_generating,
    depends_on_length,
    generation_regime,
    recomputes_beyond,
    rope_regime,
)
from tests.random_models import ARCHITECTURES, random_lm
from tests.rope_models import CONTEXT, ROPE_MODELS, rope_hf, rope_lm

LENGTHS = [1, CONTEXT - 1, CONTEXT, CONTEXT + 1, CONTEXT + 2, CONTEXT + 9]


def rotated(hf, length: int) -> torch.Tensor:
    """cos and sin of the first tokens of a sequence of this length."""
    x = torch.zeros(1, length, 1)
    rotation = hf.model.rotary_emb(x, torch.arange(length)[None])
    return torch.stack(rotation)[..., :1, :].clone(), hf.model.rotary_emb.inv_freq.clone()


@pytest.mark.parametrize("name", ROPE_MODELS)
def test_lengths_share_a_regime_exactly_where_transformers_has_the_same_frequencies(name):
    config = rope_hf(name).config
    frequencies = {n: rotated(rope_hf(name), n)[1] for n in LENGTHS}
    for a, b in itertools.combinations(LENGTHS, 2):
        same = torch.equal(frequencies[a], frequencies[b])
        assert (rope_regime(config, a) == rope_regime(config, b)) == same, (a, b)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_whose_frequencies_are_fixed_have_one_regime(architecture):
    config = random_lm(architecture).text_config
    assert not depends_on_length(config)
    assert by_regime(config, LENGTHS) == [list(range(len(LENGTHS)))]
    assert len({generation_regime(config, n, 30) for n in LENGTHS}) == 1


@pytest.mark.parametrize("name", ROPE_MODELS)
def test_what_a_sequence_is_given_does_not_depend_on_those_before(name):
    """transformers keeps the frequencies of a longer sequence until a short one comes."""
    model = rope_lm(name)
    ids = torch.arange(3, 3 + 2 * CONTEXT)[None]
    for n in (2 * CONTEXT, CONTEXT, CONTEXT + 3, 3, CONTEXT + 1, CONTEXT):
        with torch.inference_mode():
            logits = model.hf(ids[:, :n]).logits
            assert torch.equal(logits, rope_hf(name)(ids[:, :n]).logits)


def test_a_generation_changes_where_a_token_beyond_the_context_is_read():
    config = rope_hf("phi3_longrope").config
    assert not changes_while_generating(config, CONTEXT - 3, 4)
    assert changes_while_generating(config, CONTEXT - 3, 5)
    assert not changes_while_generating(config, CONTEXT, 1)
    assert not changes_while_generating(config, CONTEXT + 1, 30)
    dynamic = rope_hf("llama_dynamic").config
    assert changes_while_generating(dynamic, CONTEXT + 1, 2)
    assert not changes_while_generating(dynamic, CONTEXT + 1, 1)


def test_only_phi_3_recomputes_its_keys():
    limits = {name: recomputes_beyond(hf := rope_hf(name), hf.config) for name in ROPE_MODELS}
    assert limits == dict.fromkeys(ROPE_MODELS) | {"phi3_longrope": CONTEXT}


def test_layers_of_two_kinds_have_a_regime_each():
    class Config:
        max_position_embeddings = 16
        rope_parameters = {  # noqa: RUF012
            "full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            "sliding_attention": {
                "rope_type": "longrope",
                "original_max_position_embeddings": 8,
            },
        }

    regimes = [rope_regime(Config(), n) for n in (8, 9, 16, 17, 18)]
    assert regimes == [(0, 0), (0, 1), (0, 1), (17, 1), (18, 1)]
