"""Digests are of content: a file is read again wherever it may have changed."""

import hashlib
import importlib
import os
import sys
import time
from pathlib import Path

import pytest

from saexp import digests
from saexp.digests import code_digest, content_name, contents, file_sha256
from saexp.interventions.outcomes import AnswerLogit, AnswerRank


def of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled at once."""
    monkeypatch.setattr(digests, "_RACY_NS", -(10**18))


def test_a_file_of_equal_size_and_restored_time_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"one")
    before = file.stat()
    assert file_sha256(file) == of(b"one")
    file.write_bytes(b"two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file_sha256(file) == of(b"two")


@pytest.mark.usefixtures("settled")
def test_a_file_that_did_not_change_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, real = [], digests.read_sha256
    monkeypatch.setattr(digests, "read_sha256", lambda p: read.append(p) or real(p))
    file = tmp_path / "a"
    file.write_bytes(b"one")
    assert file_sha256(file) == file_sha256(file) == of(b"one")
    assert len(read) == 1
    time.sleep(0.02)
    file.write_bytes(b"two")
    assert file_sha256(file) == of(b"two")
    assert len(read) == 2


@pytest.mark.usefixtures("settled")
def test_large_files_are_remembered_by_later_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_PERSISTED_BYTES", 3)
    monkeypatch.setattr(digests._CACHE, "file", None)
    monkeypatch.setattr(digests._CACHE, "known", {})
    digests.remember_in(tmp_path / "cache")
    file = tmp_path / "a"
    file.write_bytes(b"one")
    assert file_sha256(file) == of(b"one")
    monkeypatch.setattr(digests._CACHE, "known", {})
    read: list[Path] = []
    real = digests.read_sha256
    monkeypatch.setattr(digests, "read_sha256", lambda p: read.append(p) or real(p))
    assert file_sha256(file) == of(b"one")
    assert read == []
    persisted = tmp_path / "cache" / "digests.json"
    sound = persisted.read_text()
    other = sound.replace(of(b"one"), of(b"two"))
    assert other != sound
    shapes = ("{damaged", "", "[]", "3", "null", '{"digests": {}}', '{"digests": 3, "checksum": 3}')
    for number, content in enumerate((*shapes, other, other.replace("checksum", "a"))):
        monkeypatch.setattr(digests._CACHE, "known", {})
        persisted.write_text(content)
        assert file_sha256(file) == of(b"one")
        assert len(read) == number + 1
        assert persisted.read_text() == sound
    persisted.write_bytes(b"\xff\xfe")
    monkeypatch.setattr(digests._CACHE, "known", {})
    assert file_sha256(file) == of(b"one")
    # What cannot be put in place leaves nothing behind.
    persisted.unlink()
    persisted.mkdir()
    monkeypatch.setattr(digests._CACHE, "known", {})
    assert file_sha256(file) == of(b"one")
    assert list(persisted.parent.iterdir()) == [persisted]


def test_only_names_that_are_hashes_stand_for_content(tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for name in ("a" * 64, "b" * 40, "latest"):
        (blobs / name).write_bytes(b"x")
        (tmp_path / f"to-{name}").symlink_to(blobs / name)
    assert content_name(tmp_path / f"to-{'a' * 64}") == "a" * 64
    assert content_name(tmp_path / f"to-{'b' * 40}") == "b" * 40
    assert content_name(tmp_path / "to-latest") == of(b"x")
    assert content_name(blobs / ("a" * 64)) == of(b"x")


def test_a_folder_is_its_files_by_name_and_content(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_bytes(b"2")
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "a.pyc").write_bytes(b"no matter")
    assert contents(tmp_path) == [("a", of(b"1")), ("sub/b", of(b"2"))]


def test_code_is_known_by_the_files_of_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert code_digest(AnswerLogit) != code_digest(AnswerRank)
    assert code_digest(AnswerLogit) == code_digest(AnswerLogit)
    monkeypatch.syspath_prepend(str(tmp_path))
    code_digests = []
    for number, helper in enumerate(("x = 1", "x = 1", "x = 2")):
        name = f"my_code_{number}"
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
        (tmp_path / name / "helper.py").write_text(helper)
        (tmp_path / name / "mine.py").write_text("class Mine: pass")
        module = importlib.import_module(f"{name}.mine")
        module.Mine.__module__ = "my_code.mine"
        monkeypatch.setitem(sys.modules, "my_code", sys.modules[name])
        monkeypatch.setitem(sys.modules, "my_code.mine", module)
        code_digests.append(code_digest(module.Mine))
    assert code_digests[0] == code_digests[1] != code_digests[2]


def test_code_that_is_in_no_file_has_no_digest() -> None:
    typed_class = type("Typed", (), {"__module__": "nowhere_in_a_file"})
    assert code_digest(typed_class) is None
