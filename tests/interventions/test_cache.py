"""A generation is computed once; another row, model or SAE is another generation."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from saexp.errors import StoreError
from saexp.interventions import engine
from saexp.interventions.cache import ResultCache
from saexp.interventions.computing import generate
from saexp.interventions.ops import Add, Row, Vector
from saexp.models.hookpoints import Hookpoint
from saexp.saes.base import SparseAutoencoder
from tests.random_models import D_MODEL, TEXTS, random_lm

AT = Hookpoint(1, "resid_post")


def sae() -> SparseAutoencoder:
    decoder = torch.eye(D_MODEL)
    zeros = torch.zeros(D_MODEL)
    return SparseAutoencoder(
        {"W_enc": decoder, "W_dec": decoder, "b_enc": zeros, "b_dec": zeros},
        architecture="standard",
        hookpoint=AT,
    )


def rows() -> list[Row]:
    ids = [tuple(random_lm("llama").tokenizer(t)["input_ids"][:9]) for t in TEXTS]
    steered = [Row(i, (Add(AT, Vector(torch.eye(D_MODEL)[2]), 3.0),), (1,)) for i in ids]
    return [*steered, *(Row(i) for i in ids)]


def run(some: list[Row], cache: ResultCache | None) -> list[list[int]]:
    return generate(
        random_lm("llama"), some, {AT: sae()}, max_new_tokens=5, batch_tokens=40, cache=cache
    )


def test_the_second_time_nothing_is_generated_and_tokens_are_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = run(rows(), None)
    assert run(rows(), ResultCache(tmp_path, {"model": "a"})) == wanted

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(engine, "_generate_batch", never)
    assert run(rows(), ResultCache(tmp_path, {"model": "a"})) == wanted
    with pytest.raises(AssertionError, match="the model ran"):
        run(rows(), ResultCache(tmp_path, {"model": "b"}))
    other = [Row(rows()[0].ids, (Add(AT, Vector(torch.eye(D_MODEL)[2]), 3.5),), (1,))]
    with pytest.raises(AssertionError, match="the model ran"):
        run(other, ResultCache(tmp_path, {"model": "a"}))


def test_what_an_interrupted_run_made_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = engine._generate_batch, []

    def third_fails(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "_generate_batch", third_fails)
    with pytest.raises(KeyboardInterrupt):
        run(rows(), ResultCache(tmp_path, {}))
    kept = ResultCache(tmp_path, {}).get("tokens 5", [r.key for r in rows()])
    assert 0 < len(kept) < len(rows())
    monkeypatch.setattr(engine, "_generate_batch", real)
    assert run(rows(), ResultCache(tmp_path, {})) == run(rows(), None)


def test_a_file_that_is_no_cache_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "generations.sqlite").write_text("not a database, but long enough to be one" * 9)
    with pytest.raises(StoreError, match="generations.sqlite: .*; delete it or choose another"):
        ResultCache(tmp_path, {})


@pytest.mark.parametrize("version", range(1, 3))
def test_results_of_earlier_versions_are_not_read(tmp_path: Path, version: int) -> None:
    """Written as those versions wrote them: their guessed texts could be wrong."""
    some, about = rows(), {"model": "a"}
    cache = ResultCache(tmp_path, about)
    prefix = repr((version, sorted(about.items())))
    with cache.file:
        for row in some:
            digest = hashlib.sha256(f"{prefix}tokens 5{row.key!r}".encode()).digest()
            wrong = np.asarray([7.0] * 5, dtype="<f8").tobytes()
            cache.file.execute("insert into results values (?, ?)", (digest, wrong))
    assert cache.get("tokens 5", [r.key for r in some]) == {}
    assert run(some, cache) == run(some, None)
