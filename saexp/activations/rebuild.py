"""A manifest that was lost or damaged, made anew of the shards that prove what they hold.

Since each shard's header has the store, the hookpoint, the shard's number and the checksum of its
values (`shards.Label`), a shard without an entry is as good as one with it. Shards of earlier
versions lack that, and are collected again.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saexp.activations.files import MANIFEST, read_manifest
from saexp.activations.shards import Label
from saexp.digests import digest_of
from saexp.errors import ModelError, StoreError
from saexp.models.hookpoints import Hookpoint
from saexp.wording import counted

log = logging.getLogger(__name__)

_LONGEST_HEADER = 2**16
_CHUNK_BYTES = 2**22


def shard_files(folder: Path) -> list[tuple[Hookpoint, Path]]:
    """Every file that is named as a shard of a hookpoint, in order."""
    files = []
    for file in sorted(folder.glob("layer_*/*.safetensors")):
        try:
            hookpoint = Hookpoint.parse(file.parent.name)
        except (ModelError, ValueError):
            continue
        if file.stem.isdecimal() and file.is_file():
            files.append((hookpoint, file))
    return files


def sound_manifest(folder: Path, fresh: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """(manifest, whether it is to be written); `fresh` is that of the same store without shards.

    What is on disk, where it is sound and of this store, else one made anew, with a warning.
    """
    try:
        manifest = read_manifest(folder)
        if _identity(manifest) == _identity(fresh):
            return manifest, False
        reason = f"{folder / MANIFEST} is another store's"
    except StoreError:
        there = (folder / MANIFEST).exists()
        reason = f"{folder / MANIFEST} is {'damaged' if there else 'missing'}"
        if not there and not shard_files(folder):
            return dict(fresh), True
    return _rebuilt(folder, fresh, reason), True


def _identity(manifest: Mapping[str, Any]) -> tuple[str, int]:
    return digest_of(manifest["ingredients"]), manifest["n_rows"]


def _rebuilt(folder: Path, fresh: Mapping[str, Any], reason: str) -> dict[str, Any]:
    files = shard_files(folder)
    proven = []
    for hookpoint, file in files:
        proof = _proven(file, folder.name, hookpoint)
        if proof is not None:
            proven.append((hookpoint, file, *proof))
    # Of one store all are the same, unless it was made anew with other ones before.
    sizes = Counter(label.shard_rows for _, _, label, _ in proven)
    shard_rows = sizes.most_common(1)[0][0] if sizes else fresh["shard_rows"]
    n_shards = -(-fresh["n_rows"] // shard_rows)
    hookpoints: dict[str, dict[str, Any]] = {}
    n_kept = 0
    for hookpoint, file, label, entry in proven:
        if label.shard_rows == shard_rows and label.index < n_shards:
            hookpoints.setdefault(hookpoint.name, {})[file.stem] = entry
            n_kept += 1
    log.warning(
        "%s and is made anew from the shards: %s kept, %d collected again where needed",
        *(reason, counted(n_kept, "shard"), len(files) - n_kept),
    )
    return {**fresh, "shard_rows": shard_rows, "hookpoints": hookpoints}


def _proven(file: Path, store: str, hookpoint: Hookpoint) -> tuple[Label, dict[str, Any]] | None:
    """A shard's label and its entry; None where its header does not prove what it holds."""
    try:
        with file.open("rb") as opened:
            size = opened.read(8)
            length = int.from_bytes(size, "little")
            if length > _LONGEST_HEADER:
                return None
            header = opened.read(length)
            about = json.loads(header)
            label = Label.read(about["__metadata__"])
            n_rows, _ = about["acts"]["shape"]
            whole, values = hashlib.sha256(size + header), hashlib.sha256()
            while chunk := opened.read(_CHUNK_BYTES):
                whole.update(chunk)
                values.update(chunk)
            n_bytes = opened.tell()
        belongs = (label.store, label.hookpoint, label.name) == (store, hookpoint.name, file.stem)
        begin, end = about["acts"]["data_offsets"]
        fits = begin == 0 and n_bytes - 8 - length == end and n_rows <= label.shard_rows
        if not (belongs and fits and values.hexdigest() == about["__metadata__"]["sha256"]):
            return None
        return label, {"n_rows": n_rows, "bytes": n_bytes, "sha256": whole.hexdigest()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
