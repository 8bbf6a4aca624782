"""Calls of W&B that a server that hangs would block, its own process, and the end of this one."""

import atexit
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

GRACE_SECONDS = 1.0
"""How much longer W&B's service process may take, and how long it may take to end."""
_EXIT_SECONDS = 5.0
"""How much longer the end of this process may take after an outage."""


@dataclass
class Process:
    """What the runs of one process have in common."""

    unreachable: set[str] = field(default_factory=set)
    """Servers (base URLs) that did not answer; later runs do not wait for them again."""
    exit_codes: list[int] = field(default_factory=list)
    """How the runs ended."""
    limits_exit: bool = False
    """Whether `limit_exit` was called."""


PROCESS = Process()
"""One per process, because W&B has one service per process, which can delay the process's exit."""


class Call:
    """A call in a separate thread, which can be abandoned if it takes too long."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._errors: list[Exception] = []
        self._began = time.monotonic()

        def attempt() -> None:
            try:
                call()
            except Exception as error:
                self._errors.append(error)

        self._thread = threading.Thread(target=attempt, daemon=True)
        self._thread.start()

    def join(self, seconds: float | None) -> bool:
        """Wait up to so many seconds; returns whether the call has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> tuple[Exception | None, bool]:
        """The call's error (TimeoutError if it is still running), and whether it has ended."""
        if self._thread.is_alive():
            seconds = time.monotonic() - self._began
            return TimeoutError(f"no answer within {seconds:.0f} s"), False
        return (self._errors[0] if self._errors else None), True


def within(seconds: float, call: Callable[[], Any]) -> None:
    """Call a function, and return after at most so many seconds."""
    Call(call).join(seconds)


def service() -> Any:
    """The service process that W&B started, as a Popen object; None if there is none. W&B has no
    public way to get it."""
    from wandb.sdk import wandb_setup

    attribute: Any = wandb_setup
    for name in ("_singleton", "_connection", "_proc", "_process"):
        attribute = getattr(attribute, name, None)
    return attribute


def service_ended() -> bool:
    """Whether W&B's process is gone: unexpected answers of a server can end it."""
    process = service()
    try:
        return process is not None and process.wait(GRACE_SECONDS) is not None
    except subprocess.TimeoutExpired:
        return False


def limit_exit() -> None:
    """Make this process end soon after its work, whatever W&B still waits for."""
    if PROCESS.limits_exit:
        return
    PROCESS.limits_exit = True
    import wandb

    def watch() -> None:
        threading.main_thread().join()
        process, others = service(), _threads_outside_wandb()
        for thread in others:
            thread.join()
        if process is not None:
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        # An abandoned call can still wait for the answer of a process that is gone.
        time.sleep(_EXIT_SECONDS)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(_status())

    # Started now, because no thread can be started once Python is exiting.
    threading.Thread(target=watch, daemon=True).start()

    @atexit.register
    def end() -> None:
        wandb.termsetup(wandb.Settings(silent=True), None)
        with suppress(BaseException):
            wandb.teardown()


def _threads_outside_wandb() -> list[threading.Thread]:
    """Threads, other than those of W&B, that Python waits for before it exits."""
    frames = sys._current_frames()

    def in_wandb(thread: threading.Thread) -> bool:
        frame = frames.get(thread.ident or 0)
        while frame is not None:
            if frame.f_globals.get("__name__", "").startswith("wandb."):
                return True
            frame = frame.f_back
        return False

    waited_for = [
        t for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()
    ]
    return [thread for thread in waited_for if not in_wandb(thread)]


def _status() -> int:
    """The exit status of this process: that of its runs, or 1 after an uncaught error."""
    return 1 if hasattr(sys, "last_value") else max(PROCESS.exit_codes, default=0)
