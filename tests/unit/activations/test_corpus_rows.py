"""Positions in a corpus, and their activations: against plain loops over the contexts."""

import numpy as np
import pandas as pd
import pytest
import torch

from saexp.config import CorpusConfig, PositionsConfig
from saexp.data.corpora import Corpus, tokenized
from saexp.data.documents import TokenizerInfo
from saexp.data.rows import CorpusRows
from saexp.errors import ConfigError
from saexp.models import Hookpoint
from saexp.models.loading import LanguageModel
from tests.random_models import random_lm, tokenizer
from tests.unit.activations.collecting import run

CLOSE = {"atol": 1e-5, "rtol": 0}
SIZE = 12
BOS = 1


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = "the city of London was born in a player and he".split()  # noqa: SIM905
    lines = [" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(300)]
    (folder / "a.txt").write_text("\n".join(lines), "utf-8")
    cfg = CorpusConfig(name="corpus", path=str(folder / "a.txt"), document="line")
    return tokenized(cfg, TokenizerInfo(tokenizer(), "t", True), SIZE, folder / "cache")


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return random_lm("llama")


def positions(corpus: Corpus, name: str = "all", **settings: object) -> CorpusRows:
    return CorpusRows(corpus, PositionsConfig(name=name, **settings), tokenizer())


def expected(corpus: Corpus, name: str, n: int = 2) -> list[tuple[int, int, int]]:
    """(context, token index, token id) by a loop."""
    rows = []
    for context in range(len(corpus)):
        ids = corpus.ids(np.asarray([context]))[0].tolist()
        ordinary = [i for i, token in enumerate(ids) if token not in tokenizer().all_special_ids]
        chosen = {
            "all": ordinary,
            "last": ordinary[-n:],
            "middle": [ordinary[(len(ordinary) - 1) // 2]],
            "indices": [ordinary[0], ordinary[-1]],
        }[name]
        rows += [(context, i, ids[i]) for i in chosen]
    return rows


@pytest.mark.parametrize("name", ["all", "last", "middle", "indices"])
def test_positions_equal_those_of_a_loop(corpus, name):
    rows = positions(corpus, name, n=2, indices=[0, -1])
    numbers = rows.numbers(0, rows.n_rows)
    assert list(zip(*(c.tolist() for c in numbers), strict=True)) == expected(corpus, name)


def test_special_tokens_are_positions_only_when_asked_for(corpus):
    every = positions(corpus, include_special=True)
    assert every.n_rows == corpus.n_tokens
    ids = every.numbers(0, every.n_rows).token_id
    assert ids[0] == BOS
    assert positions(corpus).n_rows == np.count_nonzero(~np.isin(ids, tokenizer().all_special_ids))


def test_random_positions_are_as_many_as_asked_for_and_depend_on_the_seed(corpus):
    first, again, other = (positions(corpus, "random", n=3, seed=s) for s in (0, 0, 1))
    numbers = first.numbers(0, first.n_rows)
    assert set(np.bincount(numbers.text_id)) == {3}
    assert len(set(zip(numbers.text_id, numbers.token_index, strict=True))) == first.n_rows
    for a, b in zip(numbers, again.numbers(0, again.n_rows), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(numbers.token_index, other.numbers(0, other.n_rows).token_index)
    assert first.digests()["positions"] != other.digests()["positions"]


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_any_range_of_rows_is_a_part_of_all_rows(corpus, monkeypatch, block):
    monkeypatch.setattr("saexp.data.rows._BLOCK", block)
    rows = positions(corpus)
    whole = rows.numbers(0, rows.n_rows)
    for first, end in [(0, 1), (5, 5), (3, 40), (rows.n_rows - 3, rows.n_rows), (11, 300)]:
        for part, column in zip(rows.numbers(first, end), whole, strict=True):
            np.testing.assert_array_equal(part, column[first:end])


def test_rows_are_written_by_groups_and_compared_with_the_file(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("saexp.data.rows._GROUP_ROWS", 100)
    rows = positions(corpus)
    rows.write(tmp_path / "rows.parquet")
    saved = pd.read_parquet(tmp_path / "rows.parquet")
    assert saved.columns.tolist() == ["row", "text_id", "token_index", "token_id"]
    assert saved.equals(rows.rows)
    assert rows.equals(tmp_path / "rows.parquet")
    assert not positions(corpus, "last").equals(tmp_path / "rows.parquet")
    saved.assign(token_id=saved["token_id"] + 1).to_parquet(tmp_path / "rows.parquet")
    assert not rows.equals(tmp_path / "rows.parquet")


def test_stored_activations_equal_a_plain_forward_pass(corpus, model, tmp_path):
    rows = positions(corpus)
    at = [Hookpoint(1, "resid_post")]
    store, stats = run(model, tmp_path, at, rows, max_length=SIZE, shard_rows=500)
    ids = torch.from_numpy(corpus.ids(np.arange(len(corpus))))
    with torch.no_grad():
        # hidden_states[0] is the embedding.
        hidden = model.hf(ids, output_hidden_states=True).hidden_states[2]
    ordinary = ~torch.isin(ids, torch.tensor(tokenizer().all_special_ids))
    torch.testing.assert_close(store.acts(1), hidden[ordinary], **CLOSE)
    assert store.rows.equals(rows.rows)
    assert stats.tokens_forwarded >= store.n_rows
    again, stats = run(model, tmp_path, at, positions(corpus), max_length=SIZE, shard_rows=500)
    assert (again.path, stats.tokens_forwarded) == (store.path, 0)


def test_positions_that_need_examples_are_refused(corpus):
    with pytest.raises(ConfigError, match="a corpus has no entities and no prompts"):
        positions(corpus, "entity_last")
    with pytest.raises(ConfigError, match=r"positions\.indices=\[0,-1\]"):
        positions(corpus, "indices")


@pytest.mark.parametrize("name", ["all", "random"])
def test_chosen_rows_and_their_texts_are_those_of_the_table(corpus, name, monkeypatch):
    monkeypatch.setattr("saexp.data.rows._BLOCK", 7)
    rows = positions(corpus, name, n=3)
    chosen = np.sort(np.random.default_rng(0).choice(rows.n_rows, 40, replace=False))
    table = rows.rows
    pd.testing.assert_frame_equal(rows.at(chosen), table.iloc[chosen].reset_index(drop=True))
    np.testing.assert_array_equal(rows.text_ids(chosen), table["text_id"].to_numpy()[chosen])
    for text_id in (0, 1, len(corpus) - 1):
        of_text = np.flatnonzero(table["text_id"] == text_id)
        assert np.arange(*rows.bounds(text_id)).tolist() == of_text.tolist()
    assert rows.at(chosen[:0]).columns.tolist() == table.columns.tolist()
