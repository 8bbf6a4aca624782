"""Long beginnings that many texts share are computed once, and nothing else changes."""

import itertools
import logging
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saexp.activations.shared_prefixes import (
    Group,
    compare_prefixes,
    empty_past,
    forward,
    groups,
    units,
)
from saexp.models import Hookpoint
from saexp.models.forward import TokenBudget
from saexp.models.loading import LanguageModel
from tests.random_models import PARALLEL, TEXTS, random_hf, random_lm, tokenizer
from tests.unit.activations.collecting import POSTS, digests, placed, run
from tests.unit.activations.test_forward import n_hooks, with_memory_for

BEGINNING = TEXTS[0]
ENDS = "twice in the second half of the game while nobody sang"
SHARED = [f"{BEGINNING} The {end} came {n}" for n, end in enumerate(ENDS.split())]
MIXED = [*TEXTS[1:3], *SHARED[:5], TEXTS[3], *SHARED[5:], TEXTS[4]]
CLOSE = {"atol": 1e-5, "rtol": 0}
BATCH_TOKENS = 128


def sequences_of(texts):
    return [tuple(tokenizer()(t).input_ids) for t in texts]


@st.composite
def sorted_sequences(draw):
    """Distinct sequences of few different tokens, sorted, of which none begins another."""
    drawn = draw(st.sets(st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)))
    alone = [s for s in drawn if not any(o != s and o[: len(s)] == s for o in drawn)]
    return sorted(alone, reverse=draw(st.booleans()))[:7]


def n_common(sequences):
    columns = itertools.takewhile(
        lambda column: len(set(column)) == 1, zip(*sequences, strict=False)
    )
    return len(list(columns))


def most_saved(sequences, min_saved, least):
    """By trying every way to cut the list into neighbours."""
    best = [0]
    for end in range(1, len(sequences) + 1):
        options = [best[-1]]
        for first in range(end - 1):
            shared = n_common(sequences[first:end])
            if shared >= least:
                options.append(best[first] + (end - first - 1) * shared - min_saved)
        best.append(max(options))
    return best[-1]


@settings(max_examples=60)
@given(sorted_sequences(), st.integers(0, 6), st.integers(1, 3))
def test_groups_save_the_most_that_any_way_to_group_neighbours_saves(sequences, min_saved, least):
    prefix_groups = groups(sequences, min_saved, least)
    assert [g.first for g in prefix_groups[1:]] == sorted(g.first for g in prefix_groups[1:])
    assert all(a.end <= b.first for a, b in itertools.pairwise(prefix_groups))
    for group in prefix_groups:
        assert group.n_shared == n_common(sequences[group.first : group.end]) >= least
    saved = [(g.end - g.first - 1) * g.n_shared - min_saved for g in prefix_groups]
    assert all(s > 0 for s in saved)
    assert sum(saved) == most_saved(sequences, min_saved, least)


def test_groups_of_groups_are_taken_whole_or_apart_by_what_that_saves():
    a, b = (1,) * 20, (2,) * 20
    near = [(*a, *b, n) for n in range(5)]
    far = [(*a, 9, *b, n) for n in range(5)]
    # Apart: 2 x 4 x 40 or 41 less 2 x 50; whole: 9 x 20 less 50.
    assert groups([*near, *far], 50) == [Group(40, 0, 5), Group(41, 5, 10)]
    assert groups([*near, *far], 300) == []
    short = [(*a, *b[:1], n) for n in range(5)] + [(*a, 3, n) for n in range(5)]
    assert groups(short, 50) == [Group(20, 0, 10)]


# One of each way to encode positions and each kind of attention.
@pytest.mark.parametrize(
    "architecture", ["gpt2", "gpt_neox", "llama", "mistral", "gemma2", "gemma3", "phi"]
)
@torch.no_grad()
def test_values_are_those_of_whole_texts_and_fewer_tokens_are_forwarded(architecture, tmp_path):
    model = random_lm(architecture)
    streams = [s for s in ("resid_mid", "attn_out", "attn_z", "mlp_in", "mlp_out")]
    available_streams = [s for s in streams if s != "resid_mid" or architecture not in PARALLEL]
    hookpoints = [*POSTS, *(Hookpoint(1, s) for s in available_streams), Hookpoint(0, "embed")]
    placement = placed(MIXED)
    settings = {"placement": placement, "batch_tokens": BATCH_TOKENS}
    store, stats = run(model, tmp_path / "shared", hookpoints, **settings)
    whole, all_of_it = run(model, tmp_path / "whole", hookpoints, **settings, share_prefixes=False)
    for point in hookpoints:
        torch.testing.assert_close(
            store.acts(point.layer, point.stream), whole.acts(point.layer, point.stream), **CLOSE
        )
    # All but one of those in the group go without the beginning, and the longest is compared.
    lengths = sorted(map(len, sequences_of(MIXED)))
    shared = n_common(sequences_of(SHARED))
    assert all_of_it.tokens_forwarded == sum(lengths)
    n_compared = stats.tokens_forwarded - (sum(lengths) - (len(SHARED) - 1) * shared)
    longest = max(map(len, sequences_of(SHARED)))
    assert n_compared in (0, 2 * longest - shared)
    # The oracle beside the own way: transformers' hidden states.
    out = model.hf(torch.tensor([sequences_of(MIXED)[5]]), output_hidden_states=True)
    of_text = torch.from_numpy(np.flatnonzero(placement.rows["text_id"] == 5))
    torch.testing.assert_close(store.acts(0)[of_text], out.hidden_states[1][0, 1:], **CLOSE)


def test_a_model_is_compared_once_and_values_do_not_depend_on_what_else_is_collected(tmp_path):
    model, fresh = random_lm("llama"), LanguageModel.wrap(random_hf("llama"), tokenizer(), "fresh")
    settings = {"placement": placed(SHARED), "batch_tokens": BATCH_TOKENS}
    run(model, tmp_path / "first", **settings)
    again, n_again = run(model, tmp_path / "again", **settings)
    first, n_first = run(fresh, tmp_path / "fresh", **settings)
    assert n_first.tokens_forwarded > n_again.tokens_forwarded
    for point in POSTS:
        # Stores of two models: their shards' headers differ.
        assert torch.equal(again.acts(point.layer), first.acts(point.layer))
    shallow, _ = run(model, tmp_path / "shallow", POSTS[:1], **settings)
    folders = [s.path / POSTS[0].name for s in (again, shallow)]
    assert digests(folders[0]) == digests(folders[1])


def test_sliding_and_full_attention_share_where_the_pass_ends_before_the_first_full_layer(tmp_path):
    hf = random_hf("gemma3", layer_types=["sliding_attention"] * 2 + ["full_attention"])
    model = LanguageModel.wrap(hf, tokenizer(), "layers of two kinds")
    settings = {"placement": placed(MIXED), "batch_tokens": BATCH_TOKENS}
    for point in POSTS:
        store, stats = run(model, tmp_path / "shared", [point], **settings)
        whole, all_of_it = run(model, tmp_path / "whole", [point], **settings, share_prefixes=False)
        assert stats.tokens_forwarded < all_of_it.tokens_forwarded
        torch.testing.assert_close(store.acts(point.layer), whole.acts(point.layer), **CLOSE)


def test_a_model_that_gives_other_values_so_is_named_and_forwarded_whole(tmp_path, caplog):
    model = LanguageModel.wrap(random_hf("llama"), tokenizer(), "odd")

    def forget_positions(_, args, kwargs):
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            kwargs["position_ids"] = torch.zeros_like(kwargs["position_ids"])
        return args, kwargs

    handle = model.hf.register_forward_pre_hook(forget_positions, with_kwargs=True)
    settings = {"placement": placed(MIXED), "batch_tokens": BATCH_TOKENS}
    with caplog.at_level(logging.WARNING):
        store, _ = run(model, tmp_path / "odd", **settings)
        again, stats = run(model, tmp_path / "again", **settings)
    handle.remove()
    (message,) = caplog.messages
    assert message.startswith("odd gives other values (by ")
    assert message.endswith("share a prefix; every text is forwarded whole")
    assert stats.tokens_forwarded == sum(map(len, sequences_of(MIXED)))
    whole, _ = run(random_lm("llama"), tmp_path / "whole", **settings, share_prefixes=False)
    for point in POSTS:
        assert digests(store.path / point.name) == digests(again.path / point.name)
        # Of a model of another name, so that the shards' headers differ.
        assert torch.equal(store.acts(point.layer), whole.acts(point.layer))


def test_batches_behind_a_shared_beginning_halve_until_they_fit(tmp_path, caplog):
    n_shared, longest = n_common(sequences_of(SHARED)), max(map(len, sequences_of(SHARED)))
    model, tried = with_memory_for(longest)
    settings = {"placement": placed(SHARED), "batch_tokens": 2 * BATCH_TOKENS}
    with caplog.at_level(logging.WARNING):
        store, _ = run(model, tmp_path / "small", **settings)
    assert len(caplog.messages) > 0
    assert n_hooks(model) == 1
    assert tried[0] == (1, n_shared)
    assert all(length < n_shared for n_texts, length in tried if n_texts > 1)
    whole, _ = run(random_lm("llama"), tmp_path / "whole", **settings, share_prefixes=False)
    for layer in range(3):
        torch.testing.assert_close(store.acts(layer), whole.acts(layer), **CLOSE)


def test_every_row_is_read_once_and_held_keys_count_in_a_batch():
    placement = placed(MIXED)
    todo = units(placement, np.arange(len(placement.rows)))
    budget = TokenBudget(BATCH_TOKENS, torch.device("cpu"))
    outputs = list(forward(random_lm("llama"), todo, POSTS[:1], budget, torch.float32))
    rows = np.concatenate([b.rows for b in outputs])
    assert sorted(rows) == list(range(len(placement.rows)))
    assert [len(b.host[POSTS[0]]()) for b in outputs] == [len(b.rows) for b in outputs]
    assert len(outputs) > 2


@pytest.mark.parametrize("reason", ["set by the caller", "shared keys", "no such option"])
def test_models_that_cannot_share_have_no_past(reason, monkeypatch):
    model = LanguageModel.wrap(random_hf("llama"), tokenizer(), "apart")
    assert empty_past(model) is not None
    if reason == "set by the caller":
        model.observed.shares_prefixes = False
    elif reason == "shared keys":
        model.text_config.num_kv_shared_layers = 1
    else:
        monkeypatch.setattr(type(model.hf), "forward", lambda _, input_ids: input_ids)
    assert empty_past(model) is None


def test_a_shared_beginning_in_which_nothing_is_wanted(tmp_path):
    settings = {"placement": placed(MIXED, "last"), "batch_tokens": BATCH_TOKENS}
    store, stats = run(random_lm("llama"), tmp_path / "shared", **settings)
    whole, all_of_it = run(random_lm("llama"), tmp_path / "whole", **settings, share_prefixes=False)
    assert stats.tokens_forwarded < all_of_it.tokens_forwarded
    for layer in range(3):
        torch.testing.assert_close(store.acts(layer), whole.acts(layer), **CLOSE)


def rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **options}}


def longrope(context: int) -> dict[str, Any]:
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    return rope("longrope", **factors, original_max_position_embeddings=context)


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        (rope("linear", factor=2.0), True),
        (rope("dynamic", factor=2.0), True),
        # The shared beginning has 26 tokens and the texts at least 30: on one side, and across.
        (longrope(24), True),
        (longrope(28), False),
        ({**rope("dynamic", factor=2.0), "max_position_embeddings": 28}, False),
    ],
)
def test_keys_that_depend_on_a_texts_length_are_shared_by_lengths_alike(
    options, shares, tmp_path, caplog
):
    model = LanguageModel.wrap(random_hf("llama", **options), tokenizer(), "rope")
    settings = {"placement": placed(MIXED), "batch_tokens": BATCH_TOKENS}
    with caplog.at_level(logging.WARNING):
        store, stats = run(model, tmp_path / "asked", **settings)
    assert caplog.messages == [], "not tried in vain"
    assert (stats.tokens_forwarded < sum(map(len, sequences_of(MIXED)))) == shares
    whole, _ = run(model, tmp_path / "whole", **settings, share_prefixes=False)
    for layer in range(3):
        torch.testing.assert_close(store.acts(layer), whole.acts(layer), **CLOSE)


def test_what_was_compared_at_a_shallow_layer_is_compared_again_deeper(tmp_path, caplog):
    model = LanguageModel.wrap(random_hf("llama"), tokenizer(), "odd above")

    def spoil(_, args, kwargs):
        cache = kwargs.get("past_key_values")
        if (
            cache is not None
            and cache.layers[0].get_seq_length() > kwargs["hidden_states"].shape[1]
        ):
            kwargs["position_embeddings"] = tuple(x * 0.5 for x in kwargs["position_embeddings"])
        return args, kwargs

    model.blocks[2].self_attn.register_forward_pre_hook(spoil, with_kwargs=True)
    settings = {"placement": placed(MIXED), "batch_tokens": BATCH_TOKENS}
    with caplog.at_level(logging.WARNING):
        run(model, tmp_path / "shallow", [Hookpoint(0, "mlp_in")], **settings)
        assert model.observed.n_blocks_compared == 0
        run(model, tmp_path / "shallow", POSTS[:1], **settings)
        assert (model.observed.shares_prefixes, model.observed.n_blocks_compared) == (True, 1)
        assert caplog.messages == []
        store, _ = run(model, tmp_path / "deep", POSTS, **settings)
    assert len(caplog.messages) == 1
    assert model.observed.shares_prefixes is False
    whole, _ = run(random_lm("llama"), tmp_path / "whole", **settings, share_prefixes=False)
    for layer in range(3):
        torch.testing.assert_close(store.acts(layer), whole.acts(layer), **CLOSE)


def test_a_model_that_takes_another_kind_of_cache_is_forwarded_whole(tmp_path, caplog):
    model = LanguageModel.wrap(random_hf("llama"), tokenizer(), "legacy")

    def subscript(_, args, kwargs):
        if kwargs.get("past_key_values") is not None:
            kwargs["past_key_values"][0][0]
        return args, kwargs

    model.hf.register_forward_pre_hook(subscript, with_kwargs=True)
    settings = {"placement": placed(MIXED), "batch_tokens": BATCH_TOKENS}
    with caplog.at_level(logging.WARNING):
        store, stats = run(model, tmp_path / "legacy", **settings)
    (message,) = caplog.messages
    assert message.startswith("legacy gives an error (TypeError: ")
    assert stats.tokens_forwarded == sum(map(len, sequences_of(MIXED)))
    whole, _ = run(random_lm("llama"), tmp_path / "whole", **settings, share_prefixes=False)
    for layer in range(3):
        assert torch.equal(store.acts(layer), whole.acts(layer))


def test_float64_is_shared_to_its_own_precision(tmp_path):
    model = LanguageModel.wrap(random_hf("llama").double(), tokenizer(), "double")
    settings = {"placement": placed(MIXED), "batch_tokens": BATCH_TOKENS, "dtype": "float32"}
    store, stats = run(model, tmp_path / "shared", **settings)
    whole, all_of_it = run(model, tmp_path / "whole", **settings, share_prefixes=False)
    assert stats.tokens_forwarded < all_of_it.tokens_forwarded
    for layer in range(3):
        torch.testing.assert_close(store.acts(layer), whole.acts(layer), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("grouped", "alone", "same"),
    [
        ([0.0, 0.0], [0.0, 0.0], True),
        ([1.0, 2.0], [1.0, 2.0], True),
        ([1.0, 2.1], [1.0, 2.0], False),
        ([float("nan"), 1.0], [1.0, 1.0], False),
        ([1.0, 1.0], [float("inf"), 1.0], False),
        ([1.0, 0.0], [0.0, 0.0], False),
    ],
)
def test_values_are_equal_up_to_rounding_and_unequal_where_one_is_nan(grouped, alone, same):
    model = LanguageModel.wrap(random_hf("llama"), tokenizer(), "settled")
    compare_prefixes(model, POSTS[1:2], [(torch.tensor([grouped]), torch.tensor([alone]))])
    assert (model.observed.shares_prefixes, model.observed.n_blocks_compared) == (
        (True, 2) if same else (False, 0)
    )
