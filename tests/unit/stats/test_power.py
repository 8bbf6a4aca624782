"""Detectable effects: what they are is what simulated tests detect in about 80 % of runs."""

import numpy as np
import pytest
from scipy import sparse, stats

from saexp.stats.separation import stratified_rank_test
from saexp.stats.significance import detectable_auroc, detectable_change


def test_noether_of_large_groups() -> None:
    """Noether (1987): N = (z_a + z_b)^2 / (12 c (1 - c) (A - 1/2)^2), for small effects."""
    quantiles = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
    for n_first, n_second in ((5000, 5000), (2000, 8000)):
        n, c = n_first + n_second, n_first / (n_first + n_second)
        expected = 0.5 + quantiles / np.sqrt(12 * c * (1 - c) * n)
        detectable = detectable_auroc([(n_first, n_second)], 0.05)
        assert detectable == pytest.approx(expected, abs=0.001)


def test_equal_strata_detect_nearly_what_one_sample_of_their_size_does() -> None:
    one, four = (detectable_auroc(s, 0.01) for s in ([(400, 400)], [(100, 100)] * 4))
    assert one is not None
    assert four is not None
    assert four == pytest.approx(one, abs=0.003)


@pytest.mark.parametrize(("n", "alpha"), [(3, 0.05), (10, 1e-6), (2, 0.05)])
def test_no_auroc_is_detectable_where_the_rarest_arrangement_would_not_pass(
    n: int, alpha: float
) -> None:
    assert detectable_auroc([(n, n)], alpha) is None
    first = np.arange(2 * n) < n
    perfect = sparse.csr_array((1.0 + np.arange(2 * n)[::-1])[:, None])
    p_value = stratified_rank_test(perfect, first, np.zeros(2 * n)).p_value[0]
    assert p_value > alpha


def test_outcomes_that_agree_more_make_a_change_easier_to_detect() -> None:
    """Independent outcomes, which the number assumes, are the conservative case."""
    change = detectable_change(50, 0.3, 0.05)
    assert change is not None
    rng = np.random.default_rng(0)
    level = rng.random((4000, 50))
    up = ((level < 0.3 + change) & (level >= 0.3)).sum(1)
    p_values = 2 * stats.binom.sf(up - 1, up, 0.5)
    assert (p_values <= 0.05).mean() > 0.95


def test_no_change_of_a_few_units_is_detectable() -> None:
    """Five changes in one direction have p = 0.0625."""
    assert detectable_change(5, 0.0, 0.05) is None
    assert detectable_change(5, 0.0, 0.07) is not None
