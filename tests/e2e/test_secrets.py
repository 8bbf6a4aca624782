"""Values from the environment are used, and nothing that a run leaves holds them."""

import json
import pickle
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import saexp
from saexp.config.environment import TypedValues, as_typed, masked, resolved
from saexp.pipeline.finished import fingerprint
from tests.shipped_texts import FEW_NEUTRAL
from tests.unit.reports.run_outputs import CommandResult, command, page_of, wandb_runs

SECRET = "swordfish-hunter2-9f3"
FOLDER = "folder-of-nobody-else"
SHORT = "pqz17"
SMALL = [
    "intervention=none",
    "analyzer.n_bootstrap=0",
    "analyzer.n_background=300",
    FEW_NEUTRAL,
    "layer=1",
]
SMALL += ["dataset.n_examples=20"]
DATA = ["dataset=jsonl", "dataset.path=${oc.env:SAEXP_TEST_FOLDER}/rows.jsonl"]
TOKENS = [
    "+intervention.where_options.token=${oc.env:SAEXP_TEST_SECRET}",
    "+intervention.where_options.short=${oc.env:SAEXP_TEST_SHORT}",
    "+intervention.where_options.deep={a: ['${oc.decode:${oc.env:SAEXP_TEST_SECRET}}']}",
    "+intervention.where_options.again='x-${intervention.where_options.token}'",
    "+intervention.where_options.whole='${oc.decode:${oc.env:SAEXP_TEST_WHOLE}}'",
]
TYPED = {
    "token": "${oc.env:SAEXP_TEST_SECRET}",
    "short": "${oc.env:SAEXP_TEST_SHORT}",
    "deep": {"a": ["${oc.decode:${oc.env:SAEXP_TEST_SECRET}}"]},
    "again": "x-${intervention.where_options.token}",
    "whole": "${oc.decode:${oc.env:SAEXP_TEST_WHOLE}}",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the runs are; the data are elsewhere, in a folder whose name is a secret."""
    data = tmp_path / "data" / FOLDER
    data.mkdir(parents=True)
    with (data / "rows.jsonl").open("w") as file:
        for i in range(40):
            row = {"text": f"The city of Name{i}", "entity": f"Name{i}", "entity_type": "city"}
            file.write(json.dumps({**row, "group": ("known", "unknown")[i % 2]}) + "\n")
    monkeypatch.setenv("SAEXP_TEST_SECRET", SECRET)
    monkeypatch.setenv("SAEXP_TEST_SHORT", SHORT)
    monkeypatch.setenv("SAEXP_TEST_WHOLE", f"{{a: {SECRET}, b: [{SHORT}]}}")
    monkeypatch.setenv("SAEXP_TEST_FOLDER", str(data))
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def assert_no_secret_in(folder: Path, result: CommandResult | None = None) -> None:
    secrets = [text.encode() for text in (SECRET, SHORT, FOLDER)]
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert files
    for path in files:
        content = path.read_bytes()
        assert not [s for s in secrets if s in content or s in str(path).encode()], path
    if result is not None:
        assert not [s for s in secrets if s in (result.out + result.err).encode()], result


@pytest.mark.parametrize("tracker", ["wandb", "jsonl"])
def test_no_file_of_a_run_or_of_its_cache_holds_a_value_from_the_environment(
    folder: Path, tracker: str
) -> None:
    result = command(folder, *SMALL, *DATA, *TOKENS, f"tracker={tracker}", "hydra.run.dir=run")
    assert result.code == 0, result.err[-2000:]
    assert_no_secret_in(folder, result)
    about = json.loads((folder / "run/provenance.json").read_text("utf-8"))
    assert about["config"]["intervention"]["where_options"] == TYPED
    assert about["config"]["dataset"]["path"] == "${oc.env:SAEXP_TEST_FOLDER}/rows.jsonl"
    assert "${oc.env:SAEXP_TEST_SECRET}" in (folder / "run/report.html").read_text("utf-8")
    pattern = "tracker.jsonl" if tracker == "jsonl" else "wandb/offline-run-*/*.wandb"
    (tracked,) = (folder / "run").glob(pattern)
    assert b"${oc.env:SAEXP_TEST_SECRET}" in tracked.read_bytes()


def test_a_failed_cell_of_a_sweep_quotes_its_setting_as_typed(folder: Path) -> None:
    words = [*SMALL, *DATA, "dataset.path=${oc.env:SAEXP_TEST_FOLDER}/${oc.env:SAEXP_TEST_SHORT}"]
    words += ["tracker=wandb", "hydra.sweep.dir=sweep", *TOKENS]
    result = command(folder, "-m", *words)
    assert result.code == 1
    why = "dataset.path=${oc.env:SAEXP_TEST_FOLDER}/${oc.env:SAEXP_TEST_SHORT}: no such file"
    assert result.err.splitlines()[-1] == f"saexp: {why}"
    assert why in page_of(folder / "sweep")
    # The cell's run and that of the sweep, in one folder.
    assert len(list(folder.glob("sweep/wandb/offline-run-*"))) == 2
    assert_no_secret_in(folder, result)


def test_cells_whose_sae_comes_from_the_environment_are_matched(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEXP_TEST_SAES", str(Path(saexp.__file__).parent / "assets/tiny/sae"))
    words = ["-m", "sae=local", "layer=1,2", "intervention=none", "tracker=none"]
    words += ["analyzer.n_bootstrap=0", "hydra.sweep.dir=sweep", "dataset.n_examples=40"]
    words += ["analyzer.n_background=300", FEW_NEUTRAL]
    words += ["sae.path='${oc.env:SAEXP_TEST_SAES}/layer_{layer}/width_256'"]
    result = command(folder, *words)
    assert result.code == 0, result.err[-2000:]
    assert (folder / "sweep/latent_matches.parquet").is_file(), result.err[-2000:]


def test_the_sweeps_own_run_goes_to_the_project_that_the_environment_names(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEXP_TEST_PROJECT", "of-the-group")
    words = ["-m", *SMALL, "tracker=wandb", "hydra.sweep.dir=sweep"]
    result = command(folder, *words, "tracker.project=${oc.env:SAEXP_TEST_PROJECT}")
    assert result.code == 0, result.err[-2000:]
    # Read once W&B's own process has written them to their end.
    runs = wandb_runs(folder / "sweep")
    assert len(runs) > 1
    assert {run["project"] for run in runs} == {"of-the-group"}


def test_the_fingerprint_is_that_of_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    word = "+intervention.where_options.token=${oc.env:SAEXP_TEST_SECRET}"
    first = fingerprint(saexp.compose([word]))
    assert first == fingerprint(saexp.compose([f"+intervention.where_options.token={SECRET}"]))
    monkeypatch.setenv("SAEXP_TEST_SECRET", "another one")
    assert first != fingerprint(saexp.compose([word]))


def test_a_changed_config_still_has_its_values_as_typed() -> None:
    cfg = replace(saexp.compose(TOKENS), seed=3)
    assert cfg.intervention.where_options["token"] == SECRET
    stored = as_typed(asdict(cfg))
    assert stored["intervention"]["where_options"] == TYPED
    assert resolved(stored)["intervention"] == asdict(cfg)["intervention"]


UNPICKLE = """
import pickle, sys
from dataclasses import asdict
from saexp.config.environment import as_typed
cfg = pickle.load(sys.stdin.buffer)
assert cfg.intervention.where_options["token"] == sys.argv[1]
print(as_typed(asdict(cfg))["intervention"]["where_options"]["token"])
"""


def test_in_another_process_a_config_has_its_values_as_typed() -> None:
    content = pickle.dumps(saexp.compose(TOKENS))
    words = [sys.executable, "-c", UNPICKLE, SECRET]
    process = subprocess.run(words, input=content, capture_output=True)
    assert process.stdout.decode() == "${oc.env:SAEXP_TEST_SECRET}\n", process.stderr.decode()


def test_a_value_that_another_config_took_from_the_environment_stays_as_it_is_typed(
    folder: Path,
) -> None:
    from_environment, typed = (
        saexp.compose([f"dataset.path={path}/rows.jsonl", "dataset=jsonl"])
        for path in ("${oc.env:SAEXP_TEST_FOLDER}", folder.parent / "data" / FOLDER)
    )
    assert from_environment == typed
    assert as_typed(asdict(typed)) == asdict(typed)


def test_a_value_that_a_later_config_takes_from_the_environment_stays_as_it_is_typed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saexp.config.environment._TYPED", TypedValues())
    path = folder.parent / "data" / FOLDER / "rows.jsonl"
    typed = saexp.compose(["dataset=jsonl", f"dataset.path={path}"])
    later = saexp.compose(["tracker.project=${oc.env:SAEXP_TEST_FOLDER}"])
    assert str(later.tracker.project) in str(typed.dataset.path)
    assert as_typed(asdict(typed)) == asdict(typed)


def test_numbers_and_short_words_of_the_environment_change_no_other_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SAEXP_TEST_MODEL", "tiny")
    monkeypatch.setenv("SAEXP_TEST_ALPHA", "0.01")
    words = ["model.name=${oc.env:SAEXP_TEST_MODEL}", "analyzer.alpha=${oc.env:SAEXP_TEST_ALPHA}"]
    stored = as_typed(asdict(saexp.compose(words)))
    assert stored["model"]["name"] == "${oc.env:SAEXP_TEST_MODEL}"
    assert stored["analyzer"]["alpha"] == 0.01
    assert stored["sae"]["name"] == "tiny"
    assert masked("a tiny model") == "a tiny model"


CHOICES = {
    "analyzer.name": "top_features",
    "analyzer.by": "frequency",
    "intervention.name": "steer",
    "intervention.outcomes.0": "neutral_kl",
    "dataset.groups.0": "well_known",
    "sae.stream": "resid_post",
}


def test_names_that_reports_look_up_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in CHOICES.items():
        monkeypatch.setenv(f"SAEXP_{key.replace('.', '_')}", value)
    typed = {key: f"${{oc.env:SAEXP_{key.replace('.', '_')}}}" for key in CHOICES}
    words = ["analyzer=top_features"]
    words += [f"{k[:-2]}=['{v}']" if k.endswith(".0") else f"{k}={v}" for k, v in typed.items()]
    cfg = saexp.compose(words)
    stored = as_typed(asdict(cfg))
    for key, value in CHOICES.items():
        entry: Any = stored
        for part in key.split("."):
            entry = entry[int(part) if part == "0" else part]
        assert entry == value
    assert masked("layer_2.resid_post") == "layer_2.resid_post"


def test_a_message_quotes_the_setting_and_not_one_that_repeats_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SAEXP_TEST_MODEL", "models/of-nobody-else")
    saexp.compose(["model.name=${oc.env:SAEXP_TEST_MODEL}"])
    assert masked("no models/of-nobody-else") == "no ${oc.env:SAEXP_TEST_MODEL}"


def test_a_report_has_the_columns_that_the_environment_chose(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEXP_TEST_BY", "frequency")
    words = ["analyzer=top_features", "analyzer.by=${oc.env:SAEXP_TEST_BY}"]
    result = command(folder, *SMALL, *words, "tracker=none", "hydra.run.dir=run")
    assert result.code == 0, result.err[-2000:]
