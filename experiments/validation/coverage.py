"""How often 95 % intervals contain the truth, over sizes and true values."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pandas as pd
import worlds
from effects import summary_of
from numpy.typing import ArrayLike
from scipy import special

from saexp.stats.separation import auroc_difference

SIZES = (10, 30, 200)
VALUES = (0.5, 0.8, 0.97, 0.99)
Values = dict[str, float]


def covered(low: ArrayLike, high: ArrayLike, truth: float) -> Values:
    """Coverage among the intervals given, the share without one, and the share of no width."""
    a, b = np.asarray(low, float), np.asarray(high, float)
    has_interval = np.isfinite(a) & np.isfinite(b)
    inside = (a <= truth) & (truth <= b)
    return {
        "value": float(inside[has_interval].mean()) if has_interval.any() else float("nan"),
        "no_interval": float((~has_interval).mean()),
        "no_width": float((a[has_interval] == b[has_interval]).mean())
        if has_interval.any()
        else float("nan"),
    }


def auroc(
    n: int, value: float, n_types: int = 1, *, ties: bool = False
) -> Callable[[np.random.Generator, int], Values]:
    """AUROC of latents on `n` test entities a group: of continuous values, or mostly of zeros."""

    def measure(rng: np.random.Generator, n_runs: int) -> Values:
        rows, known = _groups(n, n_types)
        if ties:
            values = worlds.activated(rng, _rates(known, 2 * value - 1, n_runs))
        else:
            shift = np.sqrt(2) * special.ndtri(value)
            values = np.exp(rng.normal(0, 1, (len(rows), n_runs)) + shift * known[:, None])
        table = worlds.contrast(rows, values).tables["latents"]
        return covered(table["ci_low_test"], table["ci_high_test"], value)

    return measure


def separation(
    n: int, value: float, n_types: int = 1
) -> Callable[[np.random.Generator, int], Values]:
    """Difference of the groups' frequencies on `n` test entities a group."""

    def measure(rng: np.random.Generator, n_runs: int) -> Values:
        rows, known = _groups(n, n_types)
        values = worlds.activated(rng, _rates(known, value, n_runs))
        table = worlds.contrast(rows, values).tables["latents"]
        return covered(table["separation_ci_low_test"], table["separation_ci_high_test"], value)

    return measure


def _groups(n: int, n_types: int) -> tuple[pd.DataFrame, np.ndarray]:
    rows = worlds.both_splits(12, n, worlds.TYPES[:n_types])
    return rows, (rows["group"] == "known").to_numpy()


def _rates(known: np.ndarray, difference: float, n_latents: int) -> np.ndarray:
    rates = np.where(known, (1 + difference) / 2, (1 - difference) / 2)
    return np.broadcast_to(rates[:, None], (len(known), n_latents))


@cache
def _summary(n: int, prompts_per_entity: int, n_runs: int) -> pd.DataFrame:
    """Runs (groups of prompts) of one condition with outcomes of every true value.

    `rate_v` has rate v, `change_v` goes from (1 - v)/2 to (1 + v)/2, `still` from 0.03 to 0.03.
    """
    rng = np.random.default_rng([n, prompts_per_entity, 3])
    n_units = n * n_runs
    group = np.repeat([f"run{i}" for i in range(n_runs)], n * prompts_per_entity)
    units = np.repeat([f"u{i}" for i in range(n_units)], prompts_per_entity)

    def drawn(rate: float) -> np.ndarray:
        # Entities of several prompts differ in their own rates.
        own = np.full(n_units, rate)
        if prompts_per_entity > 1:
            own = rng.beta(2 * rate, 2 * (1 - rate), n_units)
        return (rng.random(len(units)) < own.repeat(prompts_per_entity)).astype(float)

    def skewed(sigma: float | None) -> np.ndarray:
        values = rng.exponential(1, n_units) if sigma is None else rng.lognormal(0, sigma, n_units)
        return values.repeat(prompts_per_entity)

    before: dict[str, np.ndarray] = {"still": drawn(0.03)}
    after: dict[str, np.ndarray] = {"still": drawn(0.03)}
    for v in VALUES:
        before |= {f"rate_{v}": drawn(0.5), f"change_{v}": drawn((1 - v) / 2)}
        after |= {f"rate_{v}": drawn(v), f"change_{v}": drawn((1 + v) / 2)}
    for name, sigma in (("exponential", None), ("lognormal", 1.0)):
        before[name], after[name] = np.zeros(len(units)), skewed(sigma)
    parts = [
        worlds.effect_rows(values, unit=units, condition=name, role=role, group=group)
        for name, role, values in (("baseline", "baseline", before), ("a", "group", after))
    ]
    means = ("exponential", "lognormal")
    kinds = {name: "mean" if name in means else "rate" for name in before}
    summary = summary_of(pd.concat(parts, ignore_index=True), kinds)
    return summary[summary["role"] == "group"]


def rate(
    n: int, value: float, prompts_per_entity: int = 1
) -> Callable[[np.random.Generator, int], Values]:
    """Rate of an outcome over `n` entities."""

    def measure(_: np.random.Generator, n_runs: int) -> Values:
        summary, name = _summary(n, prompts_per_entity, n_runs), f"rate_{value}"
        return covered(summary[f"{name}_ci_low"], summary[f"{name}_ci_high"], value)

    return measure


def change(
    n: int, value: float | None, prompts_per_entity: int = 1
) -> Callable[[np.random.Generator, int], Values]:
    """Change of a rate against unsteered prompts; None: a rate of 0.03 that stays as it is."""

    def measure(_: np.random.Generator, n_runs: int) -> Values:
        summary = _summary(n, prompts_per_entity, n_runs)
        name = "still" if value is None else f"change_{value}"
        low, high = summary[f"{name}_change_ci_low"], summary[f"{name}_change_ci_high"]
        return covered(low, high, 0.0 if value is None else value)

    return measure


def mean(n: int, name: str) -> Callable[[np.random.Generator, int], Values]:
    """Mean of a skewed outcome over `n` entities."""
    truth = {"exponential": 1.0, "lognormal": float(np.exp(0.5))}[name]

    def measure(_: np.random.Generator, n_runs: int) -> Values:
        summary = _summary(n, 1, n_runs)
        return covered(summary[f"{name}_ci_low"], summary[f"{name}_ci_high"], truth)

    return measure


def less_surface(n: int, value: float) -> Callable[[np.random.Generator, int], Values]:
    """AUROC of a latent less 0.8, that of a baseline score with a correlation of 0.5."""

    def measure(rng: np.random.Generator, n_runs: int) -> Values:
        first = np.arange(2 * n) < n
        shifts = np.sqrt(2) * special.ndtri([value, 0.8])
        mixing = np.linalg.cholesky([[1, 0.5], [0.5, 1]])
        limits = []
        for _ in range(n_runs):
            scores = rng.normal(0, 1, (2 * n, 2)) @ mixing.T + first[:, None] * shifts
            own, other = scores.T
            difference = auroc_difference(own, other, first, np.full(2 * n, ""))
            limits.append([float(difference.interval.low), float(difference.interval.high)])
        low, high = np.array(limits).T
        return covered(low, high, value - 0.8)

    return measure


def probe_auroc(
    n: int, value: float, rows_per_entity: int = 1
) -> Callable[[np.random.Generator, int], Values]:
    """Held-out AUROC of a dense probe on one number, whose true AUROC is known whatever the fit.

    Rows of one entity have a correlation of 0.8.
    """

    def measure(rng: np.random.Generator, n_runs: int) -> Values:
        low, high = [], []
        for _ in range(n_runs):
            rows, _ = _groups(n, 1)
            entity = rng.normal(0, np.sqrt(0.8), len(rows)).repeat(rows_per_entity)
            rows = worlds.repeated(rows, np.full(len(rows), rows_per_entity))
            shift = np.sqrt(2) * special.ndtri(value) * (rows["group"] == "known").to_numpy()
            acts = (entity + rng.normal(0, np.sqrt(0.2), len(rows)) + shift)[:, None]
            m = worlds.probe(rows, np.exp(acts), acts.astype(np.float32)).metrics
            ends = [m[f"probe/dense_auroc_ci_{end}_test"] for end in ("low", "high")]
            low.append(np.nan if ends[0] is None else ends[0])
            high.append(np.nan if ends[1] is None else ends[1])
        return covered(np.array(low), np.array(high), value)

    return measure
