"""torchrun, whose processes are forks of an interpreter of `tests.interpreters`.

Its own launcher starts, watches and ends them, as `torchrun --standalone` does; a new interpreter
for each would take seconds to import what a run imports.
"""

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping
from typing import Any

from tests import interpreters

CODE = "from tests.torchrun import main; main()"


def run(
    words: list[str], n_processes: int = 2, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`torchrun --standalone --nproc-per-node=<n_processes> -m saexp <words>`.

    With FAILS_IN, FAILS_AT and FAILS_BY in `env`, this process (its rank) fails at this step: with
    `kill` it is killed, with `error` it raises a SAEError.
    """
    arguments = ["-W", "ignore", "-c", CODE, str(n_processes), *words]
    return interpreters.run(arguments, env={**os.environ, **(env or {})})


def main() -> None:
    """The launcher: the number of processes and the words of the command are `sys.argv`."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    n_processes, *words = sys.argv[1:]
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=int(n_processes),
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    try:
        elastic_launch(config, _process)(words)
    except ChildFailedError:
        sys.exit(1)


def _process(words: list[str]) -> None:
    import torch

    from saexp.errors import SAEError
    from saexp.saes.training import Training

    # As in the forks of tests.interpreters.
    torch.set_num_threads(torch.get_num_threads())
    make_step = Training.make_step

    def fails(self: Training, batch: Any) -> Any:
        if self.step == int(os.environ["FAILS_AT"]):
            if os.environ["FAILS_BY"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise SAEError("the disk of this process is on fire")
        return make_step(self, batch)

    if os.environ["RANK"] == os.environ.get("FAILS_IN"):
        Training.make_step = fails
    interpreters.run_words(["-W", "ignore", "-m", "saexp", *words])
