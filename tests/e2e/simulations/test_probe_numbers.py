"""Coverage of the probes' intervals, and p-values of scores without meaning."""

import numpy as np
import pytest
from scipy import special

from saexp.analysis.classifiers import Labelled
from saexp.analysis.probe import Judge
from tests.simulated import labels

RATES = [0.5, 0.8, 0.97, 0.99]
SIZES = [10, 60]
ROWS_AND_FRACTIONS = [(1, 0.5), (4, 0.3), (4, 0.5), (1, 0.3)]
DESIGNS = [
    (n, value, *ROWS_AND_FRACTIONS[(i + j) % 4])
    for i, n in enumerate(SIZES)
    for j, value in enumerate(RATES)
]
"""Units of either group, true value, rows of a unit, fraction of the first group."""


def limits(measured: dict[str, float | None], name: str) -> tuple[float, float]:
    low, high = (measured[f"{name}_ci_{side}"] for side in ("low", "high"))
    assert low is not None and high is not None and low < high
    return low, high


@pytest.mark.parametrize(("n", "value", "n_rows"), [design[:3] for design in DESIGNS])
def test_an_auroc_is_covered(n: int, value: float, n_rows: int) -> None:
    """Rows of a unit share half of their variance."""
    first, units = labels(n, n, n_rows)
    judge, covered, n_runs = Judge(Labelled(first, units)), 0, 200
    for seed in range(n_runs):
        rng = np.random.default_rng([seed, n])
        scores = np.sqrt(2) * special.ndtri(value) * first + np.sqrt(0.5) * (
            rng.normal(size=2 * n).repeat(n_rows) + rng.normal(size=2 * n * n_rows)
        )
        low, high = limits(judge.measure(scores, 0.0), "auroc")
        covered += low <= value <= high
    assert covered / n_runs >= 0.92


@pytest.mark.parametrize(("n", "n_rows"), [(10, 4), (30, 1)])
def test_p_values_of_scores_without_meaning(n: int, n_rows: int) -> None:
    """At most about 5 % of 400 runs are below 0.05, whether rows of a unit agree or differ."""
    first, units = labels(n, 2 * n, n_rows)
    judge, n_runs = Judge(Labelled(first, units)), 400
    for agree in (0.0, 1.0):
        n_significant = 0
        for seed in range(n_runs):
            rng = np.random.default_rng([seed, n])
            scores = rng.normal(size=3 * n).repeat(n_rows) * agree
            scores = scores + (1 - agree) * rng.normal(size=3 * n * n_rows)
            p_value = judge.measure(scores, 0.0)["auroc_p"]
            n_significant += p_value is not None and p_value <= 0.05
        # 34 or more of 400 at 5 % have probability 0.002.
        assert n_significant <= 33
        if agree == 1.0 or n_rows == 1:
            assert n_significant >= 8


@pytest.mark.parametrize(("n", "value", "n_rows", "fraction"), DESIGNS)
def test_rates_are_covered(n: int, value: float, n_rows: int, fraction: float) -> None:
    """`value` of either group are called right; half of the units are so in all their rows."""
    n_first = max(10, round(2 * n * fraction))
    first, units = labels(n_first, max(10, 2 * n - n_first), n_rows)
    n_units = len(np.unique(units))
    n_first, n_second = (len(np.unique(units[m])) for m in (first, ~first))
    expected = {"accuracy": value, "balanced_accuracy": value}
    wrong = (1 - value) * n_units
    expected["f1"] = 2 * value * n_first / (2 * value * n_first + wrong)
    judge, n_runs = Judge(Labelled(first, units)), 250
    covered = dict.fromkeys(expected, 0)
    for seed in range(n_runs):
        rng = np.random.default_rng([seed, n])
        right = np.where(
            (rng.random(n_units) < 0.5).repeat(n_rows),
            (rng.random(n_units) < value).repeat(n_rows),
            rng.random(n_units * n_rows) < value,
        )
        measured = judge.measure(np.where(right == first, 1.0, -1.0), 0.0)
        for name, truth in expected.items():
            low, high = limits(measured, name)
            covered[name] += low <= truth <= high
    assert min(covered.values()) / n_runs >= 0.92, covered


@pytest.mark.parametrize("n", SIZES)
def test_units_with_rows_of_both_groups_are_covered(n: int) -> None:
    """Each unit has a row of either group, and both are right or wrong together."""
    units = np.arange(n).astype(object).repeat(2)
    first = np.tile([True, False], n)
    judge, n_runs = Judge(Labelled(first, units)), 250
    assert judge.n_units == n
    covered = {"accuracy": 0, "balanced_accuracy": 0}
    for seed in range(n_runs):
        right = (np.random.default_rng([seed, n]).random(n) < 0.8).repeat(2)
        measured = judge.measure(np.where(right == first, 1.0, -1.0), 0.0)
        for name in covered:
            low, high = limits(measured, name)
            covered[name] += low <= 0.8 <= high
    assert min(covered.values()) / n_runs >= 0.92, covered


@pytest.mark.parametrize("n", [12, 60])
def test_an_auroc_within_kinds_is_covered(n: int) -> None:
    """Every unit has a row of each of three kinds; kinds and units move the scores."""
    first, units = labels(n, n, 3)
    kinds = np.tile(np.arange(3), 2 * n)
    judge, covered, n_runs = Judge(Labelled(first, units, kinds)), 0, 200
    value = 0.8
    for seed in range(n_runs):
        rng = np.random.default_rng([seed, n])
        noise = np.sqrt(0.8) * rng.normal(size=2 * n).repeat(3)
        noise = noise + np.sqrt(0.2) * rng.normal(size=6 * n)
        scores = np.sqrt(2) * special.ndtri(value) * first + noise + 3 * kinds
        low, high = limits(judge.measure(scores, 0.0), "auroc_within")
        covered += low <= value <= high
    assert covered / n_runs >= 0.92
