"""Sweeps from the command line: one pass over the texts, one table and page at the end."""

import json
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hydra import initialize_config_dir

import saexp
from saexp.cli import cell_folder
from saexp.config import register_schema
from saexp.config.run import conf_folder
from saexp.context import ObjectCache
from saexp.sweeps.passes import passes, texts_key
from tests import interpreters
from tests.shipped_texts import FEW_NEUTRAL
from tests.unit.reports.run_outputs import (
    CommandResult,
    command,
    metrics_of,
    page_of,
    table_of,
    wandb_runs,
)
from tests.unit.reports.run_outputs import assert_links_lead_to_reports as assert_links

SMALL = ["tracker=none", "intervention.n_prompts=4", "intervention.n_controls=2"]
SMALL += [
    "intervention.max_new_tokens=4",
    "analyzer.n_bootstrap=0",
    "analyzer.n_background=200",
    "analyzer.scores=false",
    FEW_NEUTRAL,
]
SMALL += ["dataset.n_examples=40", "hydra.sweep.dir=sweep", "intervention.n_neutral=2"]
SMALL += ["intervention.n_choice_prompts=2", "intervention.top_k=1"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> CommandResult:
    words = ["-m", "layer=0,2", "width=512", "coefficient=0.6", *SMALL]
    result = command(tmp_path_factory.mktemp("grid"), *words)
    assert result.code == 0, result.err[-2000:]
    return result


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Tokens that one cell by itself forwards."""
    folder = tmp_path_factory.mktemp("alone")
    words = [w for w in SMALL if not w.startswith("hydra")]
    cfg = saexp.compose([*words, "intervention=none", f"cache_dir={folder}/cache"])
    return saexp.run(cfg, folder / "run").metrics["collection/tokens_forwarded"] or 0


def test_a_sweep_forwards_no_more_than_one_of_its_cells_alone(
    swept: CommandResult, alone: int
) -> None:
    assert table_of(swept.sweep)["collection/tokens_forwarded"].sum() == alone > 0


def test_the_table_is_what_the_cells_folders_hold(swept: CommandResult) -> None:
    table = table_of(swept.sweep)
    assert table["status"].tolist() == ["finished"] * 2
    assert table["layer"].tolist() == [0, 2]
    for row in table.to_dict("records"):
        about = json.loads((swept.sweep / row["folder"] / "provenance.json").read_text())
        assert all(row[k] == about["config"][k] for k in ("layer", "width", "coefficient"))
        for name, value in metrics_of(swept.sweep / row["folder"]).items():
            assert pd.isna(row[name]) if value is None else row[name] == value, name


def test_the_page_links_every_cells_report_and_is_printed_last(swept: CommandResult) -> None:
    assert_links(swept.sweep, 2)
    *_, counted, where = swept.out.splitlines()
    assert counted == "sweep: 2 cells: 2 finished"
    assert where == "report: sweep/sweep.html"


def test_the_plan_is_one_pass_that_stores_every_layer(swept: CommandResult) -> None:
    plan = json.loads((swept.sweep / "plan.json").read_text())
    assert len(plan["cells"]) == 2
    (together,) = plan["passes"].values()
    assert all([layer, None] in together for layer in (0, 2))


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> CommandResult:
    """Three cells: one fails, one cannot begin; each with a W&B run, offline."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        folder = tmp_path_factory.mktemp("failing")
        return command(folder, "-m", "layer=9,foo,2", *SMALL, "tracker=wandb", "intervention=none")


def test_a_failing_cell_fails_the_sweep_after_the_others(failing: CommandResult) -> None:
    assert failing.code == 1
    table = table_of(failing.sweep)
    assert table["status"].tolist() == ["failed", "failed", "finished"]
    why = "layer=9 is out of range: tiny has layers 0-4; try layer=4"
    assert table["error"][0] == why
    assert why in page_of(failing.sweep)
    assert_links(failing.sweep, 1)
    error = failing.sweep / table["folder"][0] / "error.txt"
    assert error.read_text("utf-8") == f"ModelError: {why}\n"
    assert "sweep: 3 cells: 2 failed, 1 finished" in failing.out.splitlines()
    assert failing.err.splitlines()[-1] == f"saexp: {why}"
    assert "Traceback" not in failing.err


def test_the_page_names_what_was_swept_and_nothing_else(failing: CommandResult) -> None:
    assert "<h1>Sweep over layer</h1>" in page_of(failing.sweep)


def test_wandb_holds_a_run_per_cell_and_one_with_the_table(failing: CommandResult) -> None:
    runs = wandb_runs(failing.sweep)
    assert [(r["job_type"], r["exit_code"]) for r in runs] == [
        ("analyze", 1),
        ("analyze", 1),
        ("analyze", 0),
        ("sweep", 0),
    ]
    (group,) = {r["group"] for r in runs}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d · sweep", group)
    holding = [any(k.startswith("tables/sweep/") for k in r["keys"]) for r in runs]
    assert holding == [False, False, False, True]
    assert "contrast/best_auroc_known_test" in runs[2]["keys"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> CommandResult:
    """Three cells, the second one long: Ctrl-C while it generates."""
    folder = tmp_path_factory.mktemp("stopped")
    words = ["-m", *SMALL, "intervention=none,steer,clamp", "intervention.n_prompts=300"]
    words += ["intervention.max_new_tokens=30"]
    process = interpreters.Process(["-m", "saexp", *words], folder)
    end = time.monotonic() + 100
    # Written before the cell's long part.
    while not list(folder.glob("sweep/1_*/metrics.json")) and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    return CommandResult(process.wait(), out, err, folder / "sweep")


def test_ctrl_c_leaves_a_report_of_what_there_is_and_says_how_to_go_on(
    stopped: CommandResult,
) -> None:
    assert stopped.code == 1
    message = (
        "saexp: stopped; what was collected is kept, and the same command continues from there"
    )
    assert stopped.err.splitlines()[-1] == message
    assert "Traceback" not in stopped.err
    table = table_of(stopped.sweep)
    assert table["intervention"].tolist() == ["none", "steer", "clamp"]
    assert (table["status"][0], table["status"][2]) == ("finished", "not run")
    assert_links(stopped.sweep, 1)


def test_the_cell_that_ctrl_c_ended_counts_as_stopped(stopped: CommandResult) -> None:
    assert table_of(stopped.sweep)["status"].tolist() == ["finished", "stopped", "not run"]
    assert "sweep: 3 cells: 1 finished, 1 stopped, 1 not run" in stopped.out.splitlines()
    for state in ("finished", "stopped", "not run"):
        assert f"<b>1</b><span>cell {state}</span>" in page_of(stopped.sweep)


def test_shards_made_by_several_cells_are_one_store(tmp_path: Path) -> None:
    words = ["task=collect", "layer=[0,3]", "tracker=none", "dataset.n_examples=60"]
    completed = command(tmp_path, "-m", *words, "task.shard=0,1,2", "task.n_shards=3")
    assert completed.code == 0, completed.err[-2000:]
    (parts,) = (saexp.open_store(p) for p in (tmp_path / "outputs/cache/activations").iterdir())
    cfg = saexp.compose([*words, f"cache_dir={tmp_path}/alone"])
    result = saexp.run(cfg, tmp_path / "run")
    (alone,) = (saexp.open_store(p) for p in (tmp_path / "alone/activations").iterdir())
    assert (parts.path.name, len(parts.shard_bounds)) == (alone.path.name, 3)
    assert parts.rows.equals(alone.rows)
    for layer in (0, 3):
        torch.testing.assert_close(parts.acts(layer), alone.acts(layer), atol=1e-5, rtol=0)
    (sweep,) = (tmp_path / "outputs/sweeps").glob("*/*")
    forwarded = table_of(sweep)["collection/tokens_forwarded"]
    assert (forwarded > 0).all()
    assert forwarded.sum() == result.metrics["collection/tokens_forwarded"]


def test_a_shard_beyond_the_last_is_one_line(tmp_path: Path) -> None:
    result = command(tmp_path, "task=collect", "task.shard=3", "task.n_shards=3", "tracker=none")
    assert result.code == 1
    assert result.out == ""
    assert result.err.splitlines() == [
        "saexp: task.shard=3 is not below task.n_shards=3; type task.shard=<0 to 2> or a larger "
        "task.n_shards="
    ]


def planned(*cells: Sequence[str]) -> dict[str, list[list[Any]]]:
    register_schema()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        return passes([list(cell) for cell in cells], ObjectCache())


def test_cells_that_differ_in_what_is_read_off_share_a_pass() -> None:
    cells = [[f"layer={n}", f"width={w}", "coefficient=1"] for n in (0, 2) for w in (256, 512)]
    cells += [["layer=4", "intervention=clamp"], ["layer=4", "analyzer.alpha=0.1"]]
    passes = planned(*cells)
    assert list(passes) == [texts_key(saexp.compose([]))]
    assert all([layer, None] in passes[texts_key(saexp.compose([]))] for layer in (0, 2, 4))


@pytest.mark.parametrize(
    "word", ["dataset=ioi", "positions=last", "model=tiny_control", "dataset.max_length=40"]
)
def test_cells_with_other_texts_or_positions_have_a_pass_of_their_own(word: str) -> None:
    passes = planned(["layer=0"], ["layer=4", word])
    keys = [texts_key(saexp.compose(words)) for words in ([], [word])]
    assert list(passes) == keys
    assert [[0, None] in passes[k] for k in keys] == [True, False]
    assert [[4, None] in passes[k] for k in keys] == [False, True]


def test_every_stream_and_layer_of_collecting_cells_is_planned() -> None:
    words = ["task=collect", "task.streams=[resid_post,mlp_out]"]
    (plan,) = planned([*words, "layer=[0,1]"], ["layer=3"], [*words, "layer=1"]).values()
    expected = [[n, s] for n in (0, 1) for s in ("resid_post", "mlp_out")]
    assert all(h in plan for h in [*expected, [3, None]])
    assert [3, "mlp_out"] not in plan


def test_cells_that_cannot_be_composed_are_left_out_of_the_plan() -> None:
    (plan,) = planned(["layer=first"], ["model=nosuch"], ["nokey=1"], ["layer=3"]).values()
    assert [3, None] in plan


def test_a_cell_with_a_wrong_setting_does_not_hide_what_a_like_cell_needs() -> None:
    (plan,) = planned(["layer=3", "intervention.n_prompts=few"], ["layer=3"], ["layer=1"]).values()
    assert [3, None] in plan


def test_a_release_known_by_its_id_is_planned_at_the_layer_of_its_catalogue_entry() -> None:
    words = ["sae=gpt2_jb", "sae.id=blocks.5.hook_resid_pre", "layer=null"]
    (plan,) = planned(["model=gpt2", *words]).values()
    assert [5, None] in plan


def test_a_sweep_whose_tracker_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    result = command(tmp_path, "-m", "layer=0,1", *SMALL, "tracker=wandb", "tracker.mode=sometimes")
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith("saexp: tracker.mode=sometimes: choose online")


def test_a_cells_folder_can_be_made_whatever_was_typed(tmp_path: Path) -> None:
    (tmp_path / cell_folder(3, ["layer=1", f"dataset.path={'データ' * 40}"])).mkdir()
