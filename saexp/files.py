"""Atomic writes, locks between processes, and marks of the processes that use a folder."""

import errno
import json
import logging
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError

from saexp.errors import StoreError

log = logging.getLogger(__name__)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CACHE, SWEEP_FOLDER = "cache_dir=", "hydra.sweep.dir="
RUN_FOLDER = "hydra.run.dir= (hydra.sweep.dir= of a sweep)"
"""Settings that choose the folder of the cache, of a sweep, and of a run or a sweep's cell."""
_LIMITS = (errno.EDQUOT, errno.EFBIG)
"""Errors that a limit of the user causes, not the disk."""
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_reported: set[Path] = set()
"""Cache directories that `report_read_only` warned about, once per process as log lines are."""
_ATTEMPTS = 3
"""Attempts to take a lock whose folder another process removes."""


def show_bytes(n_bytes: int) -> str:
    """A readable size such as 1.2 GB, in powers of ten."""
    n = float(n_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def disk_is_full(error: BaseException) -> bool:
    """Whether an error, also as a library reports it, means that the disk is full."""
    if isinstance(error, RuntimeError):
        # torch.save reports no error number; other faults show when the file is opened.
        return "PytorchStreamWriter" in str(error) or "inline_container" in str(error)
    return _number(error) in _FULL


def _number(error: BaseException) -> int | None:
    """The operating system's number of an error, also if a library has put it into a text."""
    patterns = {SafetensorError: r"os error (\d+)", shutil.Error: r"\[Errno (\d+)\]"}
    for kind, pattern in patterns.items():
        if isinstance(error, kind):
            match = re.search(pattern, str(error))
            return int(match[1]) if match else None
    return error.errno if isinstance(error, OSError) else None


def cannot_write(
    path: Path, error: Exception, n_bytes: int | None = None, *, option: str = CACHE
) -> StoreError:
    """The error for a file that could not be written; for a full disk with the bytes needed.

    `option` is the setting that selects another folder.
    """
    number = _number(error)
    reason = os.strerror(number) if number is not None else " ".join(str(error).split())
    if number in _LIMITS:
        return StoreError(
            f"cannot write {path}: {reason}; what was finished is kept: raise that limit and run "
            f"the command again, or choose another {option}"
        )
    if disk_is_full(error):
        needs = f" needs {show_bytes(n_bytes)}" if n_bytes else ""
        return StoreError(
            f"disk full: {path}{needs}, and {show_bytes(free_bytes(path))} are free; what was "
            f"finished is kept: free some space and run the command again, or choose another "
            f"{option}"
        )
    if option in (RUN_FOLDER, SWEEP_FOLDER) and not path.parent.is_dir():
        return _removed(path.parent)
    return StoreError(f"cannot write {path}: {reason}; choose another {option}")


def _removed(folder: Path) -> StoreError:
    return StoreError(f"{folder} was removed while the run wrote to it; run the command again")


def cannot_write_run(
    error: BaseException, folder: Path, *, option: str = RUN_FOLDER
) -> StoreError | None:
    """The same for an error that was raised without a path, or by a library, while a run wrote to
    its folder; None for other errors."""
    if not isinstance(error, OSError):
        return None
    path = Path(error.filename) if isinstance(error.filename, str) else None
    if not folder.is_dir():
        return _removed(folder)
    if disk_is_full(error):
        return cannot_write(path or folder, error, option=option)
    if path is None or folder.absolute() not in path.absolute().parents:
        return None
    if error.errno not in (*_READ_ONLY, errno.ENOTDIR, errno.EEXIST):
        return None
    return cannot_write(path, error, option=option)


def write_error(folder: Path, text: str) -> None:
    """Write error.txt of a failed run. If that fails too, the user still sees the run's error."""
    with suppress(StoreError):
        write_text(folder / "error.txt", text, option=RUN_FOLDER)


def free_bytes(path: Path) -> int:
    """Free bytes on the file system of a path, which need not exist."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def is_writable(cache_dir: str | Path) -> bool:
    """Whether the cache directory is writable; False, with one warning per process, if it is on a
    read-only file system or access is denied.

    The test writes a file, because root passes `os.access`. Other problems (a full disk, a file
    instead of a folder) are reported by the next write.
    """
    folder = Path(cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(prefix=".tmp-", dir=folder):
            return True
    except OSError as error:
        if error.errno not in _READ_ONLY:
            return True
        report_read_only(cache_dir, error.strerror or str(error))
    return False


def report_read_only(cache_dir: str | Path, reason: str) -> None:
    """Warn, once per process, that nothing can be stored in the cache directory."""
    folder = Path(cache_dir).absolute()
    if folder not in _reported:
        _reported.add(folder)
        log.warning(
            "cache_dir=%s is not writable: what this run computes is not stored (%s)",
            *(cache_dir, reason),
        )


def put_in_place(temporary: Path, path: Path) -> None:
    """Sync a finished temporary file, rename it, and sync the folder's entry."""
    sync(temporary)
    temporary.chmod(0o644)
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of entries, is on disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def remove_temporary(folder: Path) -> None:
    """Remove temporary files of killed processes from a folder that no other process writes to."""
    for left in folder.glob(".tmp-*"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            with suppress(OSError):
                left.unlink(missing_ok=True)


def _make_parent(path: Path, option: str) -> None:
    # A run's folder is created before the run; if it is missing now, the user removed it.
    if option not in (RUN_FOLDER, SWEEP_FOLDER):
        path.parent.mkdir(parents=True, exist_ok=True)


def write_folder(path: Path, write: Callable[[Path], None], *, option: str = CACHE) -> None:
    """Let `write` fill a temporary folder beside `path`, sync it, and rename it to `path`.

    An existing folder is replaced. Raises as `write_atomically`.
    """
    temporary: Path | None = None
    try:
        _make_parent(path, option)
        temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=path.parent))
        write(temporary)
        for file in [*sorted(temporary.rglob("*")), temporary]:
            sync(file)
        temporary.chmod(0o755)
        if path.is_dir() and not path.is_symlink():
            # A folder cannot replace another one; moving the old one away is atomic.
            earlier = Path(tempfile.mkdtemp(prefix=".tmp-", dir=path.parent))
            path.replace(earlier)
            temporary.replace(path)
            shutil.rmtree(earlier, ignore_errors=True)
        else:
            temporary.replace(path)
        sync(path.parent)
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not disk_is_full(error):
            raise
        raise cannot_write(path, error, option=option) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_atomically(path: Path, write: Callable[[Path], None], *, option: str = CACHE) -> None:
    """Let `write` make a temporary file beside `path`, sync it, and rename it to `path`.

    Raises StoreError, with `option` in its message, if the folder cannot be written or the disk is
    full.
    """
    # The name is known before the file exists, so that it is removed if a signal comes in between.
    temporary = path.parent / f".tmp-{uuid.uuid4().hex[:12]}{path.suffix}"
    try:
        _make_parent(path, option)
        write(temporary)
        put_in_place(temporary, path)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error, option=option) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, option: str = CACHE) -> None:
    """Write a text file in UTF-8 atomically; raises as `write_atomically`."""
    write_bytes(path, text.encode(), option=option)


def write_bytes(path: Path, content: bytes, *, option: str = CACHE) -> None:
    """Write bytes to a file atomically; raises as `write_atomically`."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_atomically(path, write, option=option)


def write_json(path: Path, content: Any, *, option: str = CACHE) -> None:
    """Write a JSON file atomically; objects that JSON does not know are converted by `str`.

    Raises as `write_atomically`, and ValueError for NaN and infinities.
    """
    text = json.dumps(content, indent=1, ensure_ascii=False, default=str, allow_nan=False)
    write_text(path, text + "\n", option=option)


def write_table(path: Path, table: Any, *, option: str = CACHE) -> None:
    """Write a data frame as a parquet file atomically; raises as `write_atomically`."""

    def write(temporary: Path) -> None:
        table.to_parquet(temporary, index=False)

    write_atomically(path, write, option=option)


def _lock(path: Path) -> FileLock:
    # Not bound to a thread: one thread computes a shard and takes its lock, another one writes it.
    return FileLock(path, thread_local=False)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes; the operating system releases it when a process dies.

    On file systems without such locks, filelock writes a file with process and host, and breaks
    the lock when that process is gone.
    """
    lock = try_lock(path, timeout=-1.0)
    assert lock is not None
    try:
        yield
    finally:
        lock.release()


def try_lock(path: Path, timeout: float = 0.0) -> FileLock | None:
    """The acquired lock, or None if another process holds it for `timeout` seconds (-1: wait)."""
    lock = _lock(path)
    for left in reversed(range(_ATTEMPTS)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=timeout)
        except TimeoutError:
            return None
        except FileNotFoundError as error:
            # A process that prunes the cache removed the folder in between.
            if not left:
                raise cannot_write(path.parent, error) from error
        except OSError as error:
            raise cannot_write(path.parent, error) from error
        else:
            return lock
    return None


USED = ".used"
"""Empty file whose modification time is when a run last used the store."""
FOLDER = ".users"
TRUST_SECONDS = 86400
"""How long an unlocked mark of another host counts: its locks may not be visible here."""


def _host() -> str:
    return re.sub(r"[^\w.]+", "_", socket.gethostname()) or "host"


class Lease:
    """The mark of this process in a store, from `take` to `release`; not inherited on fork."""

    def __init__(self, path: Path, lock: Any) -> None:
        self.path, self._lock, self._pid = path, lock, os.getpid()

    @classmethod
    def take(cls, store: Path) -> "Lease | None":
        """Leave a mark; None, with a log line, if none can be written."""
        path = store / FOLDER / f"{_host()}-{os.getpid()}-{secrets.token_hex(4)}.lock"
        try:
            lock = try_lock(path)
        except StoreError as error:
            log.info("%s is used without a mark: %s", store, error)
            return None
        return None if lock is None else cls(path, lock)

    def release(self) -> None:
        """Remove the mark; can be called again."""
        if self._lock is None or self._pid != os.getpid():
            return
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
        self._lock.release()
        self._lock = None


class Marked:
    """A store's folder that is marked from its first use until `close` or garbage collection."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lease: Lease | None = None

    def _mark(self) -> None:
        """Leave a mark of this process; the caller holds `.create.lock`."""
        self._lease = Lease.take(self.path)
        if self._lease is not None:
            weakref.finalize(self, self._lease.release)

    def _use(self) -> None:
        """Mark the store as used. Raises StoreError if it has been pruned."""
        if self._lease is not None or not os.access(self.path, os.W_OK):
            return
        with locked(self.path / ".create.lock"):
            if not (self.path / "manifest.json").is_file():
                raise StoreError(f"{self.path} was pruned in the meantime; run the command again")
            (self.path / USED).touch()
            self._mark()

    def close(self) -> None:
        """Remove this object's mark, so that the store can be pruned."""
        if self._lease is not None:
            self._lease.release()
            self._lease = None


def users(store: Path) -> list[str]:
    """`pid 4711 on host` of each process that uses the store; removes marks of dead processes."""
    processes = []
    for path in sorted((store / FOLDER).glob("*.lock")):
        if is_alive(path):
            processes.append(process_of(path))
            continue
        with suppress(OSError):
            path.unlink(missing_ok=True)
    return processes


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
        # The mark of another account, which cannot be locked.
        return True
    if lock is not None:
        lock.release()
    return lock is None


def _is_young(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime < TRUST_SECONDS
    except OSError:
        return False
