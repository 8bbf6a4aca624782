"""Permutation and sign-flip tests, and random directions as controls."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy import special
from torch import Tensor

from saexp.errors import DataError
from saexp.stats.intervals import mean_interval, wilson


def derived_seed(seed: int, *of: object) -> int:
    """A seed for one purpose: it depends on all of `of`, a layer or a stream among them."""
    digest = hashlib.sha256(repr((seed, *of)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def random_directions(n: int, d: int, seed: int, *of: object) -> Float[Tensor, "n d"]:
    """Unit vectors, uniform on the sphere; unrelated where `seed` or anything in `of` differs.

    `of` holds what the directions belong to, such as the stream's name, so that controls of two
    layers share nothing. Drawn on the CPU in float32: equal on every device, and the first rows
    are the same for any `n`.

    >>> random_directions(2, 64, 0, "layer_1.resid_post").norm(dim=-1)
    tensor([1., 1.])
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, d, *of))
    rows = [torch.randn(d, generator=generator) for _ in range(n)]
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1) if n else torch.empty(0, d)


MIN_CONTROLS = 19
"""With fewer controls no rank p-value can reach 0.05."""


def rank_p_value(own: float, controls: Float[np.ndarray, " k"]) -> float:
    """Two-sided rank p-value: (1 + number of controls at least as extreme) / (k + 1).

    Extreme is far from the median of all k + 1 values, which treats them alike, so that the p-value
    is valid whatever their distribution (Phipson and Smyth 2010). It is never below 1 / (k + 1),
    and NaN without controls.

    >>> rank_p_value(0.9, np.array([0.1, 0.0, -0.1, 0.05]))
    0.2
    """
    if not len(controls):
        return float("nan")
    values = np.append(controls, own)
    distance = np.abs(values - np.median(values))
    # Distances that differ by rounding alone are equal.
    as_extreme = distance[:-1] >= distance[-1] - 1e-12
    return float((1 + as_extreme.sum()) / len(values))


def prediction_p_value(own: float, controls: Float[np.ndarray, " k"]) -> float:
    """Two-sided p-value of one more draw from the controls' distribution, taken as normal.

    t = (own - mean) / (s sqrt(1 + 1/k)) with k - 1 degrees of freedom (Crawford and Howell 1998).
    NaN for fewer than 3 controls, or controls that are all equal.
    """
    k = len(controls)
    spread = float(controls.std(ddof=1)) if k > 2 else 0.0
    if spread <= 0:
        return float("nan")
    t = (own - controls.mean()) / (spread * np.sqrt(1 + 1 / k))
    return float(2 * special.stdtr(k - 1, -abs(t)))


N_FLIPS = 10_000
ROUNDING = 1e-12
"""Statistics that differ by less, on the scale of one unit's difference, are equal."""
_NUMBERS = 4_000_000
"""Numbers held at once."""


def sign_flip_p_values(
    differences: Float[np.ndarray, "n k"], seed: int, n_flips: int = N_FLIPS
) -> Float[np.ndarray, " k"]:
    """Two-sided p-value of each column's mean being 0 (Fisher 1935); rows are independent units.

    All 2^n sign flips are taken where they are no more than `n_flips`; else p = (1 + those as
    large) / (1 + n_flips) over random ones (Phipson and Smyth 2010), which all columns share.
    """
    n, n_columns = differences.shape
    limit = np.abs(differences.mean(0)) - ROUNDING * np.abs(differences).mean(0)
    as_large, total = np.zeros(n_columns), 0
    for signs in flips(n, n_columns, n_flips, seed):
        as_large += (np.abs(signs @ differences) / n >= limit).sum(0)
        total += len(signs)
    return flip_p_values(as_large, total, n, n_flips)


def flip_p_values(
    as_large: Float[np.ndarray, " k"], n_made: int, n_units: int, n_flips: int
) -> Float[np.ndarray, " k"]:
    """From counts of flips with a statistic as large as the observed one, out of `n_made`."""
    return as_large / n_made if _all(n_units, n_flips) else (1 + as_large) / (1 + n_made)


def flips(
    n_units: int, n_columns: int, n_flips: int, seed: int
) -> Iterator[Float[np.ndarray, "m n_units"]]:
    """Signs, all of them or random ones, as many at once as memory allows."""
    step = max(1, _NUMBERS // max(n_units, n_columns))
    if _all(n_units, n_flips):
        bits = np.arange(n_units)
        for start in range(0, 2**n_units, step):
            numbers = np.arange(start, min(start + step, 2**n_units))[:, None]
            yield (((numbers >> bits) & 1) * 2 - 1).astype(np.float64)
        return
    rng = np.random.default_rng([seed, 29])
    for start in range(0, n_flips, step):
        m = min(step, n_flips - start)
        yield rng.integers(2, size=(m, n_units), dtype=np.int8) * 2.0 - 1


def _all(n_units: int, n_flips: int) -> bool:
    return n_units < 63 and 2**n_units <= n_flips


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


def claim_share(name: str, n_claims: int, n: int) -> dict[str, float | int | None]:
    """Metric `name`, n_claims / n, with `_n` and its Wilson interval; null where n is 0."""
    low, high = wilson(n_claims, n)
    values = (n_claims / n, float(low), float(high)) if n else (None, None, None)
    names = (name, f"{name}_ci_low", f"{name}_ci_high")
    return {f"{name}_n": n, **dict(zip(names, values, strict=True))}
