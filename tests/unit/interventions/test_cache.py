"""A generation is computed once; another row, model or SAE is another generation."""

import hashlib
import sqlite3
from contextlib import closing
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from saexp.interventions import generation
from saexp.interventions.cached_generation import generate
from saexp.interventions.results_cache import ResultCache
from saexp.interventions.stream_edits import Add, Row, Vector
from saexp.models import Hookpoint
from saexp.saes import SAESettings, SparseAutoencoder
from tests.random_models import D_MODEL, TEXTS, random_lm

AT = Hookpoint(1, "resid_post")


def sae() -> SparseAutoencoder:
    decoder = torch.eye(D_MODEL)
    zeros = torch.zeros(D_MODEL)
    return SparseAutoencoder(
        {"W_enc": decoder, "W_dec": decoder, "b_enc": zeros, "b_dec": zeros},
        SAESettings(architecture="standard", hookpoint=AT),
    )


@cache
def rows() -> list[Row]:
    ids = [tuple(random_lm("llama").tokenizer(t)["input_ids"][:9]) for t in TEXTS]
    steered = [Row(i, (Add(AT, Vector(torch.eye(D_MODEL)[2]), 3.0),), (1,)) for i in ids]
    return [*steered, *(Row(i) for i in ids)]


def run(some: list[Row], cache: ResultCache | None) -> list[list[int]]:
    return generate(
        random_lm("llama"), some, {AT: sae()}, max_new_tokens=5, batch_tokens=40, cache=cache
    )


@pytest.fixture(scope="module")
def wanted() -> list[list[int]]:
    """Without a cache."""
    return run(rows(), None)


def test_the_second_time_nothing_is_generated_and_tokens_are_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: list[list[int]]
) -> None:
    assert run(rows(), ResultCache(tmp_path, {"model": "a"})) == wanted

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(generation, "_generate_batch", never)
    assert run(rows(), ResultCache(tmp_path, {"model": "a"})) == wanted
    with pytest.raises(AssertionError, match="the model ran"):
        run(rows(), ResultCache(tmp_path, {"model": "b"}))
    other = [Row(rows()[0].ids, (Add(AT, Vector(torch.eye(D_MODEL)[2]), 3.5),), (1,))]
    with pytest.raises(AssertionError, match="the model ran"):
        run(other, ResultCache(tmp_path, {"model": "a"}))


def test_what_an_interrupted_run_made_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: list[list[int]]
) -> None:
    real, calls = generation._generate_batch, []

    def third_fails(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(generation, "_generate_batch", third_fails)
    with pytest.raises(KeyboardInterrupt):
        run(rows(), ResultCache(tmp_path, {}))
    cache = ResultCache(tmp_path, {})
    stored = cache.get([cache.key("tokens 5", row.key) for row in rows()])
    assert 0 < len(stored) < len(rows())
    monkeypatch.setattr(generation, "_generate_batch", real)
    assert run(rows(), ResultCache(tmp_path, {})) == wanted


@pytest.mark.parametrize("version", range(1, 3))
def test_results_of_earlier_versions_are_not_read(
    tmp_path: Path, version: int, wanted: list[list[int]]
) -> None:
    """Written as those versions wrote them: their guessed texts could be wrong."""
    some, about = rows(), {"model": "a"}
    prefix = repr((version, sorted(about.items())))
    wrong = np.asarray([7.0] * 5)
    keys = [hashlib.sha256(f"{prefix}tokens 5{row.key!r}".encode()).digest() for row in some]
    cache = ResultCache(tmp_path, about)
    cache.put([(key, wrong) for key in keys])
    assert run(some, cache) == wanted


def test_results_without_checksums_are_neither_read_nor_changed(
    tmp_path: Path, wanted: list[list[int]]
) -> None:
    """Table `results` of earlier releases."""
    cache = ResultCache(tmp_path, {"model": "a"})
    key = cache.key("tokens 5", rows()[0].key)
    old = (key, np.asarray([7.0] * 5, dtype="<f8").tobytes())
    with closing(sqlite3.connect(tmp_path / "generations.sqlite")) as file, file:
        file.execute("create table results (key blob primary key, found blob)")
        file.execute("insert into results values (?, ?)", old)
    assert cache.get([key]) == {}
    assert run(rows(), cache) == wanted
    with closing(sqlite3.connect(tmp_path / "generations.sqlite")) as file:
        assert file.execute("select * from results").fetchall() == [old]
