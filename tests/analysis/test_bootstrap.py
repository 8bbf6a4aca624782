"""Bootstrap intervals against a plain loop, and their coverage of a truth that is known."""

import numpy as np
import pytest
from scipy import sparse, stats
from sklearn.metrics import roc_auc_score

from saexp.analysis import statistics
from saexp.analysis.statistics import Ranked


def as_active(values: sparse.csr_array) -> sparse.csr_array:
    return (values > 0).astype(np.float64)


def test_equals_a_plain_resampling_loop() -> None:
    """The same distribution: 2.5 % and 97.5 % quantiles to the noise of the resampling."""
    rng = np.random.default_rng(0)
    n_first, n_second, n_resamples = 25, 40, 3000
    rates = np.array([0.05, 0.3, 0.7, 1.0, 0.0])
    dense = np.round(rng.gamma(2, 1, (65, 5)) + 0.5) * (rng.random((65, 5)) < rates)
    dense[:n_first, 1] += 2
    first = np.arange(65) < n_first
    values = sparse.csr_array(dense)
    auroc, separation = Ranked(values, first).bootstrap(as_active(values), n_resamples, seed=1)
    plain: dict[str, list[np.ndarray]] = {"auroc": [], "separation": []}
    for _ in range(n_resamples):
        a = dense[rng.integers(0, n_first, n_first)]
        b = dense[rng.integers(n_first, 65, n_second)]
        u = [stats.rankdata(np.concatenate([a, b]), axis=0)[:n_first].sum(0)]
        plain["auroc"].append((u[0] - n_first * (n_first + 1) / 2) / (n_first * n_second))
        plain["separation"].append((a > 0).mean(0) - (b > 0).mean(0))
    for found, name in ((auroc, "auroc"), (separation, "separation")):
        expected = np.quantile(plain[name], [0.025, 0.975], axis=0)
        assert found.shape == (2, 5)
        np.testing.assert_allclose(found, expected, atol=0.021)
    observed = [roc_auc_score(first, column) for column in dense.T]
    assert ((auroc[0] <= observed) & (observed <= auroc[1])).all()
    np.testing.assert_allclose(auroc[:, 4], 0.5)
    np.testing.assert_allclose(separation[:, 3:], 0, atol=1e-12)


@pytest.mark.parametrize("weights", ["first", "both"])
def test_weights_are_copies_of_rows(weights: str) -> None:
    """AUROC under weights is that of the data set with rows repeated as often."""
    rng = np.random.default_rng(2)
    dense = np.round(rng.gamma(2, 1, (30, 6))) * (rng.random((30, 6)) < 0.5)
    first = np.arange(30) < 12
    repeats = rng.integers(0, 4, 30)
    if weights == "first":
        repeats[~first] = 1
    repeats[[0, 29]] = 1
    ranked = Ranked(sparse.csr_array(dense), first)
    w = repeats.astype(float)[:, None]
    found = ranked.auroc(w * first[:, None], w * ~first[:, None])[:, 0]
    rows = np.repeat(np.arange(30), repeats)
    expected = [roc_auc_score(first[rows], column[rows]) for column in dense.T]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_coverage() -> None:
    """300 independent data sets, one a column; nominal 95 %, percentile intervals of 40 and 50."""
    rng = np.random.default_rng(3)
    n_sets, first = 300, np.arange(90) < 40
    on = rng.random((90, n_sets)) < np.where(first, 0.6, 0.3)[:, None]
    values = on * np.exp(rng.normal(0, 1, (90, n_sets)))
    csr = sparse.csr_array(values)
    auroc, separation = Ranked(csr, first).bootstrap(as_active(csr), 500, seed=0)
    # P(first > second) + P(both 0)/2, values being of one law where both fire.
    truth = 0.6 * 0.7 + (0.6 * 0.3 + 0.4 * 0.7) / 2
    assert ((auroc[0] <= truth) & (truth <= auroc[1])).mean() == pytest.approx(0.95, abs=0.03)
    covered = (separation[0] <= 0.3 + 1e-6) & (separation[1] >= 0.3 - 1e-6)
    assert covered.mean() == pytest.approx(0.95, abs=0.03)


def test_confidence_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    values = sparse.csr_array(rng.gamma(2, 1, (40, 3)) * (rng.random((40, 3)) < 0.5))
    ranked = Ranked(values, np.arange(40) < 20)
    wide, _ = ranked.bootstrap(as_active(values), 400, seed=1)
    again, _ = ranked.bootstrap(as_active(values), 400, seed=1)
    narrow, _ = ranked.bootstrap(as_active(values), 400, seed=1, confidence=0.5)
    other, _ = ranked.bootstrap(as_active(values), 400, seed=2)
    np.testing.assert_array_equal(wide, again)
    assert (wide != other).any()
    assert ((wide[0] < narrow[0]) & (narrow[1] < wide[1])).all()
    # In many small pieces the draws differ, the intervals hardly.
    monkeypatch.setattr(statistics, "_BOOTSTRAP_NUMBERS", 10 * values.nnz)
    pieces, _ = ranked.bootstrap(as_active(values), 400, seed=1)
    np.testing.assert_allclose(pieces, wide, atol=0.05)


def test_of_columns_without_entries() -> None:
    empty = sparse.csr_array((20, 3), dtype=np.float64)
    auroc, separation = Ranked(empty, np.arange(20) < 8).bootstrap(empty, 50, seed=0)
    np.testing.assert_array_equal(auroc, np.full((2, 3), 0.5))
    np.testing.assert_array_equal(separation, np.zeros((2, 3)))
