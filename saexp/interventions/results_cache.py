"""Results of rows on disk, each under what determines it."""

import errno
import hashlib
import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np

from saexp.errors import StoreError
from saexp.files import CACHE, cannot_write, free_bytes, is_writable, locked, report_read_only
from saexp.interventions.salvage import PAGE_BYTES, SCHEMA, TABLE, checksum, is_sound, rebuild
from saexp.models.loading import LanguageModel
from saexp.wording import counted

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


VERSION = 4
"""Of what is stored; entries of other versions are not read. In 2, generated texts of short prompts
could be wrong, in 3 those with edits of generated tokens alone."""
_LOOK_UP = 500
"""Keys per query, under SQLite's limit."""
_INSERT = f"""
insert into {TABLE} values (?, ?, ?)
on conflict (key) do update set value = excluded.value, checksum = excluded.checksum
where value is not excluded.value or checksum is not excluded.checksum
"""
"""Rows that are there already are not written again."""

Version = tuple[int, int]


def model_ingredients(model: LanguageModel) -> dict[str, Any]:
    """What of a model fixes the results of a row of token ids.

    The module path of its blocks is one: it says which streams are changed.
    """
    return {
        "model": model.fingerprint,
        "blocks": model.cfg.blocks,
        "dtype": str(model.dtype),
        "device": model.device.type,
        "eos": model.eos_ids,
    }


class ResultCache:
    """Numbers by key; `determined_by` is everything beside the row that fixes a result.

    A row whose checksum is not that of its key and value counts as absent.
    """

    def __init__(self, cache_dir: str | Path, determined_by: Mapping[str, Any]) -> None:
        self.path = Path(cache_dir) / "generations.sqlite"
        self.prefix = (VERSION, sorted(determined_by.items()))
        self.database = Database(self.path)
        self.read_version: Version | None = None
        """That of the database when `get` last read it."""
        self._unwritten: list[tuple[bytes, bytes, bytes]] = []
        """Rows that could not be written because the file was locked."""
        self._damage_reported = False
        """Whether damaged rows that cannot be removed were reported."""

    @cached_property
    def _start(self) -> Any:
        """The digest's state after what all rows have in common."""
        return hashlib.sha256(f"({self.prefix!r}, ".encode())

    def key(self, kind: str, row_key: tuple[Any, ...]) -> bytes:
        """Digest of the row, of what is computed of it, and of everything else that fixes that.

        That of `repr((prefix, kind, row_key))`.
        """
        digest = self._start.copy()
        digest.update(f"{kind!r}, {row_key!r})".encode())
        return digest.digest()

    def version(self, connection: Connection) -> Version:
        """Differs where another connection has written, or the file is another one."""
        (number,) = connection.execute("pragma data_version").fetchone()
        return id(connection), number

    def get(self, keys: Iterable[bytes]) -> dict[bytes, np.ndarray]:
        """Those of the results that are there."""
        wanted = list(keys)

        def look_up(connection: Connection) -> tuple[dict[bytes, np.ndarray], int]:
            self.read_version = self.version(connection)
            results, n_damaged = {}, 0
            for start in range(0, len(wanted), _LOOK_UP):
                part = wanted[start : start + _LOOK_UP]
                query = f"select * from {TABLE} where key in ({','.join('?' * len(part))})"
                for row in connection.execute(query, part).fetchall():
                    if is_sound(*row):
                        results[row[0]] = np.frombuffer(row[1], dtype="<f8")
                    else:
                        n_damaged += 1
            return results, n_damaged

        results, n_damaged = self.database.read(look_up)
        if n_damaged:
            self._remove_damaged()
        return results

    def _remove_damaged(self) -> None:
        """Remove all rows with wrong checksums, so that they are reported once."""

        def remove(connection: Connection) -> tuple[int, int]:
            rows = connection.execute(f"select rowid, * from {TABLE}")
            sound = {rowid: is_sound(*row) for rowid, *row in rows}
            damaged = [(rowid,) for rowid, is_right in sound.items() if not is_right]
            connection.executemany(f"delete from {TABLE} where rowid = ?", damaged)
            return len(damaged), len(sound)

        n_damaged = n_rows = 0
        with suppress(LockedError):
            n_damaged, n_rows = self.database.write(remove) or (0, 0)
        if not n_rows:
            if not self._damage_reported:
                log.warning("%s has damaged rows; they are computed again", self.path)
            self._damage_reported = True
        elif n_damaged:
            log.warning(
                "%s: %d of %s damaged (wrong checksum); what this run needs of them is computed "
                "again",
                *(self.path, n_damaged, counted(n_rows, "row")),
            )
        else:
            # The index leads to other rows than those of its keys.
            self.database.rebuild()

    def put(
        self,
        results: Sequence[tuple[bytes, np.ndarray]],
        also: Callable[[Connection], None] | None = None,
    ) -> None:
        """Keep a batch, whole or not at all; `also` writes in the same transaction.

        While another process has the file locked for long, batches are kept in memory.
        """
        rows = list(self._unwritten)
        for key, values in results:
            content = np.asarray(values, dtype="<f8").tobytes()
            rows.append((key, content, checksum(key, content)))

        def insert(connection: Connection) -> None:
            connection.executemany(_INSERT, rows)
            if also is not None:
                also(connection)

        try:
            self.database.write(insert)
        except LockedError as error:
            if not self._unwritten:
                log.warning("%s; until then results are kept in memory", error)
            self._unwritten = rows
            self.database.wait_less()
        else:
            self._unwritten = []

    def close(self) -> None:
        """Close the file."""
        if self._unwritten:
            self.put([])
        if self._unwritten:
            n_rows = counted(len(self._unwritten), "row")
            log.warning("%s: %s not kept, the file is locked", self.path, n_rows)
        self.database.close()
