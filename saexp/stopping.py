"""Signals that end a job raise an exception in its main thread, so that it cleans up as after an
error: SIGTERM (SLURM, `docker stop`), SIGHUP (closed terminal), and Ctrl-C.

Existing handlers stay in place: `nohup` ignores SIGHUP, and submitit requeues a job on SIGUSR1 or
SIGUSR2.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

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
