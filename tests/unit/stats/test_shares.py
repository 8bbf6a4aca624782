"""Shares of variance equal least squares', a loop's over a grid, and an analysis of variance."""

import itertools

import numpy as np
import pytest
from scipy import stats

from saexp.stats.significance import main_effect_shares


def r_squared(columns: list[np.ndarray], values: np.ndarray) -> float:
    """Of least squares on an indicator per level of each factor."""
    indicators = [(c[:, None] == np.unique(c)).astype(float) for c in columns]
    design = np.hstack(indicators)
    residual = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    return 1 - float(residual @ residual) / float(((values - values.mean()) ** 2).sum())


@pytest.mark.parametrize("seed", range(5))
def test_shares_of_a_grid_equal_least_squares(seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid = np.array(list(itertools.product(range(4), range(3), range(2))))
    values = rng.normal(size=len(grid)) + 2 * grid[:, 0] - grid[:, 1] ** 2
    factors = list(grid.T)
    shares = main_effect_shares(factors, values)
    assert shares == pytest.approx([r_squared([f], values) for f in factors])
    # On a complete grid main effects are orthogonal, so that their shares add up.
    assert sum(shares) == pytest.approx(r_squared(factors, values))
    cube = values.reshape(4, 3, 2)
    means = [cube.mean(axis=axes) for axes in ((1, 2), (0, 2), (0, 1))]
    assert shares == pytest.approx([m.var() / cube.var() for m in means])


@pytest.mark.parametrize("seed", range(5))
def test_the_share_of_unequal_groups_is_that_of_the_f_test(seed: int) -> None:
    rng = np.random.default_rng(seed)
    factor = np.array(["a"] * 3 + ["b"] * 7 + ["c"] * 5)
    values = rng.normal(size=15) + (factor == "b")
    f = stats.f_oneway(*(values[factor == level] for level in "abc")).statistic
    (share,) = main_effect_shares([factor], values)
    assert share == pytest.approx(f * 2 / (f * 2 + 12))


def test_a_pure_interaction_has_no_main_effect_and_a_constant_no_share() -> None:
    a, b = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    assert main_effect_shares([a, b], np.array([1.0, 0.0, 0.0, 1.0])) == [0, 0]
    assert np.isnan(main_effect_shares([a, b], np.full(4, 0.1 + 0.2))).all()
