"""Claims of rows in the results database: given up, granted to waiting processes, and damaged."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saexp.errors import StoreError
from saexp.files import FOLDER, Lease
from saexp.interventions.results_cache import ResultCache, shared


def claims(cache_dir: Path) -> list[tuple[Any, ...]]:
    cache = ResultCache(cache_dir, {})
    rows = cache.database.read(lambda c: c.execute("select * from claims").fetchall())
    cache.close()
    return rows


def batches_of(n: int, error: BaseException) -> Any:
    """Computes n batches of one row, and raises."""

    def compute(numbers: list[int]) -> Generator[list[tuple[int, np.ndarray]], None, None]:
        for number in numbers[:n]:
            yield [(number, np.zeros(1))]
        raise error

    return compute


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StoreError("disk full"), ValueError()])
def test_an_error_gives_up_what_is_claimed(tmp_path: Path, error: BaseException) -> None:
    cache = ResultCache(tmp_path, {})
    items = {cache.key("row", (n,)): n for n in range(5)}
    with pytest.raises(type(error)):
        for _ in shared(cache, items, batches_of(2, error)):
            assert len(claims(tmp_path)) == 1
    assert claims(tmp_path) == []
    assert len(cache.get(items)) == 2
    cache.close()


def waiting_elsewhere(cache: ResultCache) -> str:
    """A killed process of another host, which asked for rows; its mark counts for a day."""
    owner = "otherhost-12-00ab.lock"
    (cache.path.parent / FOLDER).mkdir()
    (cache.path.parent / FOLDER / owner).touch()
    insert = "insert into claims values (?, x'', 3, 'host-1-00cd.lock')"
    cache.database.write(lambda c: c.execute(insert, (owner,)) and None)
    return owner


@pytest.mark.parametrize("silent_seconds", [0.0, 60.0])
def test_a_process_that_waits_gets_rows_only_while_it_shows_that_it_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent_seconds: float
) -> None:
    monkeypatch.setattr("saexp.interventions.results_cache.SILENT_SECONDS", silent_seconds)
    cache = ResultCache(tmp_path, {})
    owner = waiting_elsewhere(cache)
    items = {cache.key("row", (n,)): n for n in range(64)}
    sizes = []

    def compute(numbers: list[int]) -> Generator[list[tuple[int, np.ndarray]], None, None]:
        sizes.append(len(numbers))
        yield [(n, np.ones(1)) for n in numbers]

    assert sum(len(batch.results) for batch in shared(cache, items, compute)) == 64
    # Rows that it is left are taken in the end, too.
    assert sizes == ([32, 32] if not silent_seconds else [32, 16, 8, 4, 2, 1, 1])
    assert [row[0] for row in claims(tmp_path)] == ([owner] if silent_seconds else [])
    cache.close()


def test_damaged_claims_do_not_block_other_processes(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path, {})
    (tmp_path / "victim").write_text("content")
    keys = [cache.key("row", (n,)) for n in range(3)]
    lease = Lease.take(tmp_path)
    assert lease is not None
    rows: list[tuple[Any, ...]] = [
        ("../victim", b"".join(k[:8] for k in keys), 1, ""),
        (b"\xff\xfe", b"123", "many", None),
        (3, "text", None, 7),
        ("host-1-00ab.lock", None, None, None),
        (lease.path.name, b"12345", 1, None),
    ]
    insert = "insert into claims values (?, ?, ?, ?)"
    cache.database.write(lambda c: c.executemany(insert, rows) and None)

    def compute(numbers: list[int]) -> Generator[list[tuple[int, np.ndarray]], None, None]:
        yield [(n, np.ones(n)) for n in numbers]

    batches = list(shared(cache, dict(zip(keys, range(3), strict=True)), compute))
    assert sum(len(batch.results) for batch in batches) == 3
    assert (tmp_path / "victim").read_text() == "content"
    lease.release()
    cache.close()
