"""Progress where there is no terminal, and objects that are dropped."""

import gc
import logging
import sys
import time
import weakref

import pytest

from saexp import context
from saexp.saes import ARCHITECTURES
from tests.unit.saes.make import points, sae


def test_off_a_terminal_lines_tell_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    monkeypatch.setattr(context, "_SECONDS_BETWEEN_LINES", 0.05)
    with caplog.at_level(logging.INFO), context.progress(10, "generating", "prompt") as bar:
        bar.update(2)
        assert caplog.messages == []
        time.sleep(0.1)
        bar.update(3)
        bar.update(5)
    (line,) = caplog.messages
    assert line.startswith("generating: 5 of 10, ")
    assert " prompt/s, " in line
    assert line.endswith(" s left")


def test_what_was_done_before_is_not_part_of_the_rate(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    monkeypatch.setattr(context, "_SECONDS_BETWEEN_LINES", 0.05)
    with caplog.at_level(logging.INFO), context.progress(2000, "training", "step", 1000) as bar:
        bar.set_postfix_str("loss 0.5")
        time.sleep(0.1)
        bar.update(1)
    (line,) = caplog.messages
    assert line.startswith("training: 1001 of 2000, ")
    assert line.endswith(" s left, loss 0.5")
    rate, left = float(line.split()[4]), float(line.split()[6])
    assert 0 < rate <= 10
    assert left >= 99


def test_without_a_total_lines_have_the_count_and_the_rate(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    monkeypatch.setattr(context, "_SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level(logging.INFO), context.progress(None, "tokenizing", "document") as bar:
        time.sleep(0.01)
        bar.update(7)
    (line,) = caplog.messages
    assert line.startswith("tokenizing: 7, ")
    assert line.endswith(" document/s")


def test_on_a_terminal_the_bar_begins_at_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with context.progress(20, "training", "step", 10) as bar:
        bar.update(1)
        assert (bar.n, bar.initial, bar.total) == (11, 10, 20)


def test_a_line_comes_while_a_single_unit_takes_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(context, "_SECONDS_BETWEEN_LINES", 0.1)
    monkeypatch.setattr(context, "_LEAST_SECONDS_OF_WAIT", 0.03)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    with caplog.at_level(logging.INFO), context.progress(4, "answering", "prompt") as bar:
        bar.update(2)
        time.sleep(0.35)
    lines = [m for m in caplog.messages if m.startswith("answering: 2 of 4")]
    assert 1 <= len(lines) <= 4
    time.sleep(0.15)
    assert len([m for m in caplog.messages if m.startswith("answering: 2 of 4")]) == len(lines)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_dropped_sae_is_freed_without_garbage_collection(architecture: str) -> None:
    objects = context.ObjectCache()
    weights = []
    gc.disable()
    try:
        for n in range(objects.MAX_LOADED["sae"] + 1):
            loaded = objects.load("sae", str(n), lambda: sae(architecture))
            loaded.encode(points(3, loaded.d_in))
            weights.append(weakref.ref(loaded.W_dec))
            del loaded
    finally:
        gc.enable()
    assert [weight() is None for weight in weights] == [True, *[False] * 4]
