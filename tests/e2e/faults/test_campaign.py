"""The campaign of injected faults: a few attempts of every kind, and the table of the docs."""

import dataclasses
import random
import signal
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests.e2e.faults import injection

ROOT = Path(__file__).parents[3]
SCRIPTS = ROOT / "experiments" / "validation"
N_KILLS, N_DAMAGES, N_OTHERS = 2, 3, 1
WORKS = ("labels", "collecting")
"""The kinds that take a second or two; trainings are killed in test_checkpoints.py, runs with
steering and sweeps in test_signals.py, test_shared_rows.py and test_sweep.py."""


@pytest.fixture(scope="module")
def scripts():
    """The campaign's own modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        import fault_attempts
        import fault_works
        import faults

        yield SimpleNamespace(attempts=fault_attempts, works=fault_works, faults=faults)


@pytest.fixture(scope="module")
def bench(scripts, tmp_path_factory):
    return scripts.works.Bench(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def faults(scripts) -> ModuleType:
    return scripts.faults


@pytest.mark.slow
def test_a_few_attempts_of_every_kind_lose_nothing_and_change_nothing(faults, bench, tmp_path):
    planned = faults.plan(bench, N_KILLS, N_DAMAGES, N_OTHERS, WORKS)
    rows = faults.campaign(bench, planned, tmp_path, seed=1)
    assert [r for r in rows if any(r[name] for name in faults.BAD)] == []
    counts = faults.read(tmp_path / "faults.csv")
    assert {c["kind"] for c in counts} > set(faults.OTHERS)
    signals = [c for c in counts if c["kind"].startswith("SIG")]
    assert sum(c["hits"] for c in signals) > N_KILLS // 2
    assert sum(c["attempts"] for c in counts if c["kind"] in faults.attempts.DAMAGES) == N_DAMAGES


@pytest.mark.slow
def test_a_campaign_that_is_started_again_makes_what_is_missing(faults, bench, tmp_path):
    planned = faults.plan(bench, 0, 2, 0, WORKS)
    first = faults.campaign(bench, planned[:1], tmp_path, seed=0)
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.write('{"kind": "cut sho')
    again = faults.campaign(bench, planned, tmp_path, seed=0)
    assert (len(again), again[:1]) == (2, first)
    assert faults.campaign(bench, planned, tmp_path, seed=0) == again


@pytest.mark.slow
def test_the_campaign_notices_results_that_differ_and_work_that_is_done_again(scripts, bench):
    def attempt():
        return scripts.attempts.kill(bench, random.Random(0), "labels", signal.SIGKILL)

    # Nothing is wrong of an attempt in which nothing was changed, as those above.
    whole = bench.of("labels")
    bench.undisturbed["labels"] = dataclasses.replace(
        whole, digests={**whole.digests, "run/metrics.json": "other"}
    )
    try:
        (whole.state / "run" / "metrics.json").write_text('{"other": 0.5}')
        assert attempt().wrong == "run/metrics.json"
    finally:
        # It is run again when it is asked for.
        del bench.undisturbed["labels"]
    cwd = bench.cwd(scripts.works.WORKS["labels"])
    finished = scripts.works.finished(cwd)
    assert scripts.attempts.computed_again(finished, cwd, whole, whole.result).startswith(
        f"{len(finished.rows)} rows computed, 0 were missing"
    )
    (cwd / "run" / "metrics.json").write_text("{}")
    quiet = injection.CommandResult(0, "", "")
    assert "rewritten: run/metrics.json" in scripts.attempts.computed_again(
        finished, cwd, whole, quiet
    )


def test_the_page_has_the_table_of_the_measured_file(faults):
    page = faults.PAGE.read_text("utf-8")
    assert faults.with_table(page, faults.read(faults.MEASURED)) == page


def test_the_measured_campaign_lost_nothing(faults):
    rows = faults.read(faults.MEASURED)
    kills = [r for r in rows if r["kind"].startswith("SIG")]
    assert sum(r["hits"] for r in kills) >= 100
    assert {r["work"] for r in kills} == set(faults.WORKS)
    damages = [r for r in rows if r["kind"] in faults.attempts.DAMAGES]
    assert sum(r["attempts"] for r in damages) >= 200
    assert {r["kind"] for r in damages} == set(faults.attempts.DAMAGES)
    assert {r["kind"] for r in rows} > set(faults.OTHERS)
    assert [r for r in rows if any(r[name] for name in faults.BAD)] == []


@pytest.mark.parametrize("suffix", [".json", ".parquet", ".sqlite", ".html"])
def test_every_damage_changes_its_file_alike_for_a_seed(scripts, tmp_path, suffix):
    whole = _file(tmp_path, suffix)
    before = whole.read_bytes()
    for do, suffixes in scripts.attempts.DAMAGES.values():
        if suffixes and suffix not in suffixes:
            continue
        left = []
        for _ in range(2):
            whole.write_bytes(before)
            description = do(whole, 3)
            left.append((description, whole.read_bytes() if whole.exists() else None))
        assert left[0] == left[1]
        assert left[0][1] != before


def _file(folder: Path, suffix: str) -> Path:
    """A small valid file."""
    import sqlite3

    import pandas as pd

    path = folder / f"file{suffix}"
    if suffix == ".parquet":
        pd.DataFrame({"name": ["a", "b"], "value": [0.5, 1.5]}).to_parquet(path)
    elif suffix == ".sqlite":
        with sqlite3.connect(path) as file:
            file.execute("create table results (key blob primary key, value blob)")
            file.execute("insert into results values (x'01', x'0203')")
        file.close()
    else:
        path.write_text('{"value": 12.5, "names": [1, 2]}')
    return path
