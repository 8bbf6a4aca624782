"""Wilson's interval against statsmodels, and its coverage."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from saexp.stats import wilson


@given(
    st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
    st.sampled_from([0.5, 0.9, 0.95, 0.99]),
)
def test_equals_statsmodels(counts: tuple[int, int], confidence: float) -> None:
    k, n = counts
    low, high = wilson(k, n, confidence)
    expected = proportion_confint(k, n, alpha=1 - confidence, method="wilson")
    assert (low, high) == pytest.approx(expected, abs=1e-9)
    assert 0 <= low <= k / n <= high <= 1


def test_of_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5])
def test_coverage(share: float) -> None:
    """Exact, over all outcomes of 100 trials: close to 95 %."""
    ks = np.arange(101)
    bounds = np.array([wilson(int(k), 100) for k in ks])
    covered = (bounds[:, 0] <= share) & (share <= bounds[:, 1])
    assert stats.binom.pmf(ks, 100, share)[covered].sum() == pytest.approx(0.95, abs=0.025)


@pytest.mark.parametrize("n", [10, 30, 200])
@pytest.mark.parametrize("rate", [0.5, 0.8, 0.97, 0.99])
def test_coverage_near_the_ends(n: int, rate: float) -> None:
    """Exact; at n = 10 and 0.99 two outcomes make up all but 0.4 %, and it covers 90.4 %."""
    ks = np.arange(n + 1)
    low, high = wilson(ks, n)
    covered = stats.binom.pmf(ks, n, rate)[(low <= rate) & (rate <= high)].sum()
    assert covered >= (0.90 if (n, rate) == (10, 0.99) else 0.92)
