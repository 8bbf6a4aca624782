"""A store's files: its manifest, and whether a file is as it was written."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saexp.digests import digest_of, read_sha256
from saexp.errors import ModelError, StoreError
from saexp.files import cannot_write, write_json
from saexp.models.hookpoints import Hookpoint

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_CHECKSUM, _CHECKED = "sha256", "checked"
"""In a manifest: the digest of what `_checked` returns, and the shards that were listed when it was
written. Those of earlier versions have neither."""


def intact(
    file: Path, entry: Mapping[str, Any], *, hashed: bool, reported: set[str] | None = None
) -> bool:
    """Whether a file is as it was when its entry (`bytes`, `sha256`) was made; logs where not,
    unless that is in `reported`.

    The checksum is looked at only where `hashed`.
    """
    try:
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            problem = "is missing or truncated"
        elif hashed and read_sha256(file) != entry["sha256"]:
            problem = "is damaged (checksum)"
        else:
            # One that is not hashed must be readable, too.
            file.open("rb").close()
            return True
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    line = f"{file} {problem} and counts as not collected"
    if reported is None or line not in reported:
        log.warning("%s", line)
    if reported is not None:
        reported.add(line)
    return False


def read_manifest(folder: Path) -> dict[str, Any]:
    """A store's manifest. Raises StoreError where there is none or it is damaged."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise StoreError(f"{folder} holds no activation store (no {MANIFEST})") from error
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, " ".join(str(error).split())) from error
    if not isinstance(manifest, dict):
        raise _unreadable(path, "no JSON object")
    if (problem := _problem(manifest)) is not None:
        raise _unreadable(path, problem)
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Write a manifest with its checksum, whole or not at all; returns what was written."""
    listed = {name: sorted(shards) for name, shards in manifest["hookpoints"].items()}
    content = {**manifest, _CHECKED: listed}
    sealed = {**content, _CHECKSUM: digest_of(_checked(content))}
    if (folder / MANIFEST).is_dir():
        remove_manifest(folder)
    write_json(folder / MANIFEST, sealed)
    return sealed


def remove_manifest(folder: Path) -> None:
    """Take a store's manifest away, whatever is in its place."""
    path = folder / MANIFEST
    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def _unreadable(path: Path, reason: str) -> StoreError:
    return StoreError(
        f"{path} cannot be read ({reason}); the command that made the store makes it anew from the "
        "shards"
    )


def _problem(manifest: dict[str, Any]) -> str | None:
    """What no manifest that was written by saexp has; None where there is nothing."""
    expected = {"ingredients": dict, "hookpoints": dict}
    lacking = [key for key, kind in expected.items() if not isinstance(manifest.get(key), kind)]
    lacking += [key for key in ("n_rows", "shard_rows") if not _counts(manifest.get(key))]
    if lacking:
        return f"no {', '.join(lacking)} in it"
    if not manifest["shard_rows"]:
        return "shard_rows is 0"
    if not isinstance(manifest.get("about", {}), dict):
        return "about is no object"
    if (problem := _problem_of_shards(manifest)) is not None:
        return problem
    joined = manifest.get("joined", {})
    if not isinstance(joined, dict) or not all(
        _is_entry(entry) and isinstance(entry.get("file"), str) and "/" not in entry["file"]
        for entry in joined.values()
    ):
        return "joined has an entry without file, bytes or sha256"
    return None if _has_right_checksum(manifest) else "checksum"


def _checked(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest's checksum is of.

    Left out is what an earlier version of saexp, which knows of no checksum, may add to it: entries
    of further shards and of joined files, which are compared with the files.
    """
    content = {k: v for k, v in manifest.items() if k not in (_CHECKSUM, "joined")}
    content["hookpoints"] = {
        name: {shard: manifest["hookpoints"][name][shard] for shard in shards}
        for name, shards in manifest[_CHECKED].items()
    }
    return content


def _has_right_checksum(manifest: Mapping[str, Any]) -> bool:
    """Also where it has none, as those of earlier versions."""
    if _CHECKSUM not in manifest and _CHECKED not in manifest:
        return True
    try:
        return manifest.get(_CHECKSUM) == digest_of(_checked(manifest))
    except (LookupError, TypeError, AttributeError):
        return False


def _problem_of_shards(manifest: dict[str, Any]) -> str | None:
    n_shards = -(-manifest["n_rows"] // manifest["shard_rows"])
    for name, shards in manifest["hookpoints"].items():
        try:
            if Hookpoint.parse(name).name != name:
                return f"'{name}' is no hookpoint's name"
        except (ModelError, ValueError):
            return f"'{name}' is no hookpoint's name"
        if not isinstance(shards, dict):
            return f"no shards in {name}"
        for index, entry in shards.items():
            if not (5 <= len(index) < 10 and index.isdecimal() and int(index) < n_shards):
                return f"{name} has no shard '{index}'"
            if not _is_entry(entry):
                return f"{name}/{index} lacks bytes or sha256"
    return None


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and _counts(entry.get("bytes"))
        and isinstance(entry.get("sha256"), str)
    )


def _counts(value: Any) -> bool:
    """Whether it is an integer that is not negative; a boolean is none."""
    return type(value) is int and value >= 0
