"""Adjusted p-values equal statsmodels', scipy's and plain loops', and bound their error rates."""

import gc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats
from statsmodels.stats.multitest import multipletests

from saexp.stats.significance import benjamini_hochberg, holm

P_VALUES = arrays.arrays(np.float64, st.integers(1, 40), elements=st.floats(0, 1))


@settings(max_examples=50)
@given(P_VALUES)
def test_benjamini_hochberg(p_values: np.ndarray) -> None:
    adjusted = benjamini_hochberg(p_values)
    np.testing.assert_allclose(adjusted, multipletests(p_values, method="fdr_bh")[1], atol=1e-15)
    np.testing.assert_allclose(adjusted, stats.false_discovery_control(p_values), atol=1e-15)


def test_benjamini_hochberg_of_nothing() -> None:
    assert benjamini_hochberg(np.empty(0)).shape == (0,)


@pytest.mark.parametrize("n", [1, 2, 9, 40])
def test_holm_equals_statsmodels(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # statsmodels collects all garbage in each call of this method: 0.1 s.
    monkeypatch.setattr(gc, "collect", lambda: 0)
    p_values = np.random.default_rng(n).random(n).round(1)
    expected = multipletests(p_values, method="holm")[1]
    np.testing.assert_allclose(holm(p_values), expected, atol=1e-15)


@settings(max_examples=50)
@given(P_VALUES)
def test_holm_equals_a_plain_loop(p_values: np.ndarray) -> None:
    adjusted = holm(p_values)
    largest = 0.0
    for i, at in enumerate(sorted(range(len(p_values)), key=lambda k: p_values[k])):
        largest = max(largest, min(1.0, (len(p_values) - i) * p_values[at]))
        assert adjusted[at] == pytest.approx(largest)


def test_holm_leaves_out_what_was_not_tested() -> None:
    adjusted = holm(np.array([np.nan, 0.03, 0.01, np.nan]))
    assert np.isnan(adjusted[[0, 3]]).all()
    assert adjusted[1:3].tolist() == [0.03, 0.02]
    assert np.isnan(holm(np.full(3, np.nan))).all()
    assert holm(np.empty(0)).shape == (0,)


def test_holm_bounds_the_familywise_error_beside_a_true_effect() -> None:
    """One strong effect among 6 dependent tests of null hypotheses, 2000 times."""
    rng = np.random.default_rng(0)
    shared, own = rng.normal(size=(2000, 1)), rng.normal(size=(2000, 7))
    z = np.sqrt(0.3) * shared + np.sqrt(0.7) * own
    z[:, 0] += 5
    p = 2 * stats.norm.sf(np.abs(z))
    adjusted = np.stack([holm(row) for row in p])
    wrong = (adjusted[:, 1:] <= 0.05).any(1).mean()
    assert 0.02 < wrong <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 2000)
    assert (p[:, 1:] <= 0.05).any(1).mean() > 0.2, "uncorrected, there would be many"
