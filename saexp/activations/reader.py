"""Stored rows in order or shuffled, and rows whose norm is far above the others', such as sinks.

In most real models the first token of a text, and a few others, have residual norms of tens to
hundreds of times the median (massive activations: Sun et al. 2024, arXiv 2402.17762; attention
sinks: Xiao et al. 2023, arXiv 2309.17453). One percent of such rows holds nearly all of the
variance, so that an SAE trained with them spends its latents on them, and a variance explained with
them says nothing about ordinary positions.

A position is ordinary where its norm is at most `positions.max_norm_ratio` times the median norm,
at every stream that the SAE reads or predicts. The median is over all positions of a reference
(neutral text where the run has it, else the run's own positions): it depends on the data alone, not
on batches.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saexp.activations import ActivationStore
from saexp.activations.shard_files import StoredValues
from saexp.distributed import ALONE, Processes
from saexp.models import Hookpoint

_CHUNK_ROWS = 8192


def norm_limit(norms: Float[np.ndarray, " n"], max_norm_ratio: float | None) -> float:
    """The largest norm of an ordinary position; infinite for a ratio of None or a median of 0."""
    median = float(np.median(norms))
    return median * max_norm_ratio if max_norm_ratio is not None and median else float("inf")


def norm_limits(
    store: ActivationStore, hookpoints: Sequence[Hookpoint], max_norm_ratio: float | None
) -> dict[Hookpoint, float]:
    """`norm_limit` of each hookpoint over all rows of a store."""
    if max_norm_ratio is None:
        return dict.fromkeys(hookpoints, float("inf"))
    return {h: norm_limit(store.norms(h), max_norm_ratio) for h in hookpoints}


def ordinary_rows(
    norms: Mapping[Hookpoint, Float[np.ndarray, " n"]], limits: Mapping[Hookpoint, float]
) -> Bool[np.ndarray, " n"]:
    """Rows whose norms are within the limit at every hookpoint; all rows where none would be."""
    within = np.all([norms[h] <= limits[h] for h in limits], axis=0)
    return within if within.any() else np.ones_like(within)


@dataclass(frozen=True)
class OrdinaryRows:
    """Which rows of a store are ordinary at the hookpoints of `limits`."""

    store: ActivationStore
    limits: Mapping[Hookpoint, float]
    max_norm_ratio: float | None

    @cached_property
    def mask(self) -> Bool[np.ndarray, " n_rows"]:
        """True for each ordinary row."""
        if all(np.isinf(limit) for limit in self.limits.values()):
            return np.ones(self.store.n_rows, dtype=bool)
        return ordinary_rows({h: self.store.norms(h) for h in self.limits}, self.limits)

    @property
    def n_excluded(self) -> int:
        """Number of high-norm rows."""
        return int((~self.mask).sum())

    @cached_property
    def variance_fraction(self) -> float:
        """Fraction of the sum of squared distances from the mean that high-norm rows hold, at the
        last hookpoint: what the SAE reconstructs, or a transcoder predicts. NaN where a value is
        not finite, as in float16 where it overflows."""
        if not self.n_excluded:
            return 0.0
        if not np.isfinite(self.store.norms(self._last)).all():
            return float("nan")
        squares, high_norm = self.store.norms(self._last) ** 2, torch.from_numpy(~self.mask)
        total, of_high = torch.zeros(2, 1, dtype=torch.float64)
        for first, x in self._chunks():
            rows = x.flatten(1).double()
            total = total + rows.sum(0)
            of_high = of_high + rows[high_norm[first : first + len(x)]].sum(0)
        # sum |x - m|^2 = sum |x|^2 - 2 m sum x + n |m|^2, so that the store is read once.
        mean = total / self.store.n_rows
        constant = float(mean.square().sum())
        every = float(squares.sum()) - self.store.n_rows * constant
        high = float(squares[~self.mask].sum()) - 2 * float(mean @ of_high)
        return (high + self.n_excluded * constant) / every if every > 0 else 0.0

    def _chunks(self) -> Iterator[tuple[int, Tensor]]:
        return self.store.chunks(self._last, _CHUNK_ROWS)

    @property
    def _last(self) -> Hookpoint:
        return list(self.limits)[-1]

    @property
    def _none_is_ordinary(self) -> bool:
        """Whether no row is within every limit, so that `mask` is true for all the same."""
        limits = {h: limit for h, limit in self.limits.items() if np.isfinite(limit)}
        above = (bool((self.store.norms(h) > limit).any()) for h, limit in limits.items())
        return bool(self.mask.all()) and any(above)

    def median_norm(self, hookpoint: Hookpoint) -> float:
        """Median norm over the ordinary rows; the reference's where no row is ordinary."""
        norms, limit = self.store.norms(hookpoint), self.limits[hookpoint]
        if self.max_norm_ratio is not None and bool((norms > limit).all()):
            return limit / self.max_norm_ratio
        return float(np.median(norms[self.mask]))

    def notes(self, consequence: str) -> list[str]:
        """One line where there are high-norm rows; `consequence` says what follows for them."""
        if self._none_is_ordinary:
            return [
                f"all {self.store.n_rows:,} positions at {self._last.name} have a norm above "
                f"{self.max_norm_ratio:g} times the median of neutral text (attention sinks?); "
                "the metrics include them, because there are no others"
            ]
        return high_norm_notes(
            self.n_excluded,
            self.store.n_rows,
            self._last,
            self.max_norm_ratio,
            self.variance_fraction,
            consequence,
        )


def high_norm_notes(
    n_excluded: int,
    n_positions: int,
    at: Hookpoint,
    max_norm_ratio: float | None,
    variance_fraction: float,
    consequence: str,
) -> list[str]:
    """A note on positions of high norm: their number, their fraction of the variance, and what
    follows from them."""
    if not n_excluded:
        return []
    variance = f"hold {variance_fraction:.1%} of the variance"
    if np.isnan(variance_fraction):
        variance = "are not all finite, so that their fraction of the variance is unknown"
    return [
        f"{n_excluded:,} of {n_positions:,} positions ({n_excluded / n_positions:.2%}) at "
        f"{at.name} have a norm above {max_norm_ratio:g} times the median and {variance} "
        f"(attention sinks?); {consequence} "
        "(positions.max_norm_ratio=null treats them as any other)"
    ]


class ShuffledReader:
    """Iterator of `[batch_size, d]` float32 batches from stored activations.

    Each epoch is a new permutation of `rows`, determined by the seed and the epoch's number, so
    that a reader that starts at step n continues exactly like one that reached it. Memory: the
    permutation (8 bytes per row) and one batch. A batch may span two epochs. Each of several
    `processes` reads a part of every batch.
    """

    def __init__(
        self,
        acts: Float[Tensor, "n_rows d"] | StoredValues,
        rows: Int[np.ndarray, " n"],
        batch_size: int,
        seed: int,
        step: int = 0,
        *,
        processes: Processes = ALONE,
    ) -> None:
        self.acts, self.rows, self.batch_size, self.seed = acts, rows, batch_size, seed
        self.processes = processes
        self.position = step * batch_size
        self._epoch = -1
        self._order = rows

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Float[Tensor, "batch d"]:
        parts, n_left = [], self.batch_size
        while n_left:
            epoch, start = divmod(self.position, len(self.rows))
            if epoch != self._epoch:
                rng = np.random.default_rng([self.seed, epoch])
                self._order, self._epoch = self.rows[rng.permutation(len(self.rows))], epoch
            part = self._order[start : start + n_left]
            parts.append(part)
            n_left -= len(part)
            self.position += len(part)
        rows = np.concatenate(parts)[self.processes.rank :: self.processes.size]
        # Ascending, so that the disk is read in order.
        order = np.argsort(rows, kind="stable")
        ascending = self.acts[torch.from_numpy(rows[order])].float()
        batch = torch.empty_like(ascending)
        batch[torch.from_numpy(order)] = ascending
        return batch
