"""A damaged results database changes no result, and what is sound in it is not computed again."""

import logging
import random
import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch

from saexp.interventions.cached_generation import generate
from saexp.interventions.results_cache import ResultCache
from saexp.interventions.stream_edits import Add, Row, Vector
from saexp.models import Hookpoint
from saexp.saes import SAESettings, SparseAutoencoder
from tests.e2e.faults.injection import empty, flip_byte, garbage, truncate
from tests.random_models import D_MODEL, TEXTS, random_lm

AT = Hookpoint(1, "resid_post")
PAGE = 4096


def rows() -> list[Row]:
    ids = [tuple(random_lm("llama").tokenizer(t)["input_ids"][:9]) for t in TEXTS]
    steered = [
        Row(i, (Add(AT, Vector(torch.eye(D_MODEL)[k % D_MODEL]), 0.1 * k),), (1,))
        for i in ids
        for k in range(1, 101)
    ]
    return [*steered, *(Row(i) for i in ids)]


def generated(cache_dir: Path | None, caplog: pytest.LogCaptureFixture) -> tuple[list, int]:
    """Texts of all rows, and how many were computed."""
    caplog.clear()
    eye, zeros = torch.eye(D_MODEL), torch.zeros(D_MODEL)
    weights = {"W_enc": eye, "W_dec": eye, "b_enc": zeros, "b_dec": zeros}
    sae = SparseAutoencoder(weights, SAESettings(architecture="standard", hookpoint=AT))
    cache = ResultCache(cache_dir, {"model": "a"}) if cache_dir else None
    with caplog.at_level(logging.INFO):
        texts = generate(
            random_lm("llama"), rows(), {AT: sae}, max_new_tokens=12, batch_tokens=4096, cache=cache
        )
    if cache:
        cache.close()
    (n_computed,) = re.findall(r"(\d+) computed", caplog.text)
    return texts, int(n_computed)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with all rows."""
    return tmp_path_factory.mktemp("sound")


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    return []


@pytest.fixture
def stored(
    sound: Path, texts: list[list[int]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> Path:
    """A copy of it."""
    if not texts:
        texts += generated(None, caplog)[0]
        assert generated(sound, caplog)[0] == texts
    shutil.copy(sound / "generations.sqlite", tmp_path)
    return tmp_path


def damage_page(path: Path, seed: int) -> None:
    """Random bytes in the place of a page; seed 0: the first, with the header."""
    content = bytearray(path.read_bytes())
    rng = random.Random(seed)
    start = PAGE * (rng.randrange(len(content) // PAGE) if seed else 0)
    content[start : start + PAGE] = rng.randbytes(PAGE) if seed % 2 else bytes(PAGE)
    path.write_bytes(content)


def append(path: Path, seed: int) -> None:
    path.write_bytes(path.read_bytes() + random.Random(seed).randbytes(5000))


def text_file(path: Path, seed: int) -> None:  # noqa: ARG001
    path.write_text("not a database, but long enough to be one" * 9)


def folder(path: Path, seed: int) -> None:  # noqa: ARG001
    path.unlink()
    path.mkdir()
    (path / "file").touch()


def statement(sql: str) -> Callable[[Path, int], None]:
    def execute(path: Path, seed: int) -> None:  # noqa: ARG001
        with closing(sqlite3.connect(path)) as file, file:
            for part in sql.split(";"):
                file.execute(part)

    return execute


FEW = "where rowid % 10 = 3"
STATEMENTS = {
    "edited values": f"update checked_results set value = zeroblob(length(value)) {FEW}",
    "short values": f"update checked_results set value = substr(value, 1, 5) {FEW}",
    "empty values": f"update checked_results set value = x'' {FEW} and length(value) > 0",
    "numbers": f"update checked_results set value = 7 {FEW}",
    "texts": f"update checked_results set value = cast(x'fffe' as text) {FEW}",
    "nothing": f"update checked_results set value = null, checksum = null {FEW}",
    "another row's value": "update checked_results set (value, checksum) ="
    f" (select value, checksum from checked_results where rowid = 1) {FEW}",
}
TABLES = {
    "no table": "drop table checked_results",
    "other columns": "drop table checked_results; create table checked_results (a, b)",
    "other claims": "drop table claims; create table claims (a, b)",
    "a view": "drop table claims; create view claims as select 1 as owner",
}
N_ROWS = 101 * len(TEXTS)


def check(stored: Path, texts: list[list[int]], most: int, caplog: pytest.LogCaptureFixture) -> str:
    """Results are right, at most so many were computed, and none the second time; the log."""
    again, n_computed = generated(stored, caplog)
    log = caplog.text
    assert again == texts
    assert n_computed <= most
    again, n_computed = generated(stored, caplog)
    assert (again, n_computed) == (texts, 0)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING], "reported twice"
    return log


@pytest.mark.parametrize("seed", range(6))
def test_a_flipped_byte_costs_the_rows_of_a_page(stored, texts, caplog, seed):
    flip_byte(stored / "generations.sqlite", seed)
    check(stored, texts, N_ROWS // 3, caplog)


@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_page_costs_its_rows(stored, texts, caplog, seed):
    damage_page(stored / "generations.sqlite", seed)
    check(stored, texts, N_ROWS // 3, caplog)


@pytest.mark.parametrize("seed", range(4))
def test_the_rest_of_a_truncated_file_is_read(stored, texts, caplog, seed):
    path = stored / "generations.sqlite"
    n_bytes = path.stat().st_size
    truncate(path, seed)
    lost = 1 - path.stat().st_size / n_bytes
    # Keys are also in the index, a third of the file, where no value can be read.
    check(stored, texts, min(N_ROWS, int(2 * lost * N_ROWS) + 60), caplog)


@pytest.mark.parametrize("damage", [garbage, text_file, folder])
def test_what_is_no_database_is_set_aside(stored, texts, caplog, damage):
    damage(stored / "generations.sqlite", 1)
    log = check(stored, texts, N_ROWS, caplog)
    (aside,) = stored.glob("generations.sqlite.damaged-*")
    assert f"was damaged: 0 rows could be read and are kept; {aside.name}" in log.replace(
        "the rest is computed again, and the damaged file is now ", ""
    )


@pytest.mark.parametrize("damage", [empty, lambda path, _: path.unlink()])
def test_an_empty_or_deleted_file_begins_anew(stored, texts, caplog, damage):
    damage(stored / "generations.sqlite", 1)
    log = check(stored, texts, N_ROWS, caplog)
    assert "WARNING" not in log


def test_bytes_behind_the_end_change_nothing(stored, texts, caplog):
    append(stored / "generations.sqlite", 1)
    check(stored, texts, 0, caplog)


@pytest.mark.parametrize("name", STATEMENTS)
def test_rows_with_other_values_are_computed_again(stored, texts, caplog, name):
    statement(STATEMENTS[name])(stored / "generations.sqlite", 0)
    n_damaged = len(range(3, N_ROWS + 1, 10))
    log = check(stored, texts, n_damaged, caplog)
    if name == "empty values":
        return
    assert log.count(f"{n_damaged} of {N_ROWS} rows damaged (wrong checksum)") == 1
    assert not list(stored.glob("*.damaged-*"))


@pytest.mark.parametrize("name", TABLES)
def test_other_tables_are_set_aside(stored, texts, caplog, name):
    statement(TABLES[name])(stored / "generations.sqlite", 0)
    check(stored, texts, 0 if "checked" not in TABLES[name] else N_ROWS, caplog)


def test_a_journal_of_the_damaged_file_is_not_applied_to_the_new_one(stored, texts, caplog):
    path = stored / "generations.sqlite"
    damage_page(path, 0)
    path.with_name(path.name + "-journal").write_bytes(b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" * 99)
    check(stored, texts, 0, caplog)


@pytest.mark.parametrize("seed", range(2))
def test_a_file_damaged_while_a_run_has_it_open_is_rebuilt(stored, texts, caplog, seed):
    cache = ResultCache(stored, {"model": "a"})
    keys = [cache.key("tokens 12", row.key) for row in rows()]
    before = cache.get(keys)
    assert len(before) == N_ROWS
    for page in range(0, 40, 3):
        damage_page(stored / "generations.sqlite", 100 * seed + page)
    cache.put(list(before.items()))
    cache.close()
    check(stored, texts, 0, caplog)


def test_values_longer_than_a_page_can_be_read_from_a_damaged_file(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path, {})
    numbers = [0, 1, 60, 500, 502, 503, 504, 505, 511, 512, 1000, 1020, 1021, 5000, 20000]
    values = {cache.key("row", (n,)): torch.arange(n).double().numpy() for n in numbers}
    cache.put(list(values.items()))
    cache.close()
    damage_page(tmp_path / "generations.sqlite", 0)
    cache = ResultCache(tmp_path, {})
    again = cache.get(values)
    assert {k: v.tolist() for k, v in again.items()} == {k: v.tolist() for k, v in values.items()}
    cache.close()
