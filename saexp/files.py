"""Files that appear whole or not at all, locks, and marks of the processes that use a folder."""

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
"""Of these a limit of the user is the cause, not the disk."""
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_reported: set[Path] = set()
"""Cache directories of which `report_read_only` has warned."""
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
    """Whether an error of the operating system says so, or what a library makes of one."""
    if isinstance(error, RuntimeError):
        # torch.save, whose writer reports no number; other faults have shown when it was opened.
        return "PytorchStreamWriter" in str(error) or "inline_container" in str(error)
    return _number(error) in _FULL


def _number(error: BaseException) -> int | None:
    """The operating system's number of an error, also where a library has put it into a text."""
    patterns = {SafetensorError: r"os error (\d+)", shutil.Error: r"\[Errno (\d+)\]"}
    for kind, pattern in patterns.items():
        if isinstance(error, kind):
            match = re.search(pattern, str(error))
            return int(match[1]) if match else None
    return error.errno if isinstance(error, OSError) else None


def cannot_write(
    path: Path, error: Exception, n_bytes: int | None = None, *, option: str = CACHE
) -> StoreError:
    """The one line for a file that could not be written; of a full disk it says what is lacking.

    `option` is the setting that chooses another folder.
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
            f"finished is kept: make room and run the command again, or choose another {option}"
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
    its folder; None for an error of something else."""
    if not isinstance(error, OSError):
        return None
    named = Path(error.filename) if isinstance(error.filename, str) else None
    if not folder.is_dir():
        return _removed(folder)
    if disk_is_full(error):
        return cannot_write(named or folder, error, option=option)
    if named is None or folder.absolute() not in named.absolute().parents:
        return None
    if error.errno not in (*_READ_ONLY, errno.ENOTDIR, errno.EEXIST):
        return None
    return cannot_write(named, error, option=option)


def write_error(folder: Path, text: str) -> None:
    """error.txt of a run that failed. Where even that cannot be written, the error that the user
    sees is the run's own."""
    with suppress(StoreError):
        write_text(folder / "error.txt", text, option=RUN_FOLDER)


def free_bytes(path: Path) -> int:
    """Bytes free where `path` is, or would be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def is_writable(cache_dir: str | Path) -> bool:
    """Whether the cache directory can be written; False, and one warning per process, where it is
    on a read-only file system or access is denied.

    A file is made and removed there, because root passes `os.access`. Whatever else is wrong with
    it (a full disk, a file instead of a folder) is reported by what is written there next.
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
    """Warn that nothing can be kept in the cache directory, once per process."""
    folder = Path(cache_dir).absolute()
    if folder not in _reported:
        _reported.add(folder)
        log.warning(
            "cache_dir=%s cannot be written: what this run computes is not kept (%s)",
            *(cache_dir, reason),
        )


def put_in_place(temporary: Path, path: Path) -> None:
    """Sync a finished temporary file, rename it, and sync the folder's entry."""
    sync(temporary)
    temporary.chmod(0o644)
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of entries, is on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def remove_temporary(folder: Path) -> None:
    """Remove what a killed process left unfinished in a folder that no other process writes now."""
    for left in folder.glob(".tmp-*"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            with suppress(OSError):
                left.unlink(missing_ok=True)


def _make_parent(path: Path, option: str) -> None:
    # The folder of a run is made before the run: one that is missing now was removed by the user.
    if option not in (RUN_FOLDER, SWEEP_FOLDER):
        path.parent.mkdir(parents=True, exist_ok=True)


def write_folder(path: Path, write: Callable[[Path], None], *, option: str = CACHE) -> None:
    """Let `write` fill a temporary folder beside `path`, sync it, and rename it into place.

    What was at `path` is replaced. Raises as `write_atomically`.
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
            # A folder takes no other's place; one that is moved aside is never half there.
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
    """Let `write` make a temporary file beside `path`, sync it, and rename it into place.

    Raises StoreError, in one line that names `option`, where the folder cannot be written or the
    disk is full.
    """
    # Its name is known before it is there, so that a signal in between leaves none.
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
    """A text file in UTF-8, whole or not at all; raises as `write_atomically`."""
    write_bytes(path, text.encode(), option=option)


def write_bytes(path: Path, content: bytes, *, option: str = CACHE) -> None:
    """A file of these bytes, whole or not at all; raises as `write_atomically`."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_atomically(path, write, option=option)


def write_json(path: Path, content: Any, *, option: str = CACHE) -> None:
    """A JSON file, whole or not at all; what JSON does not know is written by `str`.

    Raises as `write_atomically`, and ValueError for NaN and infinities.
    """
    text = json.dumps(content, indent=1, ensure_ascii=False, default=str, allow_nan=False)
    write_text(path, text + "\n", option=option)


def write_table(path: Path, table: Any, *, option: str = CACHE) -> None:
    """A data frame as a parquet file, whole or not at all; raises as `write_atomically`."""

    def write(temporary: Path) -> None:
        table.to_parquet(temporary, index=False)

    write_atomically(path, write, option=option)


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
