"""Interrupted and divided collections end in the same bytes as an undisturbed one."""

import pytest
import torch

from saexp import activations as store_module
from saexp.activations import ActivationStore
from saexp.activations import shard_files as shards
from tests.random_models import random_lm
from tests.unit.activations.collecting import POSTS, REPEATING, digests, placed, run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Digests of a collection that nothing happened to."""
    return digests(collect(tmp_path_factory.mktemp("whole")).path)


def collect(cache, hookpoints=POSTS) -> ActivationStore:
    return run(random_lm("llama"), cache, hookpoints, placed(REPEATING), shard_rows=20)[0]


def the_store(cache) -> ActivationStore:
    (store_folder,) = (cache / "activations").iterdir()
    return ActivationStore.open(store_folder)


@pytest.mark.parametrize("moment", ["before the shard is in place", "before it is listed"])
def test_an_interruption_at_the_worst_moment_loses_one_shard(whole, tmp_path, monkeypatch, moment):
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
            collect(tmp_path)
    interrupted_shard = 7 // len(POSTS) if early else 8 - 2
    (missing,) = {tuple(s) for s in (sorted(the_store(tmp_path).missing([h])) for h in POSTS)}
    # Those before it are there, and so may be one that was under way behind it.
    assert missing[0] == interrupted_shard
    store = collect(tmp_path)
    assert digests(store.path) == whole


def test_hookpoints_collected_one_after_another_equal_those_collected_at_once(whole, tmp_path):
    for point in reversed(POSTS):
        store = collect(tmp_path, [point])
    shards = {n: d for n, d in digests(store.path).items() if n != "manifest.json"}
    assert shards == {n: d for n, d in whole.items() if n != "manifest.json"}
    assert torch.equal(store.acts(2), ActivationStore.open(store.path).acts(2))
    assert len(store.acts(2)) == len(placed(REPEATING).rows)
