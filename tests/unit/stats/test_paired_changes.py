"""Intervals of changes of rates: from counts, from fractions, and their coverage."""

import numpy as np
import pytest
from scipy import stats

from saexp.stats.intervals import paired_change_interval, paired_difference_interval

RATES = [(0.5, 0.5), (0.5, 0.8), (0.8, 0.97), (0.97, 0.99), (0.99, 0.99), (0.0, 0.97)]


def correlated(rng: np.random.Generator, p: float, q: float, rho: float, size: tuple[int, ...]):
    """Two 0/1 outcomes of the same units with these rates, and a shared normal cause."""
    first = rng.normal(size=size)
    second = rho * first + np.sqrt(1 - rho**2) * rng.normal(size=size)
    return (first < stats.norm.ppf(p)) * 1.0, (second < stats.norm.ppf(q)) * 1.0


def test_of_outcomes_it_is_the_interval_of_the_four_counts() -> None:
    before = np.repeat([1.0, 0.0, 1.0, 0.0], [5, 9, 2, 4])
    after = np.repeat([1.0, 1.0, 0.0, 0.0], [5, 9, 2, 4])
    assert paired_change_interval(before, after) == paired_difference_interval(5, 9, 2, 4)
    # Exchanged, it is mirrored.
    low, high = paired_change_interval(before, after)
    assert paired_change_interval(after, before) == pytest.approx((-high, -low))


def test_no_interval_has_zero_width() -> None:
    for value in (0.0, 0.5, 1.0):
        low, high = paired_change_interval(np.full(30, value), np.full(30, value))
        assert low < -0.05 and high > 0.05


@pytest.mark.parametrize("n", [10, 30, 200])
@pytest.mark.parametrize(("p", "q"), RATES)
def test_coverage_of_one_prompt_per_entity(n: int, p: float, q: float) -> None:
    for rho in (0.0, 0.6):
        rng = np.random.default_rng([n, round(100 * p), round(100 * q)])
        before, after = correlated(rng, p, q, rho, (500, n))
        limits = [paired_change_interval(b, a) for b, a in zip(before, after, strict=True)]
        covered = [low - 1e-12 <= q - p <= high + 1e-12 for low, high in limits]
        # 3 standard errors of the simulation below the nominal 0.95.
        assert np.mean(covered) >= 0.92


@pytest.mark.parametrize("n", [10, 30, 200])
@pytest.mark.parametrize(("p", "q"), RATES[1:4])
def test_coverage_of_several_prompts_per_entity(n: int, p: float, q: float) -> None:
    """Entities differ in their rate, from all alike to each always or never."""
    for spread in (0.3, 3.0, 100.0):
        rng = np.random.default_rng([n, round(100 * p), round(spread * 10)])
        rates = [rng.beta(spread * r, spread * (1 - r), (500, n)) for r in (p, q)]
        before, after = (rng.binomial(4, r) / 4 for r in rates)
        limits = [paired_change_interval(b, a) for b, a in zip(before, after, strict=True)]
        assert np.mean([low <= q - p <= high for low, high in limits]) >= 0.92
