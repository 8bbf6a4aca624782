"""Signals that end a process raise in its main thread, once, and whatever handled them stays."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

import pytest

from saexp.config import TrackerConfig
from saexp.context import RunContext, Stopped, exit_code, message, raise_if_stopped, stoppable
from saexp.tracking import NullTracker

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    """The handlers of a process that a terminal started."""
    before = {number: signal.getsignal(number) for number in HANDLED}
    for number in HANDLED:
        ctrl_c = number == signal.SIGINT
        signal.signal(number, signal.default_int_handler if ctrl_c else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def wait() -> None:
    time.sleep(60)
    raise AssertionError("no signal arrived")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_raises_and_gives_its_exit_code(number: signal.Signals, code: int) -> None:
    with stoppable(), pytest.raises(Stopped, match=number.name) as raised:
        os.kill(os.getpid(), number)
        wait()
    assert not isinstance(raised.value, Exception)
    assert exit_code(raised.value) == code
    assert message(raised.value).startswith(f"stopped by {number.name}; what was collected is kept")


def test_ctrl_c_is_a_keyboard_interrupt() -> None:
    with stoppable(), pytest.raises(KeyboardInterrupt) as raised:
        os.kill(os.getpid(), signal.SIGINT)
        wait()
    assert type(raised.value) is KeyboardInterrupt
    assert exit_code(raised.value) == 1
    assert message(raised.value).startswith("stopped; what was collected is kept")


def test_handlers_are_restored_and_those_of_others_are_left_alone() -> None:
    def requeue(_number: int, _frame: FrameType | None) -> None: ...

    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, requeue)
    before = {number: signal.getsignal(number) for number in HANDLED}
    with stoppable() as stopping:
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is requeue
        assert signal.getsignal(signal.SIGINT) is stopping
    assert {number: signal.getsignal(number) for number in HANDLED} == before


def test_in_another_thread_nothing_is_handled() -> None:
    seen = []

    def look() -> None:
        with stoppable():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


def test_a_signal_that_is_sent_twice_at_once_counts_once() -> None:
    with stoppable(), pytest.raises(Stopped):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            wait()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)


def test_an_exception_that_other_code_caught_is_raised_later() -> None:
    with stoppable():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            wait()
        except KeyboardInterrupt:
            pass
        with pytest.raises(Stopped):
            raise_if_stopped()


class _Slow:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        wait()


def test_no_stage_begins_after_a_signal_whose_exception_was_dropped(tmp_path: Path) -> None:
    context = RunContext(tmp_path, NullTracker(TrackerConfig(kind="none")))
    with stoppable():
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped), context.stage("collect"):
            pytest.fail("the stage began")
    assert context.seconds == {}


def test_a_signal_inside_a_destructor_is_not_lost() -> None:
    with stoppable(), pytest.raises(Stopped):
        _Slow()
        gc.collect()
        wait()


CLEANING = """
import time
from saexp.context import stoppable
with stoppable():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleaning", flush=True)
        time.sleep(600)
"""


def test_a_second_signal_ends_the_cleanup_at_once() -> None:
    words = [sys.executable, "-c", CLEANING]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.stdout.readline() == "cleaning\n"
        # Until it does not count as the same signal.
        time.sleep(1.2)
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert err.splitlines() == [
        "saexp: stopped by SIGTERM; what was collected is kept, and the same command continues "
        "from there"
    ]
