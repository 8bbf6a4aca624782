"""Coverage of intervals of means, ratios and stratified differences; levels of rank p-values."""

import numpy as np
import pytest
from scipy import sparse, stats

from saexp.analysis.top_latents import Attribution
from saexp.stats import difference_of_means, mean_interval, ratio_interval
from saexp.stats.separation import stratum_weights
from saexp.stats.significance import prediction_p_value, rank_p_value


@pytest.mark.parametrize("n", [10, 30, 200])
def test_ratios_over_clusters_are_covered(n: int) -> None:
    """Units of 1 to 5 rows whose skewed values share an effect of the unit; the true ratio is 1."""
    rng = np.random.default_rng(n)
    sizes = rng.integers(1, 6, (n, 1000)).astype(float)
    effects = rng.gamma(4.0, 0.25, (n, 1000))
    sums = effects * rng.gamma(sizes)
    low, high = ratio_interval(sums, sizes, 0, n_resamples=1000)
    assert ((low <= 1) & (high >= 1)).mean() >= 0.92


@pytest.mark.parametrize("n", [10, 30])
def test_differences_within_strata_are_covered(n: int) -> None:
    """Types 80/20 against 20/80 that differ by 3; the groups differ by 0.5 within each."""
    kinds = np.array(["a", "b"])
    first = np.repeat([True, False], n)
    n_major = round(0.8 * n)
    major, minor = (
        np.repeat(kinds, [n_major, n - n_major]),
        np.repeat(kinds, [n - n_major, n_major]),
    )
    strata = np.concatenate([major, minor])
    weights = stratum_weights(first, strata)
    covered, n_runs = 0, 400
    for seed in range(n_runs):
        values = np.random.default_rng([seed, n]).exponential(size=2 * n)
        values += 3 * (strata == "b") + 0.5 * first
        difference, low, high = difference_of_means(
            values, first, strata, weights, 0, n_resamples=300
        )
        assert low < difference < high
        covered += low <= 0.5 <= high
    assert covered / n_runs >= 0.92


@pytest.mark.parametrize(
    ("law", "n", "least"),
    [
        ("normal", 30, 0.92),
        ("exponential", 10, 0.92),
        ("exponential", 200, 0.92),
        ("lognormal", 10, 0.88),
        ("lognormal", 30, 0.90),
        ("lognormal", 200, 0.92),
    ],
)
def test_means_of_skewed_values_are_covered(law: str, n: int, least: float) -> None:
    rng = np.random.default_rng([n, len(law)])
    values = getattr(rng, law)(size=(n, 2000))
    truth = {"normal": 0.0, "exponential": 1.0, "lognormal": float(np.exp(0.5))}[law]
    low, high = mean_interval(values, 0)
    assert ((low <= truth) & (truth <= high)).mean() >= least


@pytest.mark.parametrize("k", [19, 99])
def test_exchangeable_items_pass_at_their_level(k: int) -> None:
    rng = np.random.default_rng(k)
    for values in (rng.normal(size=(4000, k + 1)), rng.gamma(0.5, size=(4000, k + 1)) - 3):
        p_values = np.array([rank_p_value(row[0], row[1:]) for row in values])
        assert p_values.min() == 1 / (k + 1)
        for alpha in (0.05, 0.2):
            assert (p_values <= alpha).mean() == pytest.approx(alpha, abs=0.02)


def test_prediction_p_value_is_uniform_for_normal_values() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(4000, 11))
    p_values = [prediction_p_value(row[0], row[1:]) for row in values]
    assert stats.kstest(p_values, "uniform").pvalue > 0.01
    assert np.isnan(prediction_p_value(1.0, np.zeros(10)))


@pytest.mark.parametrize("n", [10, 30])
def test_skewed_effects_of_sometimes_inactive_latents_are_covered(n):
    """Latents active in any fraction of the prompts, with skewed effects of either sign."""
    covered = counted = 0
    for seed in range(12):
        rng = np.random.default_rng([seed, n])
        rate, shift = rng.uniform(0, 0.8, 300), rng.normal(size=300)
        values = (shift + rng.exponential(size=(n, 300)) - 1) * (rng.random((n, 300)) < rate)
        matrix = sparse.csr_array(values)
        table = Attribution(matrix, None, matrix, np.zeros(n), []).table(["a"] * n)
        truth = (rate * shift)[table["latent"]]
        there = table["gradient_ci_low"].notna()
        inside = (table["gradient_ci_low"] <= truth) & (truth <= table["gradient_ci_high"])
        covered, counted = covered + inside[there].sum(), counted + there.sum()
    assert counted > 1200
    assert covered / counted >= 0.92
