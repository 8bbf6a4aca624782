"""Edited weights against a copy of the model whose weights were edited by hand."""

import numpy as np
import pytest
import torch
from torch import Tensor

from saexp.interventions.cached_generation import weight_divergences
from saexp.models.unembedding import orthogonalized
from tests.edited_weights import by_hand, divergence
from tests.random_models import D_MODEL, POST_NORMS, STORED, TEXTS, random_lm

DIRECTIONS = torch.randn(2, D_MODEL, generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("architecture", STORED)
def test_the_cost_is_the_divergence_of_weights_edited_by_hand(architecture: str) -> None:
    model = random_lm(architecture)
    prompts = [tuple(model.tokenizer(t)["input_ids"][: 6 + n]) for n, t in enumerate(TEXTS)]
    copied = by_hand(model.hf, DIRECTIONS, norms=architecture in POST_NORMS)
    wanted = [divergence(model.hf, copied, list(ids)) for ids in prompts]
    assert min(wanted) > 1e-2
    for batch_tokens in (1000, 1):
        with orthogonalized(model, DIRECTIONS) as original:
            costs = weight_divergences(model, prompts, original, batch_tokens=batch_tokens)
        np.testing.assert_allclose(costs, wanted, rtol=1e-3)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_inside_its_weights_are_the_model_s_own(architecture: str) -> None:
    model = random_lm(architecture)
    ids = torch.tensor([[1, 5, 9, 11, 4]])

    @torch.no_grad()
    def logits() -> Tensor:
        return model.hf(ids).logits

    plain, before = logits(), {k: v.clone() for k, v in model.hf.state_dict().items()}
    with orthogonalized(model, DIRECTIONS, embedding=True) as original:
        edited = logits()
        with pytest.raises(ZeroDivisionError), original():
            assert torch.equal(logits(), plain)
            raise ZeroDivisionError
        assert torch.equal(logits(), edited)
        assert not torch.allclose(edited, plain, atol=1e-3)
        with original(), orthogonalized(model, DIRECTIONS[:1]) as inner:
            assert not torch.equal(logits(), edited)
            with inner():
                assert torch.equal(logits(), plain)
        assert torch.equal(logits(), edited)
    after = model.hf.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(logits(), plain)
