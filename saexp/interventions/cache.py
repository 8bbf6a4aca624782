"""Results of rows on disk, each under what determines it, so that no run computes one twice.

<cache_dir>/generations.sqlite: what a killed run had made is there when it is started again.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from saexp.interventions.database import Connection, Database, LockedError
from saexp.interventions.salvage import TABLE, checksum, is_sound
from saexp.models.loading import LanguageModel
from saexp.wording import counted

log = logging.getLogger(__name__)

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
