"""Progress where there is no terminal."""

import logging
import sys
import time

import pytest

from saexp import context


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
