"""All shards of a hookpoint in one file, to be memory-mapped as one tensor."""

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saexp.activations.files import intact
from saexp.files import cannot_write, locked, write_atomically


def joined_name(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Name of the file that joins these shards; other content, other name."""
    sums = "".join(entry["sha256"] for _, entry in sorted(entries.items()))
    return f"joined-{hashlib.sha256(sums.encode()).hexdigest()[:16]}.bin"


def damaged_joined(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Path]:
    """Hookpoint -> its joined file that is not as it was written; all of a store's are hashed."""
    listed = manifest.get("joined", {}).items()
    files = {name: (folder / name / entry["file"], entry) for name, entry in listed}
    return {
        name: file
        for name, (file, entry) in files.items()
        if file.is_file() and not intact(file, entry, hashed=True)
    }


def drop_damaged(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Remove damaged joined files, to be made again of the shards when they are next wanted."""
    for file in damaged_joined(folder, manifest).values():
        try:
            file.unlink()
        except OSError as error:
            raise cannot_write(file, error) from error


def _write(path: Path, parts: Iterable[Tensor]) -> None:
    with path.open("wb") as file:
        for part in parts:
            file.write(part.contiguous().view(torch.uint8).numpy().data)


def join(path: Path, parts: Iterable[Tensor]) -> None:
    """Write the parts' values one after another, whole or not at all."""
    with locked(path.parents[1] / ".joined.lock"):
        for left in path.parent.glob(".tmp-*.bin"):
            left.unlink(missing_ok=True)
        write_atomically(path, lambda temporary: _write(temporary, parts))


def join_elsewhere(parts: Iterable[Tensor], mapped: Callable[[Path], Tensor]) -> Tensor:
    """The same in the system's temporary folder; the file goes when the tensor does."""
    try:
        with tempfile.NamedTemporaryFile(prefix="saexp-", suffix=".bin") as file:
            path = Path(file.name)
            _write(path, parts)
            return mapped(path)
    except OSError as error:
        raise cannot_write(Path(tempfile.gettempdir()) / "saexp-*.bin", error) from error
