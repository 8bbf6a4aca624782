"""AUROCs of two scores on the same observations: identities and other libraries' numbers."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from saexp.stats import Interval, auroc_interval
from saexp.stats.separation import (
    Auroc,
    auroc_correlation,
    auroc_difference,
    auroc_of,
    difference_of_aurocs,
    stratum_weights,
)
from saexp.stats.significance import difference_p_value

FIRST = np.arange(30) < 12
ONE = np.zeros(30, dtype=int)


def two_scores(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Correlated, rounded so that there are ties, of either sign."""
    rng = np.random.default_rng(seed)
    common = rng.normal(0, 1, 30)
    return (
        np.round(common + 0.7 * FIRST, 1),
        np.round(0.7 * common + 0.7 * rng.normal(0, 1, 30) + 0.4 * FIRST, 1),
    )


def test_auroc_is_that_of_sklearn() -> None:
    own, _ = two_scores()
    assert auroc_of(own, FIRST, ONE).value == pytest.approx(roc_auc_score(FIRST, own), abs=1e-12)


def test_auroc_of_strata_is_their_weighted_mean() -> None:
    own, _ = two_scores()
    strata = np.arange(30) % 3
    expected = sum(
        w * roc_auc_score(FIRST[strata == s], own[strata == s])
        for s, w in stratum_weights(FIRST, strata).items()
    )
    assert auroc_of(own, FIRST, strata).value == pytest.approx(expected, abs=1e-12)


def test_correlation_is_that_of_the_kernel_of_all_pairs() -> None:
    """DeLong's covariance from the matrix of wins, in plain loops."""
    own, other = two_scores()
    wins = [
        np.array([[(a > b) + (a == b) / 2 for b in s[~FIRST]] for a in s[FIRST]])
        for s in (own, other)
    ]
    covariance = np.cov([w.mean(1) for w in wins]) / FIRST.sum()
    covariance += np.cov([w.mean(0) for w in wins]) / (~FIRST).sum()
    expected = covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])
    assert auroc_correlation(own, other, FIRST, ONE) == pytest.approx(expected, abs=1e-12)
    assert 0.3 < expected < 0.95


def test_a_score_correlates_with_itself_fully_and_with_its_negative_inversely() -> None:
    own, _ = two_scores()
    strata = np.arange(30) % 2
    assert auroc_correlation(own, own, FIRST, strata) == pytest.approx(1)
    assert auroc_correlation(own, 3 * own - 1, FIRST, strata) == pytest.approx(1)
    assert auroc_correlation(own, -own, FIRST, strata) == pytest.approx(-1)


def test_no_correlation_where_one_separates_perfectly() -> None:
    own, _ = two_scores()
    assert auroc_correlation(own, FIRST.astype(float), FIRST, ONE) == 0.0


def auroc(value: float) -> Auroc:
    return Auroc(value, auroc_interval(value, 12, 18))


def test_the_same_auroc_with_full_correlation_does_not_differ() -> None:
    symmetric = Auroc(0.8, Interval(np.array(0.6), np.array(1.0)))
    assert difference_of_aurocs(symmetric, symmetric, 1.0) == pytest.approx((0.0, 0.0))


def test_limits_mirror_when_the_scores_are_exchanged() -> None:
    low, high = difference_of_aurocs(auroc(0.9), auroc(0.7), 0.4)
    assert low < 0.2 < high
    assert difference_of_aurocs(auroc(0.7), auroc(0.9), 0.4) == pytest.approx((-high, -low))


def test_less_correlation_is_more_uncertainty() -> None:
    pairs = [difference_of_aurocs(auroc(0.9), auroc(0.7), r) for r in (0.9, 0.5, 0.0, -0.5)]
    widths = [high - low for low, high in pairs]
    assert widths == sorted(widths)


def test_two_perfect_scores_keep_an_interval_of_positive_width() -> None:
    low, high = difference_of_aurocs(auroc(1.0), auroc(1.0), 0.0)
    assert low < -0.1
    assert high > 0.1


def test_small_groups_have_no_interval() -> None:
    own, other = (s[6:] for s in two_scores())
    difference = auroc_difference(own, other, FIRST[6:], ONE[6:])
    assert np.isfinite(difference.value)
    assert np.isnan(difference.interval).all()


def test_a_negative_or_shifted_score_changes_nothing_but_its_sign() -> None:
    own, other = two_scores()
    strata = np.arange(30) % 2
    difference = auroc_difference(own, other, FIRST, strata)
    assert difference.interval.low < difference.value < difference.interval.high
    shifted = auroc_difference(3 * own - 7, other, FIRST, strata)
    assert shifted.value == pytest.approx(difference.value)
    assert shifted.interval == pytest.approx(difference.interval)
    mirrored = auroc_difference(-own, -other, FIRST, strata)
    assert mirrored.value == pytest.approx(-difference.value)
    assert mirrored.interval == pytest.approx((-difference.interval.high, -difference.interval.low))


def test_the_paired_test_agrees_with_the_interval_and_with_delong() -> None:
    rng = np.random.default_rng(5)
    n = 4000
    first = np.arange(n) < n // 2
    for shift in (0.02, 0.05, 0.1):
        common = rng.normal(0, 1, n)
        own = common + 0.5 * rng.normal(0, 1, n) + (0.5 + shift) * first
        other = common + 0.5 * rng.normal(0, 1, n) + 0.5 * first
        strata = np.zeros(n, dtype=int)
        difference = auroc_difference(own, other, first, strata)
        p_value = difference_p_value(difference.value, difference.interval)
        low, high = difference.interval
        assert (p_value < 0.05) == (low > 0 or high < 0)
        # DeLong's test, from the placements of both scores.
        ranks = [stats.rankdata(s) for s in (own, other)]
        of_first = [
            (r[first] - stats.rankdata(s[first])) / (~first).sum()
            for r, s in zip(ranks, (own, other), strict=True)
        ]
        of_second = [
            1 - (r[~first] - stats.rankdata(s[~first])) / first.sum()
            for r, s in zip(ranks, (own, other), strict=True)
        ]
        variance = sum(np.var(a - b, ddof=1) / len(a) for a, b in (of_first, of_second))
        expected = 2 * stats.norm.sf(abs(difference.value) / np.sqrt(variance))
        assert p_value == pytest.approx(expected, rel=0.15, abs=1e-6)
    assert difference_p_value(0.0, Interval(np.array(-0.1), np.array(0.1))) == 1
    assert np.isnan(difference_p_value(0.2, Interval(np.array(np.nan), np.array(np.nan))))
