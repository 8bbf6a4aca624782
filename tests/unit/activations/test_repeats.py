"""A text that comes again is forwarded once per store, and read as if every shard had it."""

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from saexp.activations.collector import Part
from saexp.activations.shards import Label, Repeats, ShardWriter, StoredValues
from saexp.activations.store import ActivationStore
from saexp.errors import StoreError
from saexp.models.hookpoints import Hookpoint
from saexp.models.loading import LanguageModel
from tests.random_models import TEXTS, random_hf, random_lm, save
from tests.unit.activations.collecting import POSTS, digests, n_tokens, placed, run

CLOSE = {"atol": 1e-5, "rtol": 0}
AGAIN = [*TEXTS, TEXTS[1], TEXTS[0], TEXTS[4], TEXTS[1]]


@pytest.fixture(scope="module")
def model():
    return random_lm("llama")


@st.composite
def tables(draw):
    """((text, token) of each row, rows per shard, shards that a store of before holds whole)."""
    rows = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=20))
    shard_rows = draw(st.integers(1, len(rows)))
    return rows, shard_rows, draw(st.sets(st.integers(0, len(rows) // shard_rows)))


@given(tables())
def test_a_row_is_kept_in_its_shard_unless_an_earlier_one_has_its_text_and_token(made):
    rows, step, _ = made
    repeats = Repeats(pd.DataFrame(rows, columns=["text_id", "token_index"]), step)
    for row, place in enumerate(rows):
        start = row // step * step
        seen = rows[:start]
        expected = seen.index(place) if place in seen else row
        assert repeats.source[row] == expected
        if expected == row:
            held = repeats.kept(start, min(start + step, len(rows)))
            assert held[repeats.offset[row]] == row


@given(tables(), st.integers(1, 25))
def test_all_rows_are_read_wherever_they_are_kept(made, chunk_rows):
    rows, step, whole = made
    repeats = Repeats(pd.DataFrame(rows, columns=["text_id", "token_index"]), step)
    values = torch.tensor(rows, dtype=torch.float32)
    bounds = [(a, min(a + step, len(rows))) for a in range(0, len(rows), step)]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i:05d}.safetensors" for i in range(len(bounds))]
        for index, (file, (first, end)) in enumerate(zip(files, bounds, strict=True)):
            held = np.arange(first, end) if index in whole else repeats.kept(first, end)
            label = Label("17e1", "layer_0.resid_post", index, step)
            writer = ShardWriter(file, len(held), 2 if len(held) else 0, torch.float32, label)
            if len(held):
                writer.write(np.arange(len(held)), values[torch.from_numpy(held)])
            writer.finish()
        stored = StoredValues(files, bounds, lambda: repeats)
        chunks = list(stored.chunks(chunk_rows))
        some = np.random.default_rng(chunk_rows).integers(0, len(rows), 2 * len(rows))
        assert torch.equal(stored[some], values[some])
        assert torch.equal(stored[: len(rows) - 1], values[: len(rows) - 1])
        assert stored.shape == tuple(values.shape)
        assert torch.equal(torch.cat([acts for _, acts in chunks]), values)
        assert [first for first, _ in chunks] == [
            sum(len(a) for _, a in chunks[:i]) for i in range(len(chunks))
        ]
        assert max(len(acts) for _, acts in chunks) <= chunk_rows


@pytest.mark.parametrize("shard_rows", [1, 2, 3, 4])
def test_every_text_is_forwarded_once_whatever_the_shards(model, tmp_path, shard_rows):
    again = placed(AGAIN, "last")
    one, expected = run(model, tmp_path / "one", placement=again)
    store, stats = run(model, tmp_path, placement=again, shard_rows=shard_rows)
    assert stats.tokens_forwarded == expected.tokens_forwarded == n_tokens(placed(name="last"))
    assert stats.n_rows == store.n_rows == len(AGAIN)
    first = [AGAIN.index(text) for text in AGAIN]
    for layer in range(3):
        acts = store.acts(layer)
        torch.testing.assert_close(acts, one.acts(layer), **CLOSE)
        assert torch.equal(acts, acts[first])
    norms = one.acts(1).double().norm(dim=-1).numpy()
    np.testing.assert_allclose(store.norms(POSTS[1]), norms, rtol=1e-5)
    assert run(model, tmp_path, placement=again)[1].tokens_forwarded == 0


def test_other_tokens_of_a_text_that_came_before_are_forwarded(model, tmp_path):
    places = placed()
    everything, _ = run(model, tmp_path / "all", placement=places)
    rows = places.rows
    text, others = (rows[chosen] for chosen in (rows["text_id"] == 0, rows["text_id"] > 0))
    begun, n_first = text.iloc[: len(text) // 2], len(others) + len(text) // 2
    # The first text again, at a token that the first shard has and at one that it has not.
    rows = [*begun.index, *others.index, *text.index[[1, -1]]]
    places = places.take(np.asarray(rows))
    store, stats = run(model, tmp_path, placement=places, shard_rows=n_first)
    files = sorted((store.path / POSTS[1].name).glob("*.safetensors"))
    assert [len(load_file(file)["acts"]) for file in files] == [n_first, 1]
    n_begun = int(begun["token_index"].iloc[-1]) + 1
    assert stats.tokens_forwarded == n_tokens(placed()) + n_begun
    wanted = [*begun.index, *others.index, *text.index[[1, -1]]]
    torch.testing.assert_close(store.acts(1), everything.acts(1)[wanted], **CLOSE)


@pytest.mark.parametrize("shard_rows", [9, 20])
def test_parts_in_any_order_make_the_store_of_one_process(model, tmp_path, shard_rows):
    again = placed(AGAIN)
    whole, stats = run(model, tmp_path / "whole", placement=again, shard_rows=shard_rows)
    for order in ([2, 1, 0], [1, 2, 0]):
        cache, forwarded = tmp_path / str(order[0]), 0
        for k in order:
            store, part = run(model, cache, placement=again, part=Part(k, 3), shard_rows=shard_rows)
            forwarded += part.tokens_forwarded
        assert forwarded == stats.tokens_forwarded
        assert digests(store.path) == digests(whole.path)
    one, _ = run(model, tmp_path / "one", placement=again)
    torch.testing.assert_close(whole.acts(2), one.acts(2), **CLOSE)


def test_a_shard_of_nothing_but_repeats_is_a_file_without_rows_and_costs_nothing(tmp_path):
    cfg = save(random_hf("llama"), tmp_path / "model")
    points = [*POSTS, Hookpoint(1, "attn_z")]
    again = placed([TEXTS[0], TEXTS[1], TEXTS[1], TEXTS[0]], "last")
    store, _ = run(LanguageModel(cfg), tmp_path, points, again, shard_rows=2)
    before = digests(store.path)
    files = sorted(store.path.glob("*/00001.safetensors"))
    assert [load_file(file)["acts"].numel() for file in files] == [0] * len(points)
    files[0].unlink()
    assert ActivationStore.open(store.path).missing(points) == {1: [POSTS[0]]}
    model = LanguageModel(cfg)
    mended, stats = run(model, tmp_path, points, again, shard_rows=2)
    assert (stats.tokens_forwarded, model.loaded) == (0, False)
    assert digests(mended.path) == before
    acts = mended.acts(1, "attn_z")
    assert torch.equal(acts[[3, 2]], acts[:2])


def test_a_damaged_shard_that_others_repeat_is_computed_again(model, tmp_path):
    again = placed(AGAIN)
    store, stats = run(model, tmp_path, placement=again, shard_rows=9)
    acts, before = store.acts(2).clone(), digests(store.path)
    damaged = store.path / POSTS[2].name / "00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(StoreError, match="does not have all of layer_2.resid_post"):
        ActivationStore.open(store.path).acts(2)
    mended, new = run(model, tmp_path, placement=again, shard_rows=9)
    assert 0 < new.tokens_forwarded < stats.tokens_forwarded
    assert digests(mended.path) == before
    assert torch.equal(mended.acts(2), acts)


def test_shards_written_whole_are_read_as_they_are(model, tmp_path):
    again = placed(AGAIN)
    store, _ = run(model, tmp_path, placement=again, shard_rows=9)
    acts = store.acts(1).clone()
    for index, (first, end) in enumerate(store.shard_bounds):
        if index % 2:
            store.write_shard(POSTS[1], index, acts[first:end])
    opened = ActivationStore.open(store.path)
    assert sum(s["n_rows"] for s in opened.manifest["hookpoints"][POSTS[1].name].values()) > len(
        placed().rows
    )
    assert torch.equal(opened.acts(1), acts)


def test_without_its_rows_table_a_store_with_repeats_is_one_clear_line(model, tmp_path):
    again = placed(AGAIN)
    store, _ = run(model, tmp_path, placement=again, shard_rows=9)
    (store.path / "rows.parquet").unlink()
    with pytest.raises(StoreError) as error:
        ActivationStore.open(store.path).acts(1)
    assert str(error.value) == f"{store.path}/rows.parquet is damaged; collect again to repair it"
    assert len(run(model, tmp_path, placement=again)[0].acts(1)) == len(again.rows)
