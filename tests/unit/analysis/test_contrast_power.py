"""What a contrast of its size could have found."""

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from saexp.analysis import Split
from saexp.analysis.contrast_checks import contrast_power
from saexp.stats.significance import detectable_auroc
from tests.unit.analysis.simulate import D_SAE, GROUPS, activations, contrast, rows_table


def units(first: np.ndarray, strata: np.ndarray) -> Split:
    nothing = sparse.csr_array((len(first), 1))
    return Split(nothing, nothing, pd.DataFrame(index=range(len(first))), first, strata)


def test_sizes_are_those_of_the_strata_and_levels_those_of_the_claims() -> None:
    """30 entities of each group in each of two types on train, 20 on test."""
    rows = rows_table()
    m = contrast(activations(rows), rows).metrics
    assert m["contrast/n_tested"] == D_SAE - 1
    train = detectable_auroc([(30, 30), (30, 30)], 0.05 / (D_SAE - 1))
    assert m["power/auroc_train"] == pytest.approx(train)
    leading = {m[f"contrast/{k}_latent_{g}"] for k in ("best", "strongest") for g in GROUPS}
    level = 0.05 / len(leading - {None})
    assert level < 0.05
    assert m["power/auroc_test"] == pytest.approx(detectable_auroc([(20, 20), (20, 20)], level))


def test_a_type_with_one_group_does_not_count() -> None:
    first = np.array([True] * 30 + [False] * 30 + [True] * 50)
    strata = np.array(["a"] * 60 + ["b"] * 50, dtype=object)
    split = units(first, strata)
    power = contrast_power(split, split, 10, 1, 0.05).metrics
    assert power["power/auroc_train"] == pytest.approx(detectable_auroc([(30, 30)], 0.005))


def test_where_nothing_could_be_found_a_note_says_so() -> None:
    first = np.arange(8) < 4
    split = units(first, np.zeros(8))
    power = contrast_power(split, split, 1000, 0, 0.05)
    assert power.metrics["power/auroc_train"] is None
    assert power.notes[0].startswith("split train is too small to detect any latent")
    assert "p > 5e-05" in power.notes[0]
