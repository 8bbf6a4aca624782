"""Paired tests equal scipy's, and keep their error rates where heads are correlated."""

from dataclasses import asdict

import numpy as np
import pytest
from scipy import stats

from saexp.errors import DataError
from saexp.stats.significance import paired_difference, paired_head_test
from tests.simulated import heads


def pairs(n: int, shift: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    first = rng.normal(3, 1, n)
    return first, first + shift + rng.exponential(1, n) - 1


def scipy_p(first: np.ndarray, second: np.ndarray, n_resamples: float) -> float:
    def mean(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return (b - a).mean(axis=axis)

    result = stats.permutation_test(
        (first, second),
        mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=n_resamples,
        rng=np.random.default_rng(1),
    )
    return float(result.pvalue)


@pytest.mark.parametrize("n", [2, 5, 9, 13])
@pytest.mark.parametrize("shift", [0.0, 0.4, -1.0])
def test_all_flips_equal_scipys(n: int, shift: float) -> None:
    first, second = pairs(n, shift, n)
    difference = paired_difference(first, second, range(n))
    assert difference.p_value == pytest.approx(scipy_p(first, second, np.inf), abs=1e-12)
    assert difference.difference == pytest.approx((second - first).mean())
    assert (difference.n_units, difference.mean_first) == (n, pytest.approx(first.mean()))
    assert difference.mean_second == pytest.approx(second.mean())


def test_ties_count_as_large() -> None:
    """1, 1, -1 in some order: of 8 flips 6 have |sum| 1 and 2 have 3, so all are as large."""
    first, second = np.zeros(3), np.array([0.1, 0.1, -0.1])
    assert paired_difference(first, second, range(3)).p_value == 1
    assert paired_difference(first, np.abs(second), range(3)).p_value == 0.25


def test_random_flips_are_near_scipys() -> None:
    first, second = pairs(40, 0.35)
    difference = paired_difference(first, second, range(40), n_permutations=20_000)
    assert difference.p_value == pytest.approx(scipy_p(first, second, 20_000), abs=0.01)
    assert 0.005 < difference.p_value < 0.2


@pytest.mark.parametrize("n", [25, 60])
def test_the_interval_is_the_bootstrap_t_with_scipys_standard_errors(n: int) -> None:
    """Up to the Monte Carlo error of quantiles of 2000 resamples."""
    first, second = pairs(n, 0.5)
    difference = paired_difference(first, second, range(n))
    values = second - first
    drawn = values[np.random.default_rng(2).integers(n, size=(10_000, n))]
    t = (drawn.mean(1) - values.mean()) / stats.sem(drawn, axis=1)
    lower, upper = np.quantile(t, [0.025, 0.975])
    expected = (
        values.mean() - upper * stats.sem(values),
        values.mean() - lower * stats.sem(values),
    )
    assert (difference.ci_low, difference.ci_high) == pytest.approx(expected, abs=0.05)
    narrow = paired_difference(first, second, range(n), confidence=0.5)
    assert (
        difference.ci_low
        < narrow.ci_low
        < difference.difference
        < narrow.ci_high
        < difference.ci_high
    )
    few = paired_difference(first[:9], second[:9], range(9))
    assert np.isnan([few.ci_low, few.ci_high]).all()


def test_rows_of_a_unit_are_averaged_first() -> None:
    first, second = pairs(30, 0.3)
    units = np.repeat([f"entity {i}" for i in range(10)], 3)
    order = np.random.default_rng(3).permutation(30)
    difference = paired_difference(first[order], second[order], units[order])
    means = [v.reshape(10, 3).mean(1) for v in (first, second)]
    expected = paired_difference(*means, range(10))
    assert difference.n_units == 10
    assert difference.difference == pytest.approx(expected.difference)
    assert difference.p_value == pytest.approx(expected.p_value)
    # A unit with many rows counts no more than one with few.
    uneven = paired_difference(np.zeros(5), np.array([1.0, 1, 1, 1, 5]), [0, 0, 0, 0, 1])
    assert uneven.difference == 3


def test_one_unit_has_no_interval() -> None:
    difference = paired_difference(np.zeros(4), np.ones(4), ["a"] * 4)
    assert (difference.p_value, difference.difference) == (1, 1)
    assert np.isnan(difference.ci_low)
    assert np.isnan(difference.ci_high)


@pytest.mark.parametrize("n", [2, 9])
def test_few_units_have_no_interval(n: int) -> None:
    difference = paired_difference(*pairs(n, 1.0), range(n))
    assert np.isnan([difference.ci_low, difference.ci_high]).all()


def test_equal_seeds_give_equal_results() -> None:
    first, second = pairs(40, 0.2)
    a, b = (paired_difference(first, second, range(40), seed=5) for _ in range(2))
    assert a == b
    assert a != paired_difference(first, second, range(40), seed=6)


def test_heads_alone_equal_single_tests() -> None:
    rng = np.random.default_rng(0)
    original, edited = heads(rng, 9, 6, 0.3)
    edited[:, 2] += 3 * (edited - original)[:, 2].std()
    units = np.repeat(range(3), 3)
    for of, n in ((np.arange(9), 9), (units, 3)):
        head_test = paired_head_test(original, edited, of)
        single = [paired_difference(original[:, i], edited[:, i], of) for i in range(6)]
        np.testing.assert_allclose(head_test.p_value, [s.p_value for s in single])
        np.testing.assert_allclose(head_test.difference, [s.difference for s in single])
        assert (head_test.p_corrected >= head_test.p_value - 1e-12).all()
        mean = paired_difference(original.mean(1), edited.mean(1), of)
        assert asdict(head_test.overall) == pytest.approx(asdict(mean), nan_ok=True)
        assert mean.n_units == n


def test_step_down_by_hand() -> None:
    """Every flip and every set of heads, one by one."""
    rng = np.random.default_rng(7)
    differences = rng.normal(0.5, 1, (6, 4)) * np.array([1, 10, 0.1, 3])
    head_test = paired_head_test(np.zeros((6, 4)), differences, range(6))
    size = np.sqrt((differences**2).mean(0))
    signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1).T
    flipped = np.abs((signs[:, :, None] * differences).mean(1)) / size
    observed = np.abs(differences.mean(0)) / size
    expected, before, left = np.zeros(4), 0.0, [0, 1, 2, 3]
    while left:
        head = max(left, key=lambda i: observed[i])
        p = float((flipped[:, left].max(1) >= observed[head] - 1e-9).mean())
        expected[head] = before = max(before, p)
        left.remove(head)
    np.testing.assert_allclose(head_test.p_corrected, expected)


def test_one_head_needs_no_correction() -> None:
    first, second = pairs(30, 0.3)
    head_test = paired_head_test(first[:, None], second[:, None], range(30), 999)
    assert head_test.p_corrected[0] == head_test.p_value[0]
    assert head_test.p_value[0] == pytest.approx(head_test.overall.p_value, abs=1e-12)


def test_heads_that_do_not_change_at_all() -> None:
    first, second = pairs(10, 2.0)
    original = np.stack([first, first], axis=1)
    head_test = paired_head_test(original, np.stack([first, second], axis=1), range(10))
    assert head_test.p_value[0] == head_test.p_corrected[0] == 1
    assert head_test.p_corrected[1] < 0.01


class TestErrors:
    def test_lengths(self) -> None:
        with pytest.raises(DataError, match="^3 values for 2 units"):
            paired_difference(np.zeros(3), np.zeros(3), [0, 1])
        with pytest.raises(DataError, match="of paired values differ$"):
            paired_head_test(np.zeros((3, 2)), np.zeros((3, 1)), [0, 1, 2])

    def test_nothing(self) -> None:
        with pytest.raises(DataError, match="^there are no pairs to compare"):
            paired_difference(np.zeros(0), np.zeros(0), [])

    def test_values_that_are_not_finite_are_refused(self) -> None:
        with pytest.raises(DataError, match="^row 1 has a value that is not finite"):
            paired_difference(np.zeros(2), np.array([0, np.nan]), [0, 1])
