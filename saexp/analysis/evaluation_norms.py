"""High-norm positions of an evaluation (see `activations.norms`), found on its clean passes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saexp.activations.norms import norm_limit, ordinary_rows
from saexp.analysis.evaluation_passes import Batch
from saexp.models.hookpoints import Hookpoint

Streams = tuple[Hookpoint, ...]
"""Streams that an SAE reads, and a transcoder predicts, by their stored names."""


@dataclass(frozen=True)
class Means:
    """Means of what an SAE reconstructs, over positions."""

    ordinary: Float[Tensor, " d"]
    of_all: Float[Tensor, " d"] | None
    """With high-norm positions; None where there are none."""


class HighNorm:
    """Which of the positions to be spliced have high norms; `add` each batch, then `resolve`.

    The median is over all positions of all texts that may be spliced, so that it does not depend
    on batches. A position of high norm at any of an SAE's streams is one for that SAE.
    """

    def __init__(self, places: Sequence[Streams], max_norm_ratio: float | None) -> None:
        self.places, self.max_norm_ratio = places, max_norm_ratio
        self.masks: dict[Streams, list[Bool[Tensor, " n"]]] = {}
        """Per SAE's streams and batch, which positions to be spliced are ordinary; on the CPU."""
        self._norms: dict[Hookpoint, list[np.ndarray]] = {h: [] for p in places for h in p}
        self._totals: dict[Hookpoint, Tensor] = {}

    def add(self, batch: Batch, streams: Mapping[Hookpoint, Tensor]) -> None:
        """Take in the streams of one batch."""
        for hookpoint, norms in self._norms.items():
            x = values_at(streams[hookpoint], batch.spliced).cpu().double()
            norms.append(x.norm(dim=-1).numpy())
            self._totals[hookpoint] = self._totals.get(hookpoint, 0) + x.sum(0)

    def resolve(self) -> None:
        """Find the high-norm positions, once every batch was added."""
        for place in self.places:
            norms = {h: np.concatenate(self._norms[h]) for h in place}
            limits = {h: norm_limit(values, self.max_norm_ratio) for h, values in norms.items()}
            sizes = [len(part) for part in self._norms[place[0]]]
            kept = torch.from_numpy(ordinary_rows(norms, limits))
            self.masks[place] = list(kept.split(sizes))

    def n_excluded(self, place: Streams) -> int:
        """Number of high-norm positions."""
        return sum(int((~mask).sum()) for mask in self.masks[place])

    def ordinary(self, place: Streams, number: int, batch: Batch) -> Bool[Tensor, "b t"]:
        """The batch's `spliced` without high-norm positions."""
        return batch.spliced.masked_scatter(
            batch.spliced, self.masks[place][number].to(batch.spliced.device)
        )

    def means(
        self, again: Iterator[tuple[Batch, Mapping[Hookpoint, Tensor]]]
    ) -> dict[Streams, Means]:
        """Means of each place's last stream; `again` gives all batches' streams once more, and is
        read only where there are high-norm positions."""
        n = sum(map(len, next(iter(self._norms.values()))))
        of_all = {p: self._totals[p[-1]] / n for p in self.places}
        high = [p for p in self.places if self.n_excluded(p)]
        sums = {p: torch.zeros_like(of_all[p]) for p in high}
        for number, (batch, streams) in enumerate(again if high else ()):
            for place in high:
                x = values_at(streams[place[-1]], batch.spliced).cpu().double()
                sums[place] += x[self.masks[place][number]].sum(0)
        return {
            p: Means(sums[p] / (n - self.n_excluded(p)), of_all[p])
            if p in sums
            else Means(of_all[p], None)
            for p in self.places
        }


def values_at(stream: Float[Tensor, "b t d"], where: Bool[Tensor, "b t"]) -> Float[Tensor, "n d"]:
    """The stream at the true positions, row by row."""
    return stream[where.to(stream.device)]
