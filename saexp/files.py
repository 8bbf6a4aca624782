"""Files that appear whole or not at all, and locks between processes."""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError

from saexp.errors import StoreError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CACHE, RUN_FOLDER = "cache_dir=", "hydra.run.dir="
"""Settings that choose the folder of the cache, and of a run."""
_ATTEMPTS = 3
"""How often a lock is tried whose folder another process takes away."""


def show_bytes(n_bytes: int) -> str:
    """A size for reading: 1.2 GB, powers of ten."""
    n = float(n_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def disk_is_full(error: BaseException) -> bool:
    """Whether an error of the operating system, or safetensors' text of one, says so."""
    if isinstance(error, SafetensorError):
        return any(f"os error {number}" in str(error) for number in _FULL)
    return isinstance(error, OSError) and error.errno in _FULL


def cannot_write(
    path: Path, error: Exception, n_bytes: int | None = None, *, option: str = CACHE
) -> StoreError:
    """The one line for a file that could not be written; of a full disk it says what is lacking.

    `option` is the setting that chooses another folder.
    """
    if disk_is_full(error):
        needs = f" needs {show_bytes(n_bytes)}" if n_bytes else ""
        return StoreError(
            f"disk full: {path}{needs}, and {show_bytes(free_bytes(path))} are free; what was "
            f"finished is kept: make room and run the command again, or choose another {option}"
        )
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return StoreError(f"cannot write {path}: {reason}; choose another {option}")


def free_bytes(path: Path) -> int:
    """Bytes free where `path` is, or would be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def put_in_place(temporary: Path, path: Path) -> None:
    """Sync a finished temporary file, rename it, and sync the folder's entry."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.chmod(0o644)
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_atomically(path: Path, write: Callable[[Path], None], *, option: str = CACHE) -> None:
    """Let `write` make a temporary file beside `path`, sync it, and rename it into place.

    Raises StoreError, in one line that names `option`, where the folder cannot be written or the
    disk is full.
    """
    # Its name is known before it is there, so that a signal in between leaves none.
    temporary = path.parent / f".tmp-{uuid.uuid4().hex[:12]}{path.suffix}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        put_in_place(temporary, path)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error, option=option) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, option: str = CACHE) -> None:
    """A text file in UTF-8, whole or not at all; raises as `write_atomically`."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write, option=option)


def write_json(path: Path, content: Any, *, option: str = CACHE) -> None:
    """A JSON file, whole or not at all; what JSON does not know is written by `str`.

    Raises as `write_atomically`, and ValueError for NaN and infinities.
    """
    text = json.dumps(content, indent=1, ensure_ascii=False, default=str, allow_nan=False)
    write_text(path, text + "\n", option=option)


def _lock(path: Path) -> FileLock:
    # Not bound to a thread: a shard's lock is taken where it is computed, freed where it is written
    return FileLock(path, thread_local=False)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes; the operating system frees it when a process dies.

    On file systems without such locks filelock writes a file that names process and host, and
    breaks it when that process is gone.
    """
    lock = try_lock(path, timeout=-1.0)
    assert lock is not None
    try:
        yield
    finally:
        lock.release()


def try_lock(path: Path, timeout: float = 0.0) -> FileLock | None:
    """The lock, held, or None where another holds it for longer than `timeout` (-1: wait)."""
    lock = _lock(path)
    for left in reversed(range(_ATTEMPTS)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=timeout)
        except TimeoutError:
            return None
        except FileNotFoundError as error:
            # The folder was removed in between, by a process that prunes.
            if not left:
                raise cannot_write(path.parent, error) from error
        except OSError as error:
            raise cannot_write(path.parent, error) from error
        else:
            return lock
    return None
