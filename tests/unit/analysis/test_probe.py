"""Sparse and dense probes: against scikit-learn step by step, planted signals, shuffled labels."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    log_loss,
    roc_auc_score,
    roc_curve,
)
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler

from saexp.analysis import AnalysisInputs
from saexp.analysis.classifiers import Fitting, Labelled, roc, threshold_of_best_accuracy
from saexp.analysis.probe import Judge, ProbeAnalyzer
from saexp.config import ProbeConfig
from saexp.errors import ConfigError, DataError
from saexp.latents import Latents
from saexp.results import Result
from tests.unit.analysis.simulate import GROUPS, KNOWN, UNKNOWN, activations, rows_table

D_IN = 12
STRENGTHS = [0.01, 1.0]
QUICK: dict[str, Any] = {"k": [1], "strengths": [0.1]}
"""Where no number of a probe is looked at."""


def make_inputs(seed: int = 0, signal: float = 1.5) -> AnalysisInputs:
    """Simulated latents, two rows an entity; a stream that holds the group along two numbers."""
    one_each = rows_table().drop_duplicates("unit")
    rows = one_each.loc[one_each.index.repeat(2)].sample(frac=1, random_state=1)
    rows = rows.reset_index(drop=True)
    rows["text"] = [f"text {u}" for u in rows["unit"]]
    rows["entity"] = rows["unit"].astype("string")
    rng = np.random.default_rng([seed, 3])
    acts = rng.normal(size=(len(rows), D_IN)).astype(np.float32)
    known = (rows["group"] == "known").to_numpy()
    acts[known, 0] += signal
    acts[known, 1] -= signal
    return AnalysisInputs(
        latents=Latents(sparse.csr_array(activations(rows, seed)), rows),
        groups=GROUPS,
        layer=4,
        acts=torch.from_numpy(acts),
    )


def shuffled(inputs: AnalysisInputs, seed: int) -> AnalysisInputs:
    """Groups that mean nothing: drawn anew for every unit, within each split."""
    rows = inputs.latents.rows
    units = rows.drop_duplicates("unit")
    rng = np.random.default_rng(seed)
    drawn = units.groupby("split")["group"].transform(lambda g: rng.permutation(g))
    label = pd.Series(drawn.to_numpy(), index=units["unit"])
    return replace(
        inputs, latents=Latents(inputs.latents.csr, rows.assign(group=rows["unit"].map(label)))
    )


def probe(
    inputs: AnalysisInputs,
    transfer: AnalysisInputs | None = None,
    *,
    n_bootstrap: int = 60,
    **options: object,
) -> Result:
    settings = {"k": [1, 3], "strengths": STRENGTHS, **options}
    cfg = ProbeConfig(name="probe", n_bootstrap=n_bootstrap, **settings)  # type: ignore[arg-type]
    return ProbeAnalyzer(cfg).analyze(replace(inputs, transfer=transfer))


@pytest.fixture(scope="module")
def inputs() -> AnalysisInputs:
    return make_inputs()


@pytest.fixture(scope="module")
def result(inputs: AnalysisInputs) -> Result:
    return probe(inputs)


def parts(inputs: AnalysisInputs, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row numbers, label, units) of a split."""
    rows = inputs.latents.rows
    chosen = np.flatnonzero(rows["split"] == split)
    label = (rows["group"].iloc[chosen] == "known").to_numpy()
    return chosen, label, rows["unit"].iloc[chosen].to_numpy()


def step_by_step(
    x: np.ndarray, y: np.ndarray, units: np.ndarray, x_test: np.ndarray
) -> tuple[float, np.ndarray, float]:
    """(C, scores on test, cross-validated AUROC) by a loop over penalties and folds."""
    splitter = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    losses, aurocs = {}, {}
    for c in STRENGTHS:
        of_fold, auroc_of_fold = [], []
        for train, validation in splitter.split(x, y, units):
            scaler = StandardScaler().fit(x[train])
            model = LogisticRegression(C=c, max_iter=2000).fit(scaler.transform(x[train]), y[train])
            chance = model.predict_proba(scaler.transform(x[validation]))
            of_fold.append(log_loss(y[validation], chance))
            auroc_of_fold.append(roc_auc_score(y[validation], chance[:, 1]))
        losses[c], aurocs[c] = np.mean(of_fold), np.mean(auroc_of_fold)
    best = min(STRENGTHS, key=lambda c: losses[c])
    scaler = StandardScaler().fit(x)
    model = LogisticRegression(C=best, max_iter=2000).fit(scaler.transform(x), y)
    scores = model.decision_function(scaler.transform(x_test))
    return best, scores, float(aurocs[best])


@pytest.mark.parametrize("name", ["sparse_1", "sparse_3", "dense"])
def test_against_scikit_learn(inputs: AnalysisInputs, result: Result, name: str) -> None:
    train, y, units = parts(inputs, "train")
    test, y_test, _ = parts(inputs, "test")
    if name == "dense":
        assert inputs.acts is not None
        x = inputs.acts.numpy()
    else:
        dense = inputs.latents.csr.todense().astype(np.float64)
        difference = np.abs(dense[train][y].mean(0) - dense[train][~y].mean(0))
        chosen = np.argsort(-difference)[: int(name[-1])]
        x = dense[:, chosen]
        table = result.tables["probes"].query("probe == @name and data == 'test'").iloc[0]
        assert table["latents"] == ", ".join(map(str, chosen))
    c, scores, cv_auroc = step_by_step(x[train], y, units, x[test])
    row = result.tables["probes"].query("probe == @name and data == 'test'").iloc[0]
    assert row["c"] == c
    assert row["cv_auroc"] == pytest.approx(cv_auroc, abs=1e-3)
    assert result.metrics[f"probe/{name}_cv_auroc"] == row["cv_auroc"]
    assert row["auroc"] == pytest.approx(roc_auc_score(y_test, scores), abs=1e-3)
    assert row["accuracy"] == pytest.approx(accuracy_score(y_test, scores > 0), abs=0.01)
    assert row["f1"] == pytest.approx(f1_score(y_test, scores > 0), abs=0.01)
    assert result.metrics[f"probe/{name}_auroc_test"] == row["auroc"]
    assert result.metrics[f"probe/{name}_auroc_ci_low_test"] == row["auroc_ci_low"]


def test_difference_of_means_by_hand(inputs: AnalysisInputs, result: Result) -> None:
    assert inputs.acts is not None
    x = inputs.acts.numpy().astype(np.float64)
    train, y, _ = parts(inputs, "train")
    test, y_test, _ = parts(inputs, "test")
    a, b = x[train][y].mean(0), x[train][~y].mean(0)
    scores = x[test] @ (a - b)
    m = result.metrics
    assert m["probe/mean_difference_auroc_test"] == pytest.approx(roc_auc_score(y_test, scores))
    called = np.linalg.norm(x[test] - a, axis=1) < np.linalg.norm(x[test] - b, axis=1)
    assert m["probe/mean_difference_accuracy_test"] == pytest.approx((called == y_test).mean())


def test_the_best_latent_is_the_best_on_train(inputs: AnalysisInputs, result: Result) -> None:
    dense = inputs.latents.csr.todense()
    train, y, _ = parts(inputs, "train")
    test, y_test, _ = parts(inputs, "test")
    aurocs = np.array([roc_auc_score(y, dense[train][:, i]) for i in range(dense.shape[1])])
    best = int(np.abs(aurocs - 0.5).argmax())
    assert result.metrics["probe/best_latent"] == best
    assert best in (KNOWN, UNKNOWN, 30, 21)
    sign = np.sign(aurocs[best] - 0.5)
    expected = roc_auc_score(y_test, sign * dense[test][:, best])
    assert result.metrics["probe/best_latent_auroc_test"] == pytest.approx(expected)
    best_latents = result.tables["probe_latents"]
    np.testing.assert_allclose(best_latents["auroc"], aurocs[best_latents["latent"]], atol=1e-12)


def test_a_planted_signal_is_found(result: Result) -> None:
    m = result.metrics
    assert m["probe/sparse_3_auroc_test"] > 0.9
    assert m["probe/dense_auroc_test"] > 0.9
    assert m["probe/dense_auroc_ci_low_test"] < m["probe/dense_auroc_test"]
    assert m["probe/dense_auroc_ci_high_test"] <= 1


def test_intervals_of_shuffled_labels_cover_one_half(inputs: AnalysisInputs) -> None:
    """Of 4 shuffles at 95 %, at most 2 misses per probe (more has probability 0.0005)."""
    names = ("sparse_1", "sparse_3", "dense", "mean_difference", "best_latent")
    covered = dict.fromkeys(names, 0)
    for seed in range(4):
        m = probe(shuffled(inputs, seed), n_bootstrap=200, strengths=[0.1]).metrics
        for name in names:
            low = m[f"probe/{name}_auroc_ci_low_test"]
            covered[name] += low <= 0.5 <= m[f"probe/{name}_auroc_ci_high_test"]
    assert min(covered.values()) >= 2, covered


def test_permuted_labels_give_the_null_of_the_dense_probe(
    inputs: AnalysisInputs, result: Result
) -> None:
    null = probe(inputs, placebo=6)
    m = null.metrics
    (train, _, _), (test, _, units_test) = (parts(inputs, s) for s in ("train", "test"))
    trials = list(Fitting([1], STRENGTHS, (), 0).permuted(inputs, train, test, 6))
    aurocs = [roc_auc_score(first, scores) for first, scores in trials]
    assert m["probe/null_auroc_test"] == pytest.approx(np.mean(aurocs))
    low, high = np.quantile(aurocs, (0.025, 0.975))
    assert m["probe/null_auroc_ci_low_test"] == pytest.approx(low)
    assert m["probe/null_auroc_ci_high_test"] == pytest.approx(high)
    assert low < 0.5 < high < m["probe/dense_auroc_test"]
    # Independently: random scores of as many units (two rows each) have this standard deviation.
    n = [len(np.unique(units_test[trials[0][0] == group])) for group in (True, False)]
    expected = np.sqrt((sum(n) + 1) / (12 * n[0] * n[1]))
    assert 0.4 * expected < np.std(aurocs) < 2.5 * expected
    assert m["probe/n_null"] == 6
    # Everything else is as without it.
    assert {k: v for k, v in m.items() if "null" not in k} == result.metrics
    rows = null.tables["probes"]
    pd.testing.assert_frame_equal(
        rows[rows["probe"] != "null"].reset_index(drop=True), result.tables["probes"]
    )


def test_labels_are_permuted_between_units() -> None:
    units = np.repeat(np.arange(40), 3)
    rows = Labelled(units < 15, units)
    rng = np.random.default_rng(0)
    for _ in range(5):
        first = rows.permuted(rng)
        assert (pd.Series(first).groupby(units).nunique() == 1).all()
        assert first.sum() == rows.first.sum()
        assert 0.2 < (first == rows.first).mean() < 0.9


def test_the_majority_and_holm_beside_the_probes(inputs: AnalysisInputs) -> None:
    """A third of the known entities are left out of train, a half of test."""
    rows = inputs.latents.rows
    keep = (rows["group"] == "unknown") | ~rows["unit"].str.contains("[05]$")
    keep &= (
        (rows["split"] == "train")
        | (rows["group"] == "unknown")
        | ~rows["unit"].str[-1:].isin(["1", "3", "7", "9"])
    )
    assert inputs.acts is not None
    kept_rows = keep.to_numpy(dtype=bool)
    some = Latents(
        sparse.csr_array(inputs.latents.csr[kept_rows]), rows[kept_rows].reset_index(drop=True)
    )
    result = probe(replace(inputs, latents=some, acts=inputs.acts[torch.tensor(kept_rows)]))
    m, table = result.metrics, result.tables["probes"].query("data == 'test'")
    test = some.rows.query("split == 'test'")
    share = float((test["group"] == "unknown").mean())
    assert share > 0.6
    assert m["probe/majority_accuracy_test"] == pytest.approx(share)
    assert m["probe/majority_balanced_accuracy_test"] == 0.5
    assert m["probe/majority_auroc_test"] == 0.5
    assert "probe/majority_auroc_p_holm_test" not in m
    adjusted = table.set_index("probe")["auroc_p_holm"].drop("majority")
    n_units = {g: test.loc[test["group"] == g, "unit"].nunique() for g in GROUPS}
    p_values = []
    for name in adjusted.index:
        row = table[table["probe"] == name].iloc[0]
        low = row["auroc_ci_low"]
        p_values.append(adjusted[name])
        assert (adjusted[name] <= 0.05) <= (low > 0.5), name
    assert min(n_units.values()) >= 10
    assert max(p_values) < 0.01
    assert (adjusted >= 0).all()


def test_entities_with_more_rows_contribute_as_many(inputs: AnalysisInputs, result: Result) -> None:
    rows = inputs.latents.rows
    more = np.concatenate([np.arange(len(rows)), np.flatnonzero(rows["group"] == "known")])
    repeated = Latents(sparse.csr_array(inputs.latents.csr[more]), rows.iloc[more])
    repeated = Latents(repeated.csr, repeated.rows.reset_index(drop=True))
    assert inputs.acts is not None
    large = replace(inputs, latents=repeated, acts=inputs.acts[torch.from_numpy(more)])
    of_large = probe(large, **QUICK)
    for name in ("probe/n_rows", "probe/n_rows_test"):
        assert of_large.metrics[name] == result.metrics[name]
    assert any("every entity contributes 2 rows" in note for note in of_large.notes)
    assert any("was 4.0 (known) and 2.0 (unknown); an effect of" in note for note in of_large.notes)
    every = probe(large, **QUICK, within="entity_type").metrics
    assert every["probe/n_rows_test"] > result.metrics["probe/n_rows_test"]  # type: ignore[operator]


def test_types_in_unequal_proportions_are_noted(inputs: AnalysisInputs, result: Result) -> None:
    rows = inputs.latents.rows
    left_out = (rows["group"] == "known") & (rows["entity_type"] == "city")
    keep = ~(left_out & rows["unit"].str.contains("[2-9]$")).to_numpy(dtype=bool)
    assert inputs.acts is not None
    some = Latents(sparse.csr_array(inputs.latents.csr[keep]), rows[keep].reset_index(drop=True))
    unequal = replace(inputs, latents=some, acts=inputs.acts[torch.tensor(keep)])
    notes = [
        n for n in probe(unequal, **QUICK).notes if n.startswith("entity types differ between")
    ]
    assert len(notes) == 1 and "a probe may exploit this" in notes[0]
    assert not any("entity types differ" in note for note in result.notes)


def test_a_quiet_latent_that_the_selection_misses_is_named(inputs: AnalysisInputs) -> None:
    """A latent of small values that separates the groups perfectly."""
    dense = inputs.latents.csr.todense().copy()
    known = (inputs.latents.rows["group"] == "known").to_numpy()
    dense[:, 50] = np.where(known, 1e-3, 0.0)
    quiet = replace(inputs, latents=Latents(sparse.csr_array(dense), inputs.latents.rows))
    result = probe(quiet, strengths=[0.1])
    (note,) = (n for n in result.notes if "latent 50 has the best train AUROC (1.000)" in n)
    table = result.tables["probe_latents"]
    best = 0.5 + (table["auroc"] - 0.5).abs().max()
    assert f"not among the 3 latents of sparse_3, the best of which has {best:.3f}" in note
    assert not any("best train AUROC" in n for n in probe(quiet, k=[59], strengths=[0.1]).notes)


def test_transfer_to_another_data_set(inputs: AnalysisInputs, result: Result) -> None:
    other = make_inputs(seed=9)
    rows = other.latents.rows
    rows = rows.assign(text="other " + rows["text"], unit="o" + rows["unit"])
    same = rows.index < 5
    rows.loc[same, "text"] = inputs.latents.rows["text"][
        inputs.latents.rows["split"] == "train"
    ].iloc[0]
    other = replace(other, latents=Latents(other.latents.csr, rows))
    both = probe(inputs, other)
    m, table = both.metrics, both.tables["probes"]
    assert set(table["data"]) == {"train", "test", "transfer"}
    assert m["probe/n_rows_transfer"] == len(rows) - 5
    assert any("5 rows left out" in note for note in both.notes)
    assert m["probe/dense_auroc_transfer"] > 0.9
    assert m["probe/dense_auroc_test"] == result.metrics["probe/dense_auroc_test"]
    with pytest.raises(DataError, match="all its texts or entities are among the train rows"):
        train = (inputs.latents.rows["split"] == "train").to_numpy()
        train_latents = Latents(
            sparse.csr_array(inputs.latents.csr[train]),
            inputs.latents.rows[train].reset_index(drop=True),
        )
        acts = inputs.acts
        assert acts is not None
        same_rows = replace(inputs, latents=train_latents, acts=acts[torch.tensor(train)])
        probe(inputs, same_rows, **QUICK)


def test_judging_against_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    first = rng.random(200) < 0.3
    scores = np.round(rng.normal(size=200) + first, 1)
    measured = Judge(Labelled(first, np.arange(200).astype(object))).measure(scores, 0.4)
    assert measured["auroc"] == pytest.approx(roc_auc_score(first, scores))
    assert measured["accuracy"] == pytest.approx(accuracy_score(first, scores > 0.4))
    assert measured["f1"] == pytest.approx(f1_score(first, scores > 0.4))
    expected = balanced_accuracy_score(first, scores > 0.4)
    assert measured["balanced_accuracy"] == pytest.approx(expected)
    n_right = int(((scores > 0.4) == first).sum())
    wilson = binomtest(n_right, 200).proportion_ci(method="wilson")
    limits = measured["accuracy_ci_low"], measured["accuracy_ci_high"]
    assert limits == pytest.approx((wilson.low, wilson.high))
    fpr, tpr, _ = roc_curve(first, scores, drop_intermediate=False)
    np.testing.assert_allclose(roc(scores, first), np.stack([fpr, tpr], axis=1))
    cuts = np.append(np.unique(scores), scores.min() - 1)
    best = max(((scores > c) == first).mean() for c in cuts)
    assert ((scores > threshold_of_best_accuracy(scores, first)) == first).mean() == best


def test_units_count_once_however_many_rows_they_have() -> None:
    """One to forty equal rows a unit: numbers and intervals are those of one row each."""
    rng = np.random.default_rng(1)
    first, n = np.arange(40) % 2 == 0, rng.integers(1, 41, 40)
    scores, kinds = rng.normal(size=40) + first, rng.integers(0, 3, 40)
    units = np.array([f"u{i}" for i in range(40)], dtype=object)
    one = Judge(Labelled(first, units, kinds)).measure(scores, 0.5)
    many = Judge(Labelled(first.repeat(n), units.repeat(n), kinds.repeat(n)))
    again = many.measure(scores.repeat(n), 0.5)
    for name, value in one.items():
        assert again[name] == pytest.approx(value), name
    assert one["auroc_ci_high"] - one["auroc_ci_low"] > 0.15  # type: ignore[operator]


def test_a_unit_is_never_on_both_sides(inputs: AnalysisInputs) -> None:
    from saexp.stats.separation import folds

    _, y, units = parts(inputs, "train")
    for train, validation in folds(y, units, 0):
        assert not set(units[train]) & set(units[validation])


def test_large_train_splits_are_cut_with_a_note(inputs: AnalysisInputs) -> None:
    result = probe(inputs, max_train=60, **QUICK)
    assert result.metrics["probe/n_rows"] == 60
    assert any("fitted on 60 of" in note for note in result.notes)


def test_more_latents_than_there_are(inputs: AnalysisInputs) -> None:
    result = probe(inputs, k=[2, 500], strengths=[0.1])
    names = set(result.tables["probes"]["probe"])
    alone = {"dense", "mean_difference", "best_latent", "majority"}
    assert names == {"sparse_2", "sparse_59", *alone}
    assert any("at most 59 latents" in note for note in result.notes)


def test_what_cannot_be_probed(inputs: AnalysisInputs, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a probe needs two groups, but the data set has 0"):
        probe(replace(inputs, groups=()))
    rows = inputs.latents.rows
    few = rows.assign(split=rows["split"].where(rows["group"] == "known", "val"))
    with pytest.raises(DataError, match="split train has 0 units of group 'unknown'"):
        probe(replace(inputs, latents=Latents(inputs.latents.csr, few)))
    silent = sparse.csr_array(inputs.latents.csr.shape, dtype=np.float32)
    with pytest.raises(DataError, match="same mean in both groups"):
        probe(replace(inputs, latents=Latents(silent, rows)))
    for options, message in (
        ({"k": [0]}, "k=0 is not a whole number"),
        ({"strengths": [0]}, "must be numbers above 0"),
        ({"transfer": str(tmp_path / "none.jsonl")}, "no such file"),
    ):
        with pytest.raises(ConfigError, match=message):
            ProbeAnalyzer(ProbeConfig(name="probe", **options))  # type: ignore[arg-type]
