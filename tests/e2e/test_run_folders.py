"""A run's folder holds that run and nothing else; what is reused is the same in every setting."""

import json
import shutil
import sys
import types
from pathlib import Path

import pytest

import saexp
from saexp import registry
from saexp.cli import cell_folder
from saexp.context import ObjectCache, RunContext
from saexp.errors import ModelError
from saexp.pipeline import finished
from saexp.pipeline.run_folder import clear
from saexp.results import Result
from saexp.sweeps.planning import PROCESS
from saexp.tasks.collect import damaged, stores
from saexp.tracking import NullTracker
from tests import interpreters
from tests.shipped_texts import FEW_NEUTRAL
from tests.unit.reports.run_outputs import command

SMALL = ["tracker=none", "intervention.n_prompts=4", "intervention.n_controls=2"]
SMALL += [
    "intervention.max_new_tokens=4",
    "analyzer.n_bootstrap=0",
    "analyzer.n_background=200",
    FEW_NEUTRAL,
]
SMALL += ["dataset.n_examples=20", "intervention.n_neutral=2"]
SMALL += ["intervention.n_choice_prompts=2", "intervention.top_k=1"]
OBJECTS = ObjectCache()
"""Shared by the runs of this file, as by the cells of a sweep (see test_shared.py)."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def run(cache: Path, folder: Path, *words: str) -> Result:
    return saexp.run(saexp.compose([*SMALL, f"cache_dir={cache}", *words]), folder, objects=OBJECTS)


@pytest.fixture(scope="module")
def steered(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with effects; tests work on copies."""
    folder = tmp_path_factory.mktemp("steered") / "run"
    run(cache, folder)
    return folder


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


@pytest.mark.parametrize("word", ["intervention=none", "analyzer=stats", "task=collect"])
def test_files_of_an_earlier_run_in_the_folder_are_removed(
    word: str, cache: Path, steered: Path, tmp_path: Path
) -> None:
    shutil.copytree(steered, tmp_path / "same")
    assert "effects.parquet" in names(tmp_path / "same")
    for file_name in ("notes.md", "mine.parquet"):
        (tmp_path / "same" / file_name).write_text("a user's own")
    words = [word] if word == "intervention=none" else [word, "intervention=none"]
    run(cache, tmp_path / "same", *words)
    run(cache, tmp_path / "new", *words)
    assert names(tmp_path / "same") == names(tmp_path / "new") | {"notes.md", "mine.parquet"}


def test_a_copy_of_a_finished_run_replaces_what_was_in_the_folder(
    cache: Path, steered: Path, tmp_path: Path
) -> None:
    finished_run = run(cache, tmp_path / "done", "intervention=none")
    shutil.copytree(steered, tmp_path / "same")
    again = run(cache, tmp_path / "same", "intervention=none", "resume=true")
    assert names(tmp_path / "same") == names(tmp_path / "done")
    assert again.metrics.keys() == finished_run.metrics.keys()
    assert any(note.startswith("reused from") for note in again.notes)


def test_a_run_that_cannot_begin_costs_nobody_what_was_there(cache: Path, tmp_path: Path) -> None:
    run(cache, tmp_path / "same", "intervention=none")
    before = names(tmp_path / "same")
    with pytest.raises(ModelError):
        run(cache, tmp_path / "same", "intervention=none", "layer=99", "sae=random")
    assert names(tmp_path / "same") == before | {"error.txt"}


def test_a_run_with_another_store_setting_is_not_reused(cache: Path, tmp_path: Path) -> None:
    run(cache, tmp_path / "first", "intervention=none")
    run(cache, tmp_path / "again", "intervention=none", "resume=true")
    run(cache, tmp_path / "half", "intervention=none", "resume=true", "store.dtype=float16")
    run(cache, tmp_path / "few", "intervention=none", "resume=true", "store.batch_tokens=64")
    files = {n: tmp_path / n / "provenance.json" for n in ("again", "half", "few")}
    about = {n: json.loads(file.read_text("utf-8")) for n, file in files.items()}
    reused = {name: "reused_from" in content for name, content in about.items()}
    assert reused == {"again": True, "half": False, "few": False}


def test_verify_looks_at_the_store_where_the_run_was_finished(tmp_path: Path) -> None:
    words = ["intervention=none", "resume=true"]
    run(tmp_path / "cache", tmp_path / "first", *words)
    (store, *_) = stores(tmp_path / "cache")
    (shard, *_) = sorted(store.path.glob("*/*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert damaged(store) != []
    run(tmp_path / "cache", tmp_path / "again", *words)
    assert damaged(store) != []
    run(tmp_path / "cache", tmp_path / "verified", *words, "verify=true")
    assert damaged(store) == []


PLUGIN = """
from saexp.registry import register
from saexp.results import Result
from saexp.pipeline import finished
from saexp.pipeline.run_folder import clear

@register("analyzer", "constant")
class Constant:
    def __init__(self, cfg):
        pass

    def analyze(self, inputs):
        return Result(metrics={"constant/value": VALUE})
"""


def test_a_plugin_that_was_edited_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["-m", "layer=1", "intervention=none", "analyzer.name=constant", *SMALL]
    words.append("plugins=[my_constant]")
    for value in (1, 1, 99):
        (tmp_path / "my_constant.py").write_text(PLUGIN.replace("VALUE", str(value)))
        shutil.rmtree(tmp_path / "sweep", ignore_errors=True)
        result = command(tmp_path, *words, "hydra.sweep.dir=sweep")
        assert result.code == 0, result.err
        # As a new process begins.
        PROCESS.objects.clear()
        registry.PLUGINS.components.pop(("analyzer", "constant"))
        del sys.modules["my_constant"]
        cells = sorted((tmp_path / "sweep").glob("*/metrics.json"))
        values = [json.loads(cell.read_text("utf-8"))["constant/value"] for cell in cells]
        assert values == [value]


def test_runs_that_begin_at_the_same_moment_have_folders_of_their_own(tmp_path: Path) -> None:
    def start(layer: int) -> interpreters.Process:
        words = [f"layer={layer}", "task=collect", *SMALL]
        return interpreters.Process(["-m", "saexp", *words], tmp_path)

    processes = [start(layer) for layer in (1, 2)]
    assert [p.wait() for p in processes] == [0, 0]
    provenances = sorted((tmp_path / "outputs").glob("2*/*/provenance.json"))
    layers = [json.loads(p.read_text("utf-8"))["config"]["layer"] for p in provenances]
    assert sorted(layers) == [1, 2]


def test_a_cells_folder_names_what_is_swept(tmp_path: Path) -> None:
    fixed = [f"analyzer.some_long_name_{n}=1" for n in range(6)]
    cells = [[*fixed, f"layer={n}", "width=256"] for n in (1, 2)]
    (tmp_path / "plan.json").write_text(json.dumps({"cells": cells}))
    assert cell_folder(1, cells[1], str(tmp_path)) == "1_layer=2"
    assert cell_folder(0, ["b=2", "a=1"], str(tmp_path / "none")) == "0_a=1,b=2"
    # No override is cut in the middle.
    assert cell_folder(0, [f"a={'x' * 60}", f"b={'y' * 60}"]) == f"0_a={'x' * 60}"
    assert len(cell_folder(0, [f"a={'x' * 300}"])) == 120


def test_labels_and_what_a_run_reads_stay_in_the_folder(cache: Path, tmp_path: Path) -> None:
    words = ["task=label", "task.n_samples=0", "intervention=none"]
    run(cache, tmp_path / "same", *words)
    data = {n: (tmp_path / "same" / n).read_bytes() for n in names(tmp_path / "same")}
    run(cache, tmp_path / "same", "task=collect")
    left = names(tmp_path / "same")
    for name in ("entities.jsonl", "answers.jsonl"):
        assert name in left
        assert (tmp_path / "same" / name).read_bytes() == data[name]
    assert "report.html" not in left


def test_no_file_that_the_config_names_is_removed(tmp_path: Path) -> None:
    for name in ("rows.parquet", "latents.parquet"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".written.json").write_text(json.dumps(["rows.parquet", "latents.parquet"]))
    cfg = saexp.compose([f"dataset.path={tmp_path}/rows.parquet"])
    clear(tmp_path, finished.inputs(cfg))
    assert names(tmp_path) == {"rows.parquet"}


NOT_ACCOUNTS = [
    "",
    "{",
    "3",
    "null",
    '"notes.md"',
    '{"notes.md": 1}',
    "[3]",
    '["../notes.md"]',
    "[[]]",
]


@pytest.mark.parametrize("account", [*NOT_ACCOUNTS, '["sub"]', '["sub/notes.md"]'])
def test_a_damaged_account_of_files_removes_nothing_of_the_users(
    account: str, tmp_path: Path
) -> None:
    files = [tmp_path / name for name in ("notes.md", "folder/notes.md", "folder/sub/notes.md")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("a user's own")
    (tmp_path / "folder/.written.json").write_text(account)
    clear(tmp_path / "folder")
    assert all(file.is_file() for file in files)
    assert not (tmp_path / "folder/.written.json").exists()


@pytest.fixture(scope="module")
def labelled(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that labels; tests work on copies."""
    folder = tmp_path_factory.mktemp("labelled") / "run"
    run(cache, folder, "task=label", "task.n_samples=0", "intervention=none")
    return folder


@pytest.mark.parametrize("account", [None, "", "[3]", "3"])
def test_what_an_earlier_run_left_goes_where_the_account_of_it_is_damaged(
    account: str | None, labelled: Path, tmp_path: Path
) -> None:
    shutil.copytree(labelled, tmp_path, dirs_exist_ok=True)
    (tmp_path / "mine.parquet").write_text("a user's own")
    file = tmp_path / ".written.json"
    file.unlink() if account is None else file.write_text(account)
    clear(tmp_path)
    left = {"mine.parquet", "entities.jsonl", "answers.jsonl", "answers_all.jsonl"}
    assert names(tmp_path) == left


def test_a_users_page_is_kept_where_the_run_writes_none(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "same").mkdir()
    (tmp_path / "same/report.html").write_text("mine")
    for _ in range(2):
        run(cache, tmp_path / "same", "task=collect")
        assert (tmp_path / "same/report.html").read_text() == "mine"
    run(cache, tmp_path / "same", "intervention=none")
    run(cache, tmp_path / "same", "task=collect")
    assert "report.html" not in names(tmp_path / "same")


def test_a_run_whose_data_changed_meanwhile_is_not_reused(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("{}")
    cfg = saexp.compose([f"dataset.path={data}", f"cache_dir={tmp_path}/cache"])
    key = finished.fingerprint(cfg)
    names = ("provenance.json", "metrics.json", "report.html")
    for name in names:
        (tmp_path / name).write_text("{}")
    context = RunContext(tmp_path, NullTracker(cfg.tracker), results=set(names))
    finished.record(cfg, context, key)
    earlier = finished.find_finished(cfg, key)
    assert earlier is not None and earlier.folder == tmp_path.resolve()
    data.write_text("{} {}")
    changed = finished.fingerprint(cfg)
    assert changed != key
    finished.record(cfg, context, key)
    assert finished.find_finished(cfg, changed) is None


def test_a_plugin_without_a_file_has_a_fingerprint() -> None:
    sys.modules["made_here"] = types.ModuleType("made_here")
    try:
        cfg = saexp.compose(["plugins=[made_here]"])
        assert finished.fingerprint(cfg) == finished.fingerprint(cfg)
    finally:
        del sys.modules["made_here"]


@pytest.mark.parametrize("plan", ["", "{", "[]", "{}", '{"cells": 3}', '{"cells": [[3]]}'])
def test_a_damaged_plan_costs_a_cell_no_folder(plan: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(plan)
    assert cell_folder(2, ["layer=1"], str(tmp_path)) == "2_layer=1"
