"""Finished runs and sweeps with damaged files: computed again or reported, never taken over."""

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import saexp
from saexp.api import read_result
from saexp.config import RunConfig
from saexp.errors import StoreError
from saexp.pipeline import finished
from saexp.reports.saved_run import cells_table
from saexp.reports.sweep import write_sweep
from tests.e2e.faults.injection import (
    DAMAGES,
    command,
    digests_of_results,
    edit_json_number,
    flip_byte,
    wrong_shape,
)
from tests.shipped_texts import FEW_NEUTRAL
from tests.unit.reports.run_outputs import body_of

SMALL = ["tracker=none", "intervention=none", "analyzer.n_bootstrap=0", "dataset.n_examples=20"]
SMALL += ["analyzer.n_background=200", FEW_NEUTRAL]
SHAPES = ("[]", "3", "null", '{"a": 1}', '"text"')


class Done(NamedTuple):
    """A finished run, and the folder that it and its cache are in."""

    root: Path
    cfg: RunConfig
    key: str

    @property
    def folder(self) -> Path:
        return self.root / "run"

    @property
    def index(self) -> Path:
        return self.root / "cache/finished" / f"{self.key}.json"

    def files(self) -> list[Path]:
        """All that decides whether it is reused."""
        listed = json.loads((self.folder / "provenance.json").read_text("utf-8"))["files"]
        return [*(self.folder / name for name in listed), self.folder / "provenance.json"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    root = tmp_path_factory.mktemp("done")
    cfg = saexp.compose([*SMALL, "resume=true", f"cache_dir={root}/cache"])
    saexp.run(cfg, root / "run")
    key = finished.fingerprint(cfg)
    assert key is not None
    return Done(root, cfg, key)


@pytest.fixture
def run(done: Done, tmp_path: Path) -> Iterator[Done]:
    """The run, whose files are as they were when the test is over."""
    for name in ("run", "cache/finished"):
        shutil.copytree(done.root / name, tmp_path / "before" / name)
    yield done
    for name in ("run", "cache/finished"):
        shutil.rmtree(done.root / name)
        shutil.copytree(tmp_path / "before" / name, done.root / name)


def damaged(path: Path) -> Iterator[str]:
    """Every damage to a file, one after the other; afterwards the file is as it was."""
    content = path.read_bytes()
    of_json = (edit_json_number,) if path.suffix == ".json" else ()
    for damage in (*DAMAGES, *of_json):
        description = damage(path, 3)
        if not path.is_file() or path.read_bytes() != content:
            yield f"{path.name}: {description}"
        path.write_bytes(content)
    for shape in SHAPES if path.suffix == ".json" else ():
        path.write_text(shape)
        yield f"{path.name}: {shape}"
    path.unlink()
    path.mkdir()
    yield f"{path.name}: a folder"
    path.rmdir()
    path.write_bytes(content)


def test_a_run_is_not_reused_with_any_damage_to_any_file(
    run: Done, caplog: pytest.LogCaptureFixture
) -> None:
    assert {"metrics.json", "report.html", "latents.parquet"} <= {f.name for f in run.files()}
    for file in (*run.files(), run.index):
        for damage in damaged(file):
            caplog.clear()
            assert finished.find_finished(run.cfg, run.key) is None, damage
            if damage.endswith(f"{run.index.name}: deleted"):
                assert caplog.messages == []
                continue
            (message,) = caplog.messages
            assert file.name in message, damage
            assert "is not reused: " in message
            assert message.endswith("; computing it again")
    caplog.clear()
    earlier = finished.find_finished(run.cfg, run.key)
    assert earlier is not None and earlier.folder == run.folder
    assert caplog.messages == []


def test_a_list_of_files_that_lacks_one_is_not_believed(run: Done) -> None:
    file = run.folder / "provenance.json"
    about = json.loads(file.read_text("utf-8"))
    for lacking in (("metrics.json",), ("report.html",), tuple(about["files"])):
        files = {k: v for k, v in about["files"].items() if k not in lacking}
        file.write_text(json.dumps(finished.sealed({**about, "files": files})))
        finished._index(run.cfg, run.index, run.folder)
        assert finished.find_finished(run.cfg, run.key) is None, lacking
    outside = {**about["files"], "../cache/x": about["files"]["metrics.json"]}
    file.write_text(json.dumps(finished.sealed({**about, "files": outside})))
    finished._index(run.cfg, run.index, run.folder)
    assert finished.find_finished(run.cfg, run.key) is None


def test_a_damaged_run_is_computed_again_with_equal_results(run: Done, tmp_path: Path) -> None:
    expected = digests_of_results(run.folder)
    damages = itertools.cycle((*DAMAGES, edit_json_number, wrong_shape))
    files = [run.folder / n for n in ("metrics.json", "provenance.json", "latents.parquet")]
    for number, file in enumerate([*files, run.index]):
        content = file.read_bytes()
        description = next(damages)(file, number)
        again = saexp.run(run.cfg, tmp_path / f"again{number}")
        assert not any(note.startswith("reused") for note in again.notes), description
        assert digests_of_results(tmp_path / f"again{number}") == expected, description
        file.write_bytes(content)
        finished._index(run.cfg, run.index, run.folder)


def test_a_damaged_run_is_computed_again_in_its_own_folder(run: Done) -> None:
    expected = digests_of_results(run.folder)
    edit_json_number(run.folder / "metrics.json", 1)
    assert digests_of_results(run.folder) != expected
    saexp.run(run.cfg, run.folder)
    assert digests_of_results(run.folder) == expected
    earlier = finished.find_finished(run.cfg, run.key)
    assert earlier is not None and earlier.folder == run.folder


def test_reading_a_damaged_run_is_one_line_that_names_the_file(run: Done) -> None:
    sound = read_result(run.folder)
    for file in run.files():
        if file.suffix not in (".json", ".parquet") or file.name.startswith("."):
            continue
        for damage in damaged(file):
            with pytest.raises(StoreError) as error:
                read_result(run.folder)
            assert file.name in str(error.value), damage
            assert "\n" not in str(error.value), damage
    (run.folder / "a_users.parquet").write_text("no table")
    again = read_result(run.folder)
    assert again.metrics == sound.metrics
    assert again.tables.keys() == sound.tables.keys()
    assert finished.find_finished(run.cfg, run.key) is not None


def test_a_copy_is_as_good_as_the_run(run: Done, tmp_path: Path) -> None:
    saexp.run(run.cfg, tmp_path / "copy")
    own = finished.find_finished(run.cfg, run.key, tmp_path / "copy")
    assert own is not None and own.folder == tmp_path / "copy"
    (run.folder / "rows.parquet").unlink()
    other = saexp.run(run.cfg, tmp_path / "other")
    assert f"reused from {tmp_path / 'copy'}" in other.notes
    assert sum(note.startswith("reused from ") for note in other.notes) == 1
    (tmp_path / "copy/metrics.json").write_text("{}")
    shutil.rmtree(tmp_path / "other")
    assert finished.find_finished(run.cfg, run.key) is None


def test_a_copy_that_was_interrupted_is_no_finished_run(
    run: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = finished.find_finished(run.cfg, run.key)
    assert earlier is not None
    # A run holds its folder before it copies.
    (tmp_path / "copy").mkdir()
    real = finished.write_atomically
    n_files = len(finished._results(run.folder))
    for n in range(n_files):
        written: list[Path] = []

        def write(path: Path, *arguments: object, n: int = n, **options: object) -> None:
            if len(written) == n:  # noqa: B023
                raise KeyboardInterrupt
            written.append(path)  # noqa: B023
            real(path, *arguments, **options)  # pyright: ignore[reportArgumentType]

        monkeypatch.setattr(finished, "write_atomically", write)
        with pytest.raises(KeyboardInterrupt):
            finished.reuse(run.cfg, earlier, tmp_path / "copy")
        assert not (tmp_path / "copy/provenance.json").exists()
        assert finished.find_finished(run.cfg, run.key, tmp_path / "copy") == earlier
    monkeypatch.undo()
    assert finished.reuse(run.cfg, earlier, tmp_path / "copy")
    assert digests_of_results(tmp_path / "copy") == digests_of_results(run.folder)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cells of a sweep."""
    root = tmp_path_factory.mktemp("swept")
    words = ["-m", "layer=1,2", *SMALL, "cache_dir=cache", "hydra.sweep.dir=sweep"]
    result = command(words, root)
    assert result.code == 0, result.err
    return root


def test_a_sweep_with_a_damaged_cell_says_so_and_goes_on(swept: Path, tmp_path: Path) -> None:
    sweep = Path(shutil.copytree(swept / "sweep", tmp_path / "sweep"))
    (cell,) = sweep.glob("0_*")
    sound, _ = write_sweep(sweep)
    about = json.loads((cell / "provenance.json").read_text("utf-8"))
    # Of the damages some, as the other tests try all.
    for number, name in enumerate((*about["files"], "provenance.json")):
        for damage in itertools.islice(damaged(cell / name), number % 5, None, 5):
            table = cells_table(sweep)
            assert table["status"].tolist() == ["damaged", "finished"], damage
            assert name in table["error"][0], damage
    edit_json_number(cell / "metrics.json")
    write_sweep(sweep)
    assert "metrics.json was changed since it was written" in body_of(sweep / "sweep.html")
    shutil.copyfile(next((swept / "sweep").glob("0_*")) / "metrics.json", cell / "metrics.json")
    for name in (".hydra/overrides.yaml", ".hydra/config.yaml"):
        for damage in itertools.islice(damaged(cell / name), None, None, 2):
            table = cells_table(sweep)
            assert table["status"][1] == "finished", damage
            assert table["status"][0] == "not run" or table.equals(sound), damage
    for name in ("plan.json", "latent_matches.parquet", "latent_matches_notes.json"):
        assert (sweep / name).is_file() or name.endswith("notes.json")
        (sweep / name).touch()
        for damage in itertools.islice(damaged(sweep / name), 3, None, 8):
            table, _ = write_sweep(sweep)
            assert table["status"].tolist() == ["finished", "finished"], damage


def test_a_sweep_with_damaged_cells_is_computed_again(swept: Path) -> None:
    """Each cell has another damage to another file."""
    words = ["-m", "layer=1,2", *SMALL, "cache_dir=cache", "hydra.sweep.dir=again"]
    cells = sorted((swept / "sweep").glob("[01]_*"))
    expected = {cell.name: digests_of_results(cell) for cell in cells}
    names = ("metrics.json", "latents.parquet")
    damages = (edit_json_number, flip_byte)
    descriptions = [
        damage(cell / name, number)
        for number, (cell, name, damage) in enumerate(zip(cells, names, damages, strict=True))
    ]
    again = command(words, swept)
    assert again.code == 0 and "Traceback" not in again.err, descriptions
    assert "sweep: 2 cells: 2 finished" in again.out, descriptions
    reasons = [line for line in again.err.splitlines() if "is not reused: " in line]
    assert len(reasons) == 2, again.err
    for cell, name in zip(cells, names, strict=True):
        (reason,) = [line for line in reasons if cell.name in line]
        assert name in reason
    again_cells = (swept / "again").glob("[01]_*")
    assert {c.name: digests_of_results(c) for c in again_cells} == expected, descriptions
