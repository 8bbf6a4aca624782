"""Services of a run: its folder, seconds per stage, progress bars, objects shared between runs."""

import gc
import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from saexp.stopping import raise_if_stopped
from saexp.tracking import Recorder

log = logging.getLogger(__name__)


_SECONDS_BETWEEN_LINES = 20.0


class _LoggedProgress:
    """Progress as log lines, for output that is not a terminal. Short loops log nothing."""

    def __init__(self, total: int, what: str, unit: str) -> None:
        self.total, self.what, self.unit, self.done = total, what, unit, 0
        self.began = self.last_line = time.monotonic()

    def update(self, n: int = 1) -> None:
        """Count n more units as done."""
        self.done += n
        now = time.monotonic()
        if now - self.last_line < _SECONDS_BETWEEN_LINES:
            return
        self.last_line = now
        rate = self.done / (now - self.began)
        left = (self.total - self.done) / rate if rate else 0.0
        log.info(
            "%s: %d of %d, %.1f %s/s, %.0f s left",
            *(self.what, self.done, self.total, rate, self.unit, left),
        )

    def __enter__(self) -> "_LoggedProgress":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def progress(total: int, what: str, unit: str) -> Any:
    """A progress bar on a terminal, a log line every 20 s elsewhere.

    Use it as a context manager and call `.update(n)`.
    """
    if not sys.stderr.isatty():
        return _LoggedProgress(total, what, unit)
    return tqdm(total=total, desc=what, unit=unit, leave=False, dynamic_ncols=True)


class ObjectCache:
    """Models, SAEs and results of pure functions, shared by the runs that are given this object.

    The least recently used entries are dropped first. Models and SAEs are limited in number,
    results in bytes. Whoever starts several runs (a sweep's process, a notebook) holds one and
    passes it to each: `saexp.run(cfg, objects=cache)`.
    """

    MAX_LOADED = {"model": 1, "sae": 4}
    """Kind -> number of loaded objects."""

    def __init__(self, max_bytes: int = 2**30) -> None:
        self.max_bytes = max_bytes
        self._loaded: dict[str, OrderedDict[str, Any]] = {}
        self._results: OrderedDict[str, tuple[Any, int]] = OrderedDict()

    def load(self, kind: str, key: str, build: Callable[[], Any]) -> Any:
        """The object of this kind and key, built where it is not in the cache."""
        loaded = self._loaded.setdefault(kind, OrderedDict())
        if key in loaded:
            loaded.move_to_end(key)
            return loaded[key]
        while len(loaded) >= self.MAX_LOADED[kind]:
            loaded.popitem(last=False)
            # A model's modules refer to each other, so only garbage collection frees their memory.
            gc.collect()
        loaded[key] = build()
        return loaded[key]

    def get(self, key: str | None) -> Any:
        """The result stored under the key, or None."""
        if key is None or key not in self._results:
            return None
        self._results.move_to_end(key)
        return self._results[key][0]

    def put(self, key: str | None, value: Any, n_bytes: int) -> None:
        """Store a result, unless it has no key or exceeds the limit by itself."""
        if key is None or n_bytes > self.max_bytes:
            return
        self._results[key] = (value, n_bytes)
        while self.n_bytes > self.max_bytes:
            self._results.popitem(last=False)

    @property
    def n_bytes(self) -> int:
        """Size of all results together."""
        return sum(n for _, n in self._results.values())

    def clear(self) -> None:
        """Drop everything."""
        self._loaded.clear()
        self._results.clear()


@dataclass
class RunContext:
    """What a task needs besides its config."""

    folder: Path
    """The run's folder, for all files that it writes."""
    tracker: Recorder
    command: str = "python"
    """How the run was started, for provenance."""
    started: str = ""
    """ISO time at which the run began."""
    prefetch: list[tuple[int, str | None]] = field(default_factory=list)
    """(layer, stream) that other cells of the sweep need from the same texts; a stream of None is
    the stream of the run's own SAE."""
    objects: ObjectCache = field(default_factory=ObjectCache)
    """Models, SAEs and results shared with other runs."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock seconds per stage."""
    inputs: frozenset[Path] = frozenset()
    """Files and folders that the config names; the run must not remove them."""
    began_writing: bool = False
    """Whether the run has written its first file, and so removed the files of an earlier run."""
    results: set[str] = field(default_factory=set)
    """Result files of the run, relative to its folder; their checksums are recorded."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage and log a line when it ends.

        No stage begins after a signal to stop, even if a library swallowed the signal's exception.
        """
        raise_if_stopped()
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
        log.info("%s: %.1f s", name, self.seconds[name])
