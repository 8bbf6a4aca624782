"""Folders that cannot be written: what is decided, what is said, and what stays there."""

import errno
import logging
import shutil

import pytest
from safetensors import SafetensorError

from saexp.cli import report_once
from saexp.errors import StoreError
from saexp.files import (
    RUN_FOLDER,
    cannot_write,
    is_writable,
    write_atomically,
    write_folder,
    write_text,
)
from saexp.pipeline.run_folder import LOCK, holding
from tests.disks import read_only
from tests.e2e.faults.injection import small_disk


def test_a_writable_cache_directory_is_made_and_left_empty(tmp_path, caplog):
    assert is_writable(tmp_path / "new" / "cache")
    assert not list((tmp_path / "new" / "cache").iterdir())
    assert not caplog.messages


def test_a_read_only_cache_directory_is_reported_once_per_process(tmp_path, caplog):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    with caplog.at_level(logging.WARNING), read_only(tmp_path):
        assert not any(is_writable(folder) for folder in [*folders, *folders, folders[0] / "new"])
    assert caplog.messages == [
        f"cache_dir={folder} is not writable: what this run computes is not stored "
        "(Read-only file system)"
        for folder in [*folders, folders[0] / "new"]
    ]
    assert is_writable(folders[0])


@pytest.mark.parametrize("below", ["", "below"])
def test_a_file_as_cache_directory_is_left_to_the_next_write(tmp_path, below, caplog):
    file = tmp_path / "file"
    file.touch()
    assert is_writable(file / below)
    with pytest.raises(StoreError, match="cannot write .*choose another cache_dir="):
        write_text(file / below / "name", "text")
    assert not caplog.messages


def test_what_a_killed_process_left_in_a_runs_folder_is_removed_when_it_is_held(tmp_path):
    (tmp_path / ".tmp-folder").mkdir()
    (tmp_path / ".tmp-folder" / "weights").touch()
    (tmp_path / ".tmp-file.json").touch()
    (tmp_path / "metrics.json").touch()
    with holding(tmp_path):
        assert {p.name for p in tmp_path.iterdir()} == {LOCK, "metrics.json"}


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, what):
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "cfg.json").write_text("before")
    before = sorted(tmp_path.rglob("*"))

    def fail(temporary):
        file = temporary if what == "file" else temporary / "cfg.json"
        file.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    write, name = {
        "file": (write_atomically, "sae/cfg.json"),
        "folder": (write_folder, "sae"),
    }[what]
    with pytest.raises(StoreError, match="disk full: .*hydra.run.dir="):
        write(tmp_path / name, fail, option=RUN_FOLDER)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "sae" / "cfg.json").read_text() == "before"


def test_a_folder_takes_the_place_of_an_earlier_one(tmp_path):
    for content in ("first", "second"):
        write_folder(tmp_path / "sae", lambda p, c=content: (p / c).write_text(c) and None)
        assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [content]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, ""), "disk full: "),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "disk full: "),
        (SafetensorError("I/O error: (os error 27)"), "File too large; what was finished is kept"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), "disk full: "),
        (shutil.Error([("a", "b", "[Errno 28] No space left on device")]), "disk full: "),
        (OSError(errno.EDQUOT, ""), "Disk quota exceeded; what was finished is kept: raise that"),
        (OSError(errno.EROFS, ""), ": Read-only file system; choose another cache_dir="),
    ],
)
def test_the_cause_is_read_from_what_libraries_raise(tmp_path, error, reason):
    assert reason in str(cannot_write(tmp_path / "file", error))


def test_a_log_file_on_a_full_disk_is_reported_once_and_goes_on(tmp_path, capsys):
    with small_disk(tmp_path / "disk", 8) as disk:
        logger = logging.getLogger("tests.full_disk")
        logger.setLevel(logging.INFO)
        handler = logging.FileHandler(disk.path / "saexp.log")
        logger.addHandler(handler)
        report_once(logger)
        for n in range(200):
            logger.info("%d %s", n, "x" * 100)
        disk.resize(64)
        logger.info("there is room again")
        logger.removeHandler(handler)
        handler.close()
        assert "there is room again" in (disk.path / "saexp.log").read_text()
    assert capsys.readouterr().err == (
        f"{tmp_path}/disk/saexp.log is incomplete: No space left on device\n"
    )
