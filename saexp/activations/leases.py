"""Marks of the processes that use a store, so that pruning leaves it alone.

<store>/.users/<host>-<pid>-<random>.lock: its process holds it locked, so that the operating system
frees it however that process ends. Marks are made and looked at under the store's `.create.lock`.
"""

import logging
import os
import re
import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from saexp.activations.files import try_lock
from saexp.errors import StoreError

log = logging.getLogger(__name__)

FOLDER = ".users"
TRUST_SECONDS = 86400
"""A mark of another host that is not locked counts for so long: its locks may not reach here."""


def _host() -> str:
    return re.sub(r"[^\w.]+", "_", socket.gethostname()) or "host"


class Lease:
    """This process' mark in a store, from `take` to `release`; lost on fork."""

    def __init__(self, path: Path, lock: Any) -> None:
        self.path, self._lock, self._pid = path, lock, os.getpid()

    @classmethod
    def take(cls, store: Path) -> "Lease | None":
        """A mark; None, and a line in the log, where none can be written."""
        path = store / FOLDER / f"{_host()}-{os.getpid()}-{secrets.token_hex(4)}.lock"
        try:
            lock = try_lock(path)
        except StoreError as error:
            log.info("%s is used without a mark: %s", store, error)
            return None
        return None if lock is None else cls(path, lock)

    def release(self) -> None:
        """Take the mark away; may be called again."""
        if self._lock is None or self._pid != os.getpid():
            return
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
        self._lock.release()
        self._lock = None


def users(store: Path) -> list[str]:
    """`pid 4711 on host` of each process that uses the store; marks of dead ones are removed."""
    found = []
    for path in sorted((store / FOLDER).glob("*.lock")):
        host, pid, _ = path.stem.rsplit("-", 2)
        if _is_held(path) or (host != _host() and _is_young(path)):
            found.append(f"pid {pid} on {host}")
            continue
        with suppress(OSError):
            path.unlink(missing_ok=True)
    return found


def _is_held(path: Path) -> bool:
    try:
        lock = try_lock(path)
    except StoreError:
        # Of another account, which cannot be tried.
        return True
    if lock is not None:
        lock.release()
    return lock is None


def _is_young(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime < TRUST_SECONDS
    except OSError:
        return False
