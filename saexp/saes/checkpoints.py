"""Checkpoints of a training: written whole, verified when they are read, two of them kept."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saexp.digests import checksums, difference, is_checksums
from saexp.errors import StoreError
from saexp.files import remove_temporary, write_folder

log = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"
N_KEPT = 2
_NAME = re.compile(r"step_(\d{9})")


class Damaged(Exception):
    """A checkpoint that cannot be used; the text names the file and what is wrong."""


class Checkpoints:
    """The checkpoints of one training, in a folder that no other process writes meanwhile.

    Where the folder is not `writable`, those that are there are read and none is written.
    """

    def __init__(self, folder: Path, *, writable: bool = True) -> None:
        self.folder, self.writable = folder, writable
        self._usable: list[Path] = []
        self._has_warned = False

    def resume(self, load: Callable[[Path, int], None], latest: int | None = None) -> int:
        """Load the newest checkpoint that is intact; its step, 0 where there is none.

        `load` reads one, given its folder and step, and raises Damaged, or any other exception
        of a file that does not hold what it should; the one before is then tried. With `latest`,
        those of later steps are left as they are.
        """
        damaged: list[tuple[Path, str]] = []
        step = 0
        for path, at in self._found():
            if latest is not None and at > latest:
                continue
            try:
                verify(path)
                load(path, at)
            except Damaged as error:
                damaged.append((path, str(error)))
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                damaged.append((path, reason))
            else:
                step, self._usable = at, [path]
                break
        then = f"going on from step {step}" if step else "starting from the beginning"
        for path, reason in damaged:
            log.warning("checkpoint %s is damaged (%s); %s", path, reason, then)
        return step

    def _found(self) -> list[tuple[Path, int]]:
        """(folder, step) of each checkpoint, the newest first."""
        named = [(p, _NAME.fullmatch(p.name)) for p in self.folder.glob("step_*")]
        found = [(p, int(match[1])) for p, match in named if match]
        return sorted(found, key=lambda pair: -pair[1])

    def write(self, step: int, write: Callable[[Path], None]) -> None:
        """Let `write` fill the checkpoint of a step; older ones than the one before are removed.

        One that cannot be written (full disk) is a warning, once per training: nothing else is
        lost by it, and the earlier checkpoints stay.
        """
        if not self.writable:
            return

        def fill(temporary: Path) -> None:
            write(temporary)
            sums = checksums(temporary, [file.name for file in temporary.iterdir()])
            (temporary / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")

        path = self.folder / f"step_{step:09d}"
        try:
            remove_temporary(self.folder)
            write_folder(path, fill)
        except (StoreError, RuntimeError) as error:
            if not self._has_warned:
                log.warning("checkpoint at step %d could not be written (%s)", step, error)
            self._has_warned = True
            return
        self._usable = [*self._usable, path][-N_KEPT:]
        for old, _ in self._found():
            if old not in self._usable:
                shutil.rmtree(old, ignore_errors=True)

    def remove(self) -> None:
        """Remove all of them, of a training that is finished."""
        if self.writable:
            shutil.rmtree(self.folder, ignore_errors=True)


def verify(path: Path) -> None:
    """Raise Damaged, naming the first file that is missing or not as it was written."""
    sums = read_object(path / CHECKSUMS)
    if not sums or not is_checksums(sums):
        raise Damaged(f"{CHECKSUMS} is not a list of checksums")
    if changed := difference(path, sums):
        raise Damaged(changed)
    for file in path.iterdir():
        if file.name not in sums and file.name != CHECKSUMS:
            raise Damaged(f"{file.name}: not in {CHECKSUMS}")


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object from a file; raises Damaged."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise Damaged(f"{file.name}: missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{file.name}: cannot be read") from error
    if not isinstance(content, dict):
        raise Damaged(f"{file.name}: not a JSON object")
    return content
