"""task=report: the pages of saved runs and sweeps are those that the runs wrote."""

import json
from pathlib import Path

import pandas as pd
import pytest

from tests.shipped_texts import FEW_NEUTRAL
from tests.unit.reports.run_outputs import (
    CommandResult,
    assert_links_lead_to_reports,
    command,
    page_of,
    table_of,
)

SMALL = ["tracker=none", "cache_dir=cache", "dataset.n_examples=20", "analyzer.n_bootstrap=0"]
SMALL += ["analyzer.n_background=200", "analyzer.scores=false", "intervention=none", FEW_NEUTRAL]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report_again")


@pytest.fixture(scope="module")
def swept(folder: Path) -> CommandResult:
    return command(folder, "-m", "layer=1,9,2", "width=256", *SMALL, "hydra.sweep.dir=sweep")


def report(folder: Path, path: str, *words: str) -> CommandResult:
    return command(folder, "task=report", f"path={path}", *words, "hydra.run.dir=own")


def test_a_sweeps_pages_are_equal_byte_for_byte(folder: Path, swept: CommandResult) -> None:
    assert table_of(swept.sweep)["status"].tolist() == ["finished", "failed", "finished"]
    pages = [*sorted(swept.sweep.glob("*/report.html")), swept.sweep / "sweep.html"]
    files = [*pages, swept.sweep / "sweep.parquet"]
    before = {file: file.read_bytes() for file in files}
    assert len(pages) == 3
    for file in files[1:]:
        file.unlink()
    files[0].write_text("changed")
    result = report(folder, "sweep")
    assert result.code == 0, result.err[-2000:]
    assert {file: file.read_bytes() for file in files} == before
    assert "pages of 2 cells written again" in result.out
    assert result.out.splitlines()[-1] == "report: sweep/sweep.html"
    assert_links_lead_to_reports(swept.sweep, 2)


def test_a_partial_sweep_is_reported_with_its_missing_cells(
    folder: Path, swept: CommandResult
) -> None:
    """As `kill -9` leaves it: without table and page, a cell killed midway and one not begun."""
    plan = swept.sweep / "plan.json"
    content = json.loads(plan.read_text("utf-8"))
    cells = [*content["cells"], ["layer=3", "width=256"], ["layer=4", "width=256"]]
    plan.write_text(json.dumps({**content, "cells": cells}))
    (swept.sweep / "3_layer=3/.hydra").mkdir(parents=True)
    for name in ("sweep.parquet", "sweep.html", "latent_matches.parquet"):
        (swept.sweep / name).unlink()
    result = report(folder, "sweep", "cells=false")
    assert result.code == 0, result.err[-2000:]
    states = ["finished", "failed", "finished", "stopped", "not run"]
    assert table_of(swept.sweep)["status"].tolist() == states
    assert "latents of different SAEs are not matched" in result.out
    assert "cell not run" in page_of(swept.sweep)


@pytest.mark.usefixtures("swept")
def test_a_page_that_changes_leaves_the_run_reusable(folder: Path) -> None:
    """As another version of saexp or plotly would change it."""
    (run,) = folder.glob("sweep/0_*")
    text = (run / "report.html").read_text("utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saexp.reports.analysis._title", lambda _: "another title")
        # From another folder, where the run's relative cache_dir is not.
        (folder / "elsewhere").mkdir()
        assert report(folder / "elsewhere", str(run.resolve())).code == 0
    assert "another title" in (run / "report.html").read_text("utf-8") != text
    words = ["layer=1", "width=256", *SMALL, "resume=true", "hydra.run.dir=copy"]
    result = command(folder, *words)
    assert result.code == 0, result.err[-2000:]
    assert json.loads((folder / "copy/metrics.json").read_text())["collection/seconds"] == 0
    assert "not reused" not in result.err
    assert pd.read_parquet(run / "latents.parquet").equals(
        pd.read_parquet(folder / "copy/latents.parquet")
    )


@pytest.mark.usefixtures("swept")
def test_a_damaged_table_or_another_folder_is_one_line(folder: Path) -> None:
    (run,) = folder.glob("sweep/2_*")
    (run / "rows.parquet").write_bytes(b"")
    (folder / "foreign/1/.hydra").mkdir(parents=True)
    for path, part in (
        (str(run), "rows.parquet was changed since the run wrote it"),
        ("cache", "path=cache holds neither a run nor a sweep"),
        ("nowhere", "path=nowhere does not exist"),
        ("foreign", "path=foreign holds neither a run nor a sweep"),
    ):
        result = report(folder, path)
        assert result.code == 1
        assert part in result.err.splitlines()[-1]
    result = report(folder, "sweep")
    assert result.code == 0
    assert "no page of 2_layer=2" in result.out
    assert table_of(folder / "sweep")["status"].tolist()[2] == "damaged"
    result = command(folder, "task=report")
    assert "saexp: task=report needs the folder of a run or sweep" in result.err


TASKS = {
    "evaluate": ["task.n_texts=8", "task.n_bootstrap=0"],
    "train": ["sae_trainer.n_samples=2048", "sae_trainer.batch_size=256", "width=64"],
    "dashboard": ["task.latents=[12,40]"],
    "label": ["task.n_samples=0", "task.max_new_tokens=2"],
    "analyze": ["intervention=ablate", "intervention.n_prompts=4", "intervention.n_controls=1"]
    + ["intervention.max_new_tokens=3", "intervention.n_choice_prompts=2"]
    + ["intervention.size=small", "intervention.top_k=4"],
}


def run_of(folder: Path, task: str) -> Path:
    """The folder of the task's run, which is made once."""
    if not (folder / task).exists():
        small = ["tracker=none", "cache_dir=cache", "dataset.n_examples=20", "layer=2"]
        small += ["analyzer.n_bootstrap=0", "analyzer.n_background=200", FEW_NEUTRAL]
        words = [f"task={task}", *small, *TASKS[task], f"hydra.run.dir={task}"]
        result = command(folder, *words)
        assert result.code == 0, result.err[-2000:]
    return folder / task


@pytest.mark.parametrize("task", TASKS)
def test_the_page_of_every_task_is_equal(folder: Path, task: str) -> None:
    page = run_of(folder, task) / ("dashboard.html" if task == "dashboard" else "report.html")
    before = page.read_bytes()
    page.unlink()
    assert report(folder, task).code == 0
    assert page.read_bytes() == before


def test_a_small_causal_test_keeps_what_a_command_types(folder: Path) -> None:
    """Also `top_k=4`, which is the default."""
    about = json.loads((run_of(folder, "analyze") / "provenance.json").read_text("utf-8"))
    (note,) = [n for n in about["notes"] if n.startswith("intervention.size=small")]
    assert "n_neutral 5 (not 10)" in note
    for typed in ("top_k", "n_prompts", "n_controls", "n_choice_prompts"):
        assert typed not in note


def test_a_report_is_not_written_into_the_run_that_it_reads(
    folder: Path, swept: CommandResult
) -> None:
    before = {p: p.read_bytes() for p in swept.sweep.rglob("*") if p.is_file()}
    for run_folder in ("sweep", "sweep/own"):
        result = command(folder, "task=report", "path=sweep", f"hydra.run.dir={run_folder}")
        assert result.code == 1
        assert "whose files it would replace" in result.err
    assert {p: p.read_bytes() for p in swept.sweep.rglob("*") if p.is_file()} == before


def test_a_workspace_is_of_one_sweep_and_says_what_w_and_b_lacks(
    folder: Path, swept: CommandResult, tmp_path: Path
) -> None:
    words = ["task=workspace", "dry_run=true", f"hydra.run.dir={tmp_path}"]
    result = command(folder, *words, "path=.")
    assert result.code == 1
    (line,) = result.err.splitlines()[-1:]
    assert (
        "task.path=. is neither a sweep nor a run with results; below it: 1 sweep or run;" in line
    )
    assert line.endswith("type the folder of one, such as task.path=sweep")
    result = command(folder, *words, f"path={swept.sweep.name}")
    assert result.code == 0, result.err
    assert "note: sweep was recorded with tracker=none, so that W&B has no run" in result.out
