"""The log file of a run, which a full disk interrupts and does not break."""

import logging
import sys


class LogFile(logging.FileHandler):
    """Python's own handler, but a line that cannot be written is no traceback on stderr.

    The first such line is reported; those after it are written if there is room again.
    """

    def __init__(self, filename: str, mode: str = "a", encoding: str | None = "utf-8") -> None:
        super().__init__(filename, mode, encoding, delay=True)
        self._has_reported = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        try:
            super().emit(record)
        except OSError as error:
            self._report(error)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Called where the stream raises."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self._report(error)
        else:
            super().handleError(record)

    def _report(self, error: OSError) -> None:
        if not self._has_reported:
            self._has_reported = True
            sys.stderr.write(f"{self.baseFilename} lacks lines: {error.strerror}\n")
