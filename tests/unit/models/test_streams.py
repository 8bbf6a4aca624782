"""Captured streams against `output_hidden_states` and against one another."""

import pytest
import torch

from saexp.errors import ModelError
from saexp.models import Hookpoint
from saexp.models.hooks import capture, edit, position_ids, run_truncated
from saexp.models.loading import LanguageModel
from tests.random_models import (
    ARCHITECTURES,
    D_MODEL,
    N_LAYERS,
    PARALLEL,
    POST_NORMS,
    VOCABULARY,
    random_hf,
    random_lm,
)

CLOSE = {"atol": 1e-5, "rtol": 0}
IDS = torch.randint(3, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
EVERY = pytest.mark.parametrize("architecture", ARCHITECTURES)
LAYERS = range(N_LAYERS)
_PROJECTION = {"gpt2": "c_proj", "gpt_neox": "dense", "gpt_neox_serial": "dense", "phi": "dense"}
_FINAL_NORM = {
    "gpt2": "ln_f",
    "gpt_neox": "final_layer_norm",
    "gpt_neox_serial": "final_layer_norm",
    "phi": "final_layernorm",
}


def read(model, *streams, layers=LAYERS):
    """{stream: [values of each layer]}"""
    points = {s: [Hookpoint(n, s) for n in layers] for s in streams}
    wanted = [h for of_stream in points.values() for h in of_stream]
    record = run_truncated(model, IDS, MASK, wanted)
    return {s: [record[h] for h in of_stream] for s, of_stream in points.items()}


@torch.no_grad()
def hidden_states(architecture):
    """Of a model of its own, because `transformers` leaves recording hooks on it."""
    return random_hf(architecture)(IDS, output_hidden_states=True).hidden_states


@EVERY
def test_the_residual_stream_equals_output_hidden_states(architecture):
    model, hidden = random_lm(architecture), hidden_states(architecture)
    got = read(model, "resid_pre", "resid_post")
    embed = read(model, "embed", layers=[0])["embed"][0]
    norm = getattr(model.hf.base_model, _FINAL_NORM.get(architecture, "norm"))
    torch.testing.assert_close(embed, hidden[0], **CLOSE)
    for layer in LAYERS:
        torch.testing.assert_close(got["resid_pre"][layer], hidden[layer], **CLOSE)
        if layer < N_LAYERS - 1:
            torch.testing.assert_close(got["resid_post"][layer], hidden[layer + 1], **CLOSE)
    last = got["resid_post"][-1]
    torch.testing.assert_close(norm(last), hidden[-1], **CLOSE)
    # Else an error in which one is compared would go unseen.
    assert not torch.allclose(last, hidden[-1], atol=1e-2)


@EVERY
def test_one_blocks_input_is_the_last_ones_output_bit_by_bit(architecture):
    got = read(random_lm(architecture), "resid_pre", "resid_post")
    for layer in range(1, N_LAYERS):
        assert torch.equal(got["resid_pre"][layer], got["resid_post"][layer - 1])


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a not in PARALLEL])
def test_serial_blocks_add_attention_then_mlp(architecture):
    got = read(random_lm(architecture), "resid_pre", "attn_out", "resid_mid", "mlp_out")
    post = read(random_lm(architecture), "resid_post")["resid_post"]
    for layer in LAYERS:
        pre, attn, mid, mlp = (got[s][layer] for s in got)
        torch.testing.assert_close(pre + attn, mid, **CLOSE)
        torch.testing.assert_close(mid + mlp, post[layer], **CLOSE)
        assert min(attn.abs().mean(), mlp.abs().mean()) > 1e-2, "outputs too small to tell apart"


@pytest.mark.parametrize("architecture", PARALLEL)
def test_parallel_blocks_add_both_at_once(architecture):
    got = read(random_lm(architecture), "resid_pre", "attn_out", "mlp_out", "resid_post")
    for pre, attn, mlp, post in zip(*got.values(), strict=True):
        torch.testing.assert_close(pre + attn + mlp, post, **CLOSE)
        assert min(attn.abs().mean(), mlp.abs().mean()) > 1e-2, "outputs too small to tell apart"


@EVERY
def test_attn_z_through_the_output_projection_is_the_attention_output(architecture):
    model = random_lm(architecture)
    got = read(model, "attn_z", "attn_out")
    for layer, block in enumerate(model.blocks):
        attention = next(m for n, m in block.named_children() if "attn" in n or n == "attention")
        out = getattr(attention, _PROJECTION.get(architecture, "o_proj"))(got["attn_z"][layer])
        if architecture in POST_NORMS:
            out = block.post_attention_layernorm(out)
        torch.testing.assert_close(out, got["attn_out"][layer], **CLOSE)


@EVERY
def test_mlp_in_through_the_mlp_is_mlp_out(architecture):
    model = random_lm(architecture)
    got = read(model, "mlp_in", "mlp_out")
    for layer, block in enumerate(model.blocks):
        out = block.mlp(got["mlp_in"][layer])
        if architecture in POST_NORMS:
            out = block.post_feedforward_layernorm(out)
        torch.testing.assert_close(out, got["mlp_out"][layer], **CLOSE)


NORMED = pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "phi"])
"""Phi's MLP reads the norm that attention reads."""


def gain_and_bias(architecture, block):
    name = {"gpt2": "ln_2", "gemma2": "pre_feedforward_layernorm"}
    name["gemma3"] = name["gemma2"]
    norm = getattr(block, name.get(architecture, "post_attention_layernorm"))
    gain = 1 + norm.weight if architecture.startswith("gemma") else norm.weight
    return gain, getattr(norm, "bias", torch.zeros(1))


@NORMED
def test_mlp_in_normalized_times_the_norms_gain_is_mlp_in(architecture):
    model = random_lm(architecture)
    got = read(model, "mlp_in_normalized", "mlp_in")
    for layer, block in enumerate(model.blocks):
        gain, bias = gain_and_bias(architecture, block)
        normalized, mlp_in = (got[s][layer] for s in got)
        torch.testing.assert_close(normalized * gain + bias, mlp_in, **CLOSE)
        assert not torch.allclose(normalized, mlp_in, atol=1e-2)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a not in PARALLEL])
def test_mlp_in_normalized_is_the_stream_at_unit_scale(architecture):
    """By the formulas of LayerNorm and RMSNorm, without gain and bias."""
    model = random_lm(architecture)
    got = read(model, "mlp_in_normalized", "resid_mid")
    for layer, block in enumerate(model.blocks):
        normalized, mid = (got[s][layer].double() for s in got)
        if gain_and_bias(architecture, block)[1].any():
            mid = mid - mid.mean(-1, keepdim=True)
        expected = mid / mid.pow(2).mean(-1, keepdim=True).sqrt()
        torch.testing.assert_close(normalized, expected, atol=1e-3, rtol=0)


@NORMED
def test_an_edit_of_mlp_in_normalized_reaches_the_mlp_times_the_gain(architecture):
    model, at = random_lm(architecture), Hookpoint(1, "mlp_in_normalized")
    vector = torch.linspace(-1, 1, D_MODEL)
    gain, _ = gain_and_bias(architecture, model.blocks[1])
    handle = model.blocks[1].mlp.register_forward_pre_hook(lambda _m, a: (a[0] + vector * gain,))
    with torch.no_grad():
        expected = model.hf(IDS).logits
        handle.remove()
        plain = model.hf(IDS).logits
        with edit(model, {at: lambda x: x + vector}):
            got = model.hf(IDS).logits
        with edit(model, {at: lambda x: x}):
            same = model.hf(IDS).logits
    torch.testing.assert_close(got, expected, **CLOSE)
    assert torch.equal(same, plain)
    assert not torch.allclose(got, plain, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["gemma2", "gpt2", "llama"])
def test_mlp_in_normalized_in_half_precision(architecture, dtype):
    model = LanguageModel.wrap(random_hf(architecture).to(dtype))
    got = read(model, "mlp_in_normalized", "mlp_in")
    for layer, block in enumerate(model.blocks):
        gain, bias = gain_and_bias(architecture, block)
        normalized, mlp_in = (got[s][layer].float() for s in got)
        torch.testing.assert_close(normalized * gain + bias, mlp_in, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("architecture", ["phi", "olmo2"])
def test_without_a_norm_of_the_mlps_own_there_is_no_mlp_in_normalized(architecture, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "olmo2", ("Olmo2Config", ARCHITECTURES["llama"][1]))
    model = LanguageModel.wrap(random_hf(architecture))
    with pytest.raises(ModelError, match="has no norm with a gain just before its MLP, so it has"):
        model.module(Hookpoint(1, "mlp_in_normalized"))


def test_a_gain_of_zero_cannot_be_divided_out():
    model = LanguageModel.wrap(random_hf("gemma2"))
    model.blocks[1].pre_feedforward_layernorm.weight[3] = -1
    with pytest.raises(ModelError, match="has no gain that can be divided out of its output"):
        model.module(Hookpoint(1, "mlp_in_normalized"))


@EVERY
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_no_real_token(architecture, side):
    model, pad, n = random_lm(architecture), 4, IDS.shape[1]
    filler = torch.full((2, pad), 7)
    parts = [filler, IDS] if side == "left" else [IDS, filler]
    ids = torch.cat(parts, dim=1)
    start = pad if side == "left" else 0
    mask = torch.zeros_like(ids)
    mask[:, start : start + n] = 1
    # A batch in which only one row is padded, as batches of texts are.
    ids[1, :n] = IDS[1]
    ids[1, n:] = IDS[0, :pad]
    mask[1] = 1
    points = [Hookpoint(n, "resid_post") for n in LAYERS]
    padded = run_truncated(model, ids, mask, points)
    plain = run_truncated(model, IDS, MASK, points)
    for point in points:
        torch.testing.assert_close(padded[point][0, start : start + n], plain[point][0], **CLOSE)


@EVERY
def test_positions_pick_the_same_values(architecture):
    model, point = random_lm(architecture), Hookpoint(1, "resid_post")
    where = (torch.tensor([1, 0, 1, 0]), torch.tensor([4, 10, 0, 3]))
    everything = run_truncated(model, IDS, MASK, [point])[point]
    some = run_truncated(model, IDS, MASK, [point], where)[point]
    assert torch.equal(some, everything[where])


def test_position_ids_count_unmasked_tokens():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    expected = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]])
    assert torch.equal(position_ids(mask), expected)


def test_capture_around_a_plain_forward_pass_gives_the_streams_and_the_logits():
    model = random_lm("llama")
    points = [Hookpoint(0, "embed"), Hookpoint(2, "mlp_out")]
    with torch.no_grad(), capture(model, points) as record:
        logits = model.hf(IDS).logits
    assert record.keys() == set(points)
    for point in points:
        assert torch.equal(record[point], run_truncated(model, IDS, MASK, [point])[point])
    assert torch.equal(logits, model.hf(IDS).logits)


def test_what_is_captured_carries_no_gradient():
    model = random_lm("gpt2")
    with capture(model, [Hookpoint(1, "resid_post")]) as record:
        embeddings = model.hf.get_input_embeddings()(IDS).requires_grad_()
        model.hf(inputs_embeds=embeddings)
    assert not record[Hookpoint(1, "resid_post")].requires_grad
