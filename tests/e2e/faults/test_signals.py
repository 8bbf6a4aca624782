"""Commands stopped by a signal at any moment clean up, say one line, and go on when run again."""

import json
import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest

from saexp.models.resolution import ASSETS
from tests import interpreters
from tests.e2e.faults.injection import (
    PATIENCE_SECONDS,
    CommandResult,
    command,
    digests_of_results,
    kill_after,
    one_line,
    start,
)
from tests.shipped_texts import FEW_NEUTRAL
from tests.unit.reports.run_outputs import table_of

SMALL = ["tracker=none", "intervention.n_prompts=4", "intervention.n_controls=2"]
SMALL += [
    "intervention.max_new_tokens=4",
    "analyzer.n_bootstrap=0",
    "analyzer.n_background=200",
    "analyzer.scores=false",
    FEW_NEUTRAL,
]
SMALL += ["intervention.top_k=1", "intervention.n_choice_prompts=4", "intervention.n_neutral=2"]
SMALL += ["dataset.n_examples=40"]
RESUMABLE = "what was collected is kept, and the same command continues from there"
N_STOPS = 2


def assert_nothing_is_left_open(folder: Path) -> None:
    left = [p for name in (".tmp-*", ".running.lock") for p in folder.rglob(name)]
    assert not left


def run_to_the_end(words: Sequence[str], cwd: Path) -> CommandResult:
    result = start(words, cwd).wait()
    assert result.code == 0, result.err[-2000:]
    return result


@pytest.mark.slow
def test_sigterm_at_random_moments_of_a_run_costs_nothing_that_was_finished(tmp_path: Path) -> None:
    words = [*SMALL, "layer=1", "hydra.run.dir=run"]
    # The server that processes are forked from takes its time to start.
    interpreters.run(["-c", ""], tmp_path)
    (alone := tmp_path / "alone").mkdir()
    began = time.monotonic()
    run_to_the_end(words, alone)
    seconds, expected = time.monotonic() - began, digests_of_results(alone / "run")
    rng, n_stopped, folder = random.Random(0), 0, tmp_path / "stopped"
    folder.mkdir()
    for n in range(N_STOPS):
        started = start(words, folder)
        kill_after(started, seconds * (n + rng.random()) / N_STOPS, signal.SIGTERM)
        result = started.wait()
        if result.code:
            assert one_line(result, 128 + signal.SIGTERM) == f"stopped by SIGTERM; {RESUMABLE}"
            n_stopped += 1
        assert_nothing_is_left_open(folder)
    run_to_the_end(words, folder)
    assert digests_of_results(folder / "run") == expected
    assert not (folder / "run/error.txt").exists()
    assert n_stopped > 0


@pytest.mark.slow
def test_a_sweep_whose_terminal_is_closed_has_its_page(tmp_path: Path) -> None:
    """Ctrl-C is in test_sweep.py, SIGTERM below and above."""
    words = ["-m", *SMALL, "layer=1", "intervention=none,steer,clamp", "hydra.sweep.dir=sweep"]
    words += ["intervention.n_prompts=300", "intervention.max_new_tokens=30"]
    started = start(words, tmp_path)
    end = time.monotonic() + PATIENCE_SECONDS
    # Written before the cell's long part.
    while not list(tmp_path.glob("sweep/1_*/metrics.json")):
        assert started.process.poll() is None, started.read()
        assert time.monotonic() < end
        time.sleep(0.02)
    kill_after(started, 0, signal.SIGHUP)
    assert one_line(started.wait(), 128 + signal.SIGHUP) == f"stopped by SIGHUP; {RESUMABLE}"
    table = table_of(tmp_path / "sweep")
    assert table["status"].tolist() == ["finished", "stopped", "not run"]
    assert (tmp_path / "sweep/sweep.html").is_file()
    assert_nothing_is_left_open(tmp_path)


def processes_in(cwd: Path) -> set[int]:
    """Processes that run in a folder, as their children do where they do not leave it."""
    ids = set()
    for process_folder in Path("/proc").glob("[0-9]*"):
        try:
            if Path(os.readlink(process_folder / "cwd")) == cwd and "Z" not in state(
                process_folder
            ):
                ids.add(int(process_folder.name))
        except OSError:
            # It ended in between.
            continue
    return ids


def state(process: Path) -> str:
    return (process / "stat").read_text("utf-8").rpartition(")")[2].split()[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep of the cells that joblib's finishes, by the basic launcher."""
    folder = tmp_path_factory.mktemp("alone")
    words = ["-m", *SMALL, "intervention=none", "layer=1,2", "hydra.sweep.dir=sweep"]
    result = command(words, folder)
    assert result.code == 0, result.err[-2000:]
    return folder / "sweep"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="processes are looked up in /proc")
def test_a_stopped_joblib_sweep_leaves_no_worker_and_finished_cells_as_the_basic_launcher_s(
    alone: Path, tmp_path: Path
) -> None:
    """Two workers have finished the small cells and are in the long ones when it is stopped."""
    words = ["-m", *SMALL, "intervention=none,steer", "intervention.n_prompts=300", "layer=1,2"]
    words += ["hydra.sweep.dir=sweep", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    process = interpreters.Process(["-m", "saexp", *words], tmp_path)
    end = time.monotonic() + PATIENCE_SECONDS
    while len(list(tmp_path.glob("sweep/[23]_*/metrics.json"))) < 2:
        assert process.poll() is None, process.read()
        assert time.monotonic() < end
        time.sleep(0.05)
    assert len(processes_in(tmp_path)) >= 3
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 143, err[-2000:]
    assert err.splitlines()[-1] == f"saexp: stopped by SIGTERM; {RESUMABLE}"
    assert "Traceback" not in err
    assert "sweep: 4 cells: 2 finished, 2 stopped" in out.splitlines()
    assert (tmp_path / "sweep/sweep.html").is_file()
    while left := processes_in(tmp_path):
        assert time.monotonic() < end, left
        time.sleep(0.05)
    assert_nothing_is_left_open(tmp_path)
    cells, same = (table_of(sweep).set_index("layer") for sweep in (tmp_path / "sweep", alone))
    # Texts are forwarded once, by either worker.
    forwarded = "collection/tokens_forwarded"
    assert cells[forwarded].sum() == same[forwarded].sum() > 0
    cells = cells[cells["status"] == "finished"]
    names = [c for c in cells if c.startswith(("contrast/", "sparsity/"))]
    assert len(names) > 20
    pd.testing.assert_frame_equal(cells[names], same[names], check_dtype=False)


@pytest.mark.slow
def test_a_cell_that_submitit_requeues_goes_on_and_the_sweep_finishes(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    # A new interpreter runs the cell, and another one goes on; a collection imports least.
    words = ["-m", "task=collect", "layer=1", "hydra.sweep.dir=sweep", "positions=all"]
    words += ["dataset=text", f"dataset.path={ASSETS}/tiny/background.txt", "store.shard_rows=200"]
    words += ["hydra/launcher=submitit_local", "tracker=jsonl"]
    env = {**os.environ, "SUBMITIT_PREEMPT_SIGNAL": "USR1"}
    process = interpreters.Process(["-m", "saexp", *words], tmp_path, env)
    end = time.monotonic() + PATIENCE_SECONDS
    while len(list(tmp_path.glob("outputs/cache/activations/*/*/*.safetensors"))) < 20:
        assert process.poll() is None, process.read()
        assert time.monotonic() < end
        time.sleep(0.02)
    jobs = [p for p in processes_in(tmp_path) if "submitit.core._submit" in words_of(p)]
    assert len(jobs) == 1
    # SLURM's way to end a job; submitit, which requeues it, lets it pass.
    os.kill(jobs[0], signal.SIGTERM)
    os.kill(jobs[0], signal.SIGUSR1)
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, err[-2000:]
    assert "sweep: 1 cells: 1 finished" in out.splitlines()
    (cell,) = tmp_path.glob("sweep/0_*")
    assert not (cell / "error.txt").exists()
    about = json.loads((cell / "provenance.json").read_text())
    assert about["command"].startswith("python -m saexp -m task=collect")
    events = [json.loads(line) for line in (cell / "tracker.jsonl").read_text().splitlines()]
    assert [e["exit_code"] for e in events if e["event"] == "finish"] == [1, 0]
    metrics = json.loads((cell / "metrics.json").read_text())
    assert 0 < metrics["collection/tokens_forwarded"] < metrics["collection/n_rows"]
    (log,) = tmp_path.glob("sweep/.submitit/*/*_0_log.err")
    assert "Bypassing signal SIGTERM" in log.read_text()
    assert_nothing_is_left_open(tmp_path)


def words_of(process: int) -> str:
    return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()
