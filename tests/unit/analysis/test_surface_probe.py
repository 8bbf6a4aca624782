"""The surface baseline beside the probes: on the same rows, fitted on train alone."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn.metrics import roc_auc_score

from saexp.analysis import AnalysisInputs
from saexp.analysis.classifiers import labelled
from saexp.analysis.contrast import ContrastAnalyzer
from saexp.analysis.contrast_checks import fit_surface, read_texts, token_counts
from saexp.analysis.probe import Judge, ProbeAnalyzer
from saexp.config import AnalyzerConfig, ProbeConfig
from saexp.context import ObjectCache
from saexp.latents import Latents
from saexp.results import Result
from saexp.stats.separation import auroc_difference
from saexp.stats.significance import difference_p_value
from tests.unit.analysis.simulate import GROUPS, activations, rows_table
from tests.unit.analysis.surface_texts import names, placed, tokenized


def make_inputs() -> AnalysisInputs:
    """Groups whose names have partly other letters, in one template."""
    table = rows_table()
    units = table["unit"].unique()
    group = table.drop_duplicates("unit").set_index("unit")["group"]
    letters = {"known": "abcdefgh", "unknown": "abcdefij"}
    entity = {u: names(1, letters[group[u]], i)[0] for i, u in enumerate(units)}
    where = placed([entity[u] for u in table["unit"]])
    columns = {c: where[c] for c in ("text_id", "token_index", "entity")}
    rows = table.assign(**columns, text=[t.text for t in where["tokens"]])
    return AnalysisInputs(
        latents=Latents(sparse.csr_array(activations(rows)), rows),
        groups=GROUPS,
        layer=4,
        acts=torch.randn(len(rows), 4, generator=torch.Generator().manual_seed(0)),
        texts=where["tokens"].tolist(),
        neutral_texts=[tokenized("abcdabcd"), tokenized("ijkl")],
        objects=ObjectCache(),
    )


def probe(inputs: AnalysisInputs) -> Result:
    cfg = ProbeConfig(name="probe", n_bootstrap=40, k=[1], strengths=[1.0])
    return ProbeAnalyzer(cfg).analyze(inputs)


@pytest.fixture(scope="module")
def inputs() -> AnalysisInputs:
    return make_inputs()


@pytest.fixture(scope="module")
def result(inputs: AnalysisInputs) -> Result:
    return probe(inputs)


def row_of(result: Result, data: str) -> pd.Series:
    table = result.tables["probes"]
    return table[(table["probe"] == "surface") & (table["data"] == data)].iloc[0]


def test_its_numbers_are_those_of_the_baseline_fitted_by_itself(
    inputs: AnalysisInputs, result: Result
) -> None:
    rows = inputs.latents.rows
    read, first = read_texts(rows, inputs.texts), (rows["group"] == "known").to_numpy()
    train, test = (np.flatnonzero(rows["split"] == s) for s in ("train", "test"))
    units = rows["unit"].to_numpy()
    counts = token_counts(inputs.neutral_texts)
    fitted = fit_surface([read[i] for i in train], first[train], units[train], counts, 0)
    auroc = roc_auc_score(first[test], fitted.score([read[i] for i in test]))
    assert 0.6 < auroc < 1
    assert result.metrics["probe/surface_auroc_test"] == pytest.approx(auroc)
    assert row_of(result, "test")["auroc"] == pytest.approx(auroc)
    assert row_of(result, "test")["c"] == fitted.fitted.c


def test_it_has_the_name_that_it_has_in_a_contrast(result: Result) -> None:
    m = result.metrics
    assert m["contrast/surface_auroc_test"] == m["probe/surface_auroc_test"]
    for end in ("low", "high"):
        name = f"surface_auroc_ci_{end}_test"
        assert m[f"contrast/surface_auroc_test_ci_{end}"] == m[f"probe/{name}"] is not None


def test_a_contrast_has_the_same_number_where_there_is_one_type(
    inputs: AnalysisInputs, result: Result
) -> None:
    name, rows = "contrast/surface_auroc_test", inputs.latents.rows

    def of_contrast(rows: pd.DataFrame) -> float | int | None:
        cfg = AnalyzerConfig(name="contrast", n_bootstrap=0)
        same = replace(inputs, latents=Latents(inputs.latents.csr, rows))
        return ContrastAnalyzer(cfg).analyze(same).metrics[name]

    # A probe compares over all pairs, so that types do not matter to it.
    assert of_contrast(rows.assign(entity_type="one")) == pytest.approx(
        result.metrics[name], abs=1e-12
    )
    # A contrast compares within types.
    assert rows["entity_type"].nunique() > 1
    assert of_contrast(rows) != pytest.approx(result.metrics[name], abs=1e-4)


def test_labels_of_the_test_split_do_not_enter_the_fit(
    inputs: AnalysisInputs, result: Result
) -> None:
    rows = inputs.latents.rows
    test = (rows["split"] == "test").to_numpy()
    units = rows["unit"][test].unique()
    swapped = dict(zip(units, np.random.default_rng(0).random(len(units)) < 0.5, strict=True))
    other = rows["group"].map({"known": "unknown", "unknown": "known"})
    labels = rows["group"].where(~rows["unit"].map(swapped).fillna(False).astype(bool), other)
    changed = replace(inputs, latents=Latents(inputs.latents.csr, rows.assign(group=labels)))
    again = probe(changed)
    pd.testing.assert_series_equal(
        row_of(again, "train").dropna(), row_of(result, "train").dropna()
    )
    assert row_of(again, "test")["auroc"] != row_of(result, "test")["auroc"]


def test_without_texts_there_is_none(inputs: AnalysisInputs) -> None:
    without = probe(replace(inputs, texts=()))
    assert "surface" not in set(without.tables["probes"]["probe"])
    assert "contrast/surface_auroc_test" not in without.metrics


def test_probes_are_compared_with_it_on_the_same_rows(result: Result) -> None:
    m, table = result.metrics, result.tables["probes"]
    compared = [p for p in table["probe"].unique() if p not in ("surface", "majority")]
    for name in compared:
        difference = m[f"probe/{name}_auroc_test"] - m["probe/surface_auroc_test"]
        assert m[f"probe/{name}_minus_surface_test"] == pytest.approx(difference)
        low, high = (m[f"probe/{name}_minus_surface_ci_{end}_test"] for end in ("low", "high"))
        assert low < difference < high
        p_value = m[f"probe/{name}_minus_surface_p_holm_test"]
        assert 0 <= p_value <= 1
        assert p_value > 0.05 or not low < 0 < high
    train = table[table["data"] == "train"]
    assert train["minus_surface"].isna().all()
    assert table.loc[table["probe"] == "surface", "minus_surface"].isna().all()


def test_without_repeated_rows_the_difference_is_that_of_delongs_placements(
    inputs: AnalysisInputs,
) -> None:
    rng = np.random.default_rng(2)
    rows = labelled(inputs, np.arange(len(inputs.latents.rows)), ())
    rows = replace(rows, units=np.arange(len(rows)).astype(str))
    common = rng.normal(0, 1, len(rows)) + 0.5 * rows.first
    own, other = (common + 0.5 * rng.normal(0, 1, len(rows)) for _ in range(2))
    value, interval, p_value = Judge(rows).difference(own, other)
    expected = auroc_difference(own, other, rows.first, np.zeros(len(rows), dtype=int))
    assert value == pytest.approx(expected.value)
    assert np.allclose(interval, expected.interval, atol=1e-3)
    assert p_value == pytest.approx(difference_p_value(expected.value, expected.interval), abs=1e-2)
