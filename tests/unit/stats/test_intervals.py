"""Intervals against published examples and by their coverage."""

import numpy as np
import pytest
from scipy import special, stats

from saexp.stats.intervals import (
    MIN_N,
    auroc_interval,
    mean_interval,
    mover,
    paired_difference_interval,
    wilson,
)
from saexp.stats.permutation import prediction_p_value, rank_p_value


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
    found = mover(k_first / n_first, limits[0], k_second / n_second, limits[1])
    assert float(found.low) == pytest.approx(low, abs=6e-5)
    assert float(found.high) == pytest.approx(high, abs=6e-5)


def test_paired_difference_of_independent_outcomes_is_the_hybrid() -> None:
    """phi is 0 where a d = b c."""
    found = paired_difference_interval(18, 12, 12, 8)
    expected = mover(0.6, wilson(30, 50), 0.6, wilson(30, 50))
    assert found == pytest.approx((float(expected.low), float(expected.high)), abs=1e-12)


@pytest.mark.parametrize("n", [10, 30, 200])
@pytest.mark.parametrize("change", [0.0, 0.05, 0.3, 0.9])
def test_paired_differences_are_covered(n: int, change: float) -> None:
    rng = np.random.default_rng([n, int(100 * change)])
    before = rng.random((1500, n)) < 0.05
    after = before | (rng.random((1500, n)) < change / 0.95)
    covered = 0
    for a, b in zip(after, before, strict=True):
        low, high = paired_difference_interval(
            int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum()), int((~a & ~b).sum())
        )
        assert low < high
        covered += low <= change <= high
    assert covered / len(after) >= 0.92


@pytest.mark.parametrize("n", [10, 30, 200])
@pytest.mark.parametrize("auroc", [0.5, 0.8, 0.97, 0.99])
def test_an_auroc_is_covered(n: int, auroc: float) -> None:
    rng = np.random.default_rng([n, int(100 * auroc)])
    first = rng.normal(np.sqrt(2) * special.ndtri(auroc), 1, (1000, n))
    second = rng.normal(0, 1, (1000, n))
    values = np.array([(a[:, None] > b).mean() for a, b in zip(first, second, strict=True)])
    low, high = auroc_interval(values, n, n)
    assert ((low <= auroc) & (auroc <= high)).mean() >= 0.92
    assert (high > low).all()


def test_auroc_interval_solves_its_equation() -> None:
    """At a limit, the distance to the estimate is z standard errors there (Newcombe's eq. 5)."""
    m, n, z = 30, 50, stats.norm.isf(0.025)
    found = auroc_interval(np.array([0.2, 0.5, 0.93]), m, n)
    for limit in found:
        q1, q2 = limit / (2 - limit), 2 * limit**2 / (1 + limit)
        extra = (m + n) / 2 - 1
        hanley_mcneil = limit * (1 - limit) + extra * (q1 - limit**2) + extra * (q2 - limit**2)
        distance = np.abs(limit - np.array([0.2, 0.5, 0.93]))
        np.testing.assert_allclose(distance, z * np.sqrt(hanley_mcneil / (m * n)), rtol=1e-9)


@pytest.mark.parametrize(("n", "least"), [(10, 0.88), (30, 0.90), (200, 0.92)])
@pytest.mark.parametrize("law", ["normal", "exponential", "lognormal"])
def test_means_of_skewed_values_are_covered(n: int, least: float, law: str) -> None:
    rng = np.random.default_rng([n, len(law)])
    values = getattr(rng, law if law != "lognormal" else "lognormal")(size=(n, 2000))
    truth = {"normal": 0.0, "exponential": 1.0, "lognormal": float(np.exp(0.5))}[law]
    low, high = mean_interval(values, 0)
    assert ((low <= truth) & (truth <= high)).mean() >= (least if law == "lognormal" else 0.92)


def test_too_few_values_and_equal_values_have_no_interval() -> None:
    low, high = mean_interval(np.random.default_rng(0).normal(size=(MIN_N - 1, 2)), 0)
    assert np.isnan(low).all() and np.isnan(high).all()
    low, high = mean_interval(np.stack([np.ones(20), np.arange(20.0)], axis=1), 0)
    assert np.isnan(low[0]) and low[1] < 9.5 < high[1]


@pytest.mark.parametrize("k", [19, 99])
def test_exchangeable_items_pass_at_their_level(k: int) -> None:
    rng = np.random.default_rng(k)
    for values in (rng.normal(size=(4000, k + 1)), rng.gamma(0.5, size=(4000, k + 1)) - 3):
        found = np.array([rank_p_value(row[0], row[1:]) for row in values])
        assert found.min() == 1 / (k + 1)
        for alpha in (0.05, 0.2):
            assert (found <= alpha).mean() == pytest.approx(alpha, abs=0.02)


def test_the_other_sign_counts() -> None:
    controls = np.linspace(-0.9, -0.7, 19)
    assert rank_p_value(0.2, controls) == 1 / 20
    assert rank_p_value(-0.8, controls) > 0.8
    assert np.isnan(rank_p_value(0.2, np.empty(0)))


def test_prediction_p_value_is_uniform_for_normal_values() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(4000, 11))
    found = [prediction_p_value(row[0], row[1:]) for row in values]
    assert stats.kstest(found, "uniform").pvalue > 0.01
    assert np.isnan(prediction_p_value(1.0, np.zeros(10)))
