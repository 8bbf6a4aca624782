"""The reported value of the best cell of a sweep is unbiased."""

from pathlib import Path

import numpy as np
import pytest

from saexp.reports.saved_run import cells_table
from saexp.reports.sweep import findings
from tests.unit.reports.written import cell, effect


def test_cells_with_equal_effects_are_reported_without_a_range(tmp_path: Path) -> None:
    """The true rate is 0.2 in every cell, and the sentence holds one cell's interval."""
    rng, reported = np.random.default_rng(0), []
    for sweep in range(40):
        cell_folder = tmp_path / str(sweep)
        for layer in range(6):
            test, train = rng.binomial(100, 0.2, size=2) / 100
            rows = effect("known", 1, test, 0.0, 0.5, train=train - 0.3, p=0.5, chosen=True)
            cell(cell_folder, layer, f"layer={layer}", metrics={}, effects=rows)
        sentence, *_ = findings(cells_table(cell_folder), cell_folder)
        assert "; 0 of 6 cells differ from their controls" in sentence
        reported.append(float(sentence.split(" at layer ")[0].split(" [")[0].split(" ")[-1]))
    # Selected by the train value, the test value is unbiased: 0.2 with a standard error of 0.006.
    assert np.mean(reported) == pytest.approx(0.2, abs=0.02)
