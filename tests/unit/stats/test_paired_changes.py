"""Intervals of changes of rates: from counts, from fractions, and their coverage."""

import numpy as np
import pytest

from saexp.stats import paired_change_interval, paired_difference_interval


def test_of_outcomes_it_is_the_interval_of_the_four_counts() -> None:
    before = np.repeat([1.0, 0.0, 1.0, 0.0], [5, 9, 2, 4])
    after = np.repeat([1.0, 1.0, 0.0, 0.0], [5, 9, 2, 4])
    assert paired_change_interval(before, after) == paired_difference_interval(5, 9, 2, 4)
    # Exchanged, it is mirrored.
    low, high = paired_change_interval(before, after)
    assert paired_change_interval(after, before) == pytest.approx((-high, -low))


def test_no_interval_has_zero_width() -> None:
    for value in (0.0, 0.5, 1.0):
        low, high = paired_change_interval(np.full(30, value), np.full(30, value))
        assert low < -0.05 and high > 0.05
