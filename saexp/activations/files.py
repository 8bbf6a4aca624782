"""A store's files: its manifest, and whether a file is as it was written."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saexp.digests import read_sha256
from saexp.errors import StoreError

log = logging.getLogger(__name__)


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
