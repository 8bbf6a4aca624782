"""Error rates of the paired permutation tests; the interval is that of a mean."""

import numpy as np
import pytest

from saexp.stats import mean_interval
from saexp.stats.significance import paired_difference, paired_head_test
from tests.simulated import heads


def test_the_interval_is_that_of_the_units_mean_difference() -> None:
    """Whose coverage is simulated in test_means.py."""
    rng = np.random.default_rng(0)
    units = np.arange(30).repeat(2)
    first, second = rng.normal(size=60), rng.exponential(1, 60)
    difference = paired_difference(first, second, units, n_permutations=2, seed=3)
    of_unit = (second - first).reshape(30, 2).mean(1)
    low, high = mean_interval(of_unit[:, None], 3)
    assert (difference.ci_low, difference.ci_high) == pytest.approx((low[0], high[0]), rel=1e-12)


def test_false_positives_of_the_mean() -> None:
    """200 null data sets of 12 units with skewed but symmetric-under-null differences."""
    hits = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        a, b = rng.exponential(1, (2, 12))
        difference = paired_difference(a, b, range(12), n_permutations=500, seed=seed)
        hits += difference.p_value <= 0.05
    assert 3 <= hits <= 27, "15 of 300 expected"


@pytest.mark.parametrize("common", [0.0, 0.9])
def test_familywise_error_of_heads(common: float) -> None:
    any_found = mean_found = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        original, edited = heads(rng, 15, 20, common)
        head_test = paired_head_test(original, edited, range(15), 400, seed)
        any_found += head_test.p_corrected.min() <= 0.05
        mean_found += head_test.overall.p_value <= 0.05
    assert 1 <= any_found <= 20, "10 of 200 expected"
    assert 1 <= mean_found <= 20, "10 of 200 expected, though the heads are not independent"


def test_familywise_error_beside_true_effects_and_power() -> None:
    wrong = right = 0
    for seed in range(150):
        original, edited = heads(np.random.default_rng(seed), 15, 20, 0.5)
        scale = (edited - original).std(0)
        edited[:, :5] += 2 * scale[:5]
        head_test = paired_head_test(original, edited, range(15), 400, seed)
        wrong += (head_test.p_corrected[5:] <= 0.05).any()
        right += (head_test.p_corrected[:5] <= 0.05).sum()
    assert wrong <= 16, "at most 7.5 of 150 expected"
    assert right > 0.9 * 5 * 150
