"""The processes of one run that `torchrun` started: sums, exchanges, and one error message.

Without torchrun a run has one process, and nothing here does anything. torch is imported late,
because the command line reads this module.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from saexp.errors import ConfigError, SaexpError, counted

if TYPE_CHECKING:
    from torch import Tensor

_PATIENCE = timedelta(days=7)
"""How long a process waits for the others; torchrun ends all when one fails."""
_CLAIM_SECONDS = 5
_CLAIMED = "saexp/error"
"""Key of torchrun's store with the number of processes that had an error to print."""
T = TypeVar("T")


class ProcessError(SaexpError):
    """Another process of the run has ended."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, and which of them this one is."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files, checkpoints and logs."""
        return self.rank == 0

    @property
    def are_several(self) -> bool:
        """Whether there are others."""
        return self.size > 1

    def add(self, tensor: "Tensor") -> "Tensor":
        """Replace the tensor by its sum over the processes, and return it."""
        if self.are_several:
            import torch.distributed as dist

            self._exchange(lambda: dist.all_reduce(tensor))
        return tensor

    def totals(self, counts: Sequence[int]) -> list[int]:
        """Sums of whole numbers over the processes."""
        if not self.are_several:
            return list(counts)
        import torch

        return self.add(torch.tensor(counts, dtype=torch.int64)).tolist()

    def mean(self, values: "Tensor") -> float:
        """Mean of the values of all processes, `[n]` with an n of its own in each."""
        if not self.are_several:
            return float(values.mean())
        import torch

        total = torch.tensor([float(values.double().sum()), len(values)], dtype=torch.float64)
        return float(self.add(total)[0] / total[1])

    def joined(self, tensor: "Tensor") -> "Tensor":
        """The tensors of all processes, `[n, ...]` with the same n, concatenated."""
        if not self.are_several:
            return tensor
        import torch
        import torch.distributed as dist

        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self._exchange(lambda: dist.all_gather(parts, tensor.contiguous()))
        return torch.cat(parts)

    def at_first(self, rows: "Tensor", counts: Sequence[int]) -> "list[Tensor]":
        """The rows of each process at the first one, `[counts[rank], ...]`; elsewhere none."""
        import torch
        import torch.distributed as dist

        if not self.is_first:
            # Bytes, since not every backend sends every dtype.
            content = rows.contiguous().cpu().view(torch.uint8)
            if len(rows):
                self._exchange(lambda: dist.send(content, 0))
            return []
        parts = [rows.cpu()]
        for rank in range(1, self.size):
            part = rows.new_empty(counts[rank], *rows.shape[1:], device="cpu")
            content = part.view(torch.uint8)
            if counts[rank]:
                self._exchange(lambda c=content, r=rank: dist.recv(c, r))
            parts.append(part)
        return parts

    def of_first(self, value: T) -> T:
        """The value of the first process, at all of them."""
        if not self.are_several:
            return value
        import torch.distributed as dist

        values = [value]
        self._exchange(lambda: dist.broadcast_object_list(values, 0))
        return values[0]

    def require_same(self, what: str, value: Any) -> None:
        """Wait for all processes; raises ConfigError where their values differ."""
        if not self.are_several:
            return
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        self._exchange(lambda: dist.all_gather_object(values, value))
        if any(other != values[0] for other in values):
            raise ConfigError(
                f"the {self.size} processes of torchrun differ in {what} "
                f"({', '.join(map(str, values))}); all need the same files, and a cache_dir= on a "
                "disk that they share"
            )

    def _exchange(self, exchange: Callable[[], Any]) -> None:
        try:
            exchange()
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ProcessError(
                f"process {self.rank} of {self.size}: another process of torchrun ended, or cannot "
                f"be reached ({reason}); run the command again to continue from the last checkpoint"
            ) from error


ALONE = Processes()


def launched() -> Processes:
    """The processes that torchrun started, from its environment variables."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ALONE
    return Processes(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


@contextmanager
def connected(device: str) -> Iterator[Processes]:
    """Connect the processes of torchrun: with nccl on CUDA, a GPU for each, and gloo on the CPU.

    `device` is the run's setting. Raises ConfigError where a process has no GPU of its own.
    """
    processes = launched()
    if not processes.are_several:
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    backend = "gloo"
    if device.startswith(("auto", "cuda")) and torch.cuda.is_available():
        _pick_gpu(device, int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=_PATIENCE)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ProcessError(f"the processes of torchrun cannot be connected: {reason}") from error
    yield processes
    # Not after an error: the others would notice before this process has printed it.
    dist.destroy_process_group()


def _pick_gpu(device: str, local_rank: int, n_gpus: int) -> None:
    import torch

    if ":" in device:
        raise ConfigError(
            f"device={device} is one GPU, and each process of torchrun takes its own; type "
            "device=cuda"
        )
    if local_rank >= n_gpus:
        raise ConfigError(
            f"torchrun started process {local_rank} on a machine with {counted(n_gpus, 'GPU')}; "
            f"type torchrun --nproc-per-node={n_gpus}"
        )
    torch.cuda.set_device(local_rank)


def check_command(words: Sequence[str]) -> None:
    """Raise ConfigError for a sweep that torchrun started."""
    processes = launched()
    if processes.are_several and {"-m", "--multirun"} & set(words):
        raise ConfigError(
            f"torchrun started {processes.size} processes, which train SAEs together in one run; "
            "type a run without -m (lists of layer, width and sae_trainer.variants are one run)"
        )


def check_task(task: str, *, resume: bool) -> None:
    """Raise ConfigError for a task that torchrun's processes cannot share."""
    processes = launched()
    if not processes.are_several:
        return
    if task != "train":
        raise ConfigError(
            f"torchrun started {processes.size} processes, and task={task} runs in one; type "
            f"python -m saexp task={task} (task=collect: task.n_shards=)"
        )
    if resume:
        raise ConfigError(
            "resume=true is for runs of one process; leave it out: checkpoints continue a training "
            "that was interrupted"
        )


@contextmanager
def quiet_folder() -> Iterator[list[str]]:
    """Overrides with which Hydra writes nothing outside a temporary folder, for a later process.

    Its warnings are printed with its number, and nothing else.
    """
    processes = launched()
    if processes.is_first:
        yield []
        return
    folder = Path(tempfile.mkdtemp(prefix="saexp-process-"))
    try:
        yield [
            f"hydra.run.dir={folder}",
            "hydra.output_subdir=null",
            "hydra.job_logging.root.level=WARNING",
            "hydra.job_logging.formatters.simple.format='[process "
            f"{processes.rank} of {processes.size}] %(message)s'",
        ]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def prints_error() -> bool:
    """Whether this process prints its error: of several, the first one that asks.

    The others end because of it, or have the same error.
    """
    if not launched().are_several:
        return True
    try:
        from torch.distributed import TCPStore

        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=_CLAIM_SECONDS),
            wait_for_workers=False,
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return store.add(f"{_CLAIMED}/{attempt}", 1) == 1
    except (RuntimeError, KeyError):
        # torchrun itself has ended.
        return True
