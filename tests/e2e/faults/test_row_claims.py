"""Processes that need the same rows compute each of them once, however one of them ends."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from saexp.files import FOLDER
from saexp.interventions.results_cache import ResultCache
from tests.e2e.faults.sharing_child import BATCH, PATIENCE_SECONDS, Work, server, work

N_ROWS = 400


WHOLE = Work(0, N_ROWS, 0.03)
"""About 2.4 s for one process."""


class Processes:
    """Several at once."""

    def __init__(self, cache_dir: Path, *works: Work) -> None:
        context = server()
        self.queue = context.Queue()
        self.all = [
            context.Process(target=work, args=(cache_dir, about, self.queue), daemon=True)
            for about in works
        ]
        for process in self.all:
            process.start()

    def reports(self, n: int) -> dict[int, int]:
        """Rows computed by process id, of the first n that end; all have the right results."""
        reports = [self.queue.get(timeout=PATIENCE_SECONDS) for _ in range(n)]
        assert all(right for _, _, right in reports)
        return {pid: n_computed for pid, n_computed, _ in reports}


def claims(cache_dir: Path) -> list[tuple[Any, ...]]:
    cache = ResultCache(cache_dir, {})
    rows = cache.database.read(lambda c: c.execute("select * from claims").fetchall())
    cache.close()
    return rows


@pytest.mark.parametrize("n", [2, 3])
def test_equal_runs_at_once_compute_each_row_once(tmp_path: Path, n: int) -> None:
    computed = Processes(tmp_path, *[WHOLE] * n).reports(n)
    assert sum(computed.values()) == N_ROWS
    assert min(computed.values()) > 0, "one has computed all of them"
    assert claims(tmp_path) == []
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_runs_that_have_some_rows_in_common_compute_those_once(tmp_path: Path) -> None:
    computed = Processes(tmp_path, Work(0, 200, 0.03), Work(100, 300, 0.03)).reports(2)
    assert sum(computed.values()) == 300


def test_a_killed_process_is_not_waited_for(tmp_path: Path) -> None:
    dying = Processes(tmp_path, WHOLE._replace(stop_at=10))
    dying.all[0].join(PATIENCE_SECONDS)
    assert dying.all[0].exitcode == -signal.SIGKILL
    assert len(claims(tmp_path)) == 1
    computed = Processes(tmp_path, *[WHOLE] * 2).reports(2)
    assert sum(computed.values()) == N_ROWS - 10 * BATCH
    assert claims(tmp_path) == []
    assert list((tmp_path / FOLDER).iterdir()) == [], "the killed process' mark is left"


def test_rows_of_a_process_that_is_killed_meanwhile_are_computed_by_others(tmp_path: Path) -> None:
    processes = Processes(tmp_path, WHOLE, WHOLE._replace(stop_at=10), WHOLE)
    computed = processes.reports(2)
    processes.all[1].join(PATIENCE_SECONDS)
    assert processes.all[1].exitcode == -signal.SIGKILL
    assert sum(computed.values()) == N_ROWS - 10 * BATCH


def test_a_stopped_process_is_waited_for_only_so_long(tmp_path: Path) -> None:
    stopped = Processes(tmp_path, WHOLE._replace(stop_at=4, signal=signal.SIGSTOP))
    pid = stopped.all[0].pid
    assert pid is not None
    try:
        began = time.monotonic()
        while not (tmp_path / "stopped").exists():
            assert time.monotonic() - began < PATIENCE_SECONDS
            time.sleep(0.01)
        other = Processes(tmp_path, WHOLE._replace(stalled_seconds=2.0))
        (computed,) = other.reports(1).values()
        assert computed == N_ROWS - 4 * BATCH
    finally:
        os.kill(pid, signal.SIGCONT)
    # Its claim is gone, and so are the rows that are left to compute.
    (computed,) = stopped.reports(1).values()
    assert computed == 5 * BATCH
