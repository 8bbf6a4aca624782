"""What a run's notes say of its data: examples skipped, columns misspelt."""

import json
from pathlib import Path

import pytest

import saexp
from saexp.context import ObjectCache
from tests.shipped_texts import FEW_NEUTRAL

SHIPPED = Path(saexp.__file__).parent / "assets/tiny/entities.jsonl"
MISSPELT = "column 'splitt' is not used by saexp; did you mean split?"
SKIPPED = "12 of 48 examples were skipped: no entity span (12)"
OBJECTS = ObjectCache()
"""Shared by the runs of this file, as by the cells of a sweep (see test_shared.py)."""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 of the shipped examples, 12 of them without an entity, all with a misspelt column."""
    rows = [json.loads(line) for line in SHIPPED.read_text("utf-8").splitlines()]
    both = [[r for r in rows if r["group"] == g][:24] for g in ("known", "unknown")]
    path = tmp_path_factory.mktemp("data") / "my.jsonl"
    lines = []
    for number, row in enumerate([*both[0], *both[1]]):
        columns = {k: v for k, v in row.items() if k != "entity" or number % 4}
        lines.append(json.dumps({**columns, "splitt": "train"}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def notes(cache: Path, folder: Path, *words: str) -> list[str]:
    cfg = saexp.compose(["tracker=none", f"cache_dir={cache}", *words])
    noted = saexp.run(cfg, folder, objects=OBJECTS).notes
    assert json.loads((folder / "provenance.json").read_text("utf-8"))["notes"] == noted
    return noted


RUNS = {
    "contrast": [
        "analyzer.n_bootstrap=0",
        "analyzer.n_background=200",
        FEW_NEUTRAL,
        "intervention=none",
    ],
    "stats of two layers": ["analyzer=stats", "layer=[1,2]", "intervention=none", FEW_NEUTRAL],
    "collect": ["task=collect", "layer=1"],
    "dashboard": ["task=dashboard", "task.latents=[1]", "positions=entity_last", FEW_NEUTRAL],
    "train": ["task=train", "layer=1", "width=16", "positions=entity_last"],
}


@pytest.mark.filterwarnings("ignore")  # sae-lens' own, in training
@pytest.mark.parametrize("words", RUNS.values(), ids=RUNS)
def test_skipped_examples_and_misspelt_columns_are_noted_once(
    file: Path, cache: Path, tmp_path: Path, words: list[str]
) -> None:
    if "task=train" in words:
        words = [*words, "sae_trainer.n_samples=256", "sae_trainer.batch_size=16"]
    noted = notes(cache, tmp_path, "dataset=jsonl", f"dataset.path={file}", *words)
    assert noted.count(SKIPPED) == noted.count(MISSPELT) == 1
    assert sum("examples were skipped" in note for note in noted) == 1


def test_a_second_data_set_has_notes_of_its_own(file: Path, cache: Path, tmp_path: Path) -> None:
    words = ["analyzer=probe", f"analyzer.transfer={file}", "intervention=none"]
    words += [
        "analyzer.n_bootstrap=0",
        "dataset.n_examples=40",
        "analyzer.n_background=200",
        FEW_NEUTRAL,
    ]
    noted = notes(cache, tmp_path, *words)
    assert f"transfer: {SKIPPED}" in noted
    assert SKIPPED not in noted


def test_texts_without_a_prediction_are_noted(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "my.jsonl"
    rows = [{"text": "The", "splitt": "test"}, *({"text": f"The player {n}"} for n in "ab")]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    words = ["task=evaluate", "dataset=jsonl", f"dataset.path={file}"]
    noted = notes(cache, tmp_path / "run", *words)
    skipped = "1 of 3 texts was skipped: too short: no token has a scored next token (1)"
    assert skipped in noted
    assert MISSPELT in noted


def test_labelling_notes_misspelt_columns(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "my.jsonl"
    row = {"entity_type": "player", "answer": " golf", "splitt": "train"}
    lines = [
        {**row, "text": f"The player {n}", "entity": n, "prompt": f"{n}:"} for n in ("Bo", "Al")
    ]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    words = ["task=label", "dataset=jsonl", f"dataset.path={file}", "task.form=own"]
    words += ["task.n_samples=0", "task.max_new_tokens=2"]
    words += ["task.min_correct=1"]
    assert MISSPELT in notes(cache, tmp_path / "run", *words)


def test_nothing_is_noted_of_the_shipped_data(cache: Path, tmp_path: Path) -> None:
    # The collection reads all of it.
    words = [*RUNS["contrast"], "layer=2", "dataset.n_examples=40"]
    for number, more in enumerate((words, ["task=collect", "layer=1"])):
        noted = notes(cache, tmp_path / str(number), *more)
        assert not [n for n in noted if "skipped" in n or "column" in n]
