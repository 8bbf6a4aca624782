"""Whether a cache directory can be written."""

import logging

import pytest

from saexp.errors import StoreError
from saexp.files import is_writable, write_text
from tests.disks import read_only


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
        f"cache_dir={folder} cannot be written: what this run computes is not kept "
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
