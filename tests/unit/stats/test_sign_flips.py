"""Sign-flip tests of many columns equal those of one, scipy's, and keep their error rate."""

import numpy as np
import pytest
from scipy import stats

from saexp.stats.significance import sign_flip_p_values


@pytest.mark.parametrize(("n", "tolerance"), [(7, 1e-12), (25, 0.02)])
def test_they_equal_scipys(n: int, tolerance: float) -> None:
    values = np.random.default_rng(4).normal(0.25, 1.0, size=(n, 3))
    p_values = sign_flip_p_values(values, seed=0)
    for column, p in zip(values.T, p_values, strict=True):
        wanted = stats.permutation_test(
            (column,),
            np.mean,
            permutation_type="samples",
            n_resamples=np.inf if n < 10 else 20_000,
            rng=1,
        ).pvalue
        assert p == pytest.approx(wanted, abs=tolerance)


def test_a_column_has_the_same_p_value_alone_and_beside_others() -> None:
    values = np.random.default_rng(2).normal(0.3, 1.0, size=(30, 4))
    alone = [sign_flip_p_values(values[:, [i]], seed=3)[0] for i in range(4)]
    np.testing.assert_array_equal(sign_flip_p_values(values, seed=3), alone)


def test_under_the_null_small_p_values_are_as_rare_as_they_should_be() -> None:
    values = np.random.default_rng(5).standard_t(4, size=(30, 2000))
    share = (sign_flip_p_values(values, seed=0, n_flips=2000) < 0.05).mean()
    assert abs(share - 0.05) < 4 * np.sqrt(0.05 * 0.95 / 2000)


def test_no_difference_at_all_has_p_1() -> None:
    assert sign_flip_p_values(np.zeros((12, 2)), seed=0).tolist() == [1.0, 1.0]
