"""Results of rows on disk, each under what determines it, so that no run computes one twice.

<cache_dir>/generations.sqlite: what a killed run had made is there when it is started again.
"""

import hashlib
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from saexp.errors import StoreError
from saexp.models.loading import LanguageModel

VERSION = 4
"""Of what is stored; entries of other versions are not read. In 2, generated texts of short prompts
could be wrong, in 3 those with edits of generated tokens alone."""
_LOOK_UP = 500
"""Keys per query, under SQLite's limit."""


def model_ingredients(model: LanguageModel) -> dict[str, Any]:
    """What of a model fixes the results of a row of token ids.

    The module path of its blocks is one: it says which streams are changed.
    """
    return {
        "model": model.fingerprint,
        "blocks": model.cfg.blocks,
        "dtype": str(model.dtype),
        "device": model.device.type,
        "eos": model.eos_ids,
    }


class ResultCache:
    """Numbers by key; `determined_by` is everything beside the row that fixes a result."""

    def __init__(self, cache_dir: str | Path, determined_by: Mapping[str, Any]) -> None:
        self.path = Path(cache_dir) / "generations.sqlite"
        self.prefix = (VERSION, sorted(determined_by.items()))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = sqlite3.connect(self.path, timeout=60)
            # Full synchronisation takes a tenth of a run with many small batches.
            self.file.execute("pragma synchronous=normal")
            self.file.execute(
                "create table if not exists results (key blob primary key, found blob)"
            )
        except (OSError, sqlite3.Error) as error:
            raise self._error(error) from error

    def _error(self, error: Exception) -> StoreError:
        return StoreError(
            f"cannot use {self.path}: {error}; delete it or choose another cache_dir="
        )

    @cached_property
    def _start(self) -> Any:
        """The digest's state after what all rows have in common."""
        return hashlib.sha256(f"({self.prefix!r}, ".encode())

    def key(self, kind: str, row_key: tuple[Any, ...]) -> bytes:
        """Digest of the row, of what is computed of it, and of everything else that fixes that.

        That of `repr((prefix, kind, row_key))`.
        """
        digest = self._start.copy()
        digest.update(f"{kind!r}, {row_key!r})".encode())
        return digest.digest()

    def get(
        self, kind: str, row_keys: Iterable[tuple[Any, ...]]
    ) -> dict[tuple[Any, ...], np.ndarray]:
        """Those of the rows that are there."""
        of_digest = {self.key(kind, k): k for k in row_keys}
        digests = list(of_digest)
        found = {}
        try:
            for start in range(0, len(digests), _LOOK_UP):
                some = digests[start : start + _LOOK_UP]
                marks = ",".join("?" * len(some))
                rows = self.file.execute(
                    f"select key, found from results where key in ({marks})", some
                )
                for digest, values in rows:
                    found[of_digest[digest]] = np.frombuffer(values, dtype="<f8")
        except sqlite3.Error as error:
            raise self._error(error) from error
        return found

    def put(self, kind: str, made: Sequence[tuple[tuple[Any, ...], np.ndarray]]) -> None:
        """Keep a batch, whole or not at all."""
        rows = [(self.key(kind, k), np.asarray(v, dtype="<f8").tobytes()) for k, v in made]
        try:
            with self.file:
                self.file.executemany("insert or ignore into results values (?, ?)", rows)
        except sqlite3.Error as error:
            raise self._error(error) from error

    def close(self) -> None:
        """Close the file."""
        self.file.close()
