"""Probes judged within kinds of rows and on kinds they never saw, against loops by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from saexp.analysis import AnalysisInputs
from saexp.analysis.classifiers import Labelled
from saexp.analysis.probe import Judge, ProbeAnalyzer
from saexp.config import ProbeConfig
from saexp.errors import ConfigError, DataError
from saexp.latents import Latents
from saexp.results import Result
from tests.unit.analysis.test_probe import make_inputs, parts


def probe(inputs: AnalysisInputs, n_bootstrap: int = 40, **options: object) -> Result:
    settings = {"k": [1, 3], "strengths": [0.1], **options}
    cfg = ProbeConfig(name="probe", n_bootstrap=n_bootstrap, **settings)  # type: ignore[arg-type]
    return ProbeAnalyzer(cfg).analyze(inputs)


def changed(inputs: AnalysisInputs, **columns: object) -> AnalysisInputs:
    return replace(
        inputs, latents=Latents(inputs.latents.csr, inputs.latents.rows.assign(**columns))
    )


@pytest.fixture(scope="module")
def inputs() -> AnalysisInputs:
    """Rows of three kinds, of which one is mostly of the first group, one mostly of the second."""
    plain = make_inputs()
    rows = plain.latents.rows
    rng = np.random.default_rng(5)
    known = (rows["group"] == "known").to_numpy()
    mostly = np.where(known, "easy", "hard")
    any_kind = rng.choice(["easy", "hard", "other"], size=len(rows))
    kind = np.where(rng.random(len(rows)) < 0.6, mostly, any_kind)
    return changed(plain, question=kind)


@pytest.fixture(scope="module")
def plain(inputs: AnalysisInputs) -> dict[str, float | int | None]:
    return probe(inputs).metrics


def pairwise(scores: np.ndarray, first: np.ndarray, kinds: np.ndarray) -> float:
    """Share of pairs of one kind in the right order, ties half."""
    one, other = scores[first][:, None], scores[~first]
    of_one_kind = kinds[first][:, None] == kinds[~first]
    return float(((one > other) + (one == other) / 2)[of_one_kind].mean())


def test_pairs_of_one_kind_by_hand() -> None:
    rng = np.random.default_rng(0)
    first, kinds = rng.random(90) < 0.4, rng.integers(0, 4, 90)
    first[kinds == 3] = True
    scores = np.round(rng.normal(size=90) + first + kinds, 1)
    units = np.arange(90).astype(object)
    measured = Judge(Labelled(first, units, kinds)).measure(scores, 0.0)
    assert measured["auroc"] == pytest.approx(roc_auc_score(first, scores))
    assert measured["auroc_within"] == pytest.approx(pairwise(scores, first, kinds))
    assert (
        measured["auroc_within_ci_low"]
        < measured["auroc_within"]
        < measured["auroc_within_ci_high"]
    )  # type: ignore[operator]
    apart = Judge(Labelled(first, units, kinds, kinds)).measure(scores, 0.0)
    assert apart["auroc"] == apart["auroc_within"] == measured["auroc_within"]
    alone = Judge(Labelled(first, units, np.arange(90))).measure(scores, 0.0)
    assert np.isnan(alone["auroc_within"])  # type: ignore[arg-type]


def test_the_kind_alone_is_a_base_rate_that_is_worth_nothing_within_kinds(
    inputs: AnalysisInputs, plain: dict[str, float | int | None]
) -> None:
    result = probe(inputs, within="question")
    train, y, _ = parts(inputs, "train")
    test, y_test, _ = parts(inputs, "test")
    kinds = inputs.latents.rows["question"].to_numpy()
    share = pd.Series(y).groupby(kinds[train]).mean()
    scores = share[kinds[test]].to_numpy()
    m = result.metrics
    assert m["probe/base_rate_auroc_test"] == pytest.approx(roc_auc_score(y_test, scores))
    assert m["probe/base_rate_auroc_test"] > 0.6  # type: ignore[operator]
    assert m["probe/base_rate_auroc_within_test"] == 0.5
    dense = inputs.latents.csr.todense()
    best = int(m["probe/best_latent"])  # type: ignore[arg-type]
    aurocs = roc_auc_score(y, dense[train][:, best])
    values = np.sign(aurocs - 0.5) * dense[test][:, best]
    within = pairwise(values, y_test, pd.factorize(kinds[test])[0])
    assert m["probe/best_latent_auroc_within_test"] == pytest.approx(within)
    chosen = [
        pairwise(dense[train][:, i], y, pd.factorize(kinds[train])[0])
        for i in range(dense.shape[1])
    ]
    assert m["probe/best_latent_within"] == np.abs(np.array(chosen) - 0.5).argmax()
    assert plain["probe/dense_auroc_test"] == m["probe/dense_auroc_test"]
    assert not any("within" in name or "base_rate" in name for name in plain)


def test_rows_of_an_unseen_value_under_probes_of_the_others(
    inputs: AnalysisInputs, plain: dict[str, float | int | None]
) -> None:
    result = probe(inputs, unseen="entity_type")
    assert inputs.acts is not None
    x = inputs.acts.numpy().astype(np.float64)
    dense = inputs.latents.csr.todense().astype(np.float64)
    train, y, _ = parts(inputs, "train")
    test, y_test, _ = parts(inputs, "test")
    types = inputs.latents.rows["entity_type"].to_numpy()
    means, single = np.zeros(len(test)), np.zeros(len(test))
    for value in ("city", "movie"):
        others, of_value = types[train] != value, types[test] == value
        rows, label = train[others], y[others]
        direction = x[rows][label].mean(0) - x[rows][~label].mean(0)
        means[of_value] = x[test[of_value]] @ direction
        aurocs = [roc_auc_score(label, dense[rows][:, i]) for i in range(dense.shape[1])]
        best = int(np.abs(np.array(aurocs) - 0.5).argmax())
        single[of_value] = np.sign(aurocs[best] - 0.5) * dense[test[of_value]][:, best]
    kinds = pd.factorize(types[test])[0]
    m = result.metrics
    for name, scores in (("mean_difference", means), ("best_latent", single)):
        expected = pairwise(scores, y_test, kinds)
        assert m[f"probe/{name}_auroc_unseen"] == pytest.approx(expected), name
        low, high = (m[f"probe/{name}_auroc_ci_{side}_unseen"] for side in ("low", "high"))
        assert low < expected < high  # type: ignore[operator]
    assert m["probe/n_rows_unseen"] == m["probe/n_rows_test"]
    table = result.tables["probes"]
    assert set(table["data"]) == {"train", "test", "unseen"}
    assert len(table[table["data"] == "unseen"]) == len(table[table["data"] == "test"])
    (note,) = (n for n in result.notes if "fitted on other values of 'entity_type'" in n)
    assert f"best_latent {m['probe/best_latent_auroc_unseen']:.3f} [" in note
    assert m["probe/dense_auroc_test"] == plain["probe/dense_auroc_test"]


def test_a_signal_of_one_type_does_not_carry_over() -> None:
    """In each type another number of the stream holds the group, so the other's is no use."""
    plain = make_inputs(signal=0.0)
    rows = plain.latents.rows
    known = (rows["group"] == "known").to_numpy()
    city = (rows["entity_type"] == "city").to_numpy()
    acts = np.random.default_rng(1).normal(size=(len(rows), 6)).astype(np.float32)
    acts[:, 0] += np.where(known & city, 3, 0)
    acts[:, 1] += np.where(known & ~city, 3, 0)
    inputs = replace(plain, acts=torch.from_numpy(acts))
    m = probe(inputs, unseen="entity_type", within="entity_type").metrics
    assert m["probe/dense_auroc_test"] > 0.9  # type: ignore[operator]
    assert 0.3 < m["probe/dense_auroc_unseen"] < 0.7  # type: ignore[operator]
    assert m["probe/base_rate_auroc_unseen"] == 0.5


def test_values_without_both_groups_are_left_out_and_counted(inputs: AnalysisInputs) -> None:
    rows = inputs.latents.rows
    odd = rows["entity_type"].where(rows["group"] == "unknown", "river")
    some = changed(inputs, question=rows["question"].where(rows.index % 9 > 0, odd))
    result = probe(some, unseen="question", k=[1])
    left = [n for n in result.notes if n.startswith("unseen question:")]
    assert left == [
        "unseen question: 3 values left out because a group has fewer than two units there or "
        "among the other values"
    ]
    assert result.metrics["probe/n_rows_unseen"] < result.metrics["probe/n_rows_test"]  # type: ignore[operator]
    with pytest.raises(DataError, match="unseen=same: no value has two units of both groups"):
        probe(changed(inputs, same="a"), unseen="same")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"within": 3}, r"analyzer.within=3: type a column that groups rows by kind"),
        ({"within": ["group"]}, r"within=\['group'\]: type a column"),
        ({"unseen": ["question", "split"]}, "type a single column"),
        ({"unseen": "attribute"}, "the data set has no values in column 'attribute'; it has ent"),
    ],
)
def test_columns_that_are_none(
    inputs: AnalysisInputs, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        probe(inputs, **options)
