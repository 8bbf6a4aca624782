"""What a run works with: its folder, timed stages, progress bars, objects shared between runs, the
memory of its process, and signals that end it.

SIGTERM (SLURM, `docker stop`), SIGHUP (closed terminal) and Ctrl-C raise an exception in the main
thread, so that a job cleans up as after an error. Existing handlers stay in place: `nohup` ignores
SIGHUP, and submitit requeues a job on SIGUSR1 or SIGUSR2.
"""

import contextlib
import ctypes
import functools
import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from tqdm import tqdm

from saexp.tracking import Recorder

log = logging.getLogger(__name__)


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)
_STOP_CELL = signal.SIGURG
"""Sent by the command to its workers. A worker without a cell ignores it, as processes do by
default: if a worker ended, joblib would conclude that it crashed, and kill the others."""
_TWICE_SECONDS = 1.0
"""A signal within this time after the first one is not counted as a second: `timeout` and some
launchers send theirs to the process and to its group."""
_WORKER_SECONDS = 6.0
"""How long workers have to clean up; SLURM kills after 30 s, docker after 10 s."""
_POLL_SECONDS = 0.05


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end; like Ctrl-C not an `Exception`, so nothing catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return signal.Signals(self.number).name


STOPS = (KeyboardInterrupt.__name__, Stopped.__name__, SystemExit.__name__)
"""Names of the exceptions of a run that was stopped rather than failed; submitit ends a job that
it requeues with SystemExit."""


def message(error: KeyboardInterrupt) -> str:
    """What stopped the command, and how to continue."""
    by = f" by {error}" if isinstance(error, Stopped) else ""
    return f"stopped{by}; what was collected is kept, and the same command continues from there"


def exit_code(error: KeyboardInterrupt) -> int:
    """128 plus the signal's number, as in shells; 1 after Ctrl-C."""
    return 128 + error.number if isinstance(error, Stopped) else 1


def _error(number: int) -> KeyboardInterrupt:
    return KeyboardInterrupt() if number == signal.SIGINT else Stopped(number)


class Stopping:
    """Handles the signals that end this process."""

    def __init__(self, workers_busy: Callable[[], bool] | None = None) -> None:
        self.workers_busy = workers_busy
        """Whether worker processes of this process have something to clean up."""
        self.error: KeyboardInterrupt | None = None
        """The exception of the first signal; None before it."""
        self.cleaning = False
        """Whether the exception has reached the top level."""
        self._number = 0
        self._at = 0.0
        self._lost = False
        self._hook = sys.unraisablehook

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        """Raise the signal's exception; at a second signal end immediately."""
        if self.error is None:
            self._at, self._number, self.error = time.monotonic(), number, _error(number)
            self._stop_workers()
        elif self._lost:
            self._lost = False
        elif time.monotonic() - self._at < _TWICE_SECONDS:
            return
        else:
            self._end_at_once(self.error)
        raise self.error

    def _end_at_once(self, error: KeyboardInterrupt) -> NoReturn:
        for worker in multiprocessing.active_children():
            _send(worker.pid, signal.SIGKILL)
        # The interrupted code may hold the lock of sys.stderr's buffer.
        os.write(2, f"saexp: {message(error)}\n".encode())
        os._exit(exit_code(error))

    def not_raised(self, about: Any) -> None:
        """`sys.unraisablehook`: sends the signal again if it came in a destructor or a callback,
        where Python drops exceptions."""
        if self.error is None or about.exc_value is not self.error:
            self._hook(about)
        elif not self.cleaning:
            main = threading.main_thread().ident
            assert main is not None
            self._lost = True
            again = threading.Timer(_POLL_SECONDS, signal.pthread_kill, (main, self._number))
            again.daemon = True
            again.start()

    def _stop_workers(self) -> None:
        """Make the workers of this process stop their cells; their launcher then kills them."""
        workers = multiprocessing.active_children()
        if not workers or self.workers_busy is None:
            return
        for worker in workers:
            _send(worker.pid, _STOP_CELL)
        end = time.monotonic() + _WORKER_SECONDS
        while self.workers_busy() and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)


def _send(process: int | None, number: int) -> None:
    if process is not None:
        # The process may have ended.
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


_current: Stopping | None = None
"""The handler of this process inside `stoppable`. Signal handlers are a state of the process, and
code far from the command line must learn that one was called (`raise_if_stopped`)."""


@contextlib.contextmanager
def stoppable(
    workers_busy: Callable[[], bool] | None = None, signals: Sequence[int] = _SIGNALS
) -> Iterator[Stopping]:
    """Handle the signals inside the context; the former handlers are restored afterwards."""
    global _current
    stopping = Stopping(workers_busy)
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = {number: signal.getsignal(number) for number in signals}
    outer, hook = _current, sys.unraisablehook
    try:
        _current, sys.unraisablehook = stopping, stopping.not_raised
        for number, handler in before.items():
            if handler in _DEFAULTS:
                signal.signal(number, stopping)
        yield stopping
    finally:
        for number, handler in before.items():
            if handler in _DEFAULTS:
                signal.signal(number, handler)
        _current, sys.unraisablehook = outer, hook


def raise_if_stopped() -> None:
    """Raise the signal's exception if other code caught or replaced it."""
    if _current is not None and _current.error is not None and not _current.cleaning:
        raise _current.error


@contextlib.contextmanager
def stoppable_cell() -> Iterator[None]:
    """Handle the signals in a worker process of a launcher that does not handle SIGTERM (joblib).

    A worker whose cell was stopped starts no other cell: it waits to be killed by the command, then
    ends. Does nothing in the command's own process, nor under submitit and Ray, which handle
    signals themselves.
    """
    if _current is not None or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    with stoppable(signals=(*_SIGNALS, _STOP_CELL)) as stopping:
        try:
            yield
        except KeyboardInterrupt as error:
            if error is not stopping.error:
                raise
            sys.stdout.flush()
            sys.stderr.flush()
            time.sleep(_WORKER_SECONDS)
            os._exit(exit_code(error))


_SECONDS_BETWEEN_LINES = 10.0
_LEAST_SECONDS_OF_WAIT = 1.0


class _LoggedProgress:
    """Progress as log lines, for output that is not a terminal. Short loops log nothing.

    A line also comes while a single unit, such as a batch of generations, takes longer.
    """

    def __init__(self, total: int | None, what: str, unit: str, initial: int) -> None:
        self.total, self.what, self.unit = total, what, unit
        self.initial = self.done = initial
        self.postfix = ""
        self.began = self.last_line = time.monotonic()
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:  # noqa: ARG002, FBT001, FBT002
        """What follows in the next lines, as tqdm's method of this name."""
        self.postfix = text

    def update(self, n: int = 1) -> None:
        """Count n more units as done."""
        self.done += n
        self._log_if_due()

    def _log_if_due(self) -> None:
        now = time.monotonic()
        with self._lock:
            if now - self.last_line < _SECONDS_BETWEEN_LINES:
                return
            self.last_line = now
        rate = (self.done - self.initial) / (now - self.began)
        words = [f"{self.done}", f"{rate:.1f} {self.unit}/s"]
        if self.total is not None:
            words[0] += f" of {self.total}"
            words += [f"{max(self.total - self.done, 0) / rate:.0f} s left"] if rate else []
        log.info("%s: %s", self.what, ", ".join([*words, *filter(None, [self.postfix])]))

    def _log_until_closed(self) -> None:
        """Log lines in another thread when they are due, until the context is left."""
        left = _SECONDS_BETWEEN_LINES
        while not self._closed.wait(max(left, _LEAST_SECONDS_OF_WAIT)):
            self._log_if_due()
            left = self.last_line + _SECONDS_BETWEEN_LINES - time.monotonic()

    def __enter__(self) -> "_LoggedProgress":
        # A daemon, as it must not keep a process that ends from ending.
        threading.Thread(target=self._log_until_closed, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()


def progress(total: int | None, what: str, unit: str, initial: int = 0) -> Any:
    """A progress bar on a terminal, a log line every 10 s elsewhere.

    Use it as a context manager, call `.update(n)`, and `.set_postfix_str(text)` for what follows
    the rate. `initial` units were done before, by a run that is continued: they are not part of the
    rate. A `total` of None is not known.
    """
    if not sys.stderr.isatty():
        return _LoggedProgress(total, what, unit, initial)
    return tqdm(total=total, desc=what, unit=unit, initial=initial, leave=False, dynamic_ncols=True)


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
            if kind == "model":
                # Its modules refer to each other: only garbage collection frees their memory. SAEs
                # are freed at once, and a collection takes longer than loading a small one.
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


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt`."""


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep up to 256 MB that a step has freed, for the next step.

    By default it returns tensors of a few MB to the system, whose pages are then filled with zeros
    again: a fifth of the time of a step of a small SAE. Does nothing without glibc.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_TRIM_THRESHOLD, 2**28)
        # Its largest value.
        libc.mallopt(_MMAP_THRESHOLD, 2**25)


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
    trainings: list[dict[str, Any]] = field(default_factory=list)
    """layer, width, streams and sae_trainer of later cells of the sweep that train on the corpus of
    this run, and are trained in the same pass."""
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
