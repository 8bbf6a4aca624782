"""Coverage of the intervals of rates, of changes of rates and of AUROCs."""

import numpy as np
import pandas as pd
import pytest
from scipy import special, stats

from saexp.analysis.capability import (
    _paired_rate_bounds,
    _rate_bounds,
)
from saexp.stats import auroc_interval, paired_change_interval, paired_difference_interval, wilson

SIZES = [10, 200]
N_SIMULATED = 500
"""0.92 is 3 standard errors of the simulation below the nominal 0.95."""
SPREADS = (0.3, 3.0, 100.0)
"""How alike entities are in their rate: from each always or never to all alike."""


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("change", [0.0, 0.05, 0.3, 0.9])
def test_paired_differences_are_covered(n: int, change: float) -> None:
    rng = np.random.default_rng([n, int(100 * change)])
    before = rng.random((N_SIMULATED, n)) < 0.05
    after = before | (rng.random((N_SIMULATED, n)) < change / 0.95)
    covered = 0
    for a, b in zip(after, before, strict=True):
        low, high = paired_difference_interval(
            int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum()), int((~a & ~b).sum())
        )
        assert low < high
        covered += low <= change <= high
    assert covered / len(after) >= 0.92


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("auroc", [0.5, 0.8, 0.97, 0.99])
def test_an_auroc_is_covered(n: int, auroc: float) -> None:
    rng = np.random.default_rng([n, int(100 * auroc)])
    first = rng.normal(np.sqrt(2) * special.ndtri(auroc), 1, (N_SIMULATED, n))
    second = rng.normal(0, 1, (N_SIMULATED, n))
    values = np.array([(a[:, None] > b).mean() for a, b in zip(first, second, strict=True)])
    low, high = auroc_interval(values, n, n)
    assert ((low <= auroc) & (auroc <= high)).mean() >= 0.92
    assert (high > low).all()


RATES = [(0.5, 0.5), (0.5, 0.8), (0.8, 0.97), (0.97, 0.99), (0.99, 0.99), (0.0, 0.97)]


def correlated(rng: np.random.Generator, p: float, q: float, rho: float, size: tuple[int, ...]):
    """Two 0/1 outcomes of the same units with these rates, and a shared normal cause."""
    first = rng.normal(size=size)
    second = rho * first + np.sqrt(1 - rho**2) * rng.normal(size=size)
    return (first < stats.norm.ppf(p)) * 1.0, (second < stats.norm.ppf(q)) * 1.0


@pytest.mark.parametrize(
    ("n", "rates", "rho"),
    [(n, r, (0.0, 0.6)[(i + j) % 2]) for i, n in enumerate(SIZES) for j, r in enumerate(RATES)],
)
def test_coverage_of_one_prompt_per_entity(n: int, rates: tuple[float, float], rho: float) -> None:
    p, q = rates
    rng = np.random.default_rng([n, round(100 * p), round(100 * q)])
    before, after = correlated(rng, p, q, rho, (N_SIMULATED, n))
    limits = [paired_change_interval(b, a) for b, a in zip(before, after, strict=True)]
    covered = [low - 1e-12 <= q - p <= high + 1e-12 for low, high in limits]
    assert np.mean(covered) >= 0.92


@pytest.mark.parametrize(
    ("n", "rates", "spread"),
    [(n, r, SPREADS[(i + j) % 3]) for i, n in enumerate(SIZES) for j, r in enumerate(RATES[1:4])],
)
def test_coverage_of_several_prompts_per_entity(
    n: int, rates: tuple[float, float], spread: float
) -> None:
    p, q = rates
    rng = np.random.default_rng([n, round(100 * p), round(spread * 10)])
    drawn = [rng.beta(spread * r, spread * (1 - r), (N_SIMULATED, n)) for r in (p, q)]
    before, after = (rng.binomial(4, r) / 4 for r in drawn)
    limits = [paired_change_interval(b, a) for b, a in zip(before, after, strict=True)]
    assert np.mean([low <= q - p <= high for low, high in limits]) >= 0.92


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("rate", [0.5, 0.8, 0.97])
def test_coverage_of_mean_rates_of_several_prompts(n: int, rate: float) -> None:
    for spread in SPREADS:
        rng = np.random.default_rng([n, round(100 * rate), round(10 * spread)])
        rates = rng.beta(spread * rate, spread * (1 - rate), (1000, n))
        low, high = wilson((rng.binomial(5, rates) / 5).sum(1), n)
        assert ((low <= rate) & (rate <= high)).mean() >= 0.92


@pytest.mark.parametrize(("n", "rate"), [(10, 0.5), (200, 0.8), (30, 0.97), (10, 0.99)])
def test_rates_of_entities_with_several_prompts_are_covered(n: int, rate: float) -> None:
    """Three prompts an entity; all of an entity's are alike in half of the entities."""
    covered, changes, n_runs = 0, 0, 400
    codes = np.repeat(np.arange(n), 3)
    for seed in range(n_runs):
        rng = np.random.default_rng([seed, n])
        clean, sae = (
            np.where(
                np.repeat(rng.random(n) < 0.5, 3),
                np.repeat(rng.random(n) < r, 3),
                rng.random(3 * n) < r,
            ).astype(float)
            for r in (rate, rate - 0.1)
        )
        low, high = _rate_bounds(pd.Series(clean).groupby(codes).mean().to_numpy())
        assert low is not None and high is not None and low < high
        covered += low <= rate <= high
        low, high = _paired_rate_bounds(pd.Series(clean), pd.Series(sae), codes)
        assert low is not None and high is not None and low < high
        changes += low <= -0.1 <= high
    assert covered / n_runs >= 0.92
    assert changes / n_runs >= 0.92
