"""A cache that cannot be written: computed all the same, with one warning, and not kept."""

from pathlib import Path

import pytest

from tests.disks import read_only
from tests.e2e.faults.injection import command, digests_of_results
from tests.e2e.faults.test_full_disks import TASKS

EVALUATE = ("task=evaluate", "task.n_texts=16", "task.n_bootstrap=10", "tracker=none")


@pytest.mark.parametrize("task", ["analyze", "train", "label", "evaluate"])
def test_results_with_a_read_only_cache_are_those_of_any_other(task: str, tmp_path: Path) -> None:
    words = EVALUATE if task == "evaluate" else TASKS[task]
    writable, locked = tmp_path / "writable", tmp_path / "locked"
    locked.mkdir()
    result = command([*words, f"cache_dir={writable}", f"hydra.run.dir={tmp_path}/whole"], tmp_path)
    assert result.code == 0, result.err
    whole = digests_of_results(tmp_path / "whole")
    for cache in (locked, writable):
        before = sorted(cache.rglob("*"))
        run = tmp_path / f"run_{cache.name}"
        with read_only(cache):
            result = command([*words, f"cache_dir={cache}", f"hydra.run.dir={run}"], tmp_path)
            assert result.code == 0, result.err
            warning = f"cache_dir={cache} is not writable: what this run computes is not stored"
            assert result.err.count(warning) == 1, result.err
            assert result.err.count("Read-only file system") == 1, result.err
        assert digests_of_results(run) == whole
        assert sorted(cache.rglob("*")) == before
