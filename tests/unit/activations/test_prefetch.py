"""Hookpoints stored on the way for other runs never stop the run that stores them."""

import logging
import time

import pytest

from saexp.activations import ActivationStore, collection
from saexp.activations.shard_files import ShardWriter
from saexp.errors import StoreError
from saexp.models import Hookpoint
from saexp.models.loading import LanguageModel
from saexp.pipeline.collect import hookpoints_in_model
from saexp.tasks.collect import stores, unreadable
from tests.random_models import random_hf, random_lm, tokenizer
from tests.unit.activations.collecting import POSTS, digests, run

SHARD_ROWS = 20


def spoiled(layer):
    """A model whose block gives infinities."""
    model = LanguageModel.wrap(random_hf("llama"), tokenizer(), "spoiled")
    model.blocks[layer].mlp.down_proj.weight.data.fill_(float("inf"))
    return model


def test_infinities_ahead_are_left_to_the_run_that_wants_them(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        store, stats = run(
            spoiled(1), tmp_path, POSTS[:1], prefetch=POSTS[1:], shard_rows=SHARD_ROWS
        )
    assert [m.partition(": ")[0] for m in caplog.messages] == [
        f"{h.name} is not prefetched" for h in POSTS[1:]
    ]
    assert store.hookpoints == POSTS[:1]
    assert set(store.manifest["hookpoints"]) == {POSTS[0].name}
    assert not list(store.path.rglob(".tmp-*"))
    sound, _ = run(spoiled(1), tmp_path / "alone", POSTS[:1], shard_rows=SHARD_ROWS)
    assert digests(store.path / POSTS[0].name) == digests(sound.path / POSTS[0].name)
    assert stats.tokens_forwarded > 0
    with pytest.raises(StoreError, match="NaN or Inf at layer_1.resid_post .* in float32: check"):
        run(spoiled(1), tmp_path, POSTS[1:2], shard_rows=SHARD_ROWS)


def test_a_place_that_the_model_lacks_is_left_to_the_run_that_names_it(tmp_path, caplog):
    ahead = [Hookpoint(1, "resid_mid"), POSTS[1], Hookpoint(7, "mlp_out")]
    with caplog.at_level(logging.WARNING):
        store, _ = run(random_lm("gpt_neox"), tmp_path, POSTS[:1], prefetch=ahead)
    assert store.hookpoints == POSTS[:2]
    assert [m.split(" ")[0] for m in caplog.messages] == ["layer_1.resid_mid", "layer_7.mlp_out"]


def test_a_planned_stream_that_there_is_not_is_left_out():
    ahead = [(1, "foo"), (1, "mlp_out"), (2, "embed"), (9, None), (0, None)]
    assert hookpoints_in_model(random_lm("llama"), [POSTS[2]], ahead) == [
        Hookpoint(1, "mlp_out"),
        POSTS[0],
    ]


def test_without_room_for_what_is_ahead_what_is_wanted_is_stored(tmp_path, caplog, monkeypatch):
    model = random_lm("llama")
    whole, _ = run(model, tmp_path / "whole", POSTS[:1])
    n_bytes = whole.n_rows * model.d_model * 4
    monkeypatch.setattr(collection, "free_bytes", lambda _: 2 * n_bytes)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        store, _ = run(model, tmp_path / "tight", POSTS[:1], prefetch=POSTS[1:])
    assert store.hookpoints == POSTS[:1]
    assert len(caplog.messages) == 2
    assert all("are free" in m for m in caplog.messages)
    with pytest.raises(StoreError, match="disk full"):
        run(model, tmp_path / "full", POSTS)


@pytest.mark.parametrize("content", ["{}", "null", "[1]", '{"ingredients": 3}', "{", '"text"'])
def test_a_manifest_of_another_shape_is_one_line_and_stops_no_listing(content, tmp_path):
    store, _ = run(random_lm("llama"), tmp_path, POSTS[:1])
    odd = store.path.parent / "odd"
    odd.mkdir()
    (odd / "manifest.json").write_text(content)
    with pytest.raises(StoreError, match=f"{odd}/manifest.json cannot be read .*; the command"):
        ActivationStore.open(odd)
    assert [s.path for s in stores(tmp_path)] == [store.path]
    assert unreadable(tmp_path) == [odd]


@pytest.mark.parametrize("call", ["write", "finish"])
def test_what_cannot_be_written_ahead_does_not_stop_the_run(call, tmp_path, caplog, monkeypatch):
    own = getattr(ShardWriter, call)

    def full(writer, *arguments):
        if POSTS[1].name in str(writer.path):
            writer.discard()
            raise StoreError("disk full")
        return own(writer, *arguments)

    monkeypatch.setattr(ShardWriter, call, full)
    with caplog.at_level(logging.WARNING):
        store, _ = run(
            random_lm("llama"), tmp_path, POSTS[:1], prefetch=POSTS[1:], shard_rows=SHARD_ROWS
        )
    assert caplog.messages == [f"{POSTS[1].name} is not prefetched: disk full"]
    assert store.hookpoints == [POSTS[0], POSTS[2]]
    assert not list(store.path.rglob(".tmp-*"))
    with pytest.raises(StoreError, match="disk full"):
        run(random_lm("llama"), tmp_path, POSTS[1:2], shard_rows=SHARD_ROWS)


def test_no_finished_shard_is_lost_while_the_next_is_begun(tmp_path, monkeypatch):
    own = ActivationStore._change

    def slowly(store, change):
        # The manifest is read again for the next shard meanwhile.
        own(store, lambda manifest: (change(manifest), time.sleep(0.01)))

    monkeypatch.setattr(ActivationStore, "_change", slowly)
    store, _ = run(random_lm("llama"), tmp_path, POSTS[:1], shard_rows=8)
    assert len(store.shard_bounds) > 10
    assert store.missing(POSTS[:1]) == {}
    assert ActivationStore.open(store.path).missing(POSTS[:1]) == {}
