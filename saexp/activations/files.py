"""Files that appear whole or not at all, and locks between processes."""

import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError

from saexp.digests import read_sha256
from saexp.errors import StoreError

log = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ATTEMPTS = 3
"""How often a lock is tried whose folder another process takes away."""


def intact(file: Path, entry: Mapping[str, Any], *, hashed: bool) -> bool:
    """Whether a file is as it was when its entry (`bytes`, `sha256`) was made; logs where not.

    The checksum is looked at only where `hashed`.
    """
    if not file.is_file() or file.stat().st_size != entry["bytes"]:
        log.warning("%s is missing or truncated and counts as not collected", file)
        return False
    if hashed and read_sha256(file) != entry["sha256"]:
        log.warning("%s is damaged (checksum) and counts as not collected", file)
        return False
    return True


def show_bytes(n_bytes: int) -> str:
    """A size for reading: 1.2 GB, powers of ten."""
    n = float(n_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def cannot_write(path: Path, error: Exception, n_bytes: int | None = None) -> StoreError:
    """The one line for a file that could not be written; of a full disk it says what is lacking."""
    if getattr(error, "errno", None) in _FULL:
        needs = f" needs {show_bytes(n_bytes)}" if n_bytes else ""
        return StoreError(
            f"disk full: {path}{needs}, and {show_bytes(free_bytes(path))} are free; what was "
            "finished is kept: make room and run the command again, or choose another cache_dir="
        )
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return StoreError(f"cannot write {path}: {reason}; choose another cache_dir=")


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


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a temporary file beside `path`, sync it, and rename it into place.

    Raises StoreError, in one line, where the folder cannot be written or the disk is full.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".tmp-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        put_in_place(temporary, path)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file, whole or not at all."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    write_atomically(path, lambda p: _write_text(p, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


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


_MANIFEST = {"ingredients": dict, "n_rows": int, "shard_rows": int, "hookpoints": dict}
"""What every store's manifest holds."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """A store's manifest. Raises StoreError where there is none or it is damaged."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise StoreError(f"{folder} holds no activation store (no manifest.json)") from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error)) from error
    held = manifest if isinstance(manifest, dict) else {}
    lacking = [key for key, kind in _MANIFEST.items() if not isinstance(held.get(key), kind)]
    if lacking:
        raise _unreadable(path, f"no {', '.join(lacking)} in it")
    return held


def _unreadable(path: Path, reason: str) -> StoreError:
    return StoreError(f"{path} cannot be read ({reason}); delete {path.parent} to collect anew")
