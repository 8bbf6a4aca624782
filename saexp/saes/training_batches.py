"""The data of a pass: at each step a batch for every SAE that is trained in it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from saexp.distributed import ALONE, Processes
from saexp.models import Hookpoint

N_SCALE_BATCHES = 50
"""Number of batches from which the inputs' mean norm is estimated."""
Reader = Callable[[int], Iterator[Tensor]]
"""Step -> batches from that step on: `[batch, d_in]`, a transcoder's `[batch, d_in + d_out]`."""
Streams = tuple[Hookpoint, ...]
"""The stream that an SAE reads, and the one that a transcoder predicts."""
Widths = Mapping[Hookpoint, int]
"""The streams of one SAE with their widths, in the order of the columns of its batches."""


@runtime_checkable
class Batches(Protocol):
    """The data of one pass: at each step a batch for every SAE."""

    def seek(self, step: int, streams: Sequence[Streams]) -> int:
        """Continue at this step, or at an earlier one; returns it. Batches are for `streams`."""
        ...

    def next(self) -> Mapping[Streams, Tensor]:
        """The batches of the next step, `[batch, d_in]` or `[batch, d_in + d_out]`, float32."""
        ...

    def mean_norms(self, widths: Widths) -> dict[Hookpoint, float]:
        """Estimated mean norm of the activations at each stream of an SAE."""
        ...

    @property
    def seconds_per_step(self) -> float:
        """Average time per step of what is done for many steps at once, such as a refill."""
        ...

    def checkpoint(self, step: int) -> None:
        """Store what `seek` needs to continue at this step."""
        ...

    def describe(self, streams: Streams) -> dict[str, Any]:
        """What was read for these streams so far; stored with each checkpoint of their SAEs."""
        ...


class ReaderBatches:
    """Batches of readers that can begin at any step, such as those of an activation store."""

    def __init__(self, readers: Mapping[Streams, Reader], processes: Processes = ALONE) -> None:
        self._readers, self._processes = readers, processes
        self._batches: dict[Streams, Iterator[Tensor]] = {}

    def seek(self, step: int, streams: Sequence[Streams]) -> int:
        """Continue at exactly this step."""
        self._batches = {one: self._readers[one](step) for one in streams}
        return step

    def next(self) -> Mapping[Streams, Tensor]:
        """The next batch of each reader."""
        return {one: next(batches) for one, batches in self._batches.items()}

    def mean_norms(self, widths: Widths) -> dict[Hookpoint, float]:
        """Means over the first `N_SCALE_BATCHES` batches."""
        batches = self._readers[tuple(widths)](0)
        norms = [
            [
                self._processes.mean(part.norm(dim=-1))
                for part in next(batches).split(list(widths.values()), dim=-1)
            ]
            for _ in range(N_SCALE_BATCHES)
        ]
        means = [sum(values) / len(values) for values in zip(*norms, strict=True)]
        return dict(zip(widths, means, strict=True))

    @property
    def seconds_per_step(self) -> float:
        """Nothing is done for many steps at once."""
        return 0.0

    def checkpoint(self, step: int) -> None:
        """Nothing: the step says where to continue."""

    def describe(self, streams: Streams) -> dict[str, Any]:  # noqa: ARG002
        """Nothing: what is read follows from the step."""
        return {}
