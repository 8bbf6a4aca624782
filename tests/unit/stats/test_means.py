"""The studentised bootstrap of ratios and differences, against a plain loop and by its coverage."""

import numpy as np
import pytest

from saexp import stats
from saexp.stats import MIN_N, difference_of_means, mean_interval, ratio_interval

RNG = np.random.default_rng(4)
SIZES = RNG.integers(1, 7, 25).astype(float)
SUMS = SIZES * RNG.gamma(2.0, size=25)


def plain_loop(
    above: np.ndarray, below: np.ndarray, drawn: np.ndarray, cells: np.ndarray
) -> tuple[float, float]:
    """Bootstrap-t limits of sum(above) / sum(below), every resample laid out unit by unit."""

    def estimate(rows: np.ndarray) -> tuple[float, float]:
        ratio = above[rows].sum() / below[rows].sum()
        variance = 0.0
        for cell in np.unique(cells):
            cell_rows = rows[cells[rows] == cell]
            residuals = above[cell_rows] - ratio * below[cell_rows]
            variance += len(cell_rows) * residuals.var(ddof=1)
        return ratio, np.sqrt(variance) / below[rows].sum()

    ratio, error = estimate(np.arange(len(above)))
    t = []
    for counts in drawn:
        resampled, its_error = estimate(np.repeat(np.arange(len(above)), counts.astype(int)))
        t.append((resampled - ratio) / its_error)
    upper, lower = np.quantile(t, [0.025, 0.975])
    return ratio - lower * error, ratio - upper * error


@pytest.mark.parametrize("n_cells", [1, 3])
def test_a_ratio_equals_a_plain_loop(n_cells: int) -> None:
    cells = np.arange(25) % n_cells
    members = [np.flatnonzero(cells == c) for c in range(n_cells)]
    drawn = stats._resample_counts(members, 300, np.random.default_rng([7, 53, 25]))
    for part in members:
        assert (drawn[:, part].sum(1) == len(part)).all()
    expected = plain_loop(SUMS, SIZES, drawn, cells)
    interval = ratio_interval(SUMS[:, None], SIZES[:, None], 7, cells=cells, n_resamples=300)
    np.testing.assert_allclose([side[0] for side in interval], expected, rtol=1e-9)


def test_a_mean_is_the_ratio_to_the_number_of_units() -> None:
    interval = mean_interval(SUMS[:, None], 3)
    fives = ratio_interval(5 * SUMS[:, None], np.full((25, 1), 5.0), 3)
    np.testing.assert_allclose(interval, fives)
    per_column = ratio_interval(np.stack([SUMS, -SUMS], axis=1), np.ones((25, 2)), 3)
    np.testing.assert_allclose(per_column[0], [interval[0][0], -interval[1][0]])
    opposite = ratio_interval(-SUMS[:, None], -np.ones((25, 1)), 3)
    np.testing.assert_allclose(opposite, interval)


def test_chunks_of_columns_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values = RNG.gamma(1.0, size=(40, 7))
    expected = mean_interval(values, 0)
    monkeypatch.setattr(stats, "_CHUNK_VALUES", 1)
    np.testing.assert_allclose(mean_interval(values, 0), expected)


def test_what_has_no_interval() -> None:
    few = ratio_interval(SUMS[: MIN_N - 1, None], SIZES[: MIN_N - 1, None], 0)
    without = ratio_interval(SUMS[:, None], SIZES[:, None], 0, n_resamples=0)
    constant = ratio_interval(2 * SIZES[:, None], SIZES[:, None], 0)
    nothing = ratio_interval(SUMS[:, None], np.zeros((25, 1)), 0)
    # A sum near 0 has either sign in many resamples, so its ratio has no limits.
    near = RNG.normal(size=25)
    unsigned = ratio_interval(SUMS[:, None], (near - near.mean() + 1e-3)[:, None], 0)
    for interval in (few, without, constant, nothing, unsigned):
        assert np.isnan(interval).all()


@pytest.mark.parametrize("gap", [0.0, 7.3])
def test_a_difference_of_values_that_do_not_vary_has_no_interval(gap: float) -> None:
    """As the L0 of a TopK SAE is at every position; rounding alone is neither spread nor effect."""
    first, strata = np.arange(90) % 2 == 0, np.arange(90) // 30
    weights = {0: 0.3, 1: 0.1, 2: 0.6}
    values = np.full(90, 32.1) + gap * first
    difference, low, high = difference_of_means(values, first, strata, weights, 0)
    assert difference == (pytest.approx(gap) if gap else 0)
    assert np.isnan([low, high]).all()
    values[0] += 1
    assert np.isfinite(difference_of_means(values, first, strata, weights, 0)).all()


def test_a_difference_within_strata_by_hand() -> None:
    first = np.tile([True, True, False], 12)
    strata = np.array(["a"] * 12 + ["b"] * 18 + ["c"] * 6)
    values = RNG.normal(size=36)
    weights = {"a": 0.25, "b": 0.75}
    difference, low, high = difference_of_means(values, first, strata, weights, 0)
    expected = sum(
        weight * (values[(strata == s) & first].mean() - values[(strata == s) & ~first].mean())
        for s, weight in weights.items()
    )
    assert difference == pytest.approx(expected)
    assert low < difference < high
    few = np.isin(np.arange(36), np.flatnonzero(first)[:9]) | ~first
    short = difference_of_means(values[few], first[few], strata[few], weights, 0)
    assert np.isfinite(short[0]) and np.isnan(short[1:]).all()


def test_one_stratum_is_the_two_sample_bootstrap_t() -> None:
    first = np.arange(40) < 15
    values = RNG.gamma(2.0, size=40) + first
    _, low, high = difference_of_means(
        values, first, np.array(["a"] * 40), {"a": 1.0}, 5, n_resamples=20_000
    )
    rng = np.random.default_rng(1)
    a, b = values[first], values[~first]
    observed, error = a.mean() - b.mean(), np.sqrt(a.var(ddof=1) / 15 + b.var(ddof=1) / 25)
    x, y = rng.choice(a, (20_000, 15)), rng.choice(b, (20_000, 25))
    spread = np.sqrt(x.var(1, ddof=1) / 15 + y.var(1, ddof=1) / 25)
    upper, lower = np.quantile((x.mean(1) - y.mean(1) - observed) / spread, [0.025, 0.975])
    assert low == pytest.approx(observed - lower * error, abs=0.1 * error)
    assert high == pytest.approx(observed - upper * error, abs=0.1 * error)
