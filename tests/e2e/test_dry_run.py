"""`sweep.dry_run=true` counts what the sweep then computes, and computes nothing itself."""

import re
from pathlib import Path

import pytest

from saexp.sweeps.passes import RATES, _read_rates
from tests.shipped_texts import FEW_NEUTRAL
from tests.unit.reports.run_outputs import CommandResult, command, table_of

SMALL = ["tracker=none", "intervention=none", "analyzer.n_bootstrap=0", "dataset.n_examples=20"]
SMALL += [
    "analyzer.n_background=200",
    "analyzer.scores=false",
    "hydra.sweep.dir=sweep",
    FEW_NEUTRAL,
]
GRID = ["-m", "layer=0,2", "width=256,512", *SMALL]
STORES = "outputs/cache/activations"


def plan(folder: Path, *words: str) -> CommandResult:
    """A dry run that left every file as it was."""
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    result = command(folder, *words, "sweep.dry_run=true")
    assert result.code == 0, result.err
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    return result


def tokens(result: CommandResult) -> int:
    match = re.search(r"^tokens to forward: ([\d,]+)$", result.out, re.MULTILINE)
    assert match, result.out
    return int(match[1].replace(",", ""))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("planned")


@pytest.fixture(scope="module")
def before(folder: Path) -> CommandResult:
    return plan(folder, *GRID)


@pytest.fixture(scope="module")
def swept(folder: Path, before: CommandResult) -> CommandResult:  # noqa: ARG001
    result = command(folder, *GRID)
    assert result.code == 0, result.err[-2000:]
    return result


def test_the_tokens_are_those_that_the_sweep_forwards(
    before: CommandResult, swept: CommandResult
) -> None:
    assert tokens(before) == table_of(swept.sweep)["collection/tokens_forwarded"].sum() > 0
    assert "dry run: 4 cells, 4 to run; nothing is written\n" in before.out
    assert "  1 layer=0 width=512: to run\n" in before.out


def test_the_bytes_are_those_of_the_shards(
    before: CommandResult,
    swept: CommandResult,  # noqa: ARG001
    folder: Path,
) -> None:
    shards = [p for p in (folder / STORES).rglob("*.safetensors") if p.stem.isdecimal()]
    size = sum(p.stat().st_size for p in shards)
    match = re.search(r"^disk: ([\d.]+) (kB|MB) of activations", before.out, re.MULTILINE)
    assert match
    planned = float(match[1]) * {"kB": 1e3, "MB": 1e6}[match[2]]
    # A file's header is not part of its values.
    assert 0.95 * planned <= size <= 1.2 * planned


def test_the_rate_is_from_a_short_pass_until_a_run_has_measured_it(
    before: CommandResult, swept: CommandResult, folder: Path
) -> None:
    assert swept.code == 0
    assert "tokens/s (measured by a short pass)" in before.out
    assert "4 cells of analyze/contrast/none: not known" in before.out
    after = plan(folder, "-m", "layer=1,3", "dataset.n_examples=30", *SMALL[:3], *SMALL[4:])
    assert "tokens/s (measured by earlier runs)" in after.out
    assert "2 cells of analyze/contrast/none: at most" in after.out
    assert tokens(after) > 0


def test_finished_cells_and_stored_texts_cost_nothing(swept: CommandResult, folder: Path) -> None:
    assert swept.code == 0
    again = plan(folder, *GRID)
    assert again.out.count("is reused") == 4
    assert tokens(again) == 0
    other = plan(folder, *GRID, "analyzer.alpha=0.1")
    assert "dry run: 4 cells, 4 to run" in other.out
    assert "entities (entity_last): stored already" in other.out
    assert tokens(other) == 0
    wider = plan(folder, "-m", "layer=0,4", *SMALL)
    assert tokens(wider) > 0
    assert "0 layer=0: finished in" in wider.out


def test_cells_without_a_layer_or_width_fail_with_their_line(folder: Path) -> None:
    result = plan(folder, "-m", "layer=9,3", "width=256,333", *SMALL)
    assert "dry run: 4 cells, 1 to run" in result.out
    assert "  0 layer=9 width=256: fails: layer=9 is out of range: tiny has layers" in result.out
    assert "  3 layer=3 width=333: fails: sae=tiny has no width=333 for tiny; it has" in result.out
    assert "time: at most " in result.out


def test_one_run_can_be_planned_too(folder: Path) -> None:
    words = [w for w in SMALL if not w.startswith("hydra")]
    assert "dry run: 1 cell, 1 to run" in plan(folder, *words, "layer=3").out


def test_what_cannot_be_counted_is_reported(folder: Path) -> None:
    words = ["-m", "task=collect", "model=hf", "model.name=nobody/nothing", "layer=8,first"]
    result = plan(folder, *words, *SMALL)
    assert "not counted: the files of nobody/nothing are not on this machine" in result.out
    assert "  1 layer=first: fails: " in result.out
    assert "tokens to forward: 0 (without the texts above" in result.out


def test_finished_cells_are_found_whose_numbers_were_typed(
    swept: CommandResult,  # noqa: ARG001
    folder: Path,
) -> None:
    words = ["-m", "layer=0,2", "width=256", "intervention.n_prompts=7", *SMALL]
    assert command(folder, *words).code == 0
    assert "dry run: 2 cells, 0 to run" in plan(folder, *words).out


def test_a_choice_by_a_pattern_is_planned(tmp_path: Path) -> None:
    result = plan(tmp_path, "-m", "model=glob(tin*)", *SMALL)
    assert "dry run: 2 cells, 2 to run" in result.out


@pytest.mark.parametrize(
    "content", ['{"x": [1%s]}' % ("0" * 400), '{"x": ["nan", 0, -1, 1e999]}', '{"x": 3}', "[]"]
)
def test_measured_rates_that_are_none_are_ignored(tmp_path: Path, content: str) -> None:
    (tmp_path / RATES).write_text(content)
    assert _read_rates(tmp_path) == {}


def test_a_dry_run_that_is_asked_for_in_another_way_runs_nothing(tmp_path: Path) -> None:
    result = command(tmp_path, "sweep={dry_run:true}", *SMALL)
    assert result.code == 1
    assert "nothing is run" in result.err
    assert not list(tmp_path.rglob("metrics.json"))
