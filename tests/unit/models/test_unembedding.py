"""The end of a model as a linear map: its logits are the model's own."""

import pytest
import torch

from saexp.errors import ModelError
from saexp.models import Hookpoint
from saexp.models import unembedding as weights
from saexp.models.forward import only_at, padded
from saexp.models.hooks import position_ids, run_truncated
from saexp.models.loading import LanguageModel
from saexp.models.unembedding import Unembedding
from tests.random_models import ARCHITECTURES, D_MODEL, N_LAYERS, VOCABULARY, random_hf, random_lm

IDS = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(6))
MASK = torch.ones_like(IDS)
EVERY = pytest.mark.parametrize("architecture", ARCHITECTURES)


@EVERY
@torch.no_grad()
def test_logits_are_those_of_the_model(architecture):
    model = random_lm(architecture)
    end = Unembedding(model)
    point = Hookpoint(N_LAYERS - 1, "resid_post")
    x = run_truncated(model, IDS, MASK, [point])[point].reshape(-1, D_MODEL)
    constant = model.hf.get_output_embeddings()(end.norm(torch.zeros(1, D_MODEL)))
    linear = x @ end.readout(torch.arange(VOCABULARY)).T / end.scale(x)[:, None] + constant
    assert end.softcap == (30.0 if architecture == "gemma2" else None)
    if end.softcap:
        linear = end.softcap * torch.tanh(linear / end.softcap)
    logits = model.hf(IDS).logits.reshape(-1, VOCABULARY)
    torch.testing.assert_close(linear, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("fresh", [True, False])
@torch.no_grad()
def test_norms_whose_weights_were_never_trained_and_half_precision(architecture, fresh):
    hf = random_hf(architecture)
    if fresh:
        norm = hf.base_model.ln_f if architecture == "gpt2" else hf.base_model.norm
        norm.weight.fill_(0.0 if architecture == "gemma2" else 1.0)
    expected = Unembedding(LanguageModel.wrap(hf))
    x = torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(0)) + 0.5
    tokens = torch.arange(20)
    full = x @ expected.readout(tokens).T / expected.scale(x)[:, None]
    half = Unembedding(LanguageModel.wrap(hf.to(torch.bfloat16)))
    logits = x @ half.readout(tokens).T / half.scale(x)[:, None]
    torch.testing.assert_close(logits, full, atol=0.05, rtol=0.05)
    assert logits.std() > 0.2


@EVERY
@pytest.mark.parametrize("numbers", [1, 700, 10**6])
@torch.no_grad()
def test_top_tokens(architecture, numbers, monkeypatch):
    monkeypatch.setattr(weights, "_MAX_LOGITS", numbers)
    end = Unembedding(random_lm(architecture))
    directions = torch.randn(6, D_MODEL, generator=torch.Generator().manual_seed(1))
    everything = directions @ end.readout(torch.arange(VOCABULARY)).T
    tokens = end.top_tokens(directions, 9)
    torch.testing.assert_close(
        everything.gather(1, tokens), everything.topk(9, dim=1).values, atol=1e-6, rtol=1e-5
    )
    assert end.top_tokens(directions, 10**6).shape == (6, VOCABULARY)


@EVERY
@torch.no_grad()
def test_logits_at_one_token_a_row(architecture):
    model, last = random_lm(architecture), torch.tensor([2, 6])
    every = model.hf(IDS).logits
    with only_at(model, last):
        some = model.hf(IDS).logits
    assert some.shape == (2, 1, VOCABULARY)
    torch.testing.assert_close(some[:, 0], every[[0, 1], last], atol=1e-6, rtol=1e-5)
    assert torch.equal(model.hf(IDS).logits, every)


@EVERY
@torch.no_grad()
def test_padding_on_the_right_changes_no_logit(architecture):
    model = random_lm(architecture)
    prompts = [tuple(IDS[0].tolist()), tuple(IDS[1, :3].tolist())]
    ids, mask = padded(prompts, model.pad_id, model.device, padding_side="right")
    assert mask.tolist() == [[1] * 7, [1] * 3 + [0] * 4]
    with only_at(model, torch.tensor([6, 2])):
        logits = model.hf(ids, attention_mask=mask, position_ids=position_ids(mask)).logits
    for row, prompt in enumerate(prompts):
        alone = model.hf(torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(logits[row, 0], alone, atol=1e-5, rtol=1e-5)


class TestErrors:
    def test_a_norm_of_another_kind(self):
        hf = random_hf("llama")

        class TanhNorm(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.ones(D_MODEL))

            def forward(self, x):
                return torch.tanh(x) * self.weight

        hf.model.norm = TanhNorm()
        with pytest.raises(ModelError, match="^TanhNorm .* neither LayerNorm nor RMSNorm"):
            Unembedding(LanguageModel.wrap(hf))

    def test_no_norm(self):
        hf = random_hf("llama")
        hf.model.norm = torch.nn.Identity()
        with pytest.raises(ModelError, match="^LlamaModel has 0 norms with weights after"):
            Unembedding(LanguageModel.wrap(hf))
