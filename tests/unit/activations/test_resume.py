"""Killed, raced and interrupted collections end in the same bytes as an undisturbed one."""

import signal
import subprocess
import sys
import time

import pytest
import torch

from saexp.activations import shards
from saexp.activations import store as store_module
from saexp.activations.store import ActivationStore
from tests.unit.activations.child import PATIENCE_SECONDS, load
from tests.unit.activations.collecting import POSTS, REPEATING, digests, placed, run_in_shards

PASSES = 6


def the_store(cache) -> ActivationStore:
    (place,) = (cache / "activations").iterdir()
    return ActivationStore.open(place)


def start(folder, cache, tmp_path, passes=0):
    """A child that waits, with its model loaded, for the second file."""
    ready, go = tmp_path / "ready", tmp_path / "go"
    arguments = [str(folder), str(cache), str(passes), str(ready), str(go)]
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.activations.child", *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )
    began = time.monotonic()
    while not ready.exists():
        assert child.poll() is None, "the child ended before it began"
        assert time.monotonic() - began < PATIENCE_SECONDS
        time.sleep(0.01)
    return child, go


def test_a_killed_collection_resumes_to_equal_bytes(folder, undisturbed, tmp_path):
    whole, tokens = undisturbed
    cache = tmp_path / "cache"
    child, go = start(folder, cache, tmp_path, passes=PASSES)
    go.touch()
    assert child.wait(PATIENCE_SECONDS) == -signal.SIGKILL
    child.stdout.close()
    # It lost at most the shard it computed and the one it was writing.
    killed = the_store(cache)
    missing = sorted(killed.missing(POSTS))
    assert missing == list(range(missing[0], len(killed.shard_bounds)))
    assert missing[0] in (PASSES - 2, PASSES - 1)
    assert killed.hookpoints == []
    store, stats = run_in_shards(load(folder), cache)
    assert 0 < stats.tokens_forwarded < tokens
    assert digests(store.path) == whole


def test_two_processes_at_once_make_one_sound_store_and_compute_no_shard_twice(
    folder, undisturbed, tmp_path
):
    whole, tokens = undisturbed
    model = load(folder)
    assert model.blocks is not None, "weights are read before the start"
    cache = tmp_path / "cache"
    child, go = start(folder, cache, tmp_path)
    go.touch()
    store, stats = run_in_shards(model, cache)
    said, _ = child.communicate(timeout=PATIENCE_SECONDS)
    assert child.returncode == 0
    assert int(said) + stats.tokens_forwarded == tokens
    assert digests(store.path) == whole


@pytest.mark.parametrize("moment", ["before the shard is in place", "before it is listed"])
def test_an_interruption_at_the_worst_moment_loses_one_shard(
    folder, undisturbed, tmp_path, monkeypatch, moment
):
    whole, _ = undisturbed
    early = moment == "before the shard is in place"
    module, name = (shards, "put_in_place") if early else (store_module, "write_manifest")
    real, calls = getattr(module, name), []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_in_shards(load(folder), tmp_path)
    interrupted_shard = 7 // len(POSTS) if early else 8 - 2
    (missing,) = {tuple(s) for s in (sorted(the_store(tmp_path).missing([h])) for h in POSTS)}
    # Those before it are there, and so may be one that was under way behind it.
    assert missing[0] == interrupted_shard
    store, _ = run_in_shards(load(folder), tmp_path)
    assert digests(store.path) == whole


def test_hookpoints_collected_one_after_another_equal_those_collected_at_once(
    folder, undisturbed, tmp_path
):
    whole, _ = undisturbed
    for point in reversed(POSTS):
        store, _ = run_in_shards(load(folder), tmp_path, [point])
    shards = {n: d for n, d in digests(store.path).items() if n != "manifest.json"}
    assert shards == {n: d for n, d in whole.items() if n != "manifest.json"}
    assert torch.equal(store.acts(2), ActivationStore.open(store.path).acts(2))
    assert len(store.acts(2)) == len(placed(REPEATING).rows)
