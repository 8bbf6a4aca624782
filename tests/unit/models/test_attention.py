"""Attention to tokens equals transformers' own weights, and leaves the model as it was."""

import pytest
import torch

from saexp.errors import ModelError
from saexp.models import Hookpoint
from saexp.models.hooks import attention_to, eager_attention, edit, position_ids
from saexp.models.loading import LanguageModel
from tests.random_models import (
    ARCHITECTURES,
    D_MODEL,
    N_LAYERS,
    VOCABULARY,
    hooks_left,
    random_hf,
    random_lm,
)

WIDTH = 11
IDS = torch.randint(3, VOCABULARY, (3, WIDTH), generator=torch.Generator().manual_seed(4))
LENGTHS = (11, 7, 9)
EVERY = pytest.mark.parametrize("architecture", ARCHITECTURES)
CLOSE = {"atol": 1e-6, "rtol": 1e-5}


def mask_of(side):
    mask = torch.zeros_like(IDS)
    for row, n in enumerate(LENGTHS):
        mask[row, WIDTH - n :] = 1 if side == "left" else 0
        if side == "right":
            mask[row, :n] = 1
    return mask


def every(indices, mask, side):
    """Booleans at indices into the unpadded tokens."""
    chosen = torch.zeros_like(mask, dtype=torch.bool)
    for row, n in enumerate(LENGTHS):
        start = WIDTH - n if side == "left" else 0
        chosen[row, [start + i for i in indices[row]]] = True
    return chosen


@torch.no_grad()
def reference(architecture, mask, edits=None):
    """`output_attentions` of a model of its own that was made with eager attention:
    `[b, n_layers, n_heads, t, t]`."""
    hf = random_hf(architecture, attn_implementation="eager")
    with edit(LanguageModel.wrap(hf), edits or {}):
        out = hf(IDS, attention_mask=mask, position_ids=position_ids(mask), output_attentions=True)
    return torch.stack(out.attentions, dim=1)


KEYS = ((1, 2, 3), (2,), (0, 5))
QUERIES = ((10, 9), (6,), (8, 5, 7))


@EVERY
@pytest.mark.parametrize("side", ["left", "right"])
def test_it_equals_output_attentions(architecture, side):
    model, mask = random_lm(architecture), mask_of(side)
    keys, queries = every(KEYS, mask, side), every(QUERIES, mask, side)
    weights = reference(architecture, mask)
    last = every([(n - 1,) for n in LENGTHS], mask, side)
    for chosen, query_mask in ((last, None), (queries, queries)):
        attention = attention_to(model, IDS, mask, keys, query_mask)
        assert attention.shape == (3, N_LAYERS, 4)
        for row in range(3):
            expected = weights[row][:, :, chosen[row]][..., keys[row]].sum(-1).mean(-1)
            torch.testing.assert_close(attention[row], expected, **CLOSE)
    assert attention.std() > 1e-3


@EVERY
def test_attention_to_all_tokens_is_one(architecture):
    mask = mask_of("left")
    attention = attention_to(random_lm(architecture), IDS, mask, mask.bool())
    torch.testing.assert_close(attention, torch.ones_like(attention))


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3"])
def test_keys_outside_a_sliding_window_get_nothing(architecture):
    """The window is 4 tokens: the first token is out of the last one's sight in those layers."""
    mask = torch.ones_like(IDS)
    keys = torch.zeros_like(mask, dtype=torch.bool)
    keys[:, 0] = True
    attention = attention_to(random_lm(architecture), IDS, mask, keys)
    kinds = getattr(random_lm(architecture).text_config, "layer_types", None)
    kinds = kinds or ["sliding_attention"] * N_LAYERS
    assert "sliding_attention" in kinds
    for layer, kind in enumerate(kinds):
        assert bool((attention[:, layer] == 0).all()) == (kind == "sliding_attention")


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama", "gemma2", "qwen2"])
def test_edits_are_active(architecture):
    model, mask = random_lm(architecture), mask_of("left")
    vector = torch.linspace(-2, 2, D_MODEL)
    at = every(KEYS, mask, "left")
    edits = {
        Hookpoint(0, "resid_post"): lambda x: torch.where(at[..., None], x + vector, x),
        Hookpoint(1, "attn_out"): lambda x: x * 3,
    }
    attention = attention_to(model, IDS, mask, at, edits=edits)
    weights = reference(architecture, mask, edits)[:, :, :, -1]
    expected = (weights * at[:, None, None]).sum(-1)
    torch.testing.assert_close(attention, expected, **CLOSE)
    plain = attention_to(model, IDS, mask, at)
    assert torch.equal(attention[:, 0], plain[:, 0]), "layer 0 stands before the first edit"
    assert not torch.allclose(attention[:, 1:], plain[:, 1:], atol=1e-3)


@EVERY
def test_the_model_is_left_as_it_was(architecture):
    model, mask = LanguageModel.wrap(random_hf(architecture)), mask_of("left")
    plain = run(model, mask)
    before, kind = model.fingerprint, model.hf.config._attn_implementation
    attention_to(model, IDS, mask, every(KEYS, mask, "left"))
    assert (model.fingerprint, model.hf.config._attn_implementation) == (before, kind)
    assert torch.equal(run(model, mask), plain)

    def boom(_values):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        edits = {Hookpoint(1, "resid_post"): boom}
        attention_to(model, IDS, mask, every(KEYS, mask, "left"), edits=edits)
    assert model.hf.config._attn_implementation == kind
    assert hooks_left(model.hf) == []


@torch.no_grad()
def run(model, mask):
    return model.hf(IDS, attention_mask=mask, position_ids=position_ids(mask)).logits


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_the_form_of_attention_is_set_back(kind):
    model = LanguageModel.wrap(random_hf("llama", attn_implementation=kind))
    assert model.hf.config._attn_implementation == kind
    with eager_attention(model):
        assert model.hf.config._attn_implementation == "eager"
    assert model.hf.config._attn_implementation == kind
    with pytest.raises(ZeroDivisionError), eager_attention(model):
        raise ZeroDivisionError
    assert model.hf.config._attn_implementation == kind


def test_bfloat16():
    model = LanguageModel.wrap(random_hf("llama").to(torch.bfloat16))
    mask = mask_of("left")
    attention = attention_to(model, IDS, mask, mask.bool())
    assert attention.dtype == torch.float32
    torch.testing.assert_close(attention, torch.ones_like(attention), atol=0.02, rtol=0)


class TestErrors:
    def test_a_row_without_keys(self):
        mask = mask_of("left")
        keys = every(((1,), (), (2,)), mask, "left")
        with pytest.raises(ModelError, match="^row 1 of the batch has no key"):
            attention_to(random_lm("llama"), IDS, mask, keys)

    def test_keys_and_queries_on_padding(self):
        mask, wrong = mask_of("left"), torch.ones_like(IDS, dtype=torch.bool)
        with pytest.raises(ModelError, match="^row 1 of the batch has a key on padding"):
            attention_to(random_lm("llama"), IDS, mask, wrong)
        with pytest.raises(ModelError, match="^row 1 of the batch has a query on padding"):
            attention_to(random_lm("llama"), IDS, mask, mask.bool(), wrong)
