"""Bootstrap intervals of means over units, against scipy and a loop that draws rows."""

import numpy as np
import pytest
from scipy import sparse, stats

from saexp.stats import means
from saexp.stats.means import bootstrap_means

RNG = np.random.default_rng(4)
UNITS = [f"e{i}" for i in RNG.permutation(np.repeat(np.arange(30), [1, 2, 3] * 10))]
VALUES = RNG.gamma(1.0, size=(60, 4)) * (RNG.random((60, 4)) < [0.9, 0.5, 0.2, 0.0])


def test_it_is_scipys_percentile_bootstrap_of_units() -> None:
    """Sum over size, drawn together: the mean over rows where units are drawn whole."""
    names = sorted(set(UNITS))
    sums = np.stack([VALUES[[u == name for u in UNITS]].sum(0) for name in names])
    sizes = np.array([UNITS.count(name) for name in names])
    low, high = bootstrap_means(VALUES, UNITS, n_resamples=20_000)
    for column in range(3):
        expected = stats.bootstrap(
            (sums[:, column], sizes),
            lambda s, n, axis=-1: s.sum(axis) / n.sum(axis),
            paired=True,
            method="percentile",
            n_resamples=20_000,
            rng=np.random.default_rng(0),
        ).confidence_interval
        assert low[column] == pytest.approx(expected.low, rel=0.02, abs=5e-3)
        assert high[column] == pytest.approx(expected.high, rel=0.02, abs=5e-3)
        assert low[column] < VALUES[:, column].mean() < high[column]
    assert low[3] == high[3] == 0


def test_it_equals_a_loop_over_resamples() -> None:
    """With the same draws, each of them laid out as rows."""
    names = list(dict.fromkeys(UNITS))
    drawn = np.random.default_rng([7, 47]).multinomial(30, np.full(30, 1 / 30), size=50)
    means = []
    for counts in drawn:
        times = dict(zip(names, counts, strict=True))
        rows = [i for i, unit in enumerate(UNITS) for _ in range(times[unit])]
        means.append(VALUES[rows].mean(0))
    low, high = bootstrap_means(VALUES, UNITS, n_resamples=50, confidence=0.8, seed=7)
    np.testing.assert_allclose(low, np.quantile(means, 0.1, axis=0))
    np.testing.assert_allclose(high, np.quantile(means, 0.9, axis=0))


def test_sparse_values_and_chunks_of_columns_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = bootstrap_means(VALUES, UNITS)
    monkeypatch.setattr(means, "_NUMBERS", 1)
    np.testing.assert_allclose(bootstrap_means(sparse.csr_array(VALUES), UNITS), expected)


def test_units_and_not_rows_are_the_observations() -> None:
    """Ten equal rows of each unit make the interval no narrower."""
    once = VALUES[:20]
    expected = bootstrap_means(once, list(range(20)))
    repeated = bootstrap_means(np.repeat(once, 10, axis=0), np.repeat(np.arange(20), 10).tolist())
    np.testing.assert_allclose(repeated, expected)


def test_one_unit_has_no_interval() -> None:
    assert np.isnan(bootstrap_means(VALUES, ["a"] * 60)).all()


def test_coverage() -> None:
    covered = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        effects = np.repeat(rng.normal(1.0, 1.0, size=40), 3) + rng.normal(0, 0.3, size=120)
        low, high = bootstrap_means(
            effects[:, None], np.repeat(np.arange(40), 3).tolist(), n_resamples=400
        )
        covered += low[0] <= 1.0 <= high[0]
    assert covered / 300 == pytest.approx(0.94, abs=0.035)
