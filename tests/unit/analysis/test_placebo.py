"""Placebo labels and latents: permutations, shares, and that they leave the rest alone."""

import numpy as np
import pandas as pd
import pytest

from saexp.analysis.contrast_checks import permuted, placebo_latents
from tests.simulated import split
from tests.unit.analysis.simulate import activations, contrast, rows_table

LEVEL = 0.05


def test_permuted_labels_keep_the_groups_sizes_in_every_stratum() -> None:
    before, rng = split(0), np.random.default_rng(0)
    drawn = [permuted(before, rng) for _ in range(30)]
    for after in drawn:
        for stratum in ("a", "b"):
            in_stratum = before.strata == stratum
            assert after.first[in_stratum].sum() == before.first[in_stratum].sum()
        assert after.csr is before.csr
    assert len({after.first.tobytes() for after in drawn}) == 30
    # Each unit is in the first group as often as its stratum says.
    means = np.mean([permuted(before, rng).first for _ in range(2000)], axis=0)
    for stratum in ("a", "b"):
        in_stratum = before.strata == stratum
        np.testing.assert_allclose(means[in_stratum], before.first[in_stratum].mean(), atol=0.05)


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
