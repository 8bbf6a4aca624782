"""Intervals against published examples and by their coverage."""

import numpy as np
import pytest
from scipy import stats

from saexp.stats import (
    MIN_N,
    auroc_interval,
    mean_interval,
    mover,
    paired_difference_interval,
    wilson,
)
from saexp.stats.significance import rank_p_value


@pytest.mark.parametrize(("k", "n"), [(0, 5), (3, 7), (10, 10), (47, 200)])
def test_wilson_is_scipys(k: int, n: int) -> None:
    expected = stats.binomtest(k, n).proportion_ci(method="wilson")
    low, high = wilson(k, n)
    assert float(low) == pytest.approx(expected.low, abs=1e-12)
    assert float(high) == pytest.approx(expected.high, abs=1e-12)


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        ((56, 70, 48, 80), 0.0524, 0.3339),
        ((9, 10, 3, 10), 0.1705, 0.8090),
        ((10, 10, 0, 10), 0.6075, 1.0),
        ((5, 56, 0, 29), -0.0381, 0.1926),
    ],
)
def test_newcombes_hybrid_of_wilson_limits_is_as_published(
    counts: tuple[int, int, int, int], low: float, high: float
) -> None:
    """Newcombe 1998a, table II, method 10."""
    k_first, n_first, k_second, n_second = counts
    limits = wilson(k_first, n_first), wilson(k_second, n_second)
    interval = mover(k_first / n_first, limits[0], k_second / n_second, limits[1])
    assert float(interval.low) == pytest.approx(low, abs=6e-5)
    assert float(interval.high) == pytest.approx(high, abs=6e-5)


def test_paired_difference_of_independent_outcomes_is_the_hybrid() -> None:
    """phi is 0 where a d = b c."""
    interval = paired_difference_interval(18, 12, 12, 8)
    expected = mover(0.6, wilson(30, 50), 0.6, wilson(30, 50))
    assert interval == pytest.approx((float(expected.low), float(expected.high)), abs=1e-12)


def test_auroc_interval_solves_its_equation() -> None:
    """At a limit, the distance to the estimate is z standard errors there (Newcombe's eq. 5)."""
    m, n, z = 30, 50, stats.norm.isf(0.025)
    interval = auroc_interval(np.array([0.2, 0.5, 0.93]), m, n)
    for limit in interval:
        q1, q2 = limit / (2 - limit), 2 * limit**2 / (1 + limit)
        extra = (m + n) / 2 - 1
        hanley_mcneil = limit * (1 - limit) + extra * (q1 - limit**2) + extra * (q2 - limit**2)
        distance = np.abs(limit - np.array([0.2, 0.5, 0.93]))
        np.testing.assert_allclose(distance, z * np.sqrt(hanley_mcneil / (m * n)), rtol=1e-9)


def test_too_few_values_and_equal_values_have_no_interval() -> None:
    low, high = mean_interval(np.random.default_rng(0).normal(size=(MIN_N - 1, 2)), 0)
    assert np.isnan(low).all() and np.isnan(high).all()
    low, high = mean_interval(np.stack([np.ones(20), np.arange(20.0)], axis=1), 0)
    assert np.isnan(low[0]) and low[1] < 9.5 < high[1]


def test_the_other_sign_counts() -> None:
    controls = np.linspace(-0.9, -0.7, 19)
    assert rank_p_value(0.2, controls) == 1 / 20
    assert rank_p_value(-0.8, controls) > 0.8
    assert np.isnan(rank_p_value(0.2, np.empty(0)))
