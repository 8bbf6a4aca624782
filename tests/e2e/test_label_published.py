"""task=label on published entity files of types without templates, typed in a real shell."""

import json
import shlex
import subprocess
from pathlib import Path

import pandas as pd
import pytest

import saexp
from saexp.config.run import for_hydra
from saexp.errors import DataError
from tests.unit.reports.run_outputs import CommandResult, command

BOOKS = [
    {
        "entity": name,
        "entity_type": "book",
        "attributes": [
            {"attribute_type": "creator", "attribute_value": creator},
            {"attribute_type": "length", "attribute_value": length},
        ],
    }
    for name, creator, length in (
        ("Moby-Dick", ["Herman Melville"], 635),
        ("Emma", "Jane Austen", 474),
    )
]
SHORT = ("task=label", "tracker=none", "task.n_samples=0", "task.max_new_tokens=2")


@pytest.fixture()
def books(tmp_path: Path) -> Path:
    file = tmp_path / "book.json"
    file.write_text(json.dumps(BOOKS), encoding="utf-8")
    return file


def in_shell(folder: Path, line: str) -> CommandResult:
    """The result of `python -m saexp <line>` with the words that bash makes of the line."""
    process = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
    )
    return command(folder, *process.stdout.split("\0")[:-1])


def refusal(folder: Path, *words: str) -> str:
    """The one line on stderr of a run that is refused."""
    run = in_shell(folder, " ".join([*SHORT, "dataset=wikidata", *words]))
    assert run.code == 1, run.err
    (line,) = (x for x in run.err.splitlines() if x.startswith("saexp: "))
    return line


@pytest.mark.slow
def test_the_message_names_the_command_line_that_works(books: Path):
    """What the message says to type is typed, by a shell."""
    line = refusal(books.parent, f"dataset.path={books.name}")
    expected = "\"task.templates.book.creator='What is the creator of the book {entity}?'\""
    assert f"no template for book creator; to ask about it, type {expected}" in line
    run = in_shell(
        books.parent,
        f"{' '.join(SHORT)} dataset=wikidata dataset.path={books.name} {expected} "
        "task.templates.book.length='How many pages does the book {entity} have?' "
        "task.rules.book.creator.kind=name task.rules.book.length.tolerance=20 "
        "hydra.run.dir=run cache_dir=cache",
    )
    assert run.code == 0, run.err
    table = pd.read_parquet(books.parent / "run" / "labels.parquet")
    assert table["prompt"].tolist() == [
        text
        for name in ("Moby-Dick", "Emma")
        for text in (
            f"What is the creator of the book {name}?",
            f"How many pages does the book {name} have?",
        )
    ]
    rules = pd.read_parquet(books.parent / "run" / "rules.parquet").set_index("attribute")
    assert rules["kind"].to_dict() == {"creator": "name", "length": "text"}
    assert rules["tolerance"]["length"] == 20
    page = (books.parent / "run" / "report.html").read_text("utf-8")
    assert "How answers are judged" in page


@pytest.mark.parametrize(
    ("sign", "value"),
    [
        ("", "Who wrote the book {entity}?"),
        ("+", "'Who wrote the book {entity}?'"),
        ("++", '"Who wrote the book {entity}?"'),
        ("", '["Who wrote the book {entity}?"]'),
        ("+", "Who wrote the book {entity}?"),
    ],
)
def test_a_template_may_be_typed_with_or_without_quotes_and_plus(sign: str, value: str):
    key = "task.templates.book.creator"
    cfg = saexp.compose([*SHORT, f"{sign}{key}={value}"])
    typed = cfg.task.templates["book"]["creator"]
    assert [typed] in (["Who wrote the book {entity}?"], [["Who wrote the book {entity}?"]])


def test_a_template_may_begin_with_the_entity():
    cfg = saexp.compose([*SHORT, "task.templates.book.creator={entity} was written by"])
    assert cfg.task.templates["book"]["creator"] == "{entity} was written by"


def test_other_overrides_stay_as_they_are():
    words = ["layer=2", "+task.n_samples=3", "task.rules={}", "-m", "a={b}"]
    assert for_hydra(words) == words


@pytest.mark.parametrize("dataset", ["wikidata", "entities"])
def test_published_entities_can_be_asked_from_any_dataset(books: Path, tmp_path: Path, dataset):
    words = [*SHORT, f"dataset={dataset}", f'dataset.path="{books}"', f"cache_dir={tmp_path}"]
    templates = ["task.templates.Book.Creator=Who wrote the book {entity}?"]
    run = saexp.run(saexp.compose([*words, *templates]), tmp_path / "run")
    table = run.tables["labels"]
    assert table["attribute"].tolist() == ["creator", "creator"]
    assert [list(t) for t in table["truths"]] == [["Herman Melville"], ["Jane Austen"]]
    assert sum("no template for book length" in note for note in run.notes) == 1
    with pytest.raises(DataError, match="nothing can be asked: no template for book") as caught:
        saexp.run(saexp.compose(words), tmp_path / "none")
    assert "\n" not in str(caught.value)


def test_entity_types_of_several_words_are_typed_with_underscores(tmp_path: Path):
    file = tmp_path / "games.json"
    pairs = [{"attribute_type": "location", "attribute_value": ["Oslo", "Rome"]}]
    file.write_text(
        json.dumps([{"entity": "Uvo", "entity_type": "Video game", "attributes": pairs}])
    )
    words = [*SHORT, "dataset=wikidata", f'dataset.path="{file}"', f"cache_dir={tmp_path}"]
    with pytest.raises(DataError) as caught:
        saexp.run(saexp.compose(words), tmp_path / "none")
    (typed,) = shlex.split(str(caught.value).partition("type ")[2])
    assert typed.startswith("task.templates.video_game.location=")
    run = saexp.run(saexp.compose([*words, typed]), tmp_path / "run")
    table = run.tables["labels"]
    assert table["prompt"].tolist() == ["What is the location of the video game Uvo?"]
    assert list(table["truths"][0]) == ["Oslo", "Rome"]
