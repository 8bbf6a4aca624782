"""Cells of one process that differ in their intervention alone: encoded and contrasted once."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import saexp
from saexp.analysis.contrast import ContrastAnalyzer
from saexp.context import ObjectCache
from saexp.pipeline import objects
from saexp.results import Result
from saexp.sweeps.planning import PROCESS
from tests.shipped_texts import FEW_NEUTRAL
from tests.unit.reports.run_outputs import command, table_of

SMALL = ["tracker=none", "intervention.n_prompts=2", "intervention.n_controls=1"]
SMALL += [
    "intervention.max_new_tokens=4",
    "analyzer.n_bootstrap=50",
    "analyzer.n_background=300",
    FEW_NEUTRAL,
]
SMALL += ["dataset.n_examples=40", "intervention.n_choice_prompts=2", "intervention.top_k=1"]
SMALL += ["intervention.n_neutral=2"]


class Calls:
    """How often the real functions ran, and the objects that the runs share."""

    encoded = contrasted = 0

    def __init__(self) -> None:
        self.shared = ObjectCache()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    PROCESS.objects.clear()
    counted, encode, contrast = Calls(), objects.encode_store, ContrastAnalyzer.analyze

    def encode_store(*arguments: Any) -> Any:
        counted.encoded += 1
        return encode(*arguments)

    def analyze(*arguments: Any) -> Result:
        counted.contrasted += 1
        return contrast(*arguments)

    monkeypatch.setattr(objects, "encode_store", encode_store)
    monkeypatch.setattr(ContrastAnalyzer, "analyze", analyze)
    return counted


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def run(cache: Path, folder: Path, *words: str, shared: ObjectCache | None = None) -> Result:
    cfg = saexp.compose([*SMALL, f"cache_dir={cache}", *words])
    return saexp.run(cfg, folder, objects=shared)


def assert_same(one: Result, other: Result) -> None:
    spent = {"collection/tokens_forwarded", "collection/seconds"}
    assert {k: v for k, v in one.metrics.items() if k not in spent} == pytest.approx(
        {k: v for k, v in other.metrics.items() if k not in spent}, nan_ok=True
    )
    assert one.tables.keys() == other.tables.keys()
    for name, table in one.tables.items():
        pd.testing.assert_frame_equal(table, other.tables[name])
    assert one.notes == other.notes


def test_a_sweep_over_coefficients_encodes_each_text_set_once(calls: Calls, tmp_path: Path) -> None:
    result = command(
        tmp_path,
        "-m",
        "coefficient=0,0.6",
        "intervention.outcomes=[answer_logit]",
        *SMALL,
        "hydra.sweep.dir=sweep",
    )
    assert result.code == 0, result.err[-2000:]
    # The run's own positions and those of neutral text.
    assert (calls.encoded, calls.contrasted) == (2, 1)
    table = table_of(result.sweep)
    assert len(table) == 2
    names = [c for c in table if c.startswith(("contrast/", "sparsity/", "reconstruction/"))]
    assert all(table[name].nunique(dropna=False) == 1 for name in names)


def test_what_is_kept_gives_the_same_run(calls: Calls, cache: Path, tmp_path: Path) -> None:
    words = ["intervention=ablate", "intervention.outcomes=[answer_logit]"]
    first = run(cache, tmp_path / "1", *words, shared=calls.shared)
    again = run(cache, tmp_path / "2", *words, shared=calls.shared)
    assert (calls.encoded, calls.contrasted) == (2, 1)
    fresh = run(cache, tmp_path / "3", *words)
    assert (calls.encoded, calls.contrasted) == (4, 2)
    assert_same(first, again)
    assert_same(again, fresh)


@pytest.fixture(scope="module")
def filled(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> ObjectCache:
    """What a run of layer 1 without a causal test has left."""
    objects = ObjectCache()
    words = ["layer=1", "intervention=none"]
    run(cache, tmp_path_factory.mktemp("filled") / "run", *words, shared=objects)
    return objects


@pytest.mark.parametrize(
    ("word", "encoded", "contrasted"),
    [
        ("intervention=ablate intervention.outcomes=[answer_logit]", 0, 0),
        ("analyzer.n_bootstrap=20", 0, 1),
        ("width=512", 2, 1),
        ("dataset.entity_types=[city]", 1, 1),
        ("seed=1", 2, 1),
    ],
)
def test_only_what_does_not_matter_is_left_out(
    filled: ObjectCache,
    calls: Calls,
    cache: Path,
    tmp_path: Path,
    word: str,
    encoded: int,
    contrasted: int,
) -> None:
    words = [w for w in ("layer=1", "intervention=none") if w.split("=")[0] != word.split("=")[0]]
    run(cache, tmp_path, *words, *word.split(), shared=filled)
    assert (calls.encoded, calls.contrasted) == (encoded, contrasted)


def test_results_are_bounded_and_the_least_used_goes_first() -> None:
    cached = ObjectCache(max_bytes=100)
    cached.put("a", 1, 40)
    cached.put("b", 2, 40)
    assert cached.get("a") == 1
    cached.put("c", 3, 50)
    assert [cached.get(k) for k in "abc"] == [1, None, 3]
    cached.put("large", 4, 101)
    cached.put(None, 5, 1)
    assert (cached.get("large"), cached.get(None), cached.n_bytes) == (None, None, 90)
    cached.put("a", 6, 1)
    assert (cached.get("a"), cached.n_bytes) == (6, 51)


def test_a_result_that_is_changed_does_not_change_the_cached_one(
    calls: Calls, cache: Path, tmp_path: Path
) -> None:
    words = ["intervention=none"]
    first = run(cache, tmp_path / "1", *words, shared=calls.shared)
    expected = first.tables["latents"].copy()
    first.tables["latents"]["auroc"] = np.nan
    first.metrics.clear()
    again = run(cache, tmp_path / "2", *words, shared=calls.shared)
    pd.testing.assert_frame_equal(again.tables["latents"], expected)
    assert again.metrics


def test_rows_of_lists_have_a_key_of_their_own() -> None:
    rows = [pd.DataFrame({"a": [[1], [n]]}) for n in (2, 2, 3)]
    keys = [objects._rows_key(r) for r in rows]
    assert keys[0] == keys[1] != keys[2]
    assert objects._rows_key(pd.DataFrame({"a": [1]})) != objects._rows_key(
        pd.DataFrame({"b": [1]})
    )


def test_a_model_s_settings_are_part_of_what_an_analyzer_finds() -> None:
    from saexp.analysis import AnalysisInputs
    from saexp.latents import Latents
    from saexp.models.loading import LanguageModel

    def key(*words: str, bos: bool | None = None, latents: str = "a") -> str | None:
        cfg = saexp.compose(words)
        model = LanguageModel(cfg.model).with_bos(bos)
        empty = Latents(sparse.csr_array((0, 4)), pd.DataFrame(), latents)
        inputs = AnalysisInputs(latents=empty, groups=("x", "y"), layer=1, model=model)
        analyzer = saexp.build("analyzer", cfg.analyzer)
        return objects._analysis_key(analyzer, cfg.analyzer, inputs)

    keys = [key(), key("dtype=bfloat16"), key("model.chat=true"), key(bos=False), key(latents="b")]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert key("tracker=none", "store.batch_tokens=9") == keys[0]
    typed = type("Typed", (ContrastAnalyzer,), {"__module__": "typed_into_a_notebook"})
    untyped_inputs = AnalysisInputs(
        latents=Latents(sparse.csr_array((0, 4)), pd.DataFrame(), "a"), groups=(), layer=1
    )
    cfg = saexp.compose([]).analyzer
    assert objects._analysis_key(typed(cfg), cfg, untyped_inputs) is None
