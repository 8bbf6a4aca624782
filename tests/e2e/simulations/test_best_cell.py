"""The reported value of the best cell of a sweep is unbiased."""

from pathlib import Path

import numpy as np
import pytest

from saexp.reports.saved_run import cells_table
from saexp.reports.sweep import effect_findings, effects_table
from tests.unit.reports.written import cell, effect


def test_cells_with_equal_effects_are_reported_without_a_range(tmp_path: Path) -> None:
    """The true rate is 0.2 in every cell, and the sentence holds one cell's interval."""
    rows = effect("known", 1, 0.2, 0.0, 0.5, train=-0.1, p=0.5, chosen=True)
    for layer in range(6):
        cell(tmp_path, layer, f"layer={layer}", metrics={}, effects=rows)
    effects = effects_table(tmp_path, cells_table(tmp_path))
    rng, reported = np.random.default_rng(0), []
    for _ in range(40):
        test, train = rng.binomial(100, 0.2, size=(2, 6)) / 100
        gap = np.abs(train - 0.3)
        values = {"value": test, "ci_low": test - 0.1, "ci_high": test + 0.1}
        sentence, *_ = effect_findings(effects.assign(**values, change=test - 0.3, gap_train=gap))
        assert "; 0 of 6 cells differ from their controls" in sentence
        reported.append(float(sentence.split(" at layer ")[0].split(" [")[0].split(" ")[-1]))
    # Selected by the train value, the test value is unbiased: 0.2 with a standard error of 0.006.
    assert np.mean(reported) == pytest.approx(0.2, abs=0.02)
