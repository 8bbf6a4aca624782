"""`hydra/sweeper=saexp_optuna` finds the best cell of a grid, and continues after it was killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.reports.left import command, table_of

optuna = pytest.importorskip("optuna")

CELL = ["tracker=none", "analyzer.n_bootstrap=0", "analyzer.n_background=200"]
CELL += ["analyzer.scores=false", "dataset.n_examples=40"]
STEERED = ["intervention.n_prompts=8", "intervention.n_choice_prompts=4", "intervention.top_k=1"]
STEERED += [
    "intervention.n_controls=1",
    "intervention.max_new_tokens=8",
    "intervention.n_neutral=2",
]
SEARCH = ["-m", "hydra/sweeper=saexp_optuna"]
OBJECTIVE = "effect/refusal/unknown_top1"
GRID = ["layer=0,1,2,3,4", "coefficient=0,0.2,0.4,0.6"]
AUROC = ["objective=contrast/best_auroc_unknown_test", "intervention=none", *CELL]
AUROC += ["layer=0,1,2,3,4", "width=256,512", "hydra.sweep.dir=sweep"]


def trials(folder: Path) -> list[optuna.trial.FrozenTrial]:
    storage = f"sqlite:///{folder / 'sweep/study.db'}"
    return optuna.load_study(study_name="saexp", storage=storage).get_trials()


def test_twelve_trials_find_the_best_cell_of_the_grid(tmp_path: Path) -> None:
    grid = command(tmp_path, "-m", *GRID, *CELL, *STEERED, "hydra.sweep.dir=grid")
    assert grid.code == 0, grid.err[-2000:]
    oracle = table_of(tmp_path / "grid")[OBJECTIVE]
    assert len(oracle) == 20
    assert oracle.nunique() > 1
    words = [*SEARCH, "hydra.sweeper.n_trials=12", f"objective={OBJECTIVE}", *GRID]
    said = command(tmp_path, *words, *CELL, *STEERED, "hydra.sweep.dir=sweep")
    assert said.code == 0, said.err[-2000:]
    table = table_of(tmp_path / "sweep")
    assert len(table) == len(table.drop_duplicates(["layer", "coefficient"])) == 12
    assert set(table["status"]) == {"finished"}
    assert table[OBJECTIVE].max() == oracle.max()
    values = [t.value for t in trials(tmp_path) if t.value is not None]
    assert max(values) == oracle.max()
    best = table.loc[table[OBJECTIVE].idxmax()]
    assert f"best of 12 cells: {oracle.max():g} at " in said.out
    assert best["coefficient"] > 0


def start(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    # Files, as nobody reads a pipe before the process is killed.
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "saexp", *words], cwd=folder, stdout=log, stderr=log
        )


def finished(folder: Path) -> list[Path]:
    pages = (folder / "sweep").glob("*/provenance.json")
    return [p.parent for p in pages if json.loads(p.read_text()).get("status") == "finished"]


def test_a_killed_search_continues_with_the_cell_that_was_running(tmp_path: Path) -> None:
    words = [*SEARCH, "hydra.sweeper.n_trials=5", *AUROC]
    process = start(tmp_path, *words)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "sweep").glob("2_*/.hydra"))) == 0:
        assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {p.name: (p / "metrics.json").stat().st_mtime_ns for p in finished(tmp_path)}
    running = [t for t in trials(tmp_path) if t.state == optuna.trial.TrialState.RUNNING]
    assert len(running) == 1
    assert len(before) == 2
    again = start(tmp_path, *words)
    assert again.wait(240) == 0, (tmp_path / "log").read_text()[-2000:]
    table = table_of(tmp_path / "sweep")
    assert list(table["cell"]) == [0, 1, 2, 3, 4]
    assert set(table["status"]) == {"finished"}
    assert len(table.drop_duplicates(["layer", "width"])) == 5
    after = {p.name: (p / "metrics.json").stat().st_mtime_ns for p in finished(tmp_path)}
    assert before.items() <= after.items()
    states = {t.number: t.state for t in trials(tmp_path)}
    assert states[running[0].number] == optuna.trial.TrialState.COMPLETE
    assert optuna.trial.TrialState.RUNNING not in states.values()
    # Layers that the search may visit are collected in one pass.
    assert (table["collection/tokens_forwarded"] > 0).sum() <= 1
    plan = json.loads((tmp_path / "sweep/plan.json").read_text())
    (together,) = plan["passes"].values()
    assert all([layer, None] in together for layer in range(5))
    # More trials of the same search continue it; another search does not.
    more = command(tmp_path, *SEARCH, "hydra.sweeper.n_trials=20", *AUROC)
    assert more.code == 0, more.err[-2000:]
    assert "all 10 cells of the search have been run" in more.out
    assert len(table_of(tmp_path / "sweep")) == 10
    other = command(tmp_path, *SEARCH, *AUROC, "layer=0,1")
    assert other.code == 1
    assert "is the study of another search" in other.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [*AUROC[1:]],
            "hydra/sweeper=saexp_optuna needs a metric to optimise; type e.g. objective=",
        ),
        ([AUROC[0], "layer=0", "hydra.sweep.dir=sweep"], "a search needs a swept key; type e.g."),
        ([*AUROC, "objective="], "objective= is not the name of a metric"),
        ([*AUROC, "layer=interval(4,0)"], "layer: the interval from 4 to 0 is empty"),
        ([*AUROC, "seed=tag(log,interval(0,4))"], "seed: a logarithmic interval begins above 0"),
        (
            [*AUROC, "layer=interval(1,3.5)"],
            "an interval chooses fractions: type 'int(interval(1,3))' or 'range(1,4)' for layer",
        ),
        ([*AUROC, "sweep.dry=true"], "saexp: no key 'sweep.dry'; did you mean sweep.dry_run?"),
        (["hydra.sweeper.direction=up", *AUROC], "hydra.sweeper.direction=up"),
        (["hydra.sweeper.n_trials=0", *AUROC], "hydra.sweeper.n_trials=0"),
        (["hydra.sweeper.n_trails=3", *AUROC], "n_trails"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, words: list[str], message: str) -> None:
    said = command(tmp_path, *SEARCH, *words)
    assert said.code == 1
    assert message in said.err.strip().splitlines()[-1]
    assert said.err.count(message) == 1


def test_a_damaged_study_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/study.db").write_text("damaged")
    said = command(tmp_path, *SEARCH, *AUROC)
    assert said.code == 1
    assert "sweep/study.db cannot be read (" in said.err.splitlines()[-1]
    assert "Traceback" not in said.err


def test_a_search_typed_again_runs_the_cells_that_failed(tmp_path: Path) -> None:
    words = [*SEARCH, *AUROC, "layer=2,9", "width=256", "hydra.sweeper.n_trials=2"]
    for _ in range(2):
        said = command(tmp_path, *words)
        assert said.code == 1
        assert said.err.count("failed: layer=9 is out of range") == 1
        assert sorted(table_of(tmp_path / "sweep")["status"]) == ["failed", "finished"]
    # Proposals of cells that were run already have none.
    cells = [t.user_attrs["cell"] for t in trials(tmp_path) if "cell" in t.user_attrs]
    assert sorted(map(cells.count, set(cells))) == [1, 2]


def test_a_plan_of_a_search_says_how_many_of_the_cells_it_runs(tmp_path: Path) -> None:
    said = command(tmp_path, *SEARCH, "hydra.sweeper.n_trials=3", *AUROC, "sweep.dry_run=true")
    assert said.code == 0, said.err
    assert "dry run: 10 cells, 10 to run" in said.out
    assert "a search runs at most 3 of these cells" in said.out
    assert "  3 cells of analyze/contrast/none: " in said.out
    assert not (tmp_path / "sweep").exists()


def test_an_interval_of_whole_numbers_ends_when_all_were_visited(tmp_path: Path) -> None:
    words = ["objective=contrast/best_auroc_unknown_test", "intervention=none", *CELL]
    words += ["layer=int(interval(1,2))", "hydra.sweeper.n_trials=9", "hydra.sweep.dir=sweep"]
    said = command(tmp_path, *SEARCH, *words)
    assert said.code == 0, said.err[-2000:]
    assert sorted(table_of(tmp_path / "sweep")["layer"]) == [1, 2]
