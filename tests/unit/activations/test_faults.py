"""Processes killed and raced at any instant end in the bytes of an undisturbed collection."""

import json
import random
import signal
import time

import pytest

from tests.unit.activations import child
from tests.unit.activations.child import PATIENCE_SECONDS, load
from tests.unit.activations.collecting import (
    POSTS,
    digests,
    digests_in,
    n_shard_files,
    n_sound,
    run_in_shards,
)

N_KILLS = 32


@pytest.fixture(scope="module")
def server():
    return child.server()


def start(server, function, *arguments):
    """(process, queue of what it says)."""
    said = server.SimpleQueue()
    process = server.Process(target=function, args=(*arguments, said), daemon=True)
    process.start()
    return process, said


def end(process):
    process.join(PATIENCE_SECONDS)
    return process.exitcode


@pytest.mark.slow
def test_kills_at_random_instants_leave_sound_shards_and_a_resume_ends_in_equal_bytes(
    folder, undisturbed, server, tmp_path
):
    expected, _ = undisturbed

    def collect_in_child(cache, kill_at=0, share=None):
        """Killed at a change of the disk, or after a share of an undisturbed run's time."""
        go = server.Event()
        process, said = start(server, child.collect_to_be_killed, folder, cache, kill_at, go)
        go.set()
        if share is not None:
            time.sleep(share * seconds)
            process.kill()
        return end(process), said

    code, said = collect_in_child(tmp_path / "undisturbed")
    assert code == 0
    seconds, n_changes = said.get()
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
    assert len({n for n in n_listed if 0 < n < n_shard_files(expected)}) > 4
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
    for kill_at in range(1, 28, 3):
        cache = tmp_path / str(kill_at)
        process, _ = start(server, child.collect_to_be_killed, folder, cache, kill_at, go)
        assert end(process) == -signal.SIGKILL
        store, _ = run_in_shards(load(folder), cache)
        assert digests(store.path) == expected


@pytest.fixture()
def start_writers(server, folder, tmp_path):
    """Starts writers on one store that stay in their first pass until so many processes meet."""
    place = tmp_path / "meeting"
    place.mkdir()

    def begin(n_meet, stays):
        cache = tmp_path / "cache"
        return place, [
            start(server, child.collect_at_once, folder, cache, place, n_meet, stay)
            for stay in stays
        ]

    return begin


@pytest.mark.parametrize("n_writers", [2, 4])
def test_writers_at_once_share_the_work_and_compute_no_shard_twice(
    undisturbed, start_writers, tmp_path, n_writers
):
    expected, tokens = undisturbed
    _, writers = start_writers(n_writers, [False] * n_writers)
    assert [end(process) for process, _ in writers] == [0] * n_writers
    shares = [said.get() for _, said in writers]
    assert min(shares) > 0
    assert sum(shares) == tokens
    assert digests_in(tmp_path / "cache") == expected


def test_the_shard_of_a_killed_writer_is_taken_over_by_another(
    undisturbed, start_writers, tmp_path
):
    expected, tokens = undisturbed
    place, ((stuck, _), *others) = start_writers(4, [True, False, False])
    child.meet(place, 4)
    stuck.kill()
    assert end(stuck) == -signal.SIGKILL
    assert [end(process) for process, _ in others] == [0, 0]
    assert sum(said.get() for _, said in others) == tokens
    assert digests_in(tmp_path / "cache") == expected


def test_a_writer_waits_for_the_shard_of_one_that_is_slow_and_takes_it_over_when_it_dies(
    undisturbed, start_writers, tmp_path
):
    expected, tokens = undisturbed
    place, ((stuck, _), (other, said)) = start_writers(3, [True, False])
    child.meet(place, 3)
    (manifest,) = (tmp_path / "cache" / "activations").glob("*/manifest.json")
    n_shards, began = n_shard_files(expected) // len(POSTS), time.monotonic()
    while set(map(len, json.loads(manifest.read_text())["hookpoints"].values())) != {n_shards - 1}:
        assert time.monotonic() - began < PATIENCE_SECONDS
        time.sleep(0.01)
    other.join(0.3)
    assert other.is_alive(), "it waits"
    stuck.kill()
    assert end(other) == 0
    assert said.get() == tokens
    assert digests_in(tmp_path / "cache") == expected


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(server, tmp_path):
    n_bytes, peak = {}, {}
    for n_texts in (200, 800):
        process, said = start(server, child.collect_much, tmp_path / str(n_texts), n_texts)
        assert end(process) == 0
        n_bytes[n_texts], peak[n_texts] = said.get()
    # Were they all held, the peak would be about a third higher.
    assert n_bytes[800] - n_bytes[200] > 0.25 * peak[200]
    assert peak[800] < 1.1 * peak[200]
