"""Intervals of an AUROC and of a separation over strata, against their formulas."""

import numpy as np
import pytest
from scipy import stats

from saexp.stats import MIN_GROUP, auroc_interval, auroc_p_value, mover, separation_interval, wilson


def test_one_stratum_is_newcombes_method_5() -> None:
    values = np.array([0.0, 0.2, 0.5, 0.93, 1.0])
    interval = auroc_interval(values, np.array([30]), np.array([50]), np.ones(1))
    np.testing.assert_array_equal(interval, auroc_interval(values, 30, 50))


def test_the_stratified_interval_solves_its_equation() -> None:
    """At a limit, the distance to the estimate is z standard errors of the weighted mean there."""
    first, second, weights = np.array([8, 20, 5]), np.array([12, 6, 30]), np.array([0.3, 0.5, 0.2])
    values = np.array([0.2, 0.5, 0.93])
    z = stats.norm.isf(0.025)
    for limit in auroc_interval(values, first, second, weights):
        variance = 0.0
        for m, n, w in zip(first, second, weights, strict=True):
            q1, q2 = limit / (2 - limit), 2 * limit**2 / (1 + limit)
            extra = (m + n) / 2 - 1
            hanley_mcneil = limit * (1 - limit) + extra * (q1 + q2 - 2 * limit**2)
            variance = variance + w**2 * hanley_mcneil / (m * n)
        np.testing.assert_allclose(np.abs(limit - values), z * np.sqrt(variance), rtol=1e-9)


def test_a_larger_estimated_variance_widens_the_interval() -> None:
    plain = auroc_interval(0.8, 20, 20)
    assert auroc_interval(0.8, 20, 20, variance=1e-4) == plain
    wide = auroc_interval(0.8, 20, 20, variance=0.02)
    assert wide.low < plain.low < plain.high < wide.high


def test_a_separation_far_from_0_and_1_is_newcombes_hybrid() -> None:
    one = np.ones(1)
    sizes = np.array([70]), np.array([80])
    interval = separation_interval(np.array([0.8]), np.array([0.6]), *sizes, one)
    expected = mover(0.8, wilson(56, 70), 0.6, wilson(48, 80))
    np.testing.assert_allclose(np.ravel(interval), np.ravel(expected))
    # Equal strata with equal weights count as one sample of all units.
    halves = np.array([35, 35]), np.array([40, 40])
    again = separation_interval(np.array([0.8]), np.array([0.6]), *halves, np.full(2, 0.5))
    np.testing.assert_allclose(again, interval)


def test_next_to_0_the_limit_is_the_poisson_one() -> None:
    """Brown, Cai and DasGupta 2001: 1 of 10 has the lower limit -log(0.95) / 10."""
    none = np.array([1.0])
    low, high = separation_interval(
        none, np.array([0.1]), np.array([10]), np.array([10]), np.ones(1)
    )
    assert float(high[0]) == pytest.approx(0.9 + 0.1 + np.log(0.95) / 10)
    one = stats.binomtest(1, 10).proportion_ci(method="wilson")
    ten = stats.binomtest(10, 10).proportion_ci(method="wilson")
    below = np.hypot(1 - ten.low, one.high - 0.1)
    assert float(low[0]) == pytest.approx(0.9 - below)


def test_small_groups_have_no_interval() -> None:
    for sizes in ((MIN_GROUP - 1, 50), (50, MIN_GROUP - 1)):
        assert np.isnan(auroc_interval(np.array([0.7, 1.0]), *sizes)).all()
        n = [np.array([size]) for size in sizes]
        interval = separation_interval(np.array([0.7]), np.array([0.2]), n[0], n[1], np.ones(1))
        assert np.isnan(interval).all()
    assert np.isfinite(auroc_interval(1.0, MIN_GROUP, MIN_GROUP)).all()


@pytest.mark.parametrize("auroc", [0.35, 0.6, 0.8])
def test_a_p_value_is_where_the_interval_reaches_chance(auroc: float) -> None:
    first, second, weights = np.array([8, 20]), np.array([12, 6]), np.array([0.3, 0.7])
    for variance in (0.0, 0.03):
        p_value = auroc_p_value(auroc, first, second, weights, variance)
        interval = auroc_interval(auroc, first, second, weights, variance, 1 - p_value)
        assert min(abs(float(limit) - 0.5) for limit in interval) < 1e-6
    assert np.isnan(auroc_p_value(auroc, np.array([9]), np.array([90]), np.ones(1)))
