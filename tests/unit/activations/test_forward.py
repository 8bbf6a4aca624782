"""What is forwarded, by whom, in which batches, and how its rows become a file."""

import hashlib
import logging
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from saexp.activations.collection import finite_rows
from saexp.activations.collector import Part
from saexp.activations.shard_files import Label, ShardWriter
from saexp.activations.shared_prefixes import units
from saexp.data import Example
from saexp.data.rows import Chosen, PositionTable
from saexp.data.tokenization import TokenizedText
from saexp.errors import ModelError, StoreError
from saexp.models import Hookpoint
from saexp.models.forward import AUTO_BATCH_TOKENS
from saexp.models.loading import LanguageModel
from tests.random_models import TEXTS, hooks_left, random_hf, random_lm, tokenizer
from tests.unit.activations.collecting import POSTS, digests, placed, run

CLOSE = {"atol": 1e-5, "rtol": 0}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
N_ROWS = len(placed().rows)


TEXT = st.lists(st.integers(0, 1), min_size=1, max_size=5).map(tuple)


@st.composite
def wanted_rows(draw):
    """Texts of small ids, often the same or one the start of another, and (text, token) wanted."""
    sequences = draw(st.lists(TEXT, min_size=1, max_size=8))
    rows = [
        (text_id, token)
        for text_id, ids in enumerate(sequences)
        for token in sorted(draw(st.sets(st.integers(0, len(ids) - 1), min_size=1)))
    ]
    return sequences, rows


@settings(max_examples=40)
@given(wanted_rows(), st.data())
def test_units_are_the_fewest_sequences_and_hold_every_row_of_the_shard_once(
    sequences_and_rows, data
):
    sequences, rows = sequences_and_rows
    first = data.draw(st.integers(0, len(rows) - 1))
    end = data.draw(st.integers(first + 1, len(rows)))
    texts = [TokenizedText("", ids, (), (), False) for ids in sequences]
    chosen = [
        Chosen(n, Example(id=str(n), text=""), n, [token for t, token in rows if t == n], 0)
        for n in range(len(sequences))
    ]
    placement = PositionTable(chosen, texts, [], None)
    forward_units = units(placement, np.arange(first, end))
    read = {
        row: (text, token, u.ids[: token + 1]) for u in forward_units for row, token, text in u.rows
    }
    assert sum(len(u.rows) for u in forward_units) == len(read)
    # The tokens up to it are what a causal model's value depends on.
    assert read == {
        row: (text, token, sequences[text][: token + 1])
        for row, (text, token) in enumerate(rows[first:end])
    }
    needed = {ids for _, _, ids in read.values()}
    begins_another = {s for s in needed for o in needed if o != s and o[: len(s)] == s}
    assert sorted(u.ids for u in forward_units) == sorted(needed - begins_another)


@torch.no_grad()
def test_texts_that_begin_others_or_equal_them_are_read_from_one_pass(tmp_path):
    model, words = random_lm("gpt2"), TEXTS[0].split(" ")
    texts = [" ".join(words[:n]) for n in (4, 9, len(words), 4, 1)] + [TEXTS[1], TEXTS[0]]
    store, stats = run(model, tmp_path, placement=placed(texts))
    assert stats.tokens_forwarded == sum(len(tokenizer()(t).input_ids) for t in TEXTS[:2])
    expected = [
        model.hf(torch.tensor([tokenizer()(t).input_ids]), output_hidden_states=True) for t in texts
    ]
    for layer in range(2):
        alone = torch.cat([out.hidden_states[layer + 1][0, 1:] for out in expected])
        torch.testing.assert_close(store.acts(layer), alone, **CLOSE)


@given(st.integers(0, 40), st.integers(1, 12))
def test_parts_are_disjoint_and_cover_all(n_files, n_parts):
    parts = [Part(k, n_parts).of(n_files) for k in range(n_parts)]
    assert [index for part in parts for index in part] == list(range(n_files))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# Several shards a part, and one.
@pytest.mark.parametrize(("shard_rows", "order"), [(20, [2, 1, 0]), (10**6, [1, 3, 0, 2, 4])])
def test_parts_in_any_order_make_the_store_of_one_process(shard_rows, order, tmp_path):
    model, n_parts, forwarded = random_lm("llama"), len(order), []
    smaller = min(shard_rows, -(-N_ROWS // n_parts))
    whole, stats = run(model, tmp_path / "whole", shard_rows=smaller)
    for k in order:
        store, part = run(model, tmp_path, part=Part(k, n_parts), shard_rows=shard_rows)
        assert (store.hookpoints == POSTS) == (k == order[-1])
        forwarded.append(part.tokens_forwarded)
    assert min(forwarded) > 0
    assert sum(forwarded) == stats.tokens_forwarded
    assert digests(store.path) == digests(whole.path)


def test_hookpoints_ahead_are_stored_in_the_same_pass_and_cost_none_of_their_own(tmp_path):
    model = random_lm("qwen2")
    ahead, apart = [POSTS[0], Hookpoint(1, "mlp_out"), POSTS[2]], tmp_path / "apart"
    store, stats = run(model, tmp_path, POSTS[1:2], prefetch=ahead, shard_rows=50)
    _, alone = run(model, apart, POSTS[1:2], shard_rows=50)
    assert stats.tokens_forwarded == alone.tokens_forwarded > 0
    assert store.hookpoints == sorted([POSTS[1], *ahead])
    separate, _ = run(model, apart, ahead, shard_rows=50)
    for point in ahead:
        assert torch.equal(
            store.acts(point.layer, point.stream), separate.acts(point.layer, point.stream)
        )


def test_nothing_is_forwarded_where_only_hookpoints_ahead_are_missing(tmp_path):
    model = random_lm("llama")
    run(model, tmp_path, POSTS[:1], shard_rows=9)
    store, stats = run(model, tmp_path, POSTS[:1], prefetch=POSTS[1:], shard_rows=9)
    assert (stats.tokens_forwarded, store.hookpoints) == (0, POSTS[:1])
    (store.path / POSTS[0].name / "00003.safetensors").unlink()
    store, stats = run(model, tmp_path, POSTS[:1], prefetch=POSTS[1:], shard_rows=9)
    assert stats.tokens_forwarded > 0
    assert {h: list(s) for h, s in store.manifest["hookpoints"].items() if h != POSTS[0].name} == {
        h.name: ["00003"] for h in POSTS[1:]
    }


def with_memory_for(n_tokens_at_once):
    """A model out of memory above so many tokens, padding included; (texts, length) of batches."""
    model, tried = LanguageModel.wrap(random_hf("llama"), tokenizer(), name="random-llama"), []

    def check(_, args, kwargs):
        n_texts, length, _ = (args[0] if args else kwargs["hidden_states"]).shape
        tried.append((n_texts, length))
        if n_texts * length > n_tokens_at_once:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.blocks[0].register_forward_pre_hook(check, with_kwargs=True)
    return model, tried


def n_hooks(model):
    return len(hooks_left(model.hf))


@pytest.mark.parametrize(
    ("n_tokens_at_once", "batch_tokens", "shard_rows"),
    [(32, "auto", 50), (32, 150, 10**6), (75, "auto", 10**6), (75, 150, 50)],
)
def test_batches_halve_until_they_fit_and_stay_so_in_all_shards(
    n_tokens_at_once, batch_tokens, shard_rows, tmp_path, caplog
):
    model, tried = with_memory_for(n_tokens_at_once)
    with caplog.at_level(logging.WARNING):
        store, stats = run(model, tmp_path, batch_tokens=batch_tokens, shard_rows=shard_rows)
    assert n_hooks(model) == 1
    budget = AUTO_BATCH_TOKENS["cpu"] if batch_tokens == "auto" else batch_tokens
    messages = []
    for n_texts, length in tried:
        n_padded = n_texts * length
        assert n_texts == 1 or n_padded <= budget
        if n_padded > n_tokens_at_once:
            budget = n_padded // 2
            messages.append(
                f"out of memory at {n_padded} tokens per batch; continuing with {budget}"
            )
    assert caplog.messages == messages != []
    normal, expected = run(random_lm("llama"), tmp_path / "normal", shard_rows=shard_rows)
    for layer in range(3):
        torch.testing.assert_close(store.acts(layer), normal.acts(layer), **CLOSE)
    assert stats.tokens_forwarded == expected.tokens_forwarded


def test_a_single_text_too_large_for_the_memory_is_one_line_and_leaves_what_was_finished(tmp_path):
    short = placed(["The song.", "The city.", TEXTS[0]])
    longest = len(tokenizer()(TEXTS[0]).input_ids)
    model, tried = with_memory_for(longest - 1)
    with pytest.raises(ModelError) as error:
        run(model, tmp_path, placement=short, shard_rows=4)
    assert str(error.value) == (
        f"a text of {longest} tokens does not fit into the memory of cpu; "
        "try dtype=bfloat16, a smaller dataset.max_length, or model.device_map=auto"
    )
    assert tried.count((1, longest)) == 1
    assert not list(tmp_path.rglob(".tmp-*"))
    whole, all_of_it = run(random_lm("llama"), tmp_path / "whole", placement=short, shard_rows=4)
    store, rest = run(random_lm("llama"), tmp_path, placement=short, shard_rows=4)
    assert 0 < rest.tokens_forwarded < all_of_it.tokens_forwarded
    assert digests(store.path) == digests(whole.path)


LABEL = Label("17e1", "layer_0.resid_post", 0, 100)


@st.composite
def writes(draw):
    """(values, rows of each write): a partition of the rows, shuffled."""
    n_rows, width = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    order = torch.tensor(draw(st.permutations(range(n_rows))))
    cuts = sorted(draw(st.sets(st.integers(1, n_rows))) - {n_rows})
    return torch.randn(n_rows, width, generator=generator), torch.tensor_split(order, cuts)


@settings(max_examples=40)
@given(writes(), st.sampled_from(DTYPES), st.booleans())
def test_a_shard_has_the_same_values_and_their_checksum_whatever_the_writes(
    acts_and_parts, dtype, narrow
):
    acts, parts = acts_and_parts
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer_0" / "00000.safetensors"
        writer = ShardWriter(path, *acts.shape, dtype, LABEL)
        for rows in parts:
            assert not path.exists()
            writer.write(rows.numpy(), acts[rows].to(dtype) if narrow else acts[rows])
        entry = writer.finish()
        content = path.read_bytes()
        values = acts.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
        assert content.endswith(values)
        assert torch.equal(load_file(path)["acts"], acts.to(dtype))
        with safe_open(path, framework="pt") as opened:
            checksum = hashlib.sha256(values).hexdigest()
            assert opened.metadata() == {**LABEL.metadata, "sha256": checksum}
        assert [p.name for p in path.parent.iterdir()] == [path.name]
    digest = hashlib.sha256(content).hexdigest()
    assert entry == {"n_rows": len(acts), "bytes": len(content), "sha256": digest}


@settings(max_examples=40)
@given(writes(), st.data())
def test_a_row_never_written_is_an_error_and_leaves_no_file(acts_and_parts, data):
    acts, parts = acts_and_parts
    left_out = data.draw(st.integers(0, len(parts) - 1))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "00000.safetensors"
        writer = ShardWriter(path, *acts.shape, torch.float32, LABEL)
        for number, rows in enumerate(parts):
            if number != left_out:
                writer.write(rows.numpy(), acts[rows])
        with pytest.raises(StoreError) as error:
            writer.finish()
        n_missing = len(parts[left_out])
        assert str(error.value) == f"{n_missing} rows of {path} were never written; report this"
        assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_with_nan_or_inf_are_those_torch_finds(dtype):
    special = [0.0, -0.0, 1.0, torch.finfo(dtype).max, torch.finfo(dtype).tiny]
    bad = [float("nan"), float("inf"), float("-inf")]
    rows = [[a, b] for a in [*special, *bad] for b in [*special, *bad]]
    acts = torch.tensor(rows, dtype=dtype)
    assert finite_rows(acts).tolist() == torch.isfinite(acts).all(dim=-1).tolist()
