"""Checksums of files and of JSON content, and what differs from them."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from saexp.digests import digest_of, read_sha256

Checksums = dict[str, dict[str, Any]]
"""Path below a folder -> `bytes` and `sha256` of the file."""
_SEAL = "checksum"


def checksums(folder: Path, names: Iterable[str]) -> Checksums:
    """Size and SHA-256 of those of the named files that exist, read from disk."""
    files = {name: folder / name for name in sorted(names)}
    return {
        name: {"bytes": file.stat().st_size, "sha256": read_sha256(file)}
        for name, file in files.items()
        if file.is_file()
    }


def checksum_of(content: bytes) -> dict[str, Any]:
    """What `checksums` lists for a file of this content."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def is_checksums(listed: object) -> bool:
    """Whether this has the shape of `Checksums`, and no path leads out of the folder."""
    return isinstance(listed, dict) and all(
        isinstance(about, dict)
        and isinstance(about.get("bytes"), int)
        and isinstance(about.get("sha256"), str)
        and not Path(name).is_absolute()
        and ".." not in Path(name).parts
        for name, about in listed.items()
    )


def difference(
    folder: Path,
    listed: Mapping[str, Mapping[str, Any]],
    sha256: Callable[[Path], str] = read_sha256,
) -> str | None:
    """The first file that is not as listed, in words (`rows.parquet is missing`); None if all are.

    `sha256` reads a file's digest.
    """
    for name, about in listed.items():
        file = folder / name
        try:
            if not file.is_file():
                return f"{name} is {'not a file' if file.exists() else 'missing'}"
            if file.stat().st_size != about["bytes"] or sha256(file) != about["sha256"]:
                return f"{name} was changed since it was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON content with a checksum over the rest of it, as its last key."""
    plain = {key: value for key, value in content.items() if key != _SEAL}
    return {**plain, _SEAL: digest_of(plain)}


def is_sealed(content: Mapping[str, Any]) -> bool:
    """Whether there is a checksum over the rest."""
    return _SEAL in content


def has_intact_seal(content: Mapping[str, Any]) -> bool:
    """Whether there is a checksum over the rest, and the rest is as it was then."""
    return is_sealed(content) and sealed(content)[_SEAL] == content[_SEAL]
