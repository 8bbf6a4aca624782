"""`hydra/sweeper=saexp_optuna` finds the best cell of a grid, and continues after it was killed."""

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest

from saexp import registry
from tests import interpreters
from tests.shipped_texts import FEW_NEUTRAL
from tests.unit.reports.run_outputs import command, table_of

optuna = pytest.importorskip("optuna")

CELL = ["tracker=none", "analyzer.n_bootstrap=0", "analyzer.n_background=200"]
CELL += ["analyzer.scores=false", "dataset.n_examples=40", FEW_NEUTRAL]
SEARCH = ["-m", "hydra/sweeper=saexp_optuna"]
OBJECTIVE = "contrast/best_auroc_unknown_test"
GRID = ["intervention=none", "layer=1,2", "width=256,512", *CELL, "hydra.sweep.dir=sweep"]
AUROC = [f"objective={OBJECTIVE}", *GRID]
COLLECT = ["task=collect", "objective=collection/n_rows", "tracker=none", "dataset.n_examples=4"]
COLLECT += ["hydra.sweep.dir=sweep"]
HILL = """
from dataclasses import dataclass
import saexp

@dataclass(kw_only=True)
class HillConfig(saexp.config.AnalyzerConfig):
    at: int = 0
    height: int = 1
    side: str = "north"

def value(at, height, side):
    return None if at == 0 else 2 * height + at + 0.5 * (side == "south")

@saexp.register("analyzer", "hill", config=HillConfig)
class Hill:
    def __init__(self, cfg):
        self.cfg = cfg

    def analyze(self, inputs):
        height = value(self.cfg.at, self.cfg.height, self.cfg.side)
        return saexp.Result(metrics={"hill/height": height})
"""
"""An analyzer whose result is a formula of its settings, and missing for a fifth of the cells."""


def trials(folder: Path) -> list[optuna.trial.FrozenTrial]:
    storage = f"sqlite:///{folder / 'sweep/study.db'}"
    return optuna.load_study(study_name="saexp", storage=storage).get_trials()


@pytest.fixture
def hill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., float | None]]:
    """The formula of the plugin `hill`."""
    (tmp_path / "hill.py").write_text(HILL)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield lambda *words: sys.modules["hill"].value(*words)
    registry.PLUGINS.components.pop(("analyzer", "hill"))
    del sys.modules["hill"]


def test_twelve_trials_find_the_best_cell_of_the_grid(
    tmp_path: Path, hill: Callable[..., float | None]
) -> None:
    grid = {"at": [0, 1, 2, 3, 4], "height": [1, 2], "side": ["north", "south"]}
    words = [f"analyzer.{name}={','.join(map(str, values))}" for name, values in grid.items()]
    words += ["plugins=[hill]", "analyzer=hill", "intervention=none", "layer=1", "tracker=none"]
    words += ["dataset.n_examples=4", FEW_NEUTRAL, "objective=hill/height"]
    search = command(
        tmp_path, *SEARCH, *words, "hydra.sweeper.n_trials=12", "hydra.sweep.dir=sweep"
    )
    assert search.code == 0, search.err[-2000:]
    table = table_of(tmp_path / "sweep")
    assert table["status"].tolist() == ["finished"] * 12
    values = table.set_index([f"analyzer.{name}" for name in grid])["hill/height"]
    assert values.index.is_unique
    expected = {cell: hill(*cell) for cell in itertools.product(*grid.values())}
    for cell, value in values.items():
        assert (None if pd.isna(value) else value) == expected[cell]
    # A trial that asks for a cell again is given its value.
    assert {t.value for t in trials(tmp_path) if t.value is not None} == {*values.dropna()}
    best = int(table.loc[table["hill/height"].idxmax(), "cell"])
    assert values.max() == max(value for value in expected.values() if value is not None) == 8.5
    n_missing = values.isna().sum()
    assert n_missing
    sentence = f"Of 12 cells of the search ({n_missing} without a value), cell {best} has the "
    sentence += "largest hill/height: "
    assert sentence in search.out, search.out
    assert table.loc[table["is_best"], "cell"].tolist() == [best]
    plan = json.loads((tmp_path / "sweep/plan.json").read_text())
    assert plan["search"]["best"]["cell"] == best
    assert plan["search"]["best"]["value"] == 8.5


def start(folder: Path, *words: str) -> interpreters.Process:
    return interpreters.Process(["-m", "saexp", *words], folder)


def finished(folder: Path) -> list[Path]:
    pages = (folder / "sweep").glob("*/provenance.json")
    return [p.parent for p in pages if json.loads(p.read_text()).get("status") == "finished"]


def test_a_killed_search_continues_with_the_cell_that_was_running(tmp_path: Path) -> None:
    words = [*SEARCH, "hydra.sweeper.n_trials=3", *AUROC]
    process = start(tmp_path, *words)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "sweep").glob("1_*/.hydra"))) == 0:
        assert process.poll() is None, process.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    before = {p.name: (p / "metrics.json").stat().st_mtime_ns for p in finished(tmp_path)}
    running = [t for t in trials(tmp_path) if t.state == optuna.trial.TrialState.RUNNING]
    assert len(running) == 1
    assert len(before) == 1
    again = command(tmp_path, *words)
    assert again.code == 0, again.err[-2000:]
    table = table_of(tmp_path / "sweep")
    assert list(table["cell"]) == [0, 1, 2]
    assert set(table["status"]) == {"finished"}
    assert len(table.drop_duplicates(["layer", "width"])) == 3
    assert {t.value for t in trials(tmp_path) if t.value is not None} == {*table[OBJECTIVE]}
    after = {p.name: (p / "metrics.json").stat().st_mtime_ns for p in finished(tmp_path)}
    assert before.items() <= after.items()
    states = {t.number: t.state for t in trials(tmp_path)}
    assert states[running[0].number] == optuna.trial.TrialState.COMPLETE
    assert optuna.trial.TrialState.RUNNING not in states.values()
    # Layers that the search may visit are collected in one pass.
    assert (table["collection/tokens_forwarded"] > 0).sum() <= 1
    plan = json.loads((tmp_path / "sweep/plan.json").read_text())
    (together,) = plan["passes"].values()
    assert all([layer, None] in together for layer in (1, 2))
    # More trials of the same search continue it; another search does not.
    more = command(tmp_path, *SEARCH, "hydra.sweeper.n_trials=20", *AUROC)
    assert more.code == 0, more.err[-2000:]
    assert "all 4 cells of the search have been run" in more.out
    assert len(table_of(tmp_path / "sweep")) == 4
    other = command(tmp_path, *SEARCH, *AUROC, "layer=1,2,3")
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
    result = command(tmp_path, *SEARCH, *words)
    assert result.code == 1
    assert message in result.err.strip().splitlines()[-1]
    assert result.err.count(message) == 1


def test_a_damaged_study_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/study.db").write_text("damaged")
    result = command(tmp_path, *SEARCH, *AUROC)
    assert result.code == 1
    assert "sweep/study.db cannot be read (" in result.err.splitlines()[-1]
    assert "Traceback" not in result.err


def test_a_search_typed_again_runs_the_cells_that_failed(tmp_path: Path) -> None:
    words = [*SEARCH, *COLLECT, "layer=2,9", "hydra.sweeper.n_trials=2"]
    for _ in range(2):
        result = command(tmp_path, *words)
        assert result.code == 1
        assert result.err.count("failed: layer=9 is out of range") == 1
        assert sorted(table_of(tmp_path / "sweep")["status"]) == ["failed", "finished"]
    # Proposals of cells that were run already have none.
    cells = [t.user_attrs["cell"] for t in trials(tmp_path) if "cell" in t.user_attrs]
    assert sorted(map(cells.count, set(cells))) == [1, 2]


def test_a_plan_of_a_search_says_how_many_of_the_cells_it_runs(tmp_path: Path) -> None:
    result = command(tmp_path, *SEARCH, "hydra.sweeper.n_trials=3", *AUROC, "sweep.dry_run=true")
    assert result.code == 0, result.err
    assert "dry run: 4 cells, 4 to run" in result.out
    assert "a search runs at most 3 of these cells" in result.out
    assert "  3 cells of analyze/contrast/none: " in result.out
    assert not (tmp_path / "sweep").exists()


def test_an_interval_of_whole_numbers_ends_when_all_were_visited(tmp_path: Path) -> None:
    words = ["layer=int(interval(1,2))", "hydra.sweeper.n_trials=9"]
    result = command(tmp_path, *SEARCH, *COLLECT, *words)
    assert result.code == 0, result.err[-2000:]
    assert sorted(table_of(tmp_path / "sweep")["layer"]) == [1, 2]
