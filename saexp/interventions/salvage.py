"""Sound rows of a damaged results database, found in its bytes."""

import hashlib
import logging
import mmap
import os
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from saexp.wording import counted

log = logging.getLogger(__name__)


TABLE = "checked_results"
SCHEMA = (
    f"create table if not exists {TABLE} (key blob primary key, value blob, checksum blob)",
    "create table if not exists claims"
    " (owner text primary key, keys blob, steps integer, asks text)",
)
"""`claims` is described in `sharing.py`."""
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
    """Of a row: a value under another key is damaged, too."""
    return hashlib.blake2b(key + value, digest_size=_CHECKSUM_BYTES).digest()


def is_sound(key: Any, value: Any, stored_checksum: Any) -> bool:
    """Whether a row's columns are what was written: float64 values with the right checksum."""
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
    """A record with its header; what a page has no room for is in a chain of overflow pages."""
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
    """Set a damaged database aside, and begin a new one with the rows that can be read.

    The caller holds the lock of rebuilding. Raises OSError and sqlite3.Error; nothing is set aside
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
        # With two names there is always a database at `path`, should this process be killed.
        os.link(path, aside)
    except OSError:
        path.rename(aside)
    new.replace(path)
    return aside
