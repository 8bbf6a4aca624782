"""Batched analyses of models whose rotary frequencies depend on the length equal single rows."""

from functools import cache

import numpy as np
import pytest
import torch

from saexp.analysis.evaluation import evaluate_saes
from saexp.analysis.top_latents import attribute
from saexp.data.tokenization import TokenizedText
from saexp.models.forward import TokenBudget, batches, rope_regime
from saexp.saes import SparseAutoencoder
from tests.random_models import VOCABULARY
from tests.rope_models import CONTEXT, ROPE_MODELS, rope_lm
from tests.unit.interventions.test_engine import made_sae

LENGTHS = (4, CONTEXT - 1, CONTEXT, CONTEXT + 1, CONTEXT + 1, CONTEXT + 14)


def prompts() -> list[tuple[int, ...]]:
    rng = np.random.default_rng(0)
    return [tuple(int(t) for t in rng.integers(3, VOCABULARY, n)) for n in LENGTHS]


@cache
def last_logits(name: str, ids: tuple[int, ...]) -> torch.Tensor:
    """Of the prompt alone, by a model that has not seen any other."""
    with torch.inference_mode():
        return rope_lm(name).hf(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("name", ROPE_MODELS)
def test_attributed_logits_equal_single_rows(name):
    some = prompts()
    positions = [(len(ids) - 1,) for ids in some]
    attribution = attribute(rope_lm(name), made_sae(), some, positions, [5] * len(some))
    wanted = [float(last_logits(name, ids)[-1, 5]) for ids in some]
    np.testing.assert_allclose(attribution.logit, wanted, atol=1e-5)


@pytest.mark.parametrize("name", ROPE_MODELS)
def test_evaluated_losses_equal_single_rows(name):
    texts = [
        TokenizedText("", ids, ((0, 0),) * len(ids), (False,) * len(ids), False)
        for ids in prompts()
    ]
    sae: SparseAutoencoder = made_sae()
    (evaluation,) = evaluate_saes(rope_lm(name), [sae], texts)
    for text, loss in zip(texts, evaluation.texts["ce_clean"], strict=True):
        logs = last_logits(name, text.ids).log_softmax(-1)[:-1]
        wanted = -logs.gather(1, torch.tensor(text.ids[1:])[:, None]).sum()
        assert loss == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("name", ROPE_MODELS)
def test_a_batch_has_one_set_of_frequencies_and_every_text_is_in_one(name):
    config = rope_lm(name).text_config
    lengths = [n for n in LENGTHS for _ in range(3)]
    for tokens in (1, 60, 10_000):
        text_batches = list(batches(lengths, TokenBudget(tokens, torch.device("cpu")), config))
        assert sorted(i for batch in text_batches for i in batch) == list(range(len(lengths)))
        for batch in text_batches:
            assert len({rope_regime(config, lengths[i]) for i in batch}) == 1
