"""Bootstrap intervals in which a unit (an entity, a text, a prompt) is drawn with all its rows."""

from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
from jaxtyping import Float

_NUMBERS = 4_000_000
"""Weights held at once."""

Interval = tuple[float | None, float | None]


class UnitBootstrap:
    """Draws of units with replacement, within strata; percentile intervals of what follows.

    Shapes: n_units distinct units, n_rows rows, b draws made at once.
    """

    def __init__(
        self,
        units: np.ndarray,
        n_resamples: int,
        seed: int,
        strata: np.ndarray | None = None,
    ) -> None:
        """`units` and `strata` are per row; a unit found in several strata is one of its own."""
        codes, names = pd.factorize(units)
        self.of_row = codes.astype(np.int64)
        self.n_units = len(names)
        self.n_resamples, self.seed = n_resamples, seed
        if strata is None:
            self.strata = [np.arange(self.n_units)]
        else:
            table = pd.DataFrame({"unit": self.of_row, "stratum": strata}).astype({"stratum": str})
            kind = table.groupby("unit")["stratum"].agg(lambda s: repr(sorted(set(s)))).to_numpy()
            self.strata = [np.flatnonzero(kind == k) for k in sorted(set(kind))]

    def draws(self) -> Iterator[Float[np.ndarray, "n_units b"]]:
        """How often each unit is drawn, for `n_resamples` draws in all."""
        rng = np.random.default_rng([self.seed, 17])
        size = max(1, _NUMBERS // max(self.n_units, len(self.of_row), 1))
        done = 0
        while done < self.n_resamples:
            b = min(size, self.n_resamples - done)
            weights = np.zeros((self.n_units, b))
            for units in self.strata:
                n = len(units)
                weights[units] = rng.multinomial(n, np.full(n, 1 / n), size=b).T
            yield weights
            done += b

    def interval(
        self,
        statistic: Callable[[Float[np.ndarray, "n_units b"]], np.ndarray],
        confidence: float = 0.95,
    ) -> Interval:
        """Percentile interval of `statistic(weights) -> [b]`.

        (None, None) without resamples, for fewer than two units, or where no draw gives a number.
        """
        if not self.n_resamples or self.n_units < 2:
            return None, None
        values = np.concatenate([statistic(weights) for weights in self.draws()])
        values = values[np.isfinite(values)]
        if not len(values):
            return None, None
        tail = (1 - confidence) / 2
        low, high = np.quantile(values, [tail, 1 - tail])
        return float(low), float(high)

    def mean(self, values: np.ndarray) -> Interval:
        """Interval of the mean over rows; rows that are NaN don't count."""
        there = np.isfinite(values)
        codes = self.of_row[there]
        sums = np.bincount(codes, weights=values[there], minlength=self.n_units)
        counts = np.bincount(codes, minlength=self.n_units)
        if (counts > 0).sum() < 2:
            return None, None

        def statistic(weights: np.ndarray) -> np.ndarray:
            with np.errstate(divide="ignore", invalid="ignore"):
                return (sums @ weights) / (counts @ weights)

        return self.interval(statistic)

    def rows(self, weights: Float[np.ndarray, "n_units b"]) -> Float[np.ndarray, "n_rows b"]:
        """Each row's weight: its unit's."""
        return weights[self.of_row]
