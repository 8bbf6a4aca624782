"""A collection in a process of its own, to be killed or raced: python -m tests.activations.child

arguments: model folder, cache folder, forward passes before SIGKILL (0: none), ready file, go file
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from saexp.config import ModelConfig
from saexp.models.loading import LanguageModel
from tests.activations.collecting import run


def main(folder: str, cache: str, passes: str, ready: str, go: str) -> None:
    torch.set_num_threads(1)
    model = LanguageModel(ModelConfig(name=folder, device="cpu"))
    left = int(passes)

    def count(*_: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    model.blocks[0].register_forward_pre_hook(count)
    Path(ready).touch()
    while not Path(go).exists():
        time.sleep(0.001)
    _, stats = run(model, Path(cache), shard_rows=9)
    sys.stdout.write(f"{stats.tokens_forwarded}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
