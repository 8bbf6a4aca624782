"""The SQLite database of results, which is rebuilt from its readable rows when it is damaged."""

import errno
import hashlib
import logging
import mmap
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from saexp.errors import StoreError, counted
from saexp.files import CACHE, cannot_write, free_bytes, is_writable, locked, report_read_only

log = logging.getLogger(__name__)
TABLE = "checked_results"
SCHEMA = (
    f"create table if not exists {TABLE} (key blob primary key, value blob, checksum blob)",
    "create table if not exists claims"
    " (owner text primary key, keys blob, steps integer, asks text)",
)
"""`claims` is described in `results_cache.py`."""
PAGE_BYTES = 4096
_COMPANIONS = ("-journal", "-wal", "-shm")
_KEY_BYTES, _CHECKSUM_BYTES = 32, 8
# The header of a record (sqlite.org/fileformat2.html): its size, and a type for each column. A blob
# of n bytes has type 12 + 2n, so 76 is a key, 28 a checksum, and between them is that of a value.
_HEADER = re.compile(
    rb"\x04\x4c[\x00-\x7f]\x1c|\x05\x4c[\x80-\xff][\x00-\x7f]\x1c"
    rb"|\x06\x4c[\x80-\xff]{2}[\x00-\x7f]\x1c|\x07\x4c[\x80-\xff]{3}[\x00-\x7f]\x1c"
)


def checksum(key: bytes, value: bytes) -> bytes:
    """Checksum of a row with its key: a value under a wrong key counts as damaged."""
    return hashlib.blake2b(key + value, digest_size=_CHECKSUM_BYTES).digest()


def is_sound(key: Any, value: Any, stored_checksum: Any) -> bool:
    """Whether a row is as it was written: float64 values with the right checksum."""
    if not (isinstance(key, bytes) and isinstance(value, bytes)) or len(value) % 8:
        return False
    return checksum(key, value) == stored_checksum


def readable_rows(path: Path) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Key, value and checksum of each sound row in the bytes of a file."""
    if not path.is_file() or not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for match in _HEADER.finditer(content):
            header = match[0]
            value_type = 0
            for byte in header[2:-1]:
                value_type = value_type << 7 | byte & 0x7F
            n_value, remainder = divmod(value_type - 12, 2)
            if n_value < 0 or remainder:
                continue
            n_bytes = len(header) + _KEY_BYTES + n_value + _CHECKSUM_BYTES
            record = _record(content, match.start(), n_bytes)[len(header) :]
            row = record[:_KEY_BYTES], record[_KEY_BYTES:-_CHECKSUM_BYTES], record[-8:]
            if len(record) == n_bytes - len(header) and is_sound(*row):
                yield row


def _record(content: mmap.mmap, start: int, n_bytes: int) -> bytes:
    """A record with its header; what does not fit on a page is in a chain of overflow pages."""
    most, least = PAGE_BYTES - 35, (PAGE_BYTES - 12) * 32 // 255 - 23
    if n_bytes <= most:
        return content[start : start + n_bytes]
    n_local = least + (n_bytes - least) % (PAGE_BYTES - 4)
    end = start + (n_local if n_local <= most else least)
    parts, n_left = [content[start:end]], n_bytes - (end - start)
    number = int.from_bytes(content[end : end + 4], "big")
    while n_left > 0 and 0 < number <= len(content) // PAGE_BYTES:
        page = content[(number - 1) * PAGE_BYTES : number * PAGE_BYTES]
        part = page[4 : 4 + n_left]
        parts.append(part)
        n_left -= len(part)
        number = int.from_bytes(page[:4], "big")
    return b"".join(parts)


def rebuild(path: Path) -> None:
    """Rename a damaged database, and create a new one with its readable rows.

    The caller holds the lock for rebuilding. Raises OSError and sqlite3.Error; nothing is renamed
    then.
    """
    new = path.with_name(f".tmp-{path.name}")
    _remove(new)
    try:
        with closing(sqlite3.connect(new)) as file:
            file.execute(f"pragma page_size={PAGE_BYTES}")
            with file:
                for statement in SCHEMA:
                    file.execute(statement)
                file.executemany(
                    f"insert or ignore into {TABLE} values (?, ?, ?)", readable_rows(path)
                )
            (n_rows,) = file.execute(f"select count(*) from {TABLE}").fetchone()
        aside = _set_aside(path, new)
    finally:
        _remove(new)
    log.warning(
        "%s was damaged: %s could be read and %s kept; the rest is computed again, and the "
        "damaged file is now %s",
        *(path, counted(n_rows, "row"), "is" if n_rows == 1 else "are", aside.name),
    )


def _remove(path: Path) -> None:
    for suffix in ("", *_COMPANIONS):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _set_aside(path: Path, new: Path) -> Path:
    """Rename the damaged file and its journals, and put `new` in its place."""
    stem = f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}"
    aside, n = path.with_name(stem), 1
    while aside.exists():
        aside, n = path.with_name(f"{stem}-{n}"), n + 1
    # A journal of the old file would be applied to the new one.
    for suffix in _COMPANIONS:
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    try:
        # With two names there is a database at `path` even if this process is killed.
        os.link(path, aside)
    except OSError:
        path.rename(aside)
    new.replace(path)
    return aside


TIMEOUT_SECONDS = 60.0
"""How long to wait for a lock of another process."""
_LEAST_FREE_BYTES = 65536
"""With less free space, an I/O error counts as a full disk."""
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
"""How often the file is rebuilt or reopened for one action."""
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
T = TypeVar("T")
Connection = sqlite3.Connection
Action = Callable[[Connection], T]
"""Reads or writes; repeated if the file was replaced meanwhile."""


class LockedError(StoreError):
    """Another process has held the database locked for TIMEOUT_SECONDS."""


def _code(error: sqlite3.Error) -> int:
    """The primary result code; 0 of errors that the sqlite3 module raises itself."""
    return (getattr(error, "sqlite_errorcode", 0) or 0) & 0xFF


class Database:
    """A connection to the file. Methods raise StoreError with a one-line message."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writable = is_writable(path.parent)
        self._connection: Connection | None = None
        self._identity: tuple[int, int] | None = None
        self.read(lambda _: None)

    def read(self, action: Action[T]) -> T:
        """The result of `action`, after a rebuild if the database is damaged."""
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
        """As `read`, in a transaction; returns None without effect where the file is read-only."""

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
        """The connection, to the file that is at the path now."""
        if self._connection is not None and self.writable and self._identity != self._file_now():
            self.close()
        if self._connection is None:
            # If it cannot be opened, `_replace` needs the identity of the damaged file.
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
        """A read-only connection, without locks and journals that a read-only folder may not allow.

        Rows that change while they are read have wrong checksums.
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
        # Path.exists raises for a folder without permission.
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
        # While opening: the tables have other columns.
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
        """Replace the file by a new one with its readable rows."""
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
        """From now on, wait for locks of other processes for one second only."""
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
