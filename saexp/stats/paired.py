"""Paired differences over units (entities), with intervals and permutation tests.

Rows of one unit (an entity's prompts) are averaged first, so that a unit counts once; heads of one
prompt are never taken for independent. Under the null hypothesis each unit's difference may as well
have the other sign (Fisher 1935), for all its heads at once.

Shapes: n rows, h heads, u units.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from saexp.errors import DataError
from saexp.stats.means import mean_interval
from saexp.stats.sign_flips import ROUNDING, flip_p_values, flips, sign_flip_p_values


@dataclass(frozen=True)
class PairedDifference:
    """Second minus first, averaged over units."""

    n_units: int
    mean_first: float
    mean_second: float
    difference: float
    ci_low: float
    """Bootstrap-t over units; NaN for fewer than 10 units and where all differences are equal."""
    ci_high: float
    p_value: float
    """Two-sided sign-flip permutation test of a mean difference of 0."""


@dataclass(frozen=True)
class PairedHeads:
    """What `paired_head_test` found."""

    overall: PairedDifference
    """Of the mean over all heads."""
    difference: Float[np.ndarray, " h"]
    """Mean over units."""
    p_value: Float[np.ndarray, " h"]
    """Sign-flip test of each head by itself."""
    p_corrected: Float[np.ndarray, " h"]
    """Corrected for all heads: the chance of one false finding among them is bounded."""


def paired_difference(
    first: Float[np.ndarray, " n"],
    second: Float[np.ndarray, " n"],
    units: Sequence[object] | np.ndarray,
    *,
    n_permutations: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """Mean over units of `second - first`, row by row paired.

    The p-value is `sign_flip_p_values`', the interval `mean_interval`'s.
    Raises DataError for lengths that differ, no rows, and values that are not finite.
    """
    a, b = (_by_unit(_checked(v, units)[:, None], units)[:, 0] for v in (first, second))
    return _paired(a, b, n_permutations, confidence, seed)


def paired_head_test(
    original: Float[np.ndarray, "n h"],
    edited: Float[np.ndarray, "n h"],
    units: Sequence[object] | np.ndarray,
    n_permutations: int = 10_000,
    seed: int = 0,
    *,
    confidence: float = 0.95,
) -> PairedHeads:
    """`edited - original` of every head, and of their mean, over units.

    Per head the statistic is the mean over the root mean square of the units' differences, which
    rises with Student's t and is on one scale for all heads. Corrected p-values are Westfall and
    Young's step-down maxT (1993, algorithm 4.1): each flip turns all heads of a unit together, so
    the correlation of heads is kept; they bound the familywise error whichever heads changed.
    Raises as `paired_difference`.
    """
    if original.shape != edited.shape:
        raise DataError(f"{original.shape} original and {edited.shape} edited values: no pairs")
    a, b = (_by_unit(_checked(v, units), units) for v in (original, edited))
    overall = _paired(a.mean(1), b.mean(1), n_permutations, confidence, seed)
    differences = b - a
    size = np.sqrt((differences**2).mean(0))
    scaled = np.divide(differences, size, out=np.zeros_like(differences), where=size > 0)
    observed = np.abs(scaled.mean(0))
    order = np.argsort(-observed, kind="stable")
    ranked = observed[order]
    limit = ranked - ROUNDING
    alone = np.zeros(len(order))
    largest = np.zeros(len(order))
    total = 0
    for signs in flips(len(scaled), len(order), n_permutations, seed):
        flipped = np.abs(signs @ scaled[:, order]) / len(scaled)
        alone += (flipped >= limit).sum(0)
        # The largest among each head and those that changed less.
        rest = np.maximum.accumulate(flipped[:, ::-1], axis=1)[:, ::-1]
        largest += (rest >= limit).sum(0)
        total += len(signs)
    p_value, corrected = np.empty(len(order)), np.empty(len(order))
    p_value[order] = flip_p_values(alone, total, len(scaled), n_permutations)
    corrected[order] = np.maximum.accumulate(
        flip_p_values(largest, total, len(scaled), n_permutations)
    )
    return PairedHeads(overall, differences.mean(0), p_value, corrected)


def _checked(values: np.ndarray, units: Sequence[object] | np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if len(values) != len(units):
        raise DataError(f"{len(values)} values for {len(units)} units; give one unit a row")
    if not values.size:
        raise DataError("no pairs to compare: the data set left no row")
    if not np.isfinite(values).all():
        row = int(np.argwhere(~np.isfinite(values))[0, 0])
        raise DataError(f"row {row} has a value that is not a finite number; leave it out")
    return values


def _by_unit(values: np.ndarray, units: Sequence[object] | np.ndarray) -> np.ndarray:
    """`[n, h]` -> means `[u, h]`, units in order of first appearance."""
    place: dict[object, int] = {}
    of_row = np.array([place.setdefault(unit, len(place)) for unit in units])
    sums = np.zeros((len(place), values.shape[1]))
    np.add.at(sums, of_row, values)
    return sums / np.bincount(of_row)[:, None]


def _paired(
    first: np.ndarray,
    second: np.ndarray,
    n_permutations: int,
    confidence: float,
    seed: int,
) -> PairedDifference:
    """From one value a unit."""
    differences = second - first
    low, high = mean_interval(differences[:, None], seed, confidence=confidence)
    return PairedDifference(
        n_units=len(differences),
        mean_first=float(first.mean()),
        mean_second=float(second.mean()),
        difference=float(differences.mean()),
        ci_low=float(low[0]),
        ci_high=float(high[0]),
        p_value=float(sign_flip_p_values(differences[:, None], seed, n_permutations)[0]),
    )
