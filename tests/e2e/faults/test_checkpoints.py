"""A training that was interrupted ends with the weights of an undisturbed one."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.faults.injection import (
    command,
    delete,
    digests_of_results,
    edit_json_number,
    flip_byte,
    one_line,
    small_disk,
    truncate,
    wrong_shape,
)

WORDS = (
    "task=train",
    "layer=2",
    "width=128",
    "dataset.n_examples=40",
    "sae_trainer.n_samples=10000",
    "sae_trainer.batch_size=256",
    "sae_trainer.checkpoint_every=15",
    "tracker=none",
)
N_STEPS = 10000 // 256


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(cache with the checkpoints of a training whose SAE found no room, an undisturbed run)."""
    stopped_folder = tmp_path_factory.mktemp("stopped")
    words = [*WORDS, f"cache_dir={stopped_folder}/cache"]
    assert command([*words, f"hydra.run.dir={stopped_folder}/whole"], stopped_folder).code == 0
    assert not list((stopped_folder / "cache" / "training").glob("*/*")), "removed after a training"
    with small_disk(stopped_folder / "disk", 64):
        message = one_line(
            command([*words, f"hydra.run.dir={stopped_folder}/disk/run"], stopped_folder)
        )
    assert message.startswith(f"disk full: {stopped_folder}/disk/run/sae, ")
    assert "choose another hydra.run.dir=" in message
    left = sorted(p.name for p in (stopped_folder / "cache" / "training").glob("*/*"))
    assert left == ["step_000000030", f"step_{N_STEPS:09d}"]
    return stopped_folder / "cache", stopped_folder / "whole"


@pytest.mark.parametrize(
    ("file", "damage", "n_damaged"),
    [
        ("weights.safetensors", flip_byte, 1),
        ("weights.safetensors", delete, 2),
        ("trainer_state.pt", truncate, 1),
        ("state.json", edit_json_number, 1),
        ("checksums.json", wrong_shape, 1),
    ],
)
def test_a_damaged_checkpoint_never_makes_another_sae(
    stopped: tuple[Path, Path],
    tmp_path: Path,
    file: str,
    damage: Callable[[Path], str],
    n_damaged: int,
) -> None:
    """tests/unit/saes/test_checkpoints.py does each damage to each file."""
    cache, whole = stopped
    shutil.copytree(cache, tmp_path / "cache")
    steps = sorted((tmp_path / "cache" / "training").glob("*/step_*"), reverse=True)
    for path in steps[:n_damaged]:
        damage(path / file)
    words = [*WORDS, f"cache_dir={tmp_path}/cache", f"hydra.run.dir={tmp_path}/run"]
    result = command(words, tmp_path)
    assert result.code == 0, result.err
    then = "continuing from step 30" if n_damaged == 1 else "starting from the beginning"
    reports = [line for line in result.err.splitlines() if " is damaged (" in line]
    assert len(reports) == n_damaged, result.err
    assert all(line.endswith(f"); {then}") for line in reports)
    assert digests_of_results(tmp_path / "run") == digests_of_results(whole)


def test_a_cache_without_room_for_checkpoints_costs_nothing_else(
    stopped: tuple[Path, Path], tmp_path: Path
) -> None:
    cache, whole = stopped
    kilobytes = sum(f.stat().st_size for f in cache.rglob("*") if f.is_file()) // 1024
    with small_disk(tmp_path / "disk", 4 * kilobytes) as disk:
        shutil.copytree(cache / "activations", disk.path / "activations")
        (disk.path / "ballast").touch()
        free = shutil.disk_usage(disk.path).free
        (disk.path / "ballast").write_bytes(bytes(free - 60_000))
        words = [*WORDS, f"cache_dir={disk.path}", f"hydra.run.dir={tmp_path}/run"]
        result = command(words, tmp_path)
        assert result.code == 0, result.err
        reports = [line for line in result.err.splitlines() if "could not be written" in line]
        assert len(reports) == 1, result.err
        assert "checkpoint at step 15 could not be written (disk full: " in reports[0]
    assert digests_of_results(tmp_path / "run") == digests_of_results(whole)
