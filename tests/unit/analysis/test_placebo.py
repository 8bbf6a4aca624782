"""Placebo labels and latents: permutations, shares, and that they leave the rest alone."""

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from saexp.analysis.base import Split
from saexp.analysis.contrast_checks import permuted, placebo_labels, placebo_latents
from saexp.stats.intervals import wilson
from saexp.stats.rank_tests import stratified_rank_test
from tests.unit.analysis.simulate import activations, contrast, rows_table

LEVEL = 0.05


def split(seed: int, effect: float = 0.0) -> Split:
    """20 latents of 60 units in two strata of unlike values and group sizes."""
    rng = np.random.default_rng(seed)
    strata = np.repeat(["a", "b"], [40, 20])
    first = rng.random(60) < np.where(strata == "a", 0.7, 0.3)
    values = np.exp(rng.normal(size=(60, 20)) + (strata == "a")[:, None] + effect * first[:, None])
    csr = sparse.csr_array(values)
    return Split(csr, csr, pd.DataFrame({"unit": range(60)}), first, strata)


def test_permuted_labels_keep_the_groups_sizes_in_every_stratum() -> None:
    before, rng = split(0), np.random.default_rng(0)
    drawn = [permuted(before, rng) for _ in range(30)]
    for after in drawn:
        for stratum in ("a", "b"):
            mine = before.strata == stratum
            assert after.first[mine].sum() == before.first[mine].sum()
        assert after.csr is before.csr
    assert len({after.first.tobytes() for after in drawn}) == 30
    # Each unit is in the first group as often as its stratum says.
    means = np.mean([permuted(before, rng).first for _ in range(2000)], axis=0)
    for stratum in ("a", "b"):
        mine = before.strata == stratum
        np.testing.assert_allclose(means[mine], before.first[mine].mean(), atol=0.05)


@pytest.mark.parametrize("effect", [0.0, 3.0])
def test_the_share_of_permuted_labels_is_the_error_rate_of_the_claim(effect: float) -> None:
    """Whatever the effect of the labels themselves: a claim on one latent's p-value."""
    train, test = split(1, effect), split(2, effect)

    def claims(_: Split, test: Split) -> bool:
        return stratified_rank_test(test.csr[:, :1], test.first, test.strata).p_value[0] <= LEVEL

    assert claims(train, test) == (effect > 0)
    m = placebo_labels(claims, train, test, 800, 0).metrics
    assert m["placebo/label_fraction_n"] == 800
    low, high = m["placebo/label_fraction_ci_low"], m["placebo/label_fraction_ci_high"]
    assert low - 0.01 <= LEVEL <= high + 0.01
    k = round(m["placebo/label_fraction"] * 800)
    assert (low, high) == pytest.approx(tuple(map(float, wilson(k, 800))))


def test_the_whole_contrast_finds_nothing_in_permuted_labels() -> None:
    """Planted latents are found with the true labels, and the numbers are those without placebo."""
    rows = rows_table()
    dense = activations(rows)
    plain, placebo = (contrast(dense, rows, placebo=n) for n in (0, 150))
    m = placebo.metrics
    assert m["placebo/label_fraction"] <= LEVEL
    assert m["placebo/label_fraction_n"] == 150
    pd.testing.assert_frame_equal(plain.tables["latents"], placebo.tables["latents"])
    assert plain.metrics == {k: v for k, v in m.items() if not k.startswith("placebo/")}
    assert plain.notes == placebo.notes
    again = contrast(dense, rows, placebo=150)
    assert again.metrics == m


def test_the_share_of_latents_is_that_of_a_plain_loop() -> None:
    rows = rows_table()
    table = contrast(activations(rows), rows).tables["latents"]
    n, n_claims = 0, 0
    for row in table.to_dict("records"):
        if row["auroc"] == 0.5:
            continue
        n += 1
        same = (row["auroc"] > 0.5 and row["auroc_test"] > 0.5) or (
            row["auroc"] < 0.5 and row["auroc_test"] < 0.5
        )
        n_claims += same and row["p_value_test"] <= LEVEL
    m = placebo_latents(table, LEVEL, 1000, 0).metrics
    assert m["placebo/latent_fraction_n"] == n
    assert m["placebo/latent_fraction"] == pytest.approx(n_claims / n)
    # The planted ones at least, and few others.
    assert 4 / n <= m["placebo/latent_fraction"] <= 12 / n
    assert placebo_latents(table, LEVEL, 10, 0).metrics["placebo/latent_fraction_n"] == 10


def test_no_active_latent_has_no_share() -> None:
    table = pd.DataFrame({"auroc": [0.5], "auroc_test": [0.5], "p_value_test": [1.0]})
    m = placebo_latents(table, LEVEL, 10, 0).metrics
    assert m["placebo/latent_fraction_n"] == 0
    assert m["placebo/latent_fraction"] is None
