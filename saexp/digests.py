"""SHA-256 digests of files and of source code, and checksums of the files of a run."""

import hashlib
import json
import re
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

_RACY_NS = 2 * 10**9
"""A file that changed this recently may change again within one tick of its file system's clock,
so its digest is not remembered."""
_PERSISTED_BYTES = 32 * 2**20
"""Digests of files of at least this size are kept on disk too: hashing them takes a while."""
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_REMEMBERED = "digests.json"

State = tuple[int, int, int, int]
"""(size, time of last change of the content, of the inode, inode), times in ns."""

_known: dict[str, tuple[State, str]] = {}
_persisted: Path | None = None


def read_sha256(path: Path) -> str:
    """Hex digest of a file's content, which is read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content, which is read only where the file may have changed.

    A file of the same size, inode and times as when it was last read holds the same content. The
    time at which the inode changed is one of them, which no program can set back.
    """
    place = path.resolve()
    state, name = _state(place), str(place)
    if name not in _known and state[0] >= _PERSISTED_BYTES:
        _known.update(_read_persisted())
    if name in _known and _known[name][0] == state:
        return _known[name][1]
    found = read_sha256(place)
    settled = time.time_ns() - max(state[1], state[2]) > _RACY_NS
    if settled and _state(place) == state:
        _known[name] = (state, found)
        if state[0] >= _PERSISTED_BYTES:
            _persist()
    return found


def remember_in(folder: str | Path) -> None:
    """Keep the digests of large files in this folder, for later processes."""
    global _persisted
    _persisted = Path(folder) / _REMEMBERED


def _state(path: Path) -> State:
    about = path.stat()
    return about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino


def _read_persisted() -> dict[str, tuple[State, str]]:
    """What the file lists; nothing where its own checksum says that it is damaged, as a wrong
    digest would name the content of other weights."""
    if _persisted is None:
        return {}
    try:
        content = json.loads(_persisted.read_text("utf-8"))
        listed = content["digests"]
        if content["checksum"] != digest_of(listed):
            return {}
        return {name: ((a, b, c, d), digest) for name, (a, b, c, d, digest) in listed.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _persist() -> None:
    """What cannot be written is hashed again by the next process."""
    if _persisted is None:
        return
    large = {n: found for n, found in _known.items() if found[0][0] >= _PERSISTED_BYTES}
    listed = {
        name: [*state, digest] for name, (state, digest) in (_read_persisted() | large).items()
    }
    content = {"digests": listed, "checksum": digest_of(listed)}
    temporary = _persisted.with_name(f".{_REMEMBERED}.{time.time_ns()}")
    with suppress(OSError):
        _persisted.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            temporary.replace(_persisted)
        finally:
            temporary.unlink(missing_ok=True)


def content_name(path: Path) -> str:
    """What a file's content is known by: of a file in the hub's cache the name of its blob, which
    is its hash already, else the digest of what it holds."""
    blob = path.resolve()
    named = path.is_symlink() and blob.parent.name == "blobs" and _BLOB.fullmatch(blob.name)
    return blob.name if named else file_sha256(blob)


def contents(place: Path) -> list[tuple[str, str]]:
    """(path below `place`, name of its content) of a file, or of all files of a folder."""
    if place.is_file():
        return [(place.name, content_name(place))]
    files = sorted(f for f in place.rglob("*") if f.is_file() and f.suffix != ".pyc")
    return [(f.relative_to(place).as_posix(), content_name(f)) for f in files]


def digest_of(*parts: Any) -> str:
    """Hex digest of parts that JSON can write; what it cannot is written by `str`."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def code_digest(target: Any) -> str | None:
    """Digest of the source of a class with its base classes, or of a function, when first asked.

    Of each the Python files of its package, of saexp's own its module alone; base classes of other
    installed packages are left out. None where part of it is in no file (typed into a notebook), so
    that nothing tells one version from another.
    """
    parts: list[Any] = [f"{target.__module__}.{target.__qualname__}"]
    own = target.__module__.partition(".")[0]
    for one in getattr(target, "__mro__", (target,)):
        top = one.__module__.partition(".")[0]
        if top == "builtins" or (top != own and _in_library(one.__module__)):
            continue
        files = _source_files(one.__module__)
        if files is None:
            return None
        parts.append([[f.name, file_sha256(f)] for f in files if f.is_file()])
    return digest_of(*parts)


def _source_files(module: str) -> list[Path] | None:
    """All Python files of a loaded module's package, or its own file; None where it has none."""
    top = module.partition(".")[0]
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return None
    root = getattr(sys.modules.get(top), "__file__", None)
    if top != "saexp" and root is not None and Path(root).name == "__init__.py":
        return sorted(Path(root).parent.rglob("*.py"))
    return [Path(file)]


def _in_library(module: str) -> bool:
    file = getattr(sys.modules.get(module), "__file__", None)
    return module in sys.builtin_module_names or (file is not None and in_library(Path(file)))


def in_library(file: Path) -> bool:
    """Whether a file is the standard library's or an installed package's."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    libraries = {Path(sysconfig.get_path(name)).resolve() for name in names}
    return not libraries.isdisjoint(file.resolve().parents)


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
