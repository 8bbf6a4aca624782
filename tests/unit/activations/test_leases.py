"""A store that a living process uses is not pruned; one that cannot be written can be read."""

import os
import subprocess

import pytest
import torch

import saexp
from saexp import files
from saexp.activations import ActivationStore
from saexp.errors import StoreError
from saexp.files import FOLDER, Lease, users
from saexp.tasks import collect as stores
from tests.random_models import random_lm
from tests.unit.activations.collecting import POSTS, digests, placed, run
from tests.unit.activations.test_disk import disk as disk  # a fixture

SHARD_ROWS = 45


@pytest.fixture(scope="module")
def model():
    return random_lm("llama")


@pytest.fixture
def stored(model, tmp_path) -> ActivationStore:
    """A whole store that nobody uses."""
    store, _ = run(model, tmp_path, shard_rows=SHARD_ROWS)
    store.close()
    return store


def pruned(stored: ActivationStore) -> stores.Pruned:
    return stores.prune(stored.path.parents[1], max_size="0GB", max_age=None)


def test_an_open_store_is_not_pruned_until_it_is_closed_or_deleted(model, stored):
    for use in (
        lambda s: s.acts(1),
        lambda s: next(s.chunks(POSTS[0], 3)),
        lambda s: s.norms(POSTS[0]),
    ):
        store = saexp.open_store(stored.path)
        assert users(stored.path) == []
        use(store)
        use(store)
        assert users(stored.path) == [f"pid {os.getpid()} on {files._host()}"]
        store.close()
        store.close()
        assert list((stored.path / FOLDER).iterdir()) == []
    store, _ = run(model, stored.path.parents[1])
    assert pruned(stored).removed == []
    del store
    assert pruned(stored).removed == [stored.path.name]


def test_a_dead_process_mark_is_cleared_and_a_reused_pid_does_not_matter(stored):
    lease = Lease.take(stored.path)
    assert lease is not None
    dead = lease.path.with_name(f"{files._host()}-{os.getpid()}-0badc0de.lock")
    dead.touch()
    assert len(users(stored.path)) == 1
    assert not dead.exists()
    lease.release()
    assert users(stored.path) == []


def test_a_lease_of_another_host_counts_for_a_day(stored):
    mark = stored.path / FOLDER / "elsewhere-12-0badc0de.lock"
    mark.parent.mkdir(exist_ok=True)
    mark.touch()
    assert pruned(stored).skipped == {stored.path.name: "in use by pid 12 on elsewhere"}
    old = mark.stat().st_mtime - files.TRUST_SECONDS
    os.utime(mark, (old, old))
    assert pruned(stored).removed == [stored.path.name]


def test_a_store_pruned_while_open_is_reported_and_collected_again(model, stored):
    store = ActivationStore.open(stored.path)
    acts = store.acts(1).clone()
    store.close()
    assert pruned(stored).removed == [stored.path.name]
    with pytest.raises(StoreError, match="does not have all of layer_1.resid_post; it has none"):
        ActivationStore(stored.path, stored.manifest).acts(1)
    again, stats = run(model, stored.path.parents[1], shard_rows=SHARD_ROWS)
    assert stats.tokens_forwarded > 0
    assert torch.equal(again.acts(1), acts)


@pytest.fixture
def read_only(model, disk):
    """(cache folder on a file system mounted read-only, its whole store)."""
    disk_path, sized = disk
    sized(4096)
    store, _ = run(model, disk_path, shard_rows=SHARD_ROWS)
    store.close()
    subprocess.run(["mount", "-o", "remount,ro", str(disk_path)], check=True)
    yield disk_path, store
    subprocess.run(["mount", "-o", "remount,rw", str(disk_path)], check=True)


def test_a_whole_store_on_a_read_only_file_system_is_used(model, read_only):
    disk_path, stored = read_only
    before = digests(stored.path)
    store, stats = run(model, disk_path)
    assert stats.tokens_forwarded == 0
    shards = [torch.cat([a for _, a in store.chunks(h, 5)]) for h in POSTS]
    for layer, expected in enumerate(shards):
        assert torch.equal(store.acts(layer), expected)
    assert torch.equal(saexp.open_store(stored.path).acts(2), shards[2])
    assert saexp.open_store(stored.path).hookpoints == POSTS
    assert digests(stored.path) == before
    assert pruned(stored).removed == []


def test_other_labels_of_the_same_rows_need_not_be_written(model, read_only):
    disk_path, stored = read_only
    store, _ = run(model, disk_path, placement=placed(groups=("other", "another")))
    assert set(store.rows["group"]) == {"other", "another"}
    assert set(saexp.open_store(stored.path).rows["group"]) == {"known", "unknown"}
