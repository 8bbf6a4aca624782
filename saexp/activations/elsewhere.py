"""Stores of a cache that cannot be written: read where they are, or collected for this process."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import pandas as pd

from saexp.activations.store import ActivationStore, store_key
from saexp.errors import StoreError
from saexp.models.hookpoints import Hookpoint

_folders: dict[Path, Path] = {}
"""Cache directory -> the folder of this process that stands in for it."""


def whole_store(
    cache_dir: Path,
    ingredients: Mapping[str, Any],
    rows: pd.DataFrame,
    hookpoints: Sequence[Hookpoint],
    *,
    verify: bool,
) -> ActivationStore | None:
    """The store of these ingredients, with `rows`; None where it lacks some of the hookpoints."""
    try:
        store = ActivationStore.open(
            cache_dir / "activations" / store_key(ingredients), verify=verify
        )
        # Of a damaged rows table the shards cannot be read.
        store.repeats  # noqa: B018
        if store.missing(hookpoints):
            return None
    except StoreError:
        return None
    store.show(rows)
    return store


def temporary_cache(cache_dir: Path) -> Path:
    """A folder in the system's temporary one, which is removed when this process ends."""
    key = cache_dir.absolute()
    if key not in _folders:
        folder = tempfile.mkdtemp(prefix="saexp-cache-")
        # Unlike atexit's, these run in workers of a launcher too, and not in forks.
        Finalize(
            None, shutil.rmtree, args=(folder,), kwargs={"ignore_errors": True}, exitpriority=0
        )
        _folders[key] = Path(folder)
    return _folders[key]
