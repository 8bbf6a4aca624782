"""The SQLite file that results of rows are kept in.

It is rebuilt where it is damaged, read where it cannot be written, and opened again where another
process has replaced it.
"""

import errno
import logging
import os
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from saexp.errors import StoreError
from saexp.files import CACHE, cannot_write, free_bytes, is_writable, locked, report_read_only
from saexp.interventions.salvage import PAGE_BYTES, SCHEMA, TABLE, rebuild

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 60.0
"""How long a lock of another process is waited for."""
_LEAST_FREE_BYTES = 65536
"""An I/O error where less is free is one of a full disk."""
_DAMAGED = (
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_FORMAT,
    sqlite3.SQLITE_TOOBIG,
    sqlite3.SQLITE_MISMATCH,
    sqlite3.SQLITE_INTERNAL,
)
_READ_ONLY = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM)
_ATTEMPTS = 3
"""How often the file is rebuilt or opened again for one action."""
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)

T = TypeVar("T")
Connection = sqlite3.Connection
Action = Callable[[Connection], T]
"""Reads or writes; done again where the file was replaced meanwhile."""


class LockedError(StoreError):
    """Another process has held the database locked for TIMEOUT_SECONDS."""


def _code(error: sqlite3.Error) -> int:
    """The primary result code; 0 of errors that the sqlite3 module raises itself."""
    return (getattr(error, "sqlite_errorcode", 0) or 0) & 0xFF


class Database:
    """A connection to the file. Methods raise StoreError, in one line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writable = is_writable(path.parent)
        self._connection: Connection | None = None
        self._identity: tuple[int, int] | None = None
        self.read(lambda _: None)

    def read(self, action: Action[T]) -> T:
        """What `action` returns, of a database that is not damaged."""
        n_opened_again = 0
        while True:
            try:
                return action(self._current())
            except sqlite3.Error as error:
                n_opened_again += 1
                if n_opened_again > _ATTEMPTS:
                    raise self._error(error) from error
                if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_READONLY_DBMOVED:
                    self.close()
                elif self._is_damage(error):
                    self._replace(error)
                elif self.writable and _code(error) in _READ_ONLY:
                    report_read_only(self.path.parent, str(error))
                    self.writable = False
                    self.close()
                else:
                    raise self._error(error) from error
            except OSError as error:
                raise cannot_write(self.path, error) from error

    def write(self, action: Action[T]) -> T | None:
        """As `read`, in a transaction; None, and nothing done, where it cannot be written."""

        def transaction(connection: Connection) -> T | None:
            if not self.writable:
                return None
            connection.execute("begin immediate")
            try:
                result = action(connection)
                connection.execute("commit")
            except BaseException:
                with suppress(sqlite3.Error):
                    connection.rollback()
                raise
            return result

        return self.read(transaction) if self.writable else None

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _current(self) -> Connection:
        """The connection, to the file that now has the path."""
        if self._connection is not None and self.writable and self._identity != self._file_now():
            self.close()
        if self._connection is None:
            # Where it cannot be opened, `_replace` must know which file is damaged.
            self._identity = self._file_now()
            self._connection = self._opened() if self.writable else self._opened_to_read()
            self._identity = self._file_now()
        return self._connection

    def _file_now(self) -> tuple[int, int] | None:
        try:
            about = os.stat(self.path)
        except OSError:
            return None
        return about.st_dev, about.st_ino

    def _opened(self) -> Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=TIMEOUT_SECONDS, isolation_level=None)
        try:
            # Damaged text must not fail to be decoded.
            connection.text_factory = lambda content: content.decode(errors="replace")
            # Full synchronisation takes a tenth of a run with many small batches.
            connection.execute("pragma synchronous=normal")
            connection.execute(f"pragma page_size={PAGE_BYTES}")
            for statement in SCHEMA:
                connection.execute(statement)
            self._check_columns(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _check_columns(self, connection: Connection) -> None:
        """Raises sqlite3.Error where a table has other columns."""
        connection.execute(f"select key, value, checksum from {TABLE} limit 1").fetchall()
        connection.execute("select owner, keys, steps, asks from claims limit 1").fetchall()

    def _opened_to_read(self) -> Connection:
        """Without the locks and journals that a read-only folder may not allow.

        Rows that are changed meanwhile have wrong checksums.
        """
        for options in ("mode=ro", "mode=ro&immutable=1"):
            uri = f"file:{quote(str(self.path.absolute()))}?{options}"
            connection = None
            try:
                connection = sqlite3.connect(
                    uri, uri=True, timeout=TIMEOUT_SECONDS, isolation_level=None
                )
                connection.text_factory = lambda content: content.decode(errors="replace")
                connection.execute(f"select key, value, checksum from {TABLE} limit 1").fetchall()
                return connection
            except sqlite3.Error as error:
                if connection is not None:
                    connection.close()
                reason = error
        # Not the path's own method, which raises in a folder that may not be entered.
        if os.path.exists(self.path):
            log.warning("%s cannot be read, nor rebuilt here: %s", self.path, reason)
        return self._memory()

    def _memory(self) -> Connection:
        connection = sqlite3.connect(":memory:", isolation_level=None)
        for statement in SCHEMA:
            connection.execute(statement)
        return connection

    def _is_damage(self, error: sqlite3.Error) -> bool:
        if _code(error) in _DAMAGED or os.path.isdir(self.path):
            return True
        # While it is opened: tables of other columns.
        return self._connection is None and _code(error) == sqlite3.SQLITE_ERROR

    def _replace(self, error: sqlite3.Error) -> None:
        """Rebuild a damaged file, unless another process has done so."""
        damaged = self._identity
        self.close()
        if self.writable:
            self._rebuild(damaged)
        else:
            log.warning("%s is damaged and cannot be rebuilt here: %s", self.path, error)
            self._connection = self._memory()

    def rebuild(self) -> None:
        """Begin a new file with the rows that can be read."""
        damaged = self._identity
        self.close()
        self._rebuild(damaged)

    def _rebuild(self, damaged: tuple[int, int] | None) -> None:
        with locked(self.path.with_name(f".{self.path.name}.lock")):
            if self._file_now() != damaged:
                return
            try:
                rebuild(self.path)
            except sqlite3.Error as error:
                raise self._error(error) from error
            except OSError as error:
                raise cannot_write(self.path, error) from error

    def wait_less(self) -> None:
        """Wait for locks of other processes for a second only, from now on."""
        if self._connection is not None:
            self._connection.execute("pragma busy_timeout = 1000")

    def _error(self, error: sqlite3.Error) -> StoreError:
        code = _code(error)
        full = code == sqlite3.SQLITE_IOERR and free_bytes(self.path.parent) < _LEAST_FREE_BYTES
        if code == sqlite3.SQLITE_FULL or full:
            return cannot_write(self.path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        if code in _BUSY:
            return LockedError(
                f"{self.path} has been locked by another process for {TIMEOUT_SECONDS:.0f} s: wait "
                f"for that process or end it, or choose another {CACHE}"
            )
        return StoreError(f"cannot use {self.path}: {error}; choose another {CACHE}")
