"""Rows computed in processes of their own that share a results database.

The functions are run in forks of a server that has this module imported already.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saexp.interventions import results_cache
from saexp.interventions.results_cache import ResultCache, shared

PATIENCE_SECONDS = 120
BATCH = 5


class Work(NamedTuple):
    """What a process computes: rows `first` to `last` - 1, in batches of BATCH."""

    first: int
    last: int
    seconds: float
    """Of a batch."""
    stop_at: int = -1
    """Batch before which it sends `signal` to itself, having written the file `stopped`."""
    signal: int = signal.SIGKILL
    stalled_seconds: float = 600.0


def server() -> Any:
    """What starts processes in milliseconds; each is a fork of one that imported this module."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "tests.e2e.faults.sharing_child"])
    return context


def expected(number: int) -> list[float]:
    return [float(number)] * (number % 4)


def work(cache_dir: Path, about: Work, queue: Any) -> None:
    """Says its process id, how many rows it computed, and whether all results are right."""
    results_cache.STALLED_SECONDS = about.stalled_seconds
    n_batches = 0

    def compute(numbers: list[int]) -> Generator[list[tuple[int, np.ndarray]], None, None]:
        nonlocal n_batches
        for start in range(0, len(numbers), BATCH):
            if n_batches == about.stop_at:
                (cache_dir / "stopped").touch()
                os.kill(os.getpid(), about.signal)
            n_batches += 1
            time.sleep(about.seconds)
            yield [(n, np.asarray(expected(n))) for n in numbers[start : start + BATCH]]

    cache = ResultCache(cache_dir, {})
    items = {cache.key("row", (n,)): n for n in range(about.first, about.last)}
    results = cache.get(items)
    n_computed = 0
    missing = {key: n for key, n in items.items() if key not in results}
    with closing(shared(cache, missing, compute)) as batches:
        for batch in batches:
            assert not results.keys() & dict(batch.results).keys(), "a row is returned twice"
            results.update(batch.results)
            n_computed += len(batch.results) if batch.computed_here else 0
    cache.close()
    right = all(results[key].tolist() == expected(n) for key, n in items.items())
    queue.put((os.getpid(), n_computed, right and len(results) == len(items)))
