"""Equal runs at once compute each row once, and one that is killed holds no other up."""

import re
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.e2e.faults.injection import (
    PATIENCE_SECONDS,
    CommandResult,
    Started,
    digests_of_results,
    equal_up_to_rounding,
    start,
)
from tests.shipped_texts import FEW_NEUTRAL

WORDS = (
    "tracker=none",
    "intervention.n_controls=2",
    "intervention.n_prompts=8",
    "intervention.n_choice_prompts=8",
    "intervention.n_neutral=8",
    "intervention.max_new_tokens=4",
    "dataset.n_examples=40",
    "analyzer.n_background=200",
    "analyzer.scores=false",
    FEW_NEUTRAL,
    "analyzer.n_bootstrap=0",
)


def started(cache_dir: Path, folder: Path) -> Started:
    folder.mkdir(parents=True)
    words = [*WORDS, f"cache_dir={cache_dir}", f"hydra.run.dir={folder / 'run'}"]
    return start(words, folder)


def n_computed(result: CommandResult) -> int:
    return sum(map(int, re.findall(r"rows, (\d+) computed", result.out + result.err)))


def n_stored(cache_dir: Path) -> int:
    with closing(sqlite3.connect(cache_dir / "generations.sqlite", timeout=60)) as file:
        try:
            return int(file.execute("select count(*) from checked_results").fetchone()[0])
        except sqlite3.OperationalError:
            return 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The folder of a run alone, and how many rows it computed."""
    folder = tmp_path_factory.mktemp("alone")
    result = started(folder / "cache", folder / "1").wait()
    assert result.code == 0, result
    return folder / "1" / "run", n_computed(result)


def assert_equal_results(folder: Path, expected_folder: Path) -> None:
    """Shared rows are computed in other batches, which changes scores of latents by rounding."""
    results, expected = digests_of_results(folder), digests_of_results(expected_folder)
    assert results.keys() == expected.keys()
    for name in results:
        same = results[name] == expected[name]
        assert same or equal_up_to_rounding(folder / name, expected_folder / name), name


def test_equal_runs_at_once_compute_each_row_once(undisturbed, tmp_path):
    expected_folder, n_rows = undisturbed
    runs = [started(tmp_path / "cache", tmp_path / str(i)) for i in range(2)]
    results = [run.wait() for run in runs]
    assert [s.code for s in results] == [0, 0], results
    for i in range(2):
        assert_equal_results(tmp_path / str(i) / "run", expected_folder)
    assert sum(map(n_computed, results)) == n_rows


def test_rows_of_a_killed_run_are_computed_by_the_other(undisturbed, tmp_path):
    expected_folder, n_rows = undisturbed
    cache = tmp_path / "cache"
    runs = [started(cache, tmp_path / str(i)) for i in range(2)]
    began = time.monotonic()
    while not (cache / "generations.sqlite").exists() or n_stored(cache) < 300:
        assert time.monotonic() - began < PATIENCE_SECONDS
        time.sleep(0.02)
    runs[0].process.kill()
    n_before = n_stored(cache)
    results = [run.wait() for run in runs]
    assert [s.code for s in results] == [-signal.SIGKILL, 0], results
    assert_equal_results(tmp_path / "1" / "run", expected_folder)
    # What the killed run has stored is not computed again, nor anything twice.
    assert n_rows - n_before - 250 <= sum(map(n_computed, results)) <= n_rows
