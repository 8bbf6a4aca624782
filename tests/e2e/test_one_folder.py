"""One run at a time writes to a folder; a run that died holds none."""

import errno
import os
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

import saexp
from saexp.errors import StoreError
from saexp.pipeline.run_folder import LOCK, holding, reserved_cell
from saexp.sweeps.planning import running
from tests import interpreters
from tests.shipped_texts import FEW_NEUTRAL
from tests.unit.reports.run_outputs import command

SMALL = [
    "tracker=none",
    "intervention=none",
    "dataset.n_examples=20",
    "analyzer.n_bootstrap=0",
    FEW_NEUTRAL,
]
HOLD = """
import sys, time
from pathlib import Path
from saexp.pipeline.run_folder import holding
with holding(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[interpreters.Process]:
    """Another process that holds the folder `busy`."""
    process = interpreters.Process(["-c", HOLD, str(tmp_path / "busy")])
    deadline = time.monotonic() + 120
    while process.read()[0] != "held\n":
        assert process.poll() is None, process.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield process
    stop(process)


def stop(process: interpreters.Process) -> None:
    process.kill()
    process.wait()


@pytest.mark.parametrize("words", [["hydra.run.dir=busy"], ["-m", "hydra.sweep.dir=busy"]])
def test_a_second_run_in_a_folder_is_one_line_and_touches_nothing(
    tmp_path: Path, holder: interpreters.Process, words: list[str]
) -> None:
    (tmp_path / "busy" / "metrics.json").write_text("of the first")
    before = sorted(os.listdir(tmp_path / "busy"))
    result = command(tmp_path, *words, *SMALL, "layer=1")
    assert holder.poll() is None
    assert result.code == 1
    assert result.err.splitlines() == [
        "saexp: another run is writing to busy; wait for it, or type another hydra.run.dir= "
        "(hydra.sweep.dir= of a sweep)"
    ]
    assert sorted(os.listdir(tmp_path / "busy")) == before
    assert (tmp_path / "busy" / "metrics.json").read_text() == "of the first"


def test_a_killed_run_leaves_its_folder_free(tmp_path: Path, holder: interpreters.Process) -> None:
    stop(holder)
    assert (tmp_path / "busy" / LOCK).is_file()
    for _ in range(2):
        result = command(tmp_path, "hydra.run.dir=busy", "task=collect", *SMALL, "layer=1")
        assert result.code == 0, result.err[-500:]
    assert not (tmp_path / "busy" / LOCK).exists()


def test_runs_from_python_hold_their_folder_too(tmp_path: Path) -> None:
    cfg = saexp.compose([*SMALL, "task=collect", "layer=1", f"cache_dir={tmp_path}/cache"])
    with holding(tmp_path / "run"), pytest.raises(StoreError, match="another run is writing to"):
        saexp.run(cfg, tmp_path / "run")
    saexp.run(cfg, tmp_path / "run")
    assert not (tmp_path / "run" / LOCK).exists()


def test_of_two_commands_at_once_one_runs_and_the_other_is_refused(tmp_path: Path) -> None:
    words = ["-m", "saexp", "hydra.run.dir=one", "task=collect", *SMALL, "layer=1"]
    both = [interpreters.Process(words, tmp_path) for _ in range(2)]
    deadline = time.monotonic() + 120
    errors = [p.communicate(timeout=deadline - time.monotonic())[1] for p in both]
    codes = [p.returncode for p in both]
    # Where the machine ran them one after the other, both may succeed.
    assert sorted(codes) in ([0, 1], [0, 0])
    for code, error in zip(codes, errors, strict=True):
        if code:
            assert error.startswith("saexp: another run is writing to one; ")
            assert "Traceback" not in error
    assert (tmp_path / "one" / "metrics.json").is_file()
    assert (tmp_path / "one" / ".hydra" / "config.yaml").is_file()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != LOCK}


def test_a_run_inside_of_a_running_sweep_is_one_line_and_touches_nothing(
    tmp_path: Path,
    holder: interpreters.Process,  # noqa: ARG001
) -> None:
    result = command(tmp_path, "hydra.run.dir=busy/cell", *SMALL, "layer=1")
    assert result.code == 1
    assert result.err.startswith(f"saexp: another run is writing to {tmp_path}/busy; wait for it")
    assert len(result.err.splitlines()) == 1
    assert not (tmp_path / "busy/cell").exists()


def test_a_sweep_in_whose_folder_another_run_has_a_cell_is_one_line_and_touches_nothing(
    tmp_path: Path,
    holder: interpreters.Process,  # noqa: ARG001
) -> None:
    (tmp_path / "busy/.hydra").mkdir()
    (tmp_path / "busy/.hydra/config.yaml").write_text("of the first")
    before = files_of(tmp_path)
    result = command(tmp_path, "-m", "hydra.sweep.dir=.", "hydra.sweep.subdir=busy", *SMALL)
    assert result.code == 1
    assert result.err.startswith("saexp: another run is writing to busy; wait for it")
    assert len(result.err.splitlines()) == 1
    assert files_of(tmp_path) == before


def test_a_cell_whose_folder_another_run_has_leaves_that_runs_files(
    tmp_path: Path,
    holder: interpreters.Process,  # noqa: ARG001
) -> None:
    (tmp_path / "busy/error.txt").write_text("of the first")
    with (
        pytest.raises(StoreError, match="another run is writing to"),
        reserved_cell(tmp_path / "busy"),
    ):
        raise AssertionError
    assert (tmp_path / "busy/error.txt").read_text() == "of the first"


def test_of_two_threads_one_has_the_folder(tmp_path: Path) -> None:
    cfg = replace(saexp.compose([*SMALL, "layer=1"]), plugins=["no_such_module"])
    errors: list[Exception] = []

    def second() -> None:
        try:
            saexp.run(cfg, tmp_path / "run")
        except StoreError as error:
            errors.append(error)

    with holding(tmp_path / "run"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    # Before the plugin was looked for.
    (error,) = errors
    assert str(error).startswith("another run is writing to")


def test_a_folder_on_a_file_system_without_locks_is_held_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_lock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_lock)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with holding(tmp_path / "run"), pytest.raises(StoreError, match="another run is writing"):
            holding(tmp_path / "run").__enter__()
        with holding(tmp_path / "run"):
            pass


def test_configs_are_composed_in_several_threads() -> None:
    with ThreadPoolExecutor(4) as threads:
        layers = list(threads.map(lambda n: saexp.compose([f"layer={n % 5}"]).layer, range(12)))
    assert layers == [n % 5 for n in range(12)]


def test_a_sweep_that_cannot_begin_is_none_of_the_next_command(
    tmp_path: Path,
) -> None:
    (tmp_path / "sweep/plan.json/in_the_way").mkdir(parents=True)
    (tmp_path / "sweep/0_of_an_earlier_sweep/.hydra").mkdir(parents=True)
    result = command(tmp_path, "-m", "layer=1,2", "tracker=none", "hydra.sweep.dir=sweep")
    assert result.code == 1
    assert "plan.json: Is a directory" in result.err
    assert running() is None
