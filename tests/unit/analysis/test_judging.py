"""Numbers of probes by loops over pairs of rows, and the coverage of their intervals."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from saexp.analysis.classifiers import Labelled
from saexp.analysis.probe import Judge
from saexp.stats.separation import placements
from tests.simulated import labels


def test_weighted_aurocs_by_a_loop_over_pairs() -> None:
    rng = np.random.default_rng(0)
    first, kinds = rng.random(80) < 0.4, rng.integers(0, 3, 80)
    units = np.where(first, "a", "b").astype(object) + rng.integers(0, 12, 80).astype(str)
    scores = np.round(rng.normal(size=80) + first, 1)
    rows = Labelled(first, units, kinds)
    w = np.array(
        [1 / ((units == u) & (first == f)).sum() for u, f in zip(units, first, strict=True)]
    )
    np.testing.assert_allclose(rows.weights(), w)
    measured = Judge(rows).measure(scores, 0.3)
    for name, of_kind in (("auroc", np.zeros(80)), ("auroc_within", kinds)):
        won = pairs = 0.0
        for a in np.flatnonzero(first):
            for b in np.flatnonzero(~first & (of_kind == of_kind[a])):
                won += w[a] * w[b] * ((scores[a] > scores[b]) + (scores[a] == scores[b]) / 2)
                pairs += w[a] * w[b]
        assert measured[name] == pytest.approx(won / pairs)
    called = scores > 0.3
    assert measured["accuracy"] == pytest.approx(np.average(called == first, weights=w))
    rates = [np.average(called[m] == first[m], weights=w[m]) for m in (first, ~first)]
    assert measured["balanced_accuracy"] == pytest.approx(np.mean(rates))
    true, wrong = w[called & first].sum(), w[called != first].sum()
    assert measured["f1"] == pytest.approx(2 * true / (2 * true + wrong))
    share = placements(scores, first, w)
    expected = roc_auc_score(first, scores, sample_weight=w)
    for group in (first, ~first):
        assert np.average(share[group], weights=w[group]) == pytest.approx(expected)


def test_no_interval_for_few_units() -> None:
    first, units = labels(9, 9, 5)
    measured = Judge(Labelled(first, units)).measure(np.random.default_rng(0).normal(size=90), 0.0)
    for name in ("auroc", "balanced_accuracy", "f1"):
        assert measured[name] is not None and measured[f"{name}_ci_low"] is None
    alone = Judge(Labelled(np.arange(6) < 3, np.zeros(6, dtype=object)))
    measured = alone.measure(np.arange(6.0), 2.5)
    assert [v for k, v in measured.items() if "_ci_" in k or k == "auroc_p"] == [None] * 9
