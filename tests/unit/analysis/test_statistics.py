"""Tests on sparse columns equal scipy's, scikit-learn's and statsmodels' on dense ones."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import sparse, stats
from sklearn.metrics import roc_auc_score

from saexp.stats.separation import Ranked, stratified_rank_test, stratum_weights
from saexp.stats.significance import FEW, fisher_exact


def random_columns(rng: np.random.Generator, n_rows: int, n_latents: int) -> np.ndarray:
    """Activations of very different rates, ties, and an empty, a constant and a dense column."""
    rates = rng.random(n_latents) ** 3
    dense = rng.gamma(2, 1, (n_rows, n_latents)) * (rng.random((n_rows, n_latents)) < rates)
    dense[:, : n_latents // 2] = np.round(dense[:, : n_latents // 2])
    dense[:, 0], dense[:, 1] = 0, 2.5
    dense[:, 2] = rng.gamma(2, 1, n_rows)
    return dense


def groups(rng: np.random.Generator, n_first: int, n_second: int) -> np.ndarray:
    return rng.permutation(np.arange(n_first + n_second) < n_first)


def scipy_p(dense: np.ndarray, first: np.ndarray) -> np.ndarray:
    pairs = ((column[first], column[~first]) for column in dense.T)
    return np.array([stats.mannwhitneyu(a, b, method="asymptotic").pvalue for a, b in pairs])


@pytest.mark.parametrize(("n_first", "n_second"), [(30, 30), (7, 90), (50, 2), (200, 180)])
def test_mann_whitney(n_first: int, n_second: int) -> None:
    rng = np.random.default_rng([n_first, n_second])
    dense, first = random_columns(rng, n_first + n_second, 40), groups(rng, n_first, n_second)
    ranked = Ranked(sparse.csr_array(dense), first)
    rank_test = ranked.mann_whitney()
    np.testing.assert_allclose(rank_test.p_normal, scipy_p(dense, first), rtol=1e-9)
    aurocs = [roc_auc_score(first, column) for column in dense.T]
    np.testing.assert_allclose(rank_test.auroc, aurocs, rtol=1e-12)
    np.testing.assert_array_equal(rank_test.auroc, ranked.observed())
    assert (rank_test.p_value >= rank_test.p_normal).all()
    assert (rank_test.p_value <= 1).all()
    assert rank_test.p_value[0] == rank_test.p_value[1] == 1


SMALL = arrays.arrays(
    np.float64,
    st.tuples(st.integers(4, 12), st.integers(1, 4)),
    elements=st.sampled_from([0.0, 0.0, 0.0, 1.0, 2.0, 2.5, 1e-3]),
)


@settings(max_examples=30, deadline=None)
@given(SMALL, st.integers(0, 2**31))
def test_mann_whitney_on_any_ties(dense: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    first = rng.random(len(dense)) < 0.5
    first[0], first[1] = True, False
    rank_test = Ranked(sparse.csr_array(dense), first).mann_whitney()
    np.testing.assert_allclose(rank_test.p_normal, scipy_p(dense, first), rtol=1e-9)
    aurocs = [roc_auc_score(first, column) for column in dense.T]
    np.testing.assert_allclose(rank_test.auroc, aurocs, rtol=1e-12)


def test_explicit_zeros_and_unsorted_entries_are_no_matter() -> None:
    dense = np.array([[0.0, 2.0], [3.0, 0.0], [1.0, 2.0]])
    first = np.array([True, False, True])
    messy = sparse.csr_array(
        (np.array([2.0, 0.0, 3.0, 2.0, 1.0]), np.array([1, 0, 0, 1, 0]), np.array([0, 2, 3, 5])),
        shape=(3, 2),
    )
    np.testing.assert_array_equal(messy.toarray(), dense)
    one, other = (Ranked(v, first).mann_whitney() for v in (sparse.csr_array(dense), messy))
    np.testing.assert_array_equal(one.auroc, other.auroc)
    np.testing.assert_array_equal(one.p_value, other.p_value)


def test_negative_activations_are_refused() -> None:
    with pytest.raises(ValueError, match="latent activations must not be negative"):
        Ranked(sparse.csr_array(np.array([[-1.0], [1.0]])), np.array([True, False]))


@pytest.mark.parametrize(("n_first", "n_second"), [(4, 8), (3, 9), (6, 6), (1, 11), (9, 3)])
def test_p_values_of_rare_latents_are_exact_or_larger(n_first: int, n_second: int) -> None:
    """Over all assignments of groups: P(p <= alpha) <= alpha, ties or not."""
    n = n_first + n_second
    chosen = [list(c) for c in itertools.combinations(range(n), n_first)]
    orders = np.array([c + [i for i in range(n) if i not in c] for c in chosen])
    first = np.arange(n) < n_first
    for n_active in range(1, n // 2):
        for tied in (False, True):
            values = np.zeros(n)
            values[:n_active] = 1 if tied else np.arange(1, n_active + 1)
            rank_test = Ranked(sparse.csr_array(values[orders].T), first).mann_whitney()
            for alpha in (0.2, 0.1, 0.05, 0.01):
                assert (rank_test.p_value <= alpha).mean() <= alpha + 1e-12


def test_a_rare_latent_in_a_small_group() -> None:
    """3 active of 100, all three among the 10 of the first group: 120 of 161700 ways, doubled."""
    values = np.zeros((100, 1))
    values[[0, 1, 2], 0] = [1, 2, 3]
    rank_test = Ranked(sparse.csr_array(values), np.arange(100) < 10).mann_whitney()
    assert rank_test.p_normal[0] < 1e-6
    exact = stats.fisher_exact([[3, 7], [0, 90]], alternative="greater").pvalue
    assert exact == pytest.approx(120 / 161700)
    assert rank_test.p_value[0] >= 2 * exact - 1e-12
    assert rank_test.p_value[0] < 4 * exact


@pytest.mark.parametrize("k", [8, 12, 15, 20])
def test_skewness_brings_the_tail_near_the_exact_one(k: int) -> None:
    """k of 50 active rows in the first 100 of 1000; hypergeometric, where the normal is far off."""
    values = np.zeros((1000, 1))
    values[:k], values[100 : 150 - k] = 1, 1
    rank_test = Ranked(sparse.csr_array(values), np.arange(1000) < 100).mann_whitney()
    exact = 2 * stats.hypergeom(1000, 50, 100).sf(k - 1)
    assert rank_test.p_normal[0] < 0.75 * exact
    assert 0.4 * exact < rank_test.p_value[0] < 4 * exact


def test_rare_latents_against_the_hypergeometric_law() -> None:
    rng = np.random.default_rng(5)
    for _ in range(40):
        n = int(rng.integers(12, 400))
        n_first = int(rng.integers(1, n))
        active = rng.integers(0, FEW, 30).astype(float)
        on_first = np.array([rng.hypergeometric(a, n - a, n_first) for a in active.astype(int)])
        law = stats.hypergeom(n, active.astype(int), n_first)
        want = np.minimum(1, 2 * np.minimum(law.cdf(on_first), law.sf(on_first - 1)))
        np.testing.assert_allclose(fisher_exact([(on_first, active, n_first, n)]), want, rtol=1e-9)


def van_elteren(dense: np.ndarray, first: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """z without continuity correction, from ranks: the sum of rank sums over n + 1."""
    total, variance = np.zeros(dense.shape[1]), np.zeros(dense.shape[1])
    for name in np.unique(strata):
        in_stratum = strata == name
        ranks, of_first = stats.rankdata(dense[in_stratum], axis=0), first[in_stratum]
        n, n_first = len(of_first), of_first.sum()
        total += (ranks[of_first].sum(0) - n_first * (n + 1) / 2) / (n + 1)
        share = n_first * (n - n_first) / (n * (n + 1) ** 2)
        variance += share * ranks.var(axis=0, ddof=1)
    return total / np.sqrt(np.where(variance > 0, variance, np.inf))


def test_the_stratified_test_is_van_elterens() -> None:
    """Large strata, where the continuity correction does not matter."""
    rng = np.random.default_rng(4)
    dense = random_columns(rng, 2400, 30)[:, 2:]
    strata = rng.choice(["a", "b", "c"], 2400, p=[0.2, 0.3, 0.5])
    first = rng.random(2400) < np.where(strata == "a", 0.2, 0.6)
    dense *= 1 + (strata == "a")[:, None]
    rank_test = stratified_rank_test(sparse.csr_array(dense), first, strata)
    expected = 2 * stats.norm.sf(np.abs(van_elteren(dense, first, strata)))
    common = (dense > 0).sum(0) > 100
    assert common.sum() > 10
    np.testing.assert_allclose(
        stats.norm.isf(rank_test.p_normal[common] / 2),
        stats.norm.isf(expected[common] / 2),
        atol=0.01,
    )
    weights = stratum_weights(first, strata)
    auroc = sum(
        w * Ranked(sparse.csr_array(dense[strata == s]), first[strata == s]).observed()
        for s, w in weights.items()
    )
    np.testing.assert_allclose(rank_test.auroc, auroc, rtol=1e-12)


def test_one_stratum_is_mann_whitney_and_strata_of_one_group_have_no_say() -> None:
    rng = np.random.default_rng(6)
    dense, first = random_columns(rng, 90, 30), groups(rng, 40, 50)
    values = sparse.csr_array(dense)
    plain = Ranked(values, first).mann_whitney()
    extra = sparse.csr_array(np.concatenate([dense, 9 * np.ones((5, 30))]))
    strata = np.array(["x"] * 90 + ["y"] * 5)
    for rank_test in (
        stratified_rank_test(values, first, np.zeros(90)),
        stratified_rank_test(extra, np.append(first, np.ones(5, dtype=bool)), strata),
    ):
        np.testing.assert_array_equal(rank_test.auroc, plain.auroc)
        np.testing.assert_array_equal(rank_test.p_value, plain.p_value)
    with pytest.raises(ValueError, match="no stratum"):
        stratified_rank_test(values, first, first.astype(int))


@pytest.mark.parametrize("sizes", [((3, 4), (4, 3)), ((2, 5), (5, 2)), ((2, 3), (3, 5))])
def test_stratified_p_values_of_rare_latents_are_exact_or_larger(
    sizes: tuple[tuple[int, int], ...],
) -> None:
    """Over all assignments of groups within strata: P(p <= alpha) <= alpha, ties or not."""
    rng = np.random.default_rng(8)
    (a, b), (c, d) = sizes
    strata = np.repeat([0, 1], [a + b, c + d])
    chosen = [
        (one, other)
        for one in itertools.combinations(range(a + b), a)
        for other in itertools.combinations(range(a + b, a + b + c + d), c)
    ]
    n = a + b + c + d
    # One assignment of groups, and every arrangement of the rows under it.
    first = np.zeros(n, dtype=bool)
    first[:a], first[a + b : a + b + c] = True, True
    orders = np.array(
        [
            [*one, *(i for i in range(a + b) if i not in one), *other]
            + [i for i in range(a + b, n) if i not in other]
            for one, other in chosen
        ]
    )
    for n_active in range(2, n // 2):
        for tied in (False, True):
            values = np.zeros(n)
            at = rng.permutation(n)[:n_active]
            values[at] = 1 if tied else np.arange(1, n_active + 1)
            rank_test = stratified_rank_test(sparse.csr_array(values[orders].T), first, strata)
            for alpha in (0.2, 0.1, 0.05, 0.01):
                assert (rank_test.p_value <= alpha).mean() <= alpha + 1e-12


def test_a_difference_between_strata_alone_is_not_a_finding() -> None:
    """Types 80/20 against 20/80, values that depend on the type alone: 5 % of tests at 0.05."""
    rng = np.random.default_rng(9)
    strata = np.repeat([0, 1, 0, 1], [80, 20, 20, 80])
    first = np.arange(200) < 100
    on = rng.random((200, 1500)) < np.where(strata == 0, 0.6, 0.1)[:, None]
    values = sparse.csr_array(on * rng.gamma(2, 1, on.shape))
    assert (Ranked(values, first).mann_whitney().p_value <= 0.05).mean() > 0.9
    rank_test = stratified_rank_test(values, first, strata)
    assert 0.02 < (rank_test.p_value <= 0.05).mean() < 0.06
    assert abs(rank_test.auroc.mean() - 0.5) < 0.005


def test_nothing_changes_between_equal_groups_of_common_latents() -> None:
    rng = np.random.default_rng(1)
    dense = random_columns(rng, 120, 60)
    dense = dense[:, (dense > 0).sum(0) >= FEW]
    rank_test = Ranked(sparse.csr_array(dense), groups(rng, 60, 60)).mann_whitney()
    assert dense.shape[1] > 20
    np.testing.assert_allclose(rank_test.p_value, rank_test.p_normal, rtol=1e-12)


@pytest.mark.parametrize(("n_first", "n_second"), [(30, 45), (8, 2), (1, 5)])
def test_delongs_variance(n_first: int, n_second: int) -> None:
    """From the matrix of comparisons, row by row and column by column."""
    rng = np.random.default_rng([n_first, n_second])
    dense = random_columns(rng, n_first + n_second, 20)
    first = groups(rng, n_first, n_second)
    variances = Ranked(sparse.csr_array(dense), first).delong()
    for latent, column in enumerate(dense.T):
        a, b = column[first][:, None], column[~first]
        wins = (a > b) + (a == b) / 2
        expected = sum(
            np.var(wins.mean(axis), ddof=min(1, n - 1)) / n
            for axis, n in ((1, n_first), (0, n_second))
        )
        assert variances[latent] == pytest.approx(expected, abs=1e-12)


def test_variance_of_a_stratified_auroc_is_that_of_its_repetitions() -> None:
    """DeLong's, on average over 2000 samples, against the variance of the 2000 estimates."""
    rng = np.random.default_rng(5)
    strata = np.repeat(["a", "b"], [40, 25])
    first = np.concatenate([np.arange(40) < 12, np.arange(25) < 15])
    values = np.exp(
        rng.normal(np.where(first, 0.8, 0)[:, None], np.where(first, 2, 1)[:, None], (65, 2000))
    )
    rank_test = stratified_rank_test(sparse.csr_array(values), first, strata)
    assert rank_test.variance.mean() == pytest.approx(rank_test.auroc.var(), rel=0.08)


@pytest.mark.parametrize("weights", ["first", "both"])
def test_weights_are_copies_of_rows(weights: str) -> None:
    """AUROC under weights is that of the data set with rows repeated as often."""
    rng = np.random.default_rng(2)
    dense = np.round(rng.gamma(2, 1, (30, 6))) * (rng.random((30, 6)) < 0.5)
    first = np.arange(30) < 12
    repeats = rng.integers(0, 4, 30)
    if weights == "first":
        repeats[~first] = 1
    repeats[[0, 29]] = 1
    ranked = Ranked(sparse.csr_array(dense), first)
    w = repeats.astype(float)[:, None]
    aurocs = ranked.auroc(w * first[:, None], w * ~first[:, None])[:, 0]
    rows = np.repeat(np.arange(30), repeats)
    expected = [roc_auc_score(first[rows], column[rows]) for column in dense.T]
    np.testing.assert_allclose(aurocs, expected, rtol=1e-12)
