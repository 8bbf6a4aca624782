"""Services of a run: its folder, seconds per stage, notes, progress bars. Never a model or data."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from saexp.tracking import Tracker

log = logging.getLogger(__name__)


def progress(total: int, what: str, unit: str) -> Any:
    """A bar with rate and ETA on a terminal, nothing elsewhere; `.update(n)`, usable in `with`."""
    return tqdm(total=total, desc=what, unit=unit, disable=None, leave=False, dynamic_ncols=True)


@dataclass
class RunContext:
    """What a task needs beside its config."""

    folder: Path
    """Where the run's files go."""
    tracker: Tracker
    command: str = "python"
    """How the run was started, for provenance."""
    started: str = ""
    """ISO time at which the run began."""
    ahead: list[tuple[int, str | None]] = field(default_factory=list)
    """(layer, stream) that other cells of the sweep need from the same texts; a stream of None is
    that of the run's own SAE."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock seconds per stage."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage and log a line when it is done."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
        log.info("%s: %.1f s", name, self.seconds[name])
