"""Services of a run: its folder, seconds per stage, notes, progress bars. Never a model or data."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from saexp.stopping import raise_if_stopped
from saexp.tracking import Recorder

log = logging.getLogger(__name__)


_SECONDS_BETWEEN_LINES = 20.0


class _Lines:
    """Progress where no bar can be drawn: a log line now and then, none for what is soon done."""

    def __init__(self, total: int, what: str, unit: str) -> None:
        self.total, self.what, self.unit, self.done = total, what, unit, 0
        self.began = self.told = time.monotonic()

    def update(self, n: int = 1) -> None:
        """Count n more."""
        self.done += n
        now = time.monotonic()
        if now - self.told < _SECONDS_BETWEEN_LINES:
            return
        self.told = now
        rate = self.done / (now - self.began)
        left = (self.total - self.done) / rate if rate else 0.0
        log.info(
            "%s: %d of %d, %.1f %s/s, %.0f s left",
            *(self.what, self.done, self.total, rate, self.unit, left),
        )

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def progress(total: int, what: str, unit: str) -> Any:
    """A bar on a terminal, a log line every 20 s elsewhere; `.update(n)`, in a `with`."""
    if not sys.stderr.isatty():
        return _Lines(total, what, unit)
    return tqdm(total=total, desc=what, unit=unit, leave=False, dynamic_ncols=True)


@dataclass
class RunContext:
    """What a task needs beside its config."""

    folder: Path
    """Where the run's files go."""
    tracker: Recorder
    command: str = "python"
    """How the run was started, for provenance."""
    started: str = ""
    """ISO time at which the run began."""
    ahead: list[tuple[int, str | None]] = field(default_factory=list)
    """(layer, stream) that other cells of the sweep need from the same texts; a stream of None is
    that of the run's own SAE."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock seconds per stage."""
    inputs: frozenset[Path] = frozenset()
    """Files and folders that the config names, which are not the run's to remove."""
    began_writing: bool = False
    """Whether the folder holds this run's files, and no earlier run's any more."""
    results: set[str] = field(default_factory=set)
    """Paths below the folder of the files that the run leaves; their checksums are recorded."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage and log a line when it is done.

        None begins after a signal to stop, whatever became of the exception that the signal raised.
        """
        raise_if_stopped()
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
        log.info("%s: %.1f s", name, self.seconds[name])
