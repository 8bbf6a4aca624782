"""Tasks on dataset=corpus: equal to the same texts as examples, and what cannot be asked for."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import saexp
from saexp.context import ObjectCache
from saexp.data.datasets import background_texts
from saexp.errors import ConfigError
from tests.shipped_texts import FEW_NEUTRAL

N_TEXTS = 40
OBJECTS = ObjectCache()
"""Shared by the runs of this file, as by the cells of a sweep (see test_shared.py)."""
UNLIKE = ("seconds", "tokens_forwarded")
"""Endings of metrics that depend on what was stored before."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    lines = list(dict.fromkeys(background_texts(saexp.compose([]).dataset)))[:N_TEXTS]
    (folder / "texts.txt").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


def run(folder: Path, dataset: str, name: str, words: Sequence[str]) -> Path:
    out = folder / name / dataset
    words = ["layer=2", "tracker=none", FEW_NEUTRAL, f"cache_dir={folder}/cache", *words]
    words += [f"dataset={dataset}", f"dataset.path={folder}/texts.txt"]
    if dataset == "corpus":
        words += ["dataset.document=line", "dataset.pack=false"]
    saexp.run(saexp.compose(words), out, objects=OBJECTS)
    return out


def both(folder: Path, name: str, words: Sequence[str]) -> tuple[Path, Path]:
    corpus, examples = (run(folder, dataset, name, words) for dataset in ("corpus", "text"))
    metrics = [json.loads((f / "metrics.json").read_text("utf-8")) for f in (corpus, examples)]
    one, other = ({k: v for k, v in m.items() if not k.endswith(UNLIKE)} for m in metrics)
    assert one == other
    assert not (corpus / "rows.parquet").exists()
    return corpus, examples


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    files = {file.stem: file for file in folder.glob("*.parquet")}
    files.pop("rows", None)
    return {name: pd.read_parquet(file) for name, file in files.items()}


def as_contexts(table: pd.DataFrame) -> pd.DataFrame:
    """Ids of lines, which begin with 1, as numbers of contexts."""
    for column in {"example", "example_id"} & set(table.columns):
        table[column] = (table[column].astype(int) - 1).astype(str)
    return table


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("evaluate", ["task=evaluate", "task.n_bootstrap=20"]),
        ("sampled", ["task=evaluate", "task.n_bootstrap=0", "task.n_texts=20"]),
        ("stats", ["analyzer=stats", "intervention=none", "positions=all"]),
        ("last", ["analyzer=top_features", "intervention=none", "positions=last"]),
    ],
)
def test_a_corpus_gives_the_results_of_its_texts_as_examples(
    folder: Path, name: str, words: list[str]
) -> None:
    corpus, examples = both(folder, name, words)
    of_corpus, of_examples = tables(corpus), tables(examples)
    assert of_corpus.keys() == of_examples.keys()
    for kind, table in of_corpus.items():
        if not len(table) and kind == "skips":
            continue
        pd.testing.assert_frame_equal(
            table, as_contexts(of_examples[kind]), rtol=1e-6, check_dtype=False
        )


def without_labels(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_labels(v) for k, v in value.items() if k not in ("id", "split")}
    return [without_labels(v) for v in value] if isinstance(value, list) else value


def test_a_dashboard_of_a_corpus_shows_what_that_of_its_texts_shows(folder: Path) -> None:
    words = [
        "task=dashboard",
        "positions=all",
        "task.latents=top:3",
        "analyzer.n_background=500",
    ]
    cards = [
        json.loads((path / "dashboard.json").read_text("utf-8"))
        for path in both(folder, "dashboard", words)
    ]
    assert without_labels(cards[0]) == without_labels(cards[1])
    ids = [[e["id"] for e in page["latents"][0]["top"]] for page in cards]
    assert [int(n) + 1 for n in ids[0]] == [int(n) for n in ids[1]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["analyzer=contrast"], r"analyzer=contrast reads examples.* type analyzer=stats or"),
        (["analyzer=stats"], r"intervention=steer changes prompts.* type intervention=none"),
        (["analyzer=stats", "intervention=none"], r"positions=entity_last.* type positions=all"),
        (["task=label"], r"task=label asks about examples"),
    ],
)
def test_what_needs_examples_is_refused(folder: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(folder, "corpus", "refused", words)
