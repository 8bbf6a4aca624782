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


class DamagedCheckpoint(Exception):
    """A checkpoint cannot be used; the message has the file and the reason."""


class Checkpoints:
    """The checkpoints of one training, in a folder that no other process writes to meanwhile.

    In a folder that is not `writable`, checkpoints are read but not written.
    """

    def __init__(self, folder: Path, *, writable: bool = True) -> None:
        self.folder, self.writable = folder, writable
        self._usable: list[Path] = []
        self._has_warned = False

    def resume(self, load: Callable[[Path, int], None], latest: int | None = None) -> int:
        """Load the newest intact checkpoint, and return its step, or 0 where there is none.

        `load(folder, step)` loads a checkpoint. Where it raises an exception (DamagedCheckpoint, or
        any other that invalid files cause), the previous checkpoint is tried. With `latest`,
        checkpoints of later steps are left as they are.
        """
        damaged: list[tuple[Path, str]] = []
        step = 0
        for path, step_of_path in self._by_step():
            if latest is not None and step_of_path > latest:
                continue
            try:
                verify(path)
                load(path, step_of_path)
            except DamagedCheckpoint as error:
                damaged.append((path, str(error)))
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                damaged.append((path, reason))
            else:
                step, self._usable = step_of_path, [path]
                break
        consequence = f"continuing from step {step}" if step else "starting from the beginning"
        for path, reason in damaged:
            log.warning("checkpoint %s is damaged (%s); %s", path, reason, consequence)
        return step

    def _by_step(self) -> list[tuple[Path, int]]:
        """(folder, step) of each checkpoint, the newest first."""
        matches = [(p, _NAME.fullmatch(p.name)) for p in self.folder.glob("step_*")]
        checkpoints = [(p, int(match[1])) for p, match in matches if match]
        return sorted(checkpoints, key=lambda pair: -pair[1])

    def write(self, step: int, write: Callable[[Path], None]) -> None:
        """Write the checkpoint of a step with `write`, and remove all but the newest `N_KEPT`.

        Where it cannot be written (full disk), one warning per training is logged: training can
        continue, and the earlier checkpoints stay.
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
        for old, _ in self._by_step():
            if old not in self._usable:
                shutil.rmtree(old, ignore_errors=True)

    def remove(self) -> None:
        """Remove all checkpoints, once the training is finished."""
        if self.writable:
            shutil.rmtree(self.folder, ignore_errors=True)


def verify(path: Path) -> None:
    """Raise DamagedCheckpoint, with the first file that is missing or has changed."""
    sums = read_object(path / CHECKSUMS)
    if not sums or not is_checksums(sums):
        raise DamagedCheckpoint(f"{CHECKSUMS} is not a list of checksums")
    if changed := difference(path, sums):
        raise DamagedCheckpoint(changed)
    for file in path.iterdir():
        if file.name not in sums and file.name != CHECKSUMS:
            raise DamagedCheckpoint(f"{file.name}: not in {CHECKSUMS}")


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object from a file; raises DamagedCheckpoint."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{file.name}: missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{file.name}: cannot be read") from error
    if not isinstance(content, dict):
        raise DamagedCheckpoint(f"{file.name}: not a JSON object")
    return content
