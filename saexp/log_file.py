"""The log file of a run, which a full disk interrupts and does not break."""

import logging
import sys


def report_once(logger: logging.Logger | None = None) -> None:
    """For lines that the log files of a logger (the root) cannot take, have one line on stderr.

    Python prints a traceback for each. Lines after them are written if there is room again.
    """
    for handler in (logger or logging.getLogger()).handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handleError = _OneReport(handler)  # pyright: ignore[reportAttributeAccessIssue]


class _OneReport:
    """Stands in for a handler's `handleError`, which is called while the error is handled."""

    def __init__(self, handler: logging.FileHandler) -> None:
        self._handler, self._has_reported = handler, False

    def __call__(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            logging.FileHandler.handleError(self._handler, record)
        elif not self._has_reported:
            self._has_reported = True
            sys.stderr.write(f"{self._handler.baseFilename} lacks lines: {error.strerror}\n")
