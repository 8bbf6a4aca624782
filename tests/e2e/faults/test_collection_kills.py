"""Processes killed and raced at any instant end in the bytes of an undisturbed collection."""

import json
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from saexp import files
from saexp.activations import ActivationStore
from saexp.files import FOLDER
from saexp.tasks import collect as stores
from tests import interpreters
from tests.e2e.faults import collecting_child as child
from tests.e2e.faults.collecting_child import PATIENCE_SECONDS, end, start
from tests.random_models import random_hf, save
from tests.unit.activations.collecting import (
    POSTS,
    digests,
    digests_in,
    load,
    n_shard_files,
    n_sound,
    run_in_shards,
)
from tests.unit.activations.test_disk import disk as disk  # a fixture

N_KILLS = 8
PASSES = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save(random_hf("llama"), path)
    return path


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    """(digests, tokens) of a collection that nothing happened to."""
    store, stats = run_in_shards(load(folder), tmp_path_factory.mktemp("whole"))
    return digests(store.path), stats.tokens_forwarded


@pytest.fixture(scope="module")
def server():
    return child.server()


@pytest.mark.slow
def test_kills_at_random_instants_leave_sound_shards_and_a_resume_ends_in_equal_bytes(
    folder, undisturbed, server, tmp_path
):
    expected, _ = undisturbed

    def collect_in_child(cache, kill_at=0, share=None):
        """Killed at a change of the disk, or after a share of an undisturbed run's time."""
        go = server.Event()
        process, queue = start(server, child.collect_to_be_killed, folder, cache, kill_at, go)
        go.set()
        if share is not None:
            time.sleep(share * seconds)
            process.kill()
        return end(process), queue

    code, queue = collect_in_child(tmp_path / "undisturbed")
    assert code == 0
    seconds, n_changes = queue.get()
    rng, n_kills, n_listed, caches = random.Random(0), 0, [], [tmp_path / "0"]
    while n_kills < N_KILLS:
        by_time = n_kills % 2 == 0
        code, _ = collect_in_child(
            caches[-1],
            kill_at=0 if by_time else rng.randint(1, n_changes),
            share=rng.random() if by_time else None,
        )
        n_listed.append(n_sound(caches[-1], expected))
        if code == -signal.SIGKILL:
            n_kills += 1
        else:
            assert code == 0
            assert digests_in(caches[-1]) == expected
            caches.append(tmp_path / str(len(caches)))
    # Otherwise the kills came before or after everything.
    assert len({n for n in n_listed if 0 < n < n_shard_files(expected)}) > 2
    for cache in caches:
        store, _ = run_in_shards(load(folder), cache)
        assert digests(store.path) == expected


@pytest.mark.slow
def test_no_temporary_file_is_left_after_the_resume_of_a_killed_collection(
    folder, undisturbed, server, tmp_path
):
    expected, _ = undisturbed
    go = server.Event()
    go.set()
    # Within the rows table, the manifest, the first shard's three files, and the manifest again.
    for kill_at in range(1, 28, 6):
        cache = tmp_path / str(kill_at)
        process, _ = start(server, child.collect_to_be_killed, folder, cache, kill_at, go)
        assert end(process) == -signal.SIGKILL
        store, _ = run_in_shards(load(folder), cache)
        assert digests(store.path) == expected


@pytest.fixture()
def start_writers(server, folder, tmp_path):
    """Starts writers on one store that stay in their first pass until so many processes meet."""
    meeting_folder = tmp_path / "meeting"
    meeting_folder.mkdir()

    def begin(n_meet, stays):
        cache = tmp_path / "cache"
        return meeting_folder, [
            start(server, child.collect_at_once, folder, cache, meeting_folder, n_meet, stay)
            for stay in stays
        ]

    return begin


def test_writers_at_once_share_the_work_and_compute_no_shard_twice(
    undisturbed, start_writers, tmp_path
):
    expected, tokens = undisturbed
    _, writers = start_writers(3, [False] * 3)
    assert [end(process) for process, _ in writers] == [0] * 3
    shares = [queue.get() for _, queue in writers]
    assert min(shares) > 0
    assert sum(shares) == tokens
    assert digests_in(tmp_path / "cache") == expected


def test_the_shard_of_a_killed_writer_is_taken_over_by_another(
    undisturbed, start_writers, tmp_path
):
    expected, tokens = undisturbed
    meeting_folder, ((stuck, _), *others) = start_writers(4, [True, False, False])
    child.meet(meeting_folder, 4)
    stuck.kill()
    assert end(stuck) == -signal.SIGKILL
    assert [end(process) for process, _ in others] == [0, 0]
    assert sum(queue.get() for _, queue in others) == tokens
    assert digests_in(tmp_path / "cache") == expected


def test_a_writer_waits_for_the_shard_of_one_that_is_slow_and_takes_it_over_when_it_dies(
    undisturbed, start_writers, tmp_path
):
    expected, tokens = undisturbed
    meeting_folder, ((stuck, _), (other, queue)) = start_writers(3, [True, False])
    child.meet(meeting_folder, 3)
    (manifest,) = (tmp_path / "cache" / "activations").glob("*/manifest.json")
    n_shards, began = n_shard_files(expected) // len(POSTS), time.monotonic()
    while set(map(len, json.loads(manifest.read_text())["hookpoints"].values())) != {n_shards - 1}:
        assert time.monotonic() - began < PATIENCE_SECONDS
        time.sleep(0.01)
    other.join(0.3)
    assert other.is_alive(), "it waits"
    stuck.kill()
    assert end(other) == 0
    assert queue.get() == tokens
    assert digests_in(tmp_path / "cache") == expected


def the_store(cache) -> ActivationStore:
    (path,) = (cache / "activations").iterdir()
    return ActivationStore.open(path)


def test_a_killed_collection_loses_at_most_two_shards(folder, undisturbed, server, tmp_path):
    expected, tokens = undisturbed
    # A reference, since the child opens the event after the call has returned.
    event = server.Event()
    process, _ = start(server, child.collect_to_pass, folder, tmp_path, PASSES, event)
    assert end(process) == -signal.SIGKILL
    # The shard that it computed and the one that it was writing.
    killed = the_store(tmp_path)
    missing = sorted(killed.missing(POSTS))
    assert missing == list(range(missing[0], len(killed.shard_bounds)))
    assert missing[0] in (PASSES - 2, PASSES - 1)
    assert killed.hookpoints == []
    store, stats = run_in_shards(load(folder), tmp_path)
    assert 0 < stats.tokens_forwarded < tokens
    assert digests(store.path) == expected


def test_this_process_and_another_compute_no_shard_twice(folder, undisturbed, server, tmp_path):
    expected, tokens = undisturbed
    model = load(folder)
    assert model.blocks is not None, "weights are read before the start"
    ready = server.Event()
    process, reported = start(server, child.collect_to_pass, folder, tmp_path, 0, ready)
    assert ready.wait(PATIENCE_SECONDS)
    store, stats = run_in_shards(model, tmp_path)
    assert end(process) == 0
    assert reported.get() + stats.tokens_forwarded == tokens
    assert digests(store.path) == expected


def test_what_was_collected_for_a_process_goes_with_it(tmp_path):
    code = (
        "from pathlib import Path; import multiprocessing, sys\n"
        "from saexp.activations.collection import temporary_cache\n"
        "folder = temporary_cache(Path('cache')); (folder / 'file').touch()\n"
        "assert temporary_cache(Path.cwd() / 'cache') == folder\n"
        "fork = multiprocessing.get_context('fork').Process(target=int)\n"
        "fork.start(); fork.join(); assert (folder / 'file').is_file()\n"
        "print(folder); sys.exit(1)"
    )
    done = interpreters.run(["-c", code], tmp_path)
    assert done.returncode == 1, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.name.startswith("saexp-cache-")
    assert not folder.exists()


READER = """
import sys, time
from saexp.activations import ActivationStore
store = ActivationStore.open(sys.argv[1])
acts = store.acts(1)
print("reading", flush=True)
time.sleep(100)
"""


def test_a_store_that_another_process_reads_stays_until_that_is_killed(folder, tmp_path):
    store, _ = run_in_shards(load(folder), tmp_path)
    store.close()
    prune = partial(stores.prune, tmp_path, max_size="0GB", max_age=None)
    reader = interpreters.Process(["-c", READER, str(store.path)])
    try:
        began = time.monotonic()
        while reader.read()[0] != "reading\n":
            assert reader.poll() is None, reader.read()
            assert time.monotonic() - began < PATIENCE_SECONDS
            time.sleep(0.01)
        user = f"pid {reader.pid} on {files._host()}"
        assert prune().skipped == {store.path.name: f"in use by {user}"}
        assert ActivationStore.open(store.path, verify=True).missing(POSTS) == {}
    finally:
        reader.kill()
        reader.wait()
    assert len(list((store.path / FOLDER).iterdir())) == 1, "it could not remove its lease"
    assert prune().removed == [store.path.name]
    assert not store.path.exists()
