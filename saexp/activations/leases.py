"""Marks of the processes that use a store, so that pruning leaves it alone, or that compute rows.

<store>/.users/<host>-<pid>-<random>.lock: its process holds it locked, so that the operating system
frees it however that process ends. Marks are made and looked at under the store's `.create.lock`.
"""

import logging
import os
import re
import secrets
import socket
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from saexp.errors import StoreError
from saexp.files import locked, try_lock

log = logging.getLogger(__name__)

USED = ".used"
"""Empty file whose time of last change says when a run last used the store."""
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


class Marked:
    """A store's folder that is marked from its first use until `close`, or until it is let go."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lease: Lease | None = None

    def _mark(self) -> None:
        """Leave a mark of this process; `.create.lock` is held."""
        self._lease = Lease.take(self.path)
        if self._lease is not None:
            weakref.finalize(self, self._lease.release)

    def _use(self) -> None:
        """Mark the store as used. Raises StoreError where it was pruned meanwhile."""
        if self._lease is not None or not os.access(self.path, os.W_OK):
            return
        with locked(self.path / ".create.lock"):
            if not (self.path / "manifest.json").is_file():
                raise StoreError(f"{self.path} was pruned meanwhile; run the command again")
            (self.path / USED).touch()
            self._mark()

    def close(self) -> None:
        """Take this object's mark away: the store may be pruned from now on."""
        if self._lease is not None:
            self._lease.release()
            self._lease = None


def users(store: Path) -> list[str]:
    """`pid 4711 on host` of each process that uses the store; marks of dead ones are removed."""
    found = []
    for path in sorted((store / FOLDER).glob("*.lock")):
        if is_alive(path):
            found.append(process_of(path))
            continue
        with suppress(OSError):
            path.unlink(missing_ok=True)
    return found


def process_of(mark: Path) -> str:
    """`pid 4711 on host`: the process that left a mark."""
    host, pid, _ = mark.stem.rsplit("-", 2)
    return f"pid {pid} on {host}"


def is_alive(mark: Path) -> bool:
    """Whether the process that left a mark may still be running."""
    if not mark.exists():
        return False
    return _is_held(mark) or (mark.stem.rsplit("-", 2)[0] != _host() and _is_young(mark))


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
