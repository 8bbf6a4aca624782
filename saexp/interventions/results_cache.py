"""Results of rows on disk, each under what determines it, and the sharing of rows by processes.

Rows that several processes need are computed by one of them. Table `claims` of the database has one
row per process that computes or waits: its owner, named like the lock file that the process holds
while it lives (`saexp.files`); the first 8 bytes of the key of every row that it computes, none
while it waits; a number that grows with every batch; and the process that it asks for a part of
its rows. A process claims all rows that no other process has claimed, so a single process works as
if there were no claims, and it gives a part of the remaining rows to processes that ask. A process
that waits holds no claim, so no two processes wait for each other.
"""

import hashlib
import logging
import math
import re
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import UInt64

from saexp.errors import StoreError, counted
from saexp.files import FOLDER, Lease, is_alive, process_of
from saexp.interventions.results_database import (
    TABLE,
    Connection,
    Database,
    LockedError,
    checksum,
    is_sound,
)
from saexp.models.loading import LanguageModel

log = logging.getLogger(__name__)

T = TypeVar("T")
VERSION = 4
"""Version of the stored results; others are not read. In version 2 texts of short prompts could be
wrong, in version 3 texts with edits of generated tokens only."""
_LOOK_UP = 500
"""Keys per query, under SQLite's limit."""
_INSERT = f"""
insert into {TABLE} values (?, ?, ?)
on conflict (key) do update set value = excluded.value, checksum = excluded.checksum
where value is not excluded.value or checksum is not excluded.checksum
"""
"""Rows that are already stored are not written again."""
Version = tuple[int, int]


def model_ingredients(model: LanguageModel) -> dict[str, Any]:
    """What, of a model, determines the results of a row of token ids.

    The module path of the blocks is included, as it determines which streams are changed.
    """
    return {
        "model": model.fingerprint,
        "blocks": model.cfg.blocks,
        "dtype": str(model.dtype),
        "device": model.device.type,
        "eos": model.eos_ids,
    }


class ResultCache:
    """Numbers by key; `determined_by` is everything but the row that determines a result.

    A row whose checksum does not match its key and value counts as missing.
    """

    def __init__(self, cache_dir: str | Path, determined_by: Mapping[str, Any]) -> None:
        self.path = Path(cache_dir) / "generations.sqlite"
        self.prefix = (VERSION, sorted(determined_by.items()))
        self.database = Database(self.path)
        self.read_version: Version | None = None
        """Version of the database when `get` last read it."""
        self._unwritten: list[tuple[bytes, bytes, bytes]] = []
        """Rows that could not be written because the file was locked."""
        self.n_rows = self.n_computed = 0
        """Distinct rows requested through this object, and those computed by this process."""
        self.stores = True
        """Whether results that are computed are stored; if not, they are only read."""
        self._damage_reported = False
        """Whether damaged rows that cannot be removed were already reported."""

    @cached_property
    def _start(self) -> Any:
        """State of the digest after the part that all rows have in common."""
        return hashlib.sha256(f"({self.prefix!r}, ".encode())

    def key(self, kind: str, row_key: tuple[Any, ...]) -> bytes:
        """Digest of `repr((prefix, kind, row_key))`: everything that determines a result."""
        digest = self._start.copy()
        digest.update(f"{kind!r}, {row_key!r})".encode())
        return digest.digest()

    def version(self, connection: Connection) -> Version:
        """Changes when another connection writes, or when the file is replaced."""
        (number,) = connection.execute("pragma data_version").fetchone()
        return id(connection), number

    def get(self, keys: Iterable[bytes]) -> dict[bytes, np.ndarray]:
        """The stored results among these keys."""
        all_keys = list(keys)

        def look_up(connection: Connection) -> tuple[dict[bytes, np.ndarray], int]:
            self.read_version = self.version(connection)
            results, n_damaged = {}, 0
            for start in range(0, len(all_keys), _LOOK_UP):
                some_keys = all_keys[start : start + _LOOK_UP]
                query = f"select * from {TABLE} where key in ({','.join('?' * len(some_keys))})"
                for row in connection.execute(query, some_keys).fetchall():
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
        """Remove all rows with wrong checksums, so that they are reported only once."""

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
            # The index points to rows of other keys.
            self.database.rebuild()

    def put(
        self,
        results: Sequence[tuple[bytes, np.ndarray]],
        also: Callable[[Connection], None] | None = None,
    ) -> None:
        """Store a batch, whole or not at all; `also` writes in the same transaction.

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
            log.warning("%s: %s could not be stored, because the file is locked", self.path, n_rows)
        self.database.close()


STALLED_SECONDS = 600.0
"""Rows of a running process that has finished none for this long count as unclaimed."""
SILENT_SECONDS = 30.0
"""A waiting process that has not written for this long gets no rows."""
_SIGN_SECONDS = 5.0
"""How often a waiting process writes, since lock files of other hosts may not show that it runs."""
_POLL_SECONDS = 0.1
_CHECK_SECONDS = 1.0
"""How often the lock file of a process is checked."""
_READ_SECONDS = 2.0
"""How often a waiting process reads results that others have stored."""
_REPORT_SECONDS = 5.0
_LEAST_SECONDS = 1.0
"""Rows that take less time than this are not divided."""
_MARK = re.compile(r"[\w.]+-\d+-[0-9a-f]+\.lock")
Numbers = UInt64[np.ndarray, " n"]
Compute = Callable[[list[T]], Generator[list[tuple[T, np.ndarray]], None, None]]
"""Computes results of items, batch by batch in any order."""


class Batch(NamedTuple):
    """Results by key."""

    results: list[tuple[bytes, np.ndarray]]
    computed_here: bool


def shared(
    cache: ResultCache, items: Mapping[bytes, T], compute: Compute[T]
) -> Generator[Batch, None, None]:
    """Results of all items by key: computed here, or read when another process has computed them.

    The items were not stored when `cache.get` was last called. Items that are best computed
    together, such as rows of one prompt, are next to each other.
    """
    left = dict(items)
    claims = _Claims(cache)
    try:
        while left:
            claims.take(list(left))
            stored = cache.get(left) if claims.others_wrote else {}
            for key in stored:
                del left[key]
            if stored:
                yield Batch(list(stored.items()), computed_here=False)
            if not claims.keys and left:
                time.sleep(_POLL_SECONDS)
            while todo := {key: left[key] for key in claims.keys if key in left}:
                with closing(_batches(claims, todo, compute)) as batches:
                    for results in batches:
                        for key, _ in results:
                            del left[key]
                        yield Batch(results, computed_here=True)
    finally:
        claims.close()


def _batches(
    claims: "_Claims", todo: Mapping[bytes, T], compute: Compute[T]
) -> Generator[list[tuple[bytes, np.ndarray]], None, None]:
    """Compute and store batches until all are done, or until other processes get a part of them."""
    key_of = {id(item): key for key, item in todo.items()}
    remaining = dict.fromkeys(todo)
    began = time.monotonic()
    with closing(compute(list(todo.values()))) as batches:
        for batch in batches:
            results = [(key_of[id(item)], values) for item, values in batch]
            for key, _ in results:
                del remaining[key]
            claims.store(results, any_left=bool(remaining))
            yield results
            if claims.lost:
                return
            seconds_each = (time.monotonic() - began) / max(len(todo) - len(remaining), 1)
            if claims.n_asking and len(remaining) * seconds_each >= _LEAST_SECONDS:
                claims.divide(list(remaining))
                if len(claims.keys) < len(remaining):
                    return


class _Other(NamedTuple):
    """A process in the table of claims."""

    owner: str
    numbers: Numbers
    asks: str


class _Claims:
    """This process' row in the table of claims, from the first `take` to `close`."""

    def __init__(self, cache: ResultCache) -> None:
        self.cache, self.folder = cache, cache.path.parent / FOLDER
        self.keys: list[bytes] = []
        """Keys of the rows to compute here."""
        self.n_asking = 0
        """Number of processes that ask for a part of them."""
        self.lost = False
        """Whether other processes have taken them, because this process seemed to be stalled."""
        self.others_wrote = False
        """Whether, at the last `take`, others had written since results were last read."""
        self._lease = Lease.take(cache.path.parent) if cache.database.writable else None
        self._owner = self._lease.path.name if self._lease else ""
        self._steps = 0
        self._read_at = self._listed_at = -math.inf
        self._seen: dict[str, tuple[int, float]] = {}
        """Of other processes: number of steps, and when that was first seen."""
        self._looked_at: dict[str, float] = {}
        """When the lock file of another process was last found to be held."""
        self._waits_since: float | None = None
        self._waiting_reported = False

    def take(self, keys: Sequence[bytes]) -> None:
        """Claim the `keys` that no running process has claimed; if there are none, ask for some."""
        self.lost, self.n_asking, self.keys = False, 0, list(keys)
        self.others_wrote = False
        if not self._owner:
            return
        with suppress(LockedError):
            self.cache.database.write(lambda connection: self._take(connection, keys))

    def _take(self, connection: Connection, keys: Sequence[bytes]) -> None:
        others = self._living(connection)
        numbers = _numbers(keys)
        claimed = [np.isin(numbers, other.numbers) for other in others]
        free = ~np.any(claimed, axis=0) if claimed else np.ones(len(keys), dtype=bool)
        changed = self.cache.version(connection) != self.cache.read_version
        if free.any():
            owners = [other.owner for other in others]
            # Processes that wait, also for a process that has ended, get a part of these rows.
            n_waiting = sum(not len(o.numbers) and o.asks not in owners for o in others)
            self.keys = [key for key, is_free in zip(keys, free, strict=True) if is_free]
            self.keys = self.keys[: math.ceil(len(self.keys) / (1 + n_waiting))]
            self._list(connection, self.keys, "")
            self._waits_since, self.others_wrote = None, changed
            return
        self.keys = []
        # A process that was claimant and has given none of these rows is claimant again.
        claimant = others[int(np.argmax([is_claimed.sum() for is_claimed in claimed]))]
        self._list(connection, [], claimant.owner)
        self._report_waiting(claimant.owner)
        now = time.monotonic()
        if changed and now - self._read_at > _READ_SECONDS:
            self._read_at, self.others_wrote = now, True

    def _report_waiting(self, owner: str) -> None:
        """Log once that this process waits, if that takes long."""
        now = time.monotonic()
        self._waits_since = self._waits_since or now
        if not self._waiting_reported and now - self._waits_since > _REPORT_SECONDS:
            log.info("waiting for %s, which computes rows of this run", process_of(Path(owner)))
            self._waiting_reported = True

    def _list(self, connection: Connection, keys: Sequence[bytes], asks: str) -> None:
        """Write this process's row, unless it is stored and recent."""
        row = (self._owner, _numbers(keys).tobytes(), asks)
        same = "select 1 from claims where owner = ? and keys = ? and asks = ?"
        is_new = time.monotonic() - self._listed_at < _SIGN_SECONDS
        if is_new and connection.execute(same, row).fetchall():
            return
        self._listed_at = time.monotonic()
        self._steps += 1
        connection.execute(
            "insert or replace into claims (owner, keys, asks, steps) values (?, ?, ?, ?)",
            (*row, self._steps),
        )

    def store(self, results: Sequence[tuple[bytes, np.ndarray]], *, any_left: bool) -> None:
        """Store a batch; the claim ends with the last one."""
        if not self._owner:
            self.cache.put(results)
            return
        self._steps += 1

        def step(connection: Connection) -> None:
            if not any_left:
                connection.execute("delete from claims where owner = ?", (self._owner,))
                return
            update = "update claims set steps = ? where owner = ? and length(keys) > 0"
            self.lost = not connection.execute(update, (self._steps, self._owner)).rowcount
            asking = "select count(*) from claims where asks = ?"
            (self.n_asking,) = connection.execute(asking, (self._owner,)).fetchone()

        self.cache.put(results, step)
        if self.lost:
            self.keys = []

    def divide(self, remaining: Sequence[bytes]) -> None:
        """Keep a part of the remaining rows and release an equal part per process that asks."""

        def step(connection: Connection) -> None:
            asking = [o for o in self._living(connection) if o.asks == self._owner]
            if asking:
                self.keys = list(remaining[: math.ceil(len(remaining) / (1 + len(asking)))])
                self._list(connection, self.keys, "")
                update = "update claims set asks = '' where asks = ?"
                connection.execute(update, (self._owner,))

        self.keys = list(remaining)
        with suppress(LockedError):
            self.cache.database.write(step)

    def close(self) -> None:
        """Release all claims and remove the lock file."""
        if self._lease is None:
            return
        remove = "delete from claims where owner = ?"
        with suppress(StoreError):
            self.cache.database.write(lambda c: c.execute(remove, (self._owner,)).rowcount)
        self._lease.release()

    def _living(self, connection: Connection) -> list[_Other]:
        """Other running processes; the claims of ended or stalled ones are removed."""
        query = "select owner, keys, steps, asks from claims where owner != ?"
        others = []
        for owner, keys, steps, asks in connection.execute(query, (self._owner,)).fetchall():
            is_row = isinstance(keys, bytes) and _MARK.fullmatch(str(owner)) is not None
            computes = bool(keys)
            if is_row and self._lives(owner) and not self._stands_still(owner, steps, computes):
                numbers = np.frombuffer(keys[: len(keys) // 8 * 8], dtype=np.uint64)
                others.append(_Other(owner, numbers, asks))
                continue
            connection.execute("delete from claims where owner = ?", (owner,))
        return others

    def _lives(self, owner: str) -> bool:
        now = time.monotonic()
        if now - self._looked_at.get(owner, -math.inf) > _CHECK_SECONDS:
            if not is_alive(self.folder / owner):
                with suppress(OSError):
                    (self.folder / owner).unlink(missing_ok=True)
                return False
            self._looked_at[owner] = now
        return True

    def _stands_still(self, owner: str, steps: int, computes: bool) -> bool:
        limit = STALLED_SECONDS if computes else SILENT_SECONDS
        now = time.monotonic()
        seen, since = self._seen.get(owner, (None, now))
        if seen != steps:
            self._seen[owner] = steps, now
            return False
        if now - since <= limit:
            return False
        if computes:
            log.warning(
                "%s has finished no row for %.0f s; its rows are computed here",
                *(process_of(Path(owner)), limit),
            )
        return True


def _numbers(keys: Sequence[bytes]) -> Numbers:
    """The first 8 bytes of each key."""
    return np.frombuffer(b"".join(key[:8] for key in keys), dtype=np.uint64)
