"""pytest catches the records of loggers that propagate, for which it need not look at all loggers.

Six times a test, pytest 9.2 adds its handlers to each logger that does not propagate and removes
them: to some sixty of torch's hundreds. That takes half a millisecond, more than most unit tests.
"""

import logging
from typing import Any

from _pytest.logging import catching_logs


def _enter_at_root(self: catching_logs[Any]) -> Any:
    root = logging.getLogger()
    root.addHandler(self.handler)
    self.attached_loggers.append(root)
    if self.level is not None:
        self.handler.setLevel(self.level)
        self.orig_level = root.level
        root.setLevel(min(root.level, self.level))
    return self.handler


def install() -> None:
    """Change pytest in this process, if it is a version that looks at all loggers."""
    if "attached_loggers" in getattr(catching_logs, "__slots__", ()):
        catching_logs.__enter__ = _enter_at_root
