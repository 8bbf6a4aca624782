"""The simulated error rates and coverages: the scripts run, and the docs say what they measured."""

import csv
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests import interpreters

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "validation"

KNOWN_SHORT = {"rate; n=10, value=0.99"}
"""Coverages below 0.92 that the docs explain."""


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The study's own modules."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import scenarios
    import simulate
    import table

    logger = logging.getLogger("saexp")
    level = logger.level
    yield SimpleNamespace(scenarios=scenarios, simulate=simulate, table=table)
    # The simulation is quieter than tests are.
    logger.setLevel(level)


@pytest.fixture
def table(scripts: SimpleNamespace) -> ModuleType:
    return scripts.table


@pytest.fixture
def names(scripts: SimpleNamespace) -> list[str]:
    return [s.name for s in scripts.scenarios.scenarios()]


def rows(out: Path) -> list[dict[str, str]]:
    with out.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_page_has_the_table_of_the_measured_files(table: ModuleType) -> None:
    page = table.PAGE.read_text("utf-8")
    assert table.with_table(page) == page


def test_every_scenario_is_measured(table: ModuleType, names: list[str]) -> None:
    assert set(table.read(FOLDER / "measured" / "after.csv")) == set(names)


def test_nothing_is_found_too_often_and_intervals_cover(table: ModuleType) -> None:
    measured = table.read(FOLDER / "measured" / "after.csv")
    often = {n for n, r in measured.items() if r["kind"] == "error rate" and table.too_often(r)}
    short = {n for n, r in measured.items() if r["kind"] == "coverage" and table.too_rarely(r)}
    assert often == set()
    assert short <= KNOWN_SHORT


def test_a_quick_run_measures_and_goes_on_with_what_is_missing(
    scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.csv"

    def simulate(only: str) -> list[dict[str, str]]:
        monkeypatch.setattr(sys, "argv", ["simulate.py", str(out), "--quick", "--only", only])
        scripts.simulate.main()
        return rows(out)

    first = simulate("separation, 4 types; n=10, value=0.97")
    assert [r["scenario"] for r in first] == ["separation, 4 types; n=10, value=0.97"]
    assert float(first[0]["value"]) > 0.85
    again = simulate("separation, 4 types; n=10")
    assert len(again) == 4
    assert again[0] == first[0]


def test_a_scenario_measured_in_another_process_is_the_same(
    scripts: SimpleNamespace, tmp_path: Path
) -> None:
    name, out = "AUROC, 4 types; n=30, value=0.8", tmp_path / "out.csv"
    code = f"import runpy, sys; sys.path.insert(0, {str(FOLDER)!r})\n"
    code += f"sys.argv = ['simulate.py', {str(out)!r}, '--quick', '--only', {name!r}]\n"
    code += "runpy.run_path(sys.path[0] + '/simulate.py', run_name='__main__')"
    process = interpreters.run(["-c", code])
    assert process.returncode == 0, process.stderr[-2000:]
    (measured,) = rows(out)
    (scenario,) = [s for s in scripts.scenarios.scenarios() if name in s.name]
    assert scripts.simulate.row(scenario, quick=True, version="")["value"] == measured["value"]
