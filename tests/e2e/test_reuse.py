"""Finished runs reused: what is copied, what the copy says of itself, where it is tracked."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import saexp
from saexp.digests import checksums
from saexp.results import Result
from tests.shipped_texts import FEW_NEUTRAL
from tests.unit.reports.run_outputs import wandb_runs

WORDS = ["resume=true", "dataset.n_examples=20", "intervention=none", "analyzer.n_bootstrap=0"]
WORDS += ["analyzer.n_background=200", FEW_NEUTRAL]
CHANGED = ("metrics.json", "provenance.json")


def run(cache: Path, folder: Path, *words: str, **options: Any) -> Result:
    cfg = saexp.compose([*WORDS, f"cache_dir={cache}", "tracker=none", *words])
    return saexp.run(cfg, folder, **options)


def saved(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text("utf-8"))


def digests(folder: Path) -> dict[str, str]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run that collected and computed everything, and was tracked."""
    folder = tmp_path_factory.mktemp("first")
    return run(folder / "cache", folder / "run", "tracker=jsonl")


def cache_of(first: Result) -> Path:
    assert first.path is not None
    return first.path.parent / "cache"


def test_a_copy_claims_no_work_and_says_where_it_is_from(first: Result, tmp_path: Path) -> None:
    assert first.path is not None
    assert first.metrics["collection/tokens_forwarded"]
    again = run(cache_of(first), tmp_path / "copy", "tracker=jsonl")
    spent = {"collection/tokens_forwarded": 0, "collection/seconds": 0}
    assert again.metrics == {**first.metrics, **spent} == saved(tmp_path / "copy", "metrics.json")
    own, theirs = saved(tmp_path / "copy", "provenance.json"), saved(first.path, "provenance.json")
    assert own["notes"] == [*theirs["notes"], f"reused from {first.path}"] == again.notes
    assert own["reused_from"] == str(first.path)
    assert (own["tokens_forwarded"], own["seconds"]) == (0, {})
    assert own["files"].keys() == theirs["files"].keys()
    assert own["files"] == checksums(tmp_path / "copy", own["files"])
    same = theirs.keys() - {"notes", "tokens_forwarded", "seconds", "files", "checksum"}
    assert {k: own[k] for k in same} == {k: theirs[k] for k in same}
    copied, original = digests(tmp_path / "copy"), digests(first.path)
    for left_out in (*CHANGED, "tracker.jsonl"):
        copied.pop(left_out)
        original.pop(left_out)
    assert copied == original
    assert saved(first.path, "metrics.json")["collection/tokens_forwarded"] > 0


def test_a_copy_is_tracked_as_a_run_of_its_own(first: Result, tmp_path: Path) -> None:
    sweep = tmp_path / "2026"
    result = run(cache_of(first), sweep / "0_", "tracker=jsonl", sweep=sweep)
    lines = (sweep / "0_/tracker.jsonl").read_text("utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    assert [e["event"] for e in (events[0], *events[-2:])] == ["start", "metrics", "finish"]
    assert (events[0]["group"], events[0]["job_type"]) == ("2026", "analyze")
    assert events[0]["config"]["layer"] == saexp.compose(WORDS).layer
    assert {k: v for k, v in events[-2].items() if k != "event"} == result.metrics
    assert {e["name"] for e in events if e["event"] == "figure"} == set(result.figures)
    assert events[-1] == {"event": "finish", "exit_code": 0}
    assert sum(e["event"] == "start" for e in events) == 1


def test_a_copy_gets_a_wandb_run_in_the_sweeps_group(first: Result, tmp_path: Path) -> None:
    sweep = tmp_path / "2026"
    words = ["tracker=wandb", "tracker.mode=offline"]
    run(cache_of(first), sweep / "0_", *words, sweep=sweep)
    (logged_run,) = wandb_runs(sweep)
    assert (logged_run["group"], logged_run["exit_code"]) == ("2026", 0)
    assert {"collection/tokens_forwarded", "contrast/n_significant"} <= logged_run["keys"]


def test_a_run_repeated_in_its_own_folder_stays_as_it_is(tmp_path: Path) -> None:
    first = run(tmp_path / "cache", tmp_path / "same")
    before = digests(tmp_path / "same")
    again = run(tmp_path / "cache", tmp_path / "same", "tracker=jsonl")
    assert again.metrics == first.metrics
    assert digests(tmp_path / "same") == before


def test_a_folder_that_another_run_wrote_over_is_not_reused(first: Result, tmp_path: Path) -> None:
    for layer in ("layer=1", "layer=2"):
        run(cache_of(first), tmp_path / "same", layer)
    run(cache_of(first), tmp_path / "new", "layer=1")
    about = saved(tmp_path / "new", "provenance.json")
    assert about["config"]["layer"] == 1
    assert "reused_from" not in about


TASKS = {
    "analyze": ["intervention=none", "seed=1"],
    "analyzer": ["analyzer=stats", "intervention=none"],
    "dashboard": ["task=dashboard", "task.latents=[1,2]"],
    "evaluate": ["task=evaluate", "task.n_texts=20"],
    "label": ["task=label", "task.n_samples=0"],
    "train": ["task=train", "width=64", "sae_trainer.n_samples=512", "sae_trainer.batch_size=64"],
}


@pytest.mark.parametrize("task", TASKS)
def test_every_file_that_a_task_leaves_is_listed_with_its_checksum(
    task: str, first: Result, tmp_path: Path
) -> None:
    run(cache_of(first), tmp_path / "run", *TASKS[task])
    listed = saved(tmp_path / "run", "provenance.json")["files"]
    left = {p.relative_to(tmp_path / "run").as_posix() for p in (tmp_path / "run").rglob("*")}
    folders = {name for name in left if (tmp_path / "run" / name).is_dir()}
    assert left - folders == {*listed, "provenance.json"}
    assert listed == checksums(tmp_path / "run", listed)
    again = run(cache_of(first), tmp_path / "again", *TASKS[task])
    assert f"reused from {tmp_path / 'run'}" in again.notes
