"""Moments, means per unit and quantiles of sparse latents equal numpy's on the dense matrix."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import sparse

from saexp.latents.statistics import active_quantile, by_unit, equal_rows, moments

VALUES = st.sampled_from([0.0, 0.0, 0.0, 1e-7, 0.5, 1.0, 2.25, 1000.0])
DENSE = arrays.arrays(np.float32, st.tuples(st.integers(1, 12), st.integers(1, 6)), elements=VALUES)


@settings(max_examples=50)
@given(DENSE, st.data())
def test_moments(dense: np.ndarray, data: st.DataObject) -> None:
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=len(dense), max_size=len(dense))))
    part = dense[chosen].astype(np.float64)
    summary = moments(sparse.csr_array(dense), chosen)
    assert summary.n == len(part)
    np.testing.assert_array_equal(summary.active, (part > 1e-6).sum(0))
    np.testing.assert_allclose(summary.total, part.sum(0))
    np.testing.assert_array_equal(summary.maximum, part.max(0, initial=0))
    if len(part):
        np.testing.assert_allclose(summary.mean, part.mean(0))
        np.testing.assert_allclose(summary.frequency, (part > 1e-6).mean(0))


def test_moments_of_no_rows() -> None:
    summary = moments(sparse.csr_array(np.ones((3, 2))), np.zeros(3, dtype=bool))
    for values in (summary.active, summary.mean, summary.frequency, summary.maximum):
        np.testing.assert_array_equal(values, [0, 0])


def test_the_threshold_is_exclusive() -> None:
    csr = sparse.csr_array(np.array([[0.5], [0.6]]))
    assert moments(csr, np.ones(2, dtype=bool), threshold=0.5).active.tolist() == [1]


@settings(max_examples=50)
@given(DENSE, st.data())
def test_by_unit(dense: np.ndarray, data: st.DataObject) -> None:
    """Units stay in the order in which they first appear, whatever their names."""
    names = st.sampled_from(["zoe", "ann", "Bob", "élan"])
    units = data.draw(st.lists(names, min_size=len(dense), max_size=len(dense)))
    averaged, first = by_unit(sparse.csr_array(dense), np.array(units))
    order = list(dict.fromkeys(units))
    assert first.tolist() == [units.index(u) for u in order]
    assert averaged.shape == (len(order), dense.shape[1])
    for row, unit in zip(averaged.toarray(), order, strict=True):
        members = [i for i, u in enumerate(units) if u == unit]
        np.testing.assert_allclose(row, dense[members].astype(np.float64).mean(0))


@pytest.mark.parametrize("q", [0.0, 0.5, 0.99, 1.0])
def test_active_quantile(q: float) -> None:
    rng = np.random.default_rng(0)
    dense = rng.gamma(2, 1, (40, 9)) * (rng.random((40, 9)) < 0.3)
    dense[:, 4] = 0
    latents = np.array([8, 0, 4, 0])
    quantiles = active_quantile(sparse.csr_array(dense), latents, q)
    for value, latent in zip(quantiles, latents, strict=True):
        on = dense[:, latent][dense[:, latent] > 0]
        assert value == pytest.approx(np.quantile(on, q) if len(on) else 0.0)


@settings(max_examples=50)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), st.integers(0, 3))
def test_equal_rows_of_every_unit(units: list[str], seed: int) -> None:
    """Each unit has as many rows as the one that has fewest, all of them its own."""
    labels = np.array(units)
    chosen = equal_rows(labels, seed)
    fewest = min(units.count(u) for u in units)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert {u: labels[chosen].tolist().count(u) for u in units} == dict.fromkeys(units, fewest)
    np.testing.assert_array_equal(chosen, equal_rows(labels, seed))


def test_equal_rows_are_chosen_evenly_by_seed() -> None:
    """Every row of a larger unit is chosen as often as the others, in pairs too."""
    units = np.array(["b", "a", "a", "b", "a", "a"])
    chosen = [tuple(r for r in equal_rows(units, seed) if units[r] == "a") for seed in range(3000)]
    pairs = {pair: chosen.count(pair) for pair in set(chosen)}
    assert len(pairs) == 6
    # Binomial: 500 expected, standard deviation 20.
    assert max(abs(n - 500) for n in pairs.values()) < 85


def test_equal_rows_of_nothing() -> None:
    assert equal_rows(np.array([], dtype=object), 0).tolist() == []
