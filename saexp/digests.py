"""SHA-256 digests of files and of source code, and checksums of the files of a run."""

import hashlib
import json
import re
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_RACY_NS = 2 * 10**9
"""A file that changed this recently may change again within one tick of its file system's clock,
so its digest is not cached."""
_PERSISTED_BYTES = 32 * 2**20
"""Digests of files of at least this size are cached on disk too, since hashing them is slow."""
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_CACHE_FILE = "digests.json"

State = tuple[int, int, int, int]
"""(size, time of last change of the content, of the inode, inode), times in ns."""


@dataclass
class DigestCache:
    """Digests of files that this process has read."""

    known: dict[str, tuple[State, str]] = field(default_factory=dict)
    """Absolute path -> state of the file, and its digest."""
    file: Path | None = None
    """File on disk for the digests of large files; see `remember_in`."""
    code: dict[Any, str | None] = field(default_factory=dict)
    """Class or function -> digest of its source when it was first asked for."""


_CACHE = DigestCache()
"""One per process: it affects the time that hashing takes, never a result."""


def read_sha256(path: Path) -> str:
    """Hex digest of a file's content; always reads the file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content; reads the file only if it may have changed.

    A file with the same size, inode and times as when it was last read has the same content. One
    of the times is that of the inode's last change, which no program can set.
    """
    file = path.resolve()
    state, name, known = _state(file), str(file), _CACHE.known
    if name not in known and state[0] >= _PERSISTED_BYTES:
        known.update(_read_persisted())
    if name in known and known[name][0] == state:
        return known[name][1]
    digest = read_sha256(file)
    is_old = time.time_ns() - max(state[1], state[2]) > _RACY_NS
    if is_old and _state(file) == state:
        known[name] = (state, digest)
        if state[0] >= _PERSISTED_BYTES:
            _persist()
    return digest


def remember_in(folder: str | Path) -> None:
    """Cache the digests of large files in this folder, for later processes."""
    _CACHE.file = Path(folder) / _CACHE_FILE


def _state(path: Path) -> State:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _read_persisted() -> dict[str, tuple[State, str]]:
    """Digests in the cache file; none if its checksum shows that it is damaged, because a wrong
    digest would identify the content of other weights."""
    if _CACHE.file is None:
        return {}
    try:
        content = json.loads(_CACHE.file.read_text("utf-8"))
        listed = content["digests"]
        if content["checksum"] != digest_of(listed):
            return {}
        return {name: ((a, b, c, d), digest) for name, (a, b, c, d, digest) in listed.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _persist() -> None:
    """Write the cache file. If that fails, the next process hashes the files again."""
    if _CACHE.file is None:
        return
    large = {n: entry for n, entry in _CACHE.known.items() if entry[0][0] >= _PERSISTED_BYTES}
    listed = {
        name: [*state, digest] for name, (state, digest) in (_read_persisted() | large).items()
    }
    content = {"digests": listed, "checksum": digest_of(listed)}
    temporary = _CACHE.file.with_name(f".{_CACHE_FILE}.{time.time_ns()}")
    with suppress(OSError):
        _CACHE.file.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            temporary.replace(_CACHE.file)
        finally:
            temporary.unlink(missing_ok=True)


def content_name(path: Path) -> str:
    """Identifier of a file's content: in the hub's cache the name of its blob, which is a hash
    already, otherwise the digest of the content."""
    blob = path.resolve()
    is_blob = path.is_symlink() and blob.parent.name == "blobs" and _BLOB.fullmatch(blob.name)
    return blob.name if is_blob else file_sha256(blob)


def contents(path: Path) -> list[tuple[str, str]]:
    """(relative path, `content_name`) of a file, or of all files in a folder."""
    if path.is_file():
        return [(path.name, content_name(path))]
    files = sorted(f for f in path.rglob("*") if f.is_file() and f.suffix != ".pyc")
    return [(f.relative_to(path).as_posix(), content_name(f)) for f in files]


def digest_of(*parts: Any) -> str:
    """Hex digest of JSON-serialisable parts; other objects are converted by `str`."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def code_digest(target: Any) -> str | None:
    """Digest of the source of a function, or of a class and its base classes, when first asked for.

    The source is all Python files of the package, or only the module for saexp's own classes; base
    classes from other installed packages are not included. None if part of the source is not in a
    file (typed into a notebook), so that versions cannot be distinguished.
    """
    if target not in _CACHE.code:
        _CACHE.code[target] = _code_digest(target)
    return _CACHE.code[target]


def _code_digest(target: Any) -> str | None:
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
    """All Python files of a loaded module's package, or its own file; None if it has no file."""
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
    """Whether a file belongs to the standard library or to an installed package."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    libraries = {Path(sysconfig.get_path(name)).resolve() for name in names}
    return not libraries.isdisjoint(file.resolve().parents)


Checksums = dict[str, dict[str, Any]]
"""Path below a folder -> `bytes` and `sha256` of the file."""
_SEAL = "checksum"


def checksums(folder: Path, names: Iterable[str]) -> Checksums:
    """Size and SHA-256, read from disk, of those files in the folder that exist."""
    files = {name: folder / name for name in sorted(names)}
    return {
        name: {"bytes": file.stat().st_size, "sha256": read_sha256(file)}
        for name, file in files.items()
        if file.is_file()
    }


def checksum_of(content: bytes) -> dict[str, Any]:
    """Entry of `checksums` for a file with this content."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def is_checksums(listed: object) -> bool:
    """Whether an object has the form of `Checksums`, with no path outside the folder."""
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
    """The first difference from the listed checksums (`rows.parquet is missing`); None without any.

    `sha256` computes a file's digest.
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
    """JSON content with a checksum of the rest as its last key."""
    plain = {key: value for key, value in content.items() if key != _SEAL}
    return {**plain, _SEAL: digest_of(plain)}


def is_sealed(content: Mapping[str, Any]) -> bool:
    """Whether the content has a checksum."""
    return _SEAL in content


def has_intact_seal(content: Mapping[str, Any]) -> bool:
    """Whether the content has a checksum that matches the rest."""
    return is_sealed(content) and sealed(content)[_SEAL] == content[_SEAL]


def tensors_sha256(hf: Any) -> str:
    """Hex digest of the current config and weights of a model."""
    return state_sha256(hf, repr(hf.config.to_dict()))


def state_sha256(module: Any, config: str = "") -> str:
    """Hex digest of a config and the current parameters and buffers of a module."""
    import torch

    digest = hashlib.sha256(config.encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
