"""A run's folder that cannot be written, from any moment on: one line, and nothing is lost."""

import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

import saexp
from saexp import registry
from saexp.errors import StoreError
from saexp.tracking import NullTracker
from tests.disks import read_only
from tests.e2e.faults.injection import command, digests_of_results, one_line, small_disk
from tests.shipped_texts import FEW_NEUTRAL

SMALL = (
    "dataset.n_examples=20",
    "analyzer.n_bootstrap=0",
    "analyzer.n_background=200",
    FEW_NEUTRAL,
)
SMALL += ("tracker=jsonl", "resume=false")
TASKS = {
    "analyze": ("intervention=none", *SMALL),
    "dashboard": ("task=dashboard", "task.latents=[12]", *SMALL),
    "label": ("task=label", *SMALL, "dataset.n_examples=8"),
    "train": (
        "task=train",
        "layer=2",
        "width=128",
        "sae_trainer.n_samples=5000",
        "sae_trainer.batch_size=256",
        *SMALL,
    ),
    "sweep": ("-m", "task=collect", "layer=2", *SMALL),
}
N_SIZES = 3
ROOM = 64 * 1024


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a task's run that nothing happens to."""

    @lru_cache
    def folder(task: str) -> Path:
        run_folder = tmp_path_factory.mktemp(f"whole_{task}")
        result = command(
            [*TASKS[task], f"cache_dir={cache}", f"{option_of(task)}{run_folder}"], run_folder
        )
        assert result.code == 0, result.err
        return run_folder

    return folder


def option_of(task: str) -> str:
    return "hydra.sweep.dir=" if task == "sweep" else "hydra.run.dir="


def n_kilobytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) // 1024


@pytest.mark.parametrize("task", TASKS)
def test_a_disk_that_fills_at_any_stage_is_one_line(
    task: str, cache: Path, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    option = option_of(task)
    words = [*TASKS[task], f"cache_dir={cache}"]
    folder, total = tmp_path / "disk" / "run", n_kilobytes(whole(task))
    sizes = [int(4 * (0.9 * total / 4) ** (n / (N_SIZES - 1))) for n in range(N_SIZES)]
    messages = set()
    with small_disk(tmp_path / "disk", 4) as disk:
        for kilobytes in sizes:
            shutil.rmtree(folder, ignore_errors=True)
            disk.resize(kilobytes)
            result = command([*words, f"{option}{folder}"], tmp_path)
            message = one_line(result)
            assert message.startswith(f"disk full: {folder}"), message
            assert f"choose another {option}" in message or "hydra.sweep.dir= of a" in message
            assert "Logging error" not in result.err
            assert not list(disk.path.rglob(".tmp-*"))
            messages.add(message.split(" ")[2])
        assert len(messages) >= 2, messages
        disk.resize(ROOM)
        result = command([*words, f"{option}{folder}"], tmp_path)
        assert result.code == 0, result.err
        assert digests_of_results(folder) == digests_of_results(whole(task))


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """As `ulimit -f`, which stands for a quota too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("task", ["analyze", "train"])
def test_a_limit_on_the_size_of_files_is_one_line(
    task: str, cache: Path, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    words = [*TASKS[task], f"cache_dir={cache}"]
    with largest_file(30_000):
        message = one_line(command([*words, f"hydra.run.dir={tmp_path}/run"], tmp_path))
    assert message.startswith(f"cannot write {tmp_path}/run/")
    assert "what was finished is kept: raise that limit and run the command again" in message
    assert command([*words, f"hydra.run.dir={tmp_path}/run"], tmp_path).code == 0
    assert digests_of_results(tmp_path / "run") == digests_of_results(whole(task))


class Removing(NullTracker):
    """Removes the run's folder when it is given numbers for the first time, or before."""

    at = "start"

    def start(self, *, folder: Path, **_: Any) -> None:
        self.folder = folder
        self._remove("start")

    def series(self, axis: str, values: Any) -> None:  # noqa: ARG002
        self._remove("series")

    def _remove(self, at: str) -> None:
        if at == self.at and self.folder.is_dir():
            shutil.rmtree(self.folder)


@pytest.mark.parametrize(("task", "at"), [("analyze", "start"), ("train", "series")])
def test_a_folder_that_is_removed_while_the_run_writes_to_it_is_one_line(
    task: str, at: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.register("tracker", "removing")(Removing)
    monkeypatch.setattr(Removing, "at", at)
    folder = tmp_path / "run"
    words = [w for w in TASKS[task] if w != "tracker=jsonl"]
    words += ["tracker=none", "tracker.kind=removing", f"cache_dir={cache}"]
    expected = f"{folder} was removed while the run wrote to it; run the command again"
    assert one_line(command([*words, f"hydra.run.dir={folder}"], tmp_path)) == expected
    with pytest.raises(StoreError) as error:
        # Another training than the one that left checkpoints.
        saexp.run(saexp.compose([*words, "seed=1"]), folder)
    assert str(error.value) == expected
    assert not folder.exists(), "nothing is written to a new folder of that name"


@pytest.mark.parametrize("task", ["analyze", "sweep"])
def test_a_read_only_folder_is_one_line(task: str, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with read_only(tmp_path / "run"):
        words = [*TASKS[task], f"cache_dir={cache}", f"{option_of(task)}{tmp_path}/run"]
        message = one_line(command(words, tmp_path))
    assert message.startswith(f"cannot write the run's folder {tmp_path}/run")
