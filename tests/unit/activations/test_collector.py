"""Stored activations are the model's own, whatever the batches; nothing is forwarded in vain."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saexp.config import ModelConfig, StoreConfig
from saexp.errors import ConfigError, ModelError, StoreError
from saexp.models import Hookpoint
from saexp.models.forward import TokenBudget, batches
from saexp.models.loading import LanguageModel
from tests.random_models import STORED, TEXTS, random_hf, random_lm, save, tokenizer
from tests.unit.activations.collecting import POSTS, n_tokens, placed, run

CLOSE = {"atol": 1e-5, "rtol": 0}
EMBED = Hookpoint(0, "embed")


@torch.no_grad()
def from_transformers(architecture):
    """[hidden states 0 to 3 of every position of every text], each text alone."""
    hf = random_hf(architecture)
    columns = [[], [], [], []]
    for text in TEXTS:
        out = hf(torch.tensor([tokenizer()(text).input_ids]), output_hidden_states=True)
        for column, hidden in zip(columns, out.hidden_states, strict=True):
            column.append(hidden[0, 1:])
    return [torch.cat(c) for c in columns]


@pytest.mark.parametrize("architecture", STORED)
def test_activations_equal_hidden_states_whatever_the_batches(architecture, tmp_path):
    model, expected = random_lm(architecture), from_transformers(architecture)
    inner = model.hf.base_model
    names = ("ln_f", "final_layer_norm", "norm")
    norm = next(getattr(inner, n) for n in names if hasattr(inner, n))
    for batch_tokens in (1, 75, 10**6):
        store, stats = run(
            model, tmp_path / str(batch_tokens), [EMBED, *POSTS], batch_tokens=batch_tokens
        )
        assert stats.n_rows == store.n_rows == len(expected[0])
        assert stats.tokens_forwarded == n_tokens(placed())
        torch.testing.assert_close(store.acts(0, "embed"), expected[0], **CLOSE)
        torch.testing.assert_close(store.acts(0), expected[1], **CLOSE)
        torch.testing.assert_close(store.acts(1), expected[2], **CLOSE)
        torch.testing.assert_close(norm(store.acts(2)), expected[3], **CLOSE)


def test_the_share_of_padding_is_that_of_the_batches(tmp_path):
    lengths = [len(tokenizer()(t).input_ids) for t in TEXTS]
    filled = len(lengths) * max(lengths)
    _, alone = run(random_lm("gpt2"), tmp_path / "alone", batch_tokens=1)
    _, together = run(random_lm("gpt2"), tmp_path / "together", batch_tokens=10**6)
    assert alone.padding_fraction == 0
    assert together.padding_fraction == pytest.approx((filled - sum(lengths)) / filled)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_chosen_positions_are_those_rows_of_all_positions(architecture, tmp_path):
    model = random_lm(architecture)
    everything, _ = run(model, tmp_path / "all")
    chosen = placed(name="random", n=3)
    some, stats = run(model, tmp_path / "some", placement=chosen)
    rows = everything.rows.set_index(["text_id", "token_index"])["row"]
    index = [
        rows[i, t] for i, t in zip(some.rows["text_id"], some.rows["token_index"], strict=True)
    ]
    torch.testing.assert_close(some.acts(2), everything.acts(2)[index], **CLOSE)
    # A text is forwarded up to its last wanted position only.
    assert stats.tokens_forwarded == n_tokens(chosen) < n_tokens(placed())


def test_every_stream_is_stored_at_its_own_width(tmp_path):
    points = [Hookpoint(1, s) for s in ("attn_out", "attn_z", "mlp_in", "mlp_out", "resid_mid")]
    store, _ = run(random_lm("gemma2"), tmp_path, [*points, *POSTS])
    acts = {p.stream: store.acts(1, p.stream) for p in points}
    assert {s: a.shape[1] for s, a in acts.items()} == {
        **dict.fromkeys(("attn_out", "mlp_in", "mlp_out", "resid_mid"), 32),
        "attn_z": 64,
    }
    torch.testing.assert_close(store.acts(0) + acts["attn_out"], acts["resid_mid"], **CLOSE)
    torch.testing.assert_close(acts["resid_mid"] + acts["mlp_out"], store.acts(1), **CLOSE)


def test_resid_pre_is_stored_once_as_the_last_blocks_resid_post(tmp_path):
    model = random_lm("llama")
    points = [Hookpoint(n, "resid_pre") for n in range(3)]
    store, _ = run(model, tmp_path, points)
    assert store.hookpoints == [EMBED, *POSTS[:2]]
    assert torch.equal(store.acts(2, "resid_pre"), store.acts(1, "resid_post"))
    assert torch.equal(store.acts(0, "resid_pre"), store.acts(0, "embed"))
    assert run(model, tmp_path, POSTS[:2])[1].tokens_forwarded == 0


def test_a_text_of_several_examples_is_forwarded_once(tmp_path):
    texts = [TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[0]]
    store, stats = run(random_lm("qwen2"), tmp_path, placement=placed(texts, "last"))
    assert stats.tokens_forwarded == sum(len(tokenizer()(t).input_ids) for t in TEXTS[:2])
    acts = store.acts(2)
    assert store.n_rows == 4
    assert torch.equal(acts[0], acts[2])
    assert torch.equal(acts[0], acts[3])
    assert not torch.allclose(acts[0], acts[1])


def test_a_text_longer_than_max_length_is_collected_up_to_there(tmp_path):
    model = random_lm("llama")
    long, _ = run(model, tmp_path)
    short, stats = run(model, tmp_path, placement=placed(max_length=6), max_length=6)
    assert stats.tokens_forwarded == 6 * len(TEXTS)
    short_rows = long.rows[long.rows["token_index"] < 6]["row"].tolist()
    torch.testing.assert_close(short.acts(2), long.acts(2)[short_rows], **CLOSE)
    assert short.path != long.path


def test_nothing_stored_is_forwarded_again_and_no_weights_are_read(tmp_path):
    cfg = save(random_hf("llama"), tmp_path / "model")
    first, second = (LanguageModel(cfg) for _ in range(2))
    store, stats = run(first, tmp_path)
    again, no_stats = run(second, tmp_path)
    assert stats.tokens_forwarded > 0
    assert (no_stats.tokens_forwarded, no_stats.padding_fraction) == (0, 0.0)
    assert again.path == store.path
    assert (first.loaded, second.loaded) == (True, False)
    assert torch.equal(again.acts(1), store.acts(1))


def test_one_more_hookpoint_runs_the_model_for_that_one_only(tmp_path):
    model, ran = LanguageModel.wrap(random_hf("gpt2"), tokenizer()), Counter()
    for number, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, number=number: ran.update([number]))
    store, _ = run(model, tmp_path, POSTS[2:], batch_tokens=10**6)
    assert ran == Counter({0: 1, 1: 1, 2: 1})
    file = store.path / "layer_2.resid_post" / "00000.safetensors"
    before = (file.read_bytes(), file.stat().st_mtime_ns)
    ran.clear()
    store, stats = run(model, tmp_path, [*POSTS[2:], POSTS[0]], batch_tokens=10**6)
    assert ran == Counter({0: 1})
    assert stats.tokens_forwarded == n_tokens(placed())
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before
    assert store.hookpoints == [POSTS[0], POSTS[2]]


def test_skips_are_counted_beside(tmp_path):
    _, stats = run(random_lm("gpt2"), tmp_path, n_skipped=7)
    assert stats.n_skipped == 7


@settings(max_examples=50)
@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 200))
def test_batches_hold_every_text_once_within_the_budget(lengths, batch_tokens):
    row_batches = list(batches(lengths, TokenBudget(batch_tokens, torch.device("cpu"))))
    assert sorted(i for b in row_batches for i in b) == list(range(len(lengths)))
    for batch in row_batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= batch_tokens
    ordered = [lengths[i] for b in row_batches for i in b]
    assert ordered == sorted(lengths, reverse=True)


def test_a_layer_that_is_not_there_costs_no_forward_pass(tmp_path):
    model = LanguageModel(save(random_hf("llama"), tmp_path / "model"))
    with pytest.raises(
        ModelError, match="^layer=99 is out of range: model has layers 0-2; try layer=2$"
    ):
        run(model, tmp_path, [Hookpoint(99, "resid_post")])
    assert not model.loaded
    assert not (tmp_path / "activations").exists()


def test_a_text_that_the_model_cannot_hold(tmp_path):
    texts = ["word " * 80]
    with pytest.raises(ModelError) as error:
        run(
            random_lm("gpt2"),
            tmp_path,
            placement=placed(texts, "all", max_length=70),
            max_length=70,
        )
    assert str(error.value) == (
        "a text is 70 tokens long, but random-gpt2 takes at most 64; try dataset.max_length=64"
    )
    fits = placed(texts, "middle", max_length=64)
    assert run(random_lm("gpt2"), tmp_path, placement=fits)[1].n_rows == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_names_the_text_and_the_hookpoint(bad, tmp_path):
    model = LanguageModel.wrap(random_hf("gpt2"), tokenizer())
    only_there = (set(tokenizer()(TEXTS[2]).input_ids)).difference(
        *(tokenizer()(t).input_ids for t in TEXTS if t != TEXTS[2])
    )
    model.hf.get_input_embeddings().weight[sorted(only_there)[0]] = bad
    with pytest.raises(StoreError) as error:
        run(model, tmp_path, POSTS[1:2], batch_tokens=75)
    assert str(error.value) == (
        f"NaN or Inf at layer_1.resid_post in the text '{TEXTS[2][:60]}', in float32: "
        "check the model's weights, or leave the text out"
    )
    good = placed([t for t in TEXTS if t != TEXTS[2]])
    assert run(model, tmp_path, POSTS, good)[1].n_rows > 0


def test_a_value_too_large_for_the_dtype_on_disk_is_an_error_not_inf(tmp_path):
    model = LanguageModel.wrap(random_hf("gpt2"), tokenizer())
    model.hf.get_input_embeddings().weight.mul_(1e6)
    with pytest.raises(StoreError, match="; try store.dtype=float32$"):
        run(model, tmp_path, [EMBED], dtype="float16")
    store, _ = run(model, tmp_path, [EMBED], dtype="float32")
    assert store.acts(0, "embed").abs().max() > 65504


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrow_store_holds_the_same_values_rounded(dtype, tmp_path):
    model = random_lm("llama")
    wide, _ = run(model, tmp_path)
    narrow, _ = run(model, tmp_path, dtype=dtype)
    assert narrow.acts(1).dtype == getattr(torch, dtype)
    assert torch.equal(narrow.acts(1), wide.acts(1).to(getattr(torch, dtype)))
    assert narrow.path != wide.path


def test_auto_stores_the_models_own_dtype(tmp_path):
    save(random_hf("llama"), tmp_path / "model")
    cfg = ModelConfig(name=str(tmp_path / "model"), device="cpu", dtype="bfloat16")
    store, _ = run(LanguageModel(cfg), tmp_path)
    assert store.acts(1).dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="^store.dtype=int8 is not known"):
        StoreConfig(dtype="int8")
