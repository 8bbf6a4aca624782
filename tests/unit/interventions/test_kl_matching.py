"""Scales of equal KL: found for curves of many shapes, and reported as unmatched elsewhere."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from saexp.interventions.directions import equal_kl_scales

CURVES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "quadratic": lambda a, s: a * s**2,
    "saturating": lambda a, s: 5 * (1 - np.exp(-a * s**2)),
    "steep": lambda a, s: a * s**4 / (1 + s),
    "slow": lambda a, s: np.log1p(a * s),
}


class Measured:
    """A curve per edit, and how often each was measured."""

    def __init__(self, curve: Callable[[np.ndarray, np.ndarray], np.ndarray], n: int) -> None:
        self.factor = np.exp(np.random.default_rng(n).normal(-2, 1.0, n))
        self.curve, self.times = curve, np.zeros(n, dtype=int)

    def __call__(self, which: Sequence[int], scales: Sequence[float]) -> np.ndarray:
        self.times[list(which)] += 1
        return self.curve(self.factor[list(which)], np.array(scales))


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("alike", [False, True])
def test_every_edit_is_brought_to_its_target(name: str, alike: bool) -> None:
    n = 60
    measure = Measured(CURVES[name], n)
    target = np.where(np.arange(n) % 2, 1.7, 0.05)
    scaling = equal_kl_scales(measure, target, 1.1, (np.arange(n) % 2).tolist() if alike else ())
    assert scaling.matched.all()
    again = CURVES[name](measure.factor, scaling.scales)
    np.testing.assert_allclose(scaling.kl, again)
    assert (np.abs(np.log(again / target)) <= np.log(1.1)).all()
    assert measure.times.mean() < 5


def test_those_that_are_alike_are_measured_less_often() -> None:
    counts = []
    for alike in ((), [0] * 99):
        measure = Measured(CURVES["saturating"], 99)
        assert equal_kl_scales(measure, np.full(99, 3.0), 1.1, alike).matched.all()
        counts.append(measure.times.sum())
    assert counts[1] < counts[0]


def test_a_target_out_of_reach_is_not_matched() -> None:
    measure = Measured(lambda a, s: 0.5 * a / a * (1 - np.exp(-(s**2))), 4)
    scaling = equal_kl_scales(measure, np.array([0.3, 0.8, 0.0, 0.4]), 1.1)
    assert scaling.matched.tolist() == [True, False, False, True]
    assert scaling.kl[1] == pytest.approx(0.5, rel=1e-3)
    assert np.isnan(scaling.kl[2]) and scaling.scales[2] == 1


def test_an_edit_without_effect_is_not_matched() -> None:
    scaling = equal_kl_scales(Measured(lambda a, s: 0 * a * s, 2), np.array([0.3, 1.0]), 1.1)
    assert not scaling.matched.any()


def test_nothing_to_match_measures_nothing() -> None:
    measure = Measured(CURVES["slow"], 1)
    scaling = equal_kl_scales(measure, np.zeros(0), 1.1)
    assert len(scaling.scales) == 0 and measure.times.sum() == 0
