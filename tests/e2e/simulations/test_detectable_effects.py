"""Detectable effects are those that simulated tests detect in about 80 % of runs."""

import numpy as np
import pytest
from scipy import sparse, stats

from saexp.stats.separation import stratified_rank_test
from saexp.stats.significance import detectable_auroc, detectable_change

RUNS = 400


SIZES = [[(15, 15)], [(30, 60)], [(100, 100)], [(30, 30), (40, 20), (10, 25)]]


def rejected(sizes: list[tuple[int, int]], alpha: float, auroc: float, law: str) -> float:
    """Fraction of runs in which the contrast's test finds the difference, in its direction."""
    rng = np.random.default_rng(1)
    first = np.concatenate([np.arange(a + b) < a for a, b in sizes])
    strata = np.repeat(range(len(sizes)), [a + b for a, b in sizes])
    if law == "normal":
        shift = np.sqrt(2) * stats.norm.ppf(auroc)
        values = np.exp(rng.standard_normal((len(first), RUNS)) + shift * first[:, None])
    else:
        scale = np.where(first, auroc / (1 - auroc), 1)
        values = rng.exponential(1, (len(first), RUNS)) * scale[:, None]
    test = stratified_rank_test(sparse.csr_array(values), first, strata)
    return float(((test.p_value <= alpha) & (test.auroc > 0.5)).mean())


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("alpha", [0.05, 0.05 / 500])
def test_the_detectable_auroc_is_detected_in_about_80_percent(
    sizes: list[tuple[int, int]], alpha: float
) -> None:
    auroc = detectable_auroc(sizes, alpha)
    assert auroc is not None
    assert 0.75 <= rejected(sizes, alpha, auroc, "exponential") <= 0.86
    assert 0.75 <= rejected(sizes, alpha, auroc, "normal") <= 0.88
    smaller = 0.5 + 0.7 * (auroc - 0.5)
    assert rejected(sizes, alpha, smaller, "normal") < 0.6


@pytest.mark.parametrize("n", [10, 30, 400])
@pytest.mark.parametrize("baseline", [0.0, 0.05, 0.3, 0.9, 1.0])
def test_the_detectable_change_is_detected_in_80_percent(n: int, baseline: float) -> None:
    """Against scipy's binomial test of the pairs that changed, outcomes independent."""
    change = detectable_change(n, baseline, 0.05)
    assert change is not None
    assert (change > 0) == (baseline <= 0.5)
    rng = np.random.default_rng(n)
    before = rng.random((4000, n)) < baseline
    after = rng.random((4000, n)) < baseline + change
    up, down = (after & ~before).sum(1), (before & ~after).sum(1)
    more, fewer = (up, down) if change > 0 else (down, up)
    table = {
        (a, a + b): stats.binomtest(int(a), int(a + b)).pvalue <= 0.05
        for a, b in {*zip(more.tolist(), fewer.tolist(), strict=True)}
        if a > b
    }
    detected = [table.get((a, a + b), False) for a, b in zip(more, fewer, strict=True)]
    # Four standard errors of 4000 runs.
    assert np.mean(detected) == pytest.approx(0.8, abs=0.026)
