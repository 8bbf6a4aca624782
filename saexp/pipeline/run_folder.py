"""The folder of a run belongs to one process at a time."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from saexp.errors import StoreError
from saexp.files import remove_temporary, try_lock

LOCK = ".running.lock"
_reserved: dict[Path, Any] = {}
"""Locks that the command line took before Hydra wrote anything; the run takes them over."""


def reserve(folder: Path) -> None:
    """Take a folder for the run or the sweep of this process that is about to begin.

    Raises StoreError where another run has it, it is inside of another sweep's folder, another run
    has a folder in it, or it cannot be made.
    """
    nested = [folder.resolve().parent, *(lock.parent for lock in folder.glob(f"*/{LOCK}"))]
    for other in nested:
        if other not in _reserved and _is_held(other):
            raise _busy(other)
    _reserved[folder.resolve()] = _take(folder)


@contextmanager
def reserved_cell(folder: Path) -> Iterator[None]:
    """Take a cell's folder, in that of its sweep, before anything in it is changed.

    Raises StoreError where another run has it, or it cannot be made.
    """
    place = folder.resolve()
    _reserved[place] = _take(folder)
    try:
        yield
    finally:
        if place in _reserved:
            _let_go(place, _reserved.pop(place))


def reserved() -> Path | None:
    """A folder that is reserved and that no run took over yet."""
    return next(iter(_reserved), None)


def release_all() -> None:
    """Let go what was reserved and no run took over."""
    while _reserved:
        folder, lock = _reserved.popitem()
        _let_go(folder, lock)


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold a run's folder. Raises StoreError where another run has it, or it cannot be made.

    The operating system frees it when the process dies, so that a crashed run blocks none.
    """
    place = folder.resolve()
    lock = _reserved.pop(place, None) or _take(folder)
    try:
        yield
    finally:
        _let_go(place, lock)


def _take(folder: Path) -> Any:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot make the run's folder {folder}: {error.strerror}") from error
    try:
        lock = try_lock(folder / LOCK)
    except StoreError as error:
        raise StoreError(f"cannot write the run's folder {folder}; choose another one") from error
    if lock is None:
        raise _busy(folder)
    remove_temporary(folder)
    return lock


def _busy(folder: Path) -> StoreError:
    return StoreError(
        f"another run is writing to {folder}; wait for it, or type another hydra.run.dir= "
        "(hydra.sweep.dir= of a sweep)"
    )


def _is_held(folder: Path) -> bool:
    if not (folder / LOCK).is_file():
        return False
    try:
        lock = try_lock(folder / LOCK)
    except StoreError:
        # A folder of somebody else, who left it.
        return False
    if lock is not None:
        lock.release()
    return lock is None


def _let_go(folder: Path, lock: Any) -> None:
    # While it is held, so that whoever waits for this very file finds it gone and makes another.
    with suppress(OSError):
        (folder / LOCK).unlink(missing_ok=True)
    lock.release()
