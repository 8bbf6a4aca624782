"""The results database on disks that are full, read-only or locked, and while it is rebuilt."""

import logging
import shutil
import sqlite3
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saexp import files
from saexp.errors import StoreError
from saexp.interventions import results_database
from saexp.interventions.results_cache import ResultCache
from tests.disks import obeying_permissions, read_only
from tests.e2e.faults.injection import small_disk
from tests.e2e.faults.sharing_child import PATIENCE_SECONDS, server

N_ROWS = 300


def results(first: int = 0, last: int = N_ROWS) -> list[tuple[bytes, np.ndarray]]:
    """Keys and values, of 100 numbers each."""
    return [
        (n.to_bytes(32, "little"), np.full(100, n, dtype=np.float64)) for n in range(first, last)
    ]


KEYS = [key for key, _ in results()]


def stored(cache_dir: Path) -> Path:
    cache = ResultCache(cache_dir, {})
    cache.put(results())
    cache.close()
    return cache_dir / "generations.sqlite"


def damage(path: Path) -> None:
    """The first page is lost."""
    content = path.read_bytes()
    path.write_bytes(bytes(4096) + content[4096:])


def test_a_full_disk_is_one_line_that_never_says_to_delete(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 200) as disk:
        cache = ResultCache(disk.path, {})
        first = results(0, 50)
        cache.put(first)
        with pytest.raises(StoreError) as caught:
            cache.put(results(50, 1000))
        line = str(caught.value)
        assert line.startswith(f"disk full: {disk.path / 'generations.sqlite'}, and ")
        assert "what was finished is kept: free some space and run the command again" in line
        assert "delete" not in line
        assert len(cache.get(KEYS)) == 50
        disk.resize(4000)
        cache.put(results())
        assert len(cache.get(KEYS)) == N_ROWS
        cache.close()


def test_a_full_disk_keeps_a_damaged_file_as_it_is(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 500) as disk:
        path = stored(disk.path)
        damage(path)
        content = path.read_bytes()
        with pytest.raises(StoreError, match="disk full: "):
            ResultCache(disk.path, {})
        assert path.read_bytes() == content
        disk.resize(4000)
        cache = ResultCache(disk.path, {})
        assert len(cache.get(KEYS)) == N_ROWS
        cache.close()


@pytest.mark.parametrize("damaged", [False, True])
def test_a_read_only_database_is_read_and_left_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: bool
) -> None:
    path = stored(tmp_path)
    if damaged:
        damage(path)
    content = path.read_bytes()
    with read_only(tmp_path):
        for _ in range(2):
            cache = ResultCache(tmp_path, {})
            assert len(cache.get(KEYS)) == (0 if damaged else N_ROWS)
            cache.put(results(N_ROWS, N_ROWS + 1))
            cache.close()
        assert path.read_bytes() == content
    assert caplog.text.count("is not writable: what this run computes is not stored") == 1


def test_without_a_database_in_a_read_only_folder_nothing_is_stored(tmp_path: Path) -> None:
    with read_only(tmp_path):
        cache = ResultCache(tmp_path, {})
        cache.put(results())
        assert cache.get(KEYS) == {}
        cache.close()
    assert list(tmp_path.iterdir()) == []


def test_in_a_folder_that_may_not_be_entered_nothing_is_stored(tmp_path: Path) -> None:
    folder = stored(tmp_path / "cache").parent
    folder.chmod(0)
    try:
        with obeying_permissions(), closing(ResultCache(folder, {})) as cache:
            cache.put(results())
            assert cache.get(KEYS) == {}
    finally:
        folder.chmod(0o755)


def test_a_disk_that_becomes_read_only_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_reported", set())
    with small_disk(tmp_path / "disk", 4000) as disk:
        cache = ResultCache(disk.path, {})
        cache.put(results())
        cache.close()
        cache = ResultCache(disk.path, {})
        cache.database.close()
        disk.read_only()
        cache.put(results(N_ROWS, N_ROWS + 1))
        assert len(cache.get(KEYS)) == N_ROWS
        cache.put(results(N_ROWS, N_ROWS + 1))
        cache.close()
    assert caplog.text.count("is not writable: what this run computes is not stored") == 1


def test_while_another_process_has_it_locked_results_are_kept_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results_database, "TIMEOUT_SECONDS", 0.1)
    path = stored(tmp_path)
    cache, lasting = ResultCache(tmp_path, {}), ResultCache(tmp_path, {})
    more = results(N_ROWS, N_ROWS + 20)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("begin exclusive")
        cache.put(more[:10])
        cache.put(more[10:])
        lasting.put(more)
        with pytest.raises(StoreError, match="locked by another process .* or end it, or choose"):
            cache.get(KEYS)
        lasting.close()
        other.execute("rollback")
    assert len(cache.get([key for key, _ in more])) == 0
    cache.close()
    assert "20 rows could not be stored" in caplog.text
    cache = ResultCache(tmp_path, {})
    assert len(cache.get([key for key, _ in more])) == 20
    cache.close()


def test_a_file_that_was_deleted_or_replaced_is_opened_again(tmp_path: Path) -> None:
    path = stored(tmp_path)
    cache = ResultCache(tmp_path, {})
    path.unlink()
    assert cache.get(KEYS) == {}
    cache.put(results(0, 3))
    other = stored(tmp_path / "other")
    other.replace(path)
    assert len(cache.get(KEYS)) == N_ROWS
    cache.close()


def read_damaged(cache_dir: Path, go: Any, queue: Any) -> None:
    go.wait()
    cache = ResultCache(cache_dir, {})
    queue.put(len(cache.get(KEYS)))
    cache.close()


def test_processes_that_find_the_same_damage_rebuild_it_once(tmp_path: Path) -> None:
    damage(stored(tmp_path))
    context = server()
    go, queue = context.Event(), context.Queue()
    for _ in range(4):
        context.Process(target=read_damaged, args=(tmp_path, go, queue), daemon=True).start()
    go.set()
    assert [queue.get(timeout=PATIENCE_SECONDS) for _ in range(4)] == [N_ROWS] * 4
    assert len(list(tmp_path.glob("*.damaged-*"))) == 1


@pytest.mark.parametrize("at", ["link", "replace", "unlink"])
def test_rebuilding_that_is_interrupted_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    damage(stored(tmp_path))

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.link" if at == "link" else f"pathlib.Path.{at}", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ResultCache(tmp_path, {})
    cache = ResultCache(tmp_path, {})
    assert len(cache.get(KEYS)) == N_ROWS
    cache.close()


def test_a_damaged_row_is_reported_once_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = stored(tmp_path)
    with closing(sqlite3.connect(path)) as file, file:
        file.execute("update checked_results set value = zeroblob(800) where rowid in (5, 7)")
    with caplog.at_level(logging.WARNING):
        cache = ResultCache(tmp_path, {})
        rows_read = cache.get(KEYS)
        assert len(rows_read) == N_ROWS - 2
        assert len(cache.get(KEYS)) == N_ROWS - 2
        cache.put(results())
        assert {k: v.tolist() for k, v in cache.get(KEYS).items()} == {
            k: v.tolist() for k, v in results()
        }
        cache.close()
    (record,) = caplog.records
    assert "2 of 300 rows damaged (wrong checksum)" in record.getMessage()


@pytest.mark.parametrize("cause", ["read-only", "locked"])
def test_damaged_rows_that_cannot_be_removed_are_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    path = stored(tmp_path)
    keys = [key for key, _ in results()]
    with closing(sqlite3.connect(path)) as file, file:
        file.execute("update checked_results set value = x'00' where key = ?", (keys[0],))
    monkeypatch.setattr(results_database, "TIMEOUT_SECONDS", 0.1)
    with closing(ResultCache(tmp_path, {})) as cache, closing(sqlite3.connect(path)) as other:
        if cause == "locked":
            other.execute("begin immediate")
        else:
            cache.database.writable = False
        assert [len(cache.get(keys)) for _ in range(3)] == [N_ROWS - 1] * 3
    (line,) = [r.getMessage() for r in caplog.records]
    assert line == f"{path} has damaged rows; they are computed again"


def test_rows_that_are_there_are_not_written_again(tmp_path: Path) -> None:
    stored(tmp_path)
    cache = ResultCache(tmp_path, {})

    def n_changes() -> int:
        return cache.database.read(lambda connection: connection.total_changes)

    before = n_changes()
    cache.put(results())
    assert n_changes() == before
    cache.close()


@pytest.mark.parametrize("writable", [True, False])
def test_what_a_process_killed_while_it_wrote_had_stored_is_read(
    tmp_path: Path, writable: bool
) -> None:
    """A journal is left that takes back what was half written."""
    path = stored(tmp_path / "before")
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("pragma cache_size = 5")
        writer.execute("begin")
        writer.execute("update checked_results set value = zeroblob(800)")
        files_of_it = [path, path.with_name(path.name + "-journal")]
        killed = tmp_path / "killed"
        killed.mkdir()
        for file in files_of_it:
            shutil.copy(file, killed)
        writer.execute("rollback")
    assert (killed / path.name).read_bytes() != path.read_bytes()
    with nullcontext() if writable else read_only(killed):
        cache = ResultCache(killed, {})
        rows_read = cache.get(KEYS)
        cache.close()
    assert all(
        rows_read[key].tolist() == values.tolist() for key, values in results() if key in rows_read
    )
    assert len(rows_read) == N_ROWS if writable else 0 < len(rows_read) < N_ROWS
