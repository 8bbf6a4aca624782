"""Disks that are full, damaged or cannot be written: one clear line, and no wrong value."""

import logging
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from saexp.activations import ActivationStore, collection
from saexp.errors import StoreError
from saexp.files import show_bytes
from saexp.models import Hookpoint
from saexp.models.loading import LanguageModel
from tests.disks import obeying_permissions, read_only
from tests.random_models import random_hf, random_lm, save
from tests.unit.activations.collecting import (
    POSTS,
    digests,
    n_shard_files,
    n_sound,
    placed,
    run,
)

SHARD_ROWS = 9


@pytest.fixture(scope="module")
def model():
    return random_lm("llama")


@pytest.fixture(scope="module")
def collected(model, tmp_path_factory):
    """(store, statistics) of a collection that nothing happened to."""
    return run(model, tmp_path_factory.mktemp("whole"), shard_rows=SHARD_ROWS)


@pytest.fixture(scope="module")
def expected(collected):
    return digests(collected[0].path)


@pytest.fixture()
def folder(collected, tmp_path):
    """The folder of a copy of that store, in `tmp_path`."""
    source = collected[0].path
    return Path(shutil.copytree(source, tmp_path / "activations" / source.name))


def message_of(make) -> str:
    with pytest.raises(StoreError) as error:
        make()
    assert "\n" not in str(error.value)
    return str(error.value)


def flip(file):
    with file.open("r+b") as opened:
        opened.seek(-5, 2)
        (byte,) = opened.read(1)
        opened.seek(-5, 2)
        opened.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("large", [False, True])
def test_a_flipped_byte_is_noticed_named_and_computed_again(
    model, collected, expected, folder, tmp_path, monkeypatch, caplog, large
):
    store, stats = collected
    damaged = folder / "layer_1.resid_post" / "00002.safetensors"
    flip(damaged)
    if large:
        monkeypatch.setattr("saexp.activations._HASH_ON_OPEN_BYTES", 10)
        assert run(model, tmp_path)[1].tokens_forwarded == 0, "only verify looks at large files"
    with caplog.at_level(logging.WARNING):
        again, new = run(model, tmp_path, verify=large)
        assert torch.equal(again.acts(1), store.acts(1))
    assert f"{damaged} is damaged (checksum) and counts as not collected" in caplog.messages
    assert 0 < new.tokens_forwarded < stats.tokens_forwarded
    assert digests(folder) == expected


@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_of_two_equal_shards_the_damaged_one_is_noticed(model, tmp_path, damage):
    text = "The same text is in two shards."
    store, _ = run(model, tmp_path, placement=placed([text] * 2, "last"), shard_rows=1)
    damage(store.path / "layer_1.resid_post" / "00001.safetensors")
    assert ActivationStore.open(store.path).missing(POSTS) == {1: [POSTS[1]]}


@pytest.fixture()
def disk(tmp_path):
    """(an empty folder, a function that makes it a file system of so many kB)."""
    disk_path = tmp_path / "disk"
    disk_path.mkdir()

    def sized(kilobytes, first=False):
        options = f"{'' if first else 'remount,'}size={kilobytes}k"
        return subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk_path)],
            capture_output=True,
            text=True,
        )

    if shutil.which("mount") is None:
        pytest.skip("no mount command")
    if (done := sized(64, first=True)).returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield disk_path, sized
    subprocess.run(["umount", "--lazy", str(disk_path)], check=True)


def test_a_disk_that_is_too_small_is_reported_before_any_forward_pass(disk, tmp_path):
    disk_path, sized = disk
    sized(40)
    model = LanguageModel(save(random_hf("llama"), tmp_path / "model"))
    message = message_of(lambda: run(model, disk_path, shard_rows=SHARD_ROWS))
    (store,) = (disk_path / "activations").iterdir()
    needs = show_bytes(len(placed().rows) * len(POSTS) * model.d_model * 4)
    assert message == (
        f"disk full: the activations need {needs}, and "
        f"{show_bytes(shutil.disk_usage(disk_path).free)} are free at {store}; finished shards are "
        "kept: free some space and run the command again, or choose another cache_dir="
    )
    assert not model.loaded


# From a disk too small for the rows table to one that takes most shards.
@pytest.mark.parametrize("kilobytes", [4, 20, 28, 68, 148])
def test_a_disk_that_fills_midway_keeps_what_was_finished(
    model, expected, disk, monkeypatch, kilobytes
):
    disk_path, sized = disk
    sized(kilobytes)
    with monkeypatch.context() as patch:
        patch.setattr(collection, "free_bytes", lambda _: 10**18)
        message = message_of(lambda: run(model, disk_path, shard_rows=SHARD_ROWS))
    assert message.startswith(f"disk full: {disk_path}/activations/")
    assert message.endswith("run the command again, or choose another cache_dir=")
    n_listed = n_sound(disk_path, expected)
    assert n_listed < n_shard_files(expected)
    assert n_listed > 0 or kilobytes < 60
    assert not list(disk_path.rglob(".tmp-*"))
    sized(1024)
    store, _ = run(model, disk_path, shard_rows=SHARD_ROWS)
    assert digests(store.path) == expected


def test_a_cache_folder_that_cannot_be_created_is_one_clear_line(model, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    reasons = {
        tmp_path / "file" / "below": "Not a directory",
        Path("/proc/saexp"): "No such file or directory",
    }
    for cache, reason in reasons.items():
        message = message_of(lambda cache=cache: run(model, cache))
        assert message.startswith(f"cannot write {cache}/activations/")
        assert message.endswith(f": {reason}; choose another cache_dir=")


@pytest.mark.parametrize("state", ["whole", "damaged", "no rows table", "none"])
def test_what_a_read_only_cache_lacks_is_collected_in_memory_of_the_process(
    model, collected, expected, folder, tmp_path, caplog, state
):
    store, stats = collected
    if state == "none":
        shutil.rmtree(folder)
    elif state == "no rows table":
        (folder / "rows.parquet").unlink()
    elif state == "damaged":
        flip(folder / "layer_1.resid_post" / "00002.safetensors")
    before = digests(tmp_path)
    with caplog.at_level(logging.WARNING), read_only(tmp_path):
        again, new = run(model, tmp_path, shard_rows=SHARD_ROWS)
        complete = state in ("whole", "no rows table")
        assert (again.path == folder) == complete
        assert new.tokens_forwarded == (0 if complete else stats.tokens_forwarded)
        for at in POSTS:
            assert torch.equal(again.acts(at.layer), store.acts(at.layer))
        assert [m for m in caplog.messages if "is not writable" in m] == [
            f"cache_dir={tmp_path} is not writable: what this run computes is not stored "
            "(Read-only file system)"
        ]
        if not complete:
            assert run(model, tmp_path)[1].tokens_forwarded == 0, "the process keeps what it has"
        if state != "no rows table":
            at = [Hookpoint(0, "mlp_out")]
            message = message_of(lambda: run(model, tmp_path, at, must_persist=True))
            assert message.endswith("Read-only file system; choose another cache_dir=")
        assert digests(tmp_path) == before
    assert digests(run(model, tmp_path, shard_rows=SHARD_ROWS)[0].path) == expected


def test_a_hookpoint_folder_that_cannot_be_created_is_one_clear_line(model, tmp_path):
    store, _ = run(model, tmp_path, POSTS[:1])
    (store.path / "layer_1.resid_post").write_text("not a folder")
    message = message_of(lambda: run(model, tmp_path))
    assert message.startswith(f"cannot write {store.path}/layer_1.resid_post/00000.safetensors: ")


def test_a_shard_that_may_not_be_read_is_collected_again(model, expected, folder, tmp_path, caplog):
    shard = folder / "layer_1.resid_post" / "00002.safetensors"
    shard.chmod(0)
    with caplog.at_level(logging.WARNING), obeying_permissions():
        again, stats = run(model, tmp_path, shard_rows=SHARD_ROWS)
    assert stats.tokens_forwarded > 0
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert warnings == [f"{shard} cannot be read (Permission denied) and counts as not collected"]
    assert digests(again.path) == expected


@pytest.mark.parametrize("subfolder", [".", "..", "layer_1.resid_post"])
def test_a_folder_of_the_cache_that_may_not_be_read_is_one_line(model, folder, tmp_path, subfolder):
    folder = folder / subfolder
    folder.chmod(0)
    try:
        with obeying_permissions():
            message = message_of(lambda: run(model, tmp_path, shard_rows=SHARD_ROWS))
    finally:
        folder.chmod(0o755)
    assert str(folder.resolve()) in message
    assert message.endswith("Permission denied; choose another cache_dir=") or message.endswith(
        "cannot be read (Permission denied); choose another cache_dir="
    )
