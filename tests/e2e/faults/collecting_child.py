"""Collections in other processes, to be killed, raced or measured.

The functions are run in forks of a server that has torch imported already.
"""

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from saexp.models import Hookpoint
from saexp.models.loading import LanguageModel
from tests.random_models import TEXTS, VOCABULARY, tokenizer
from tests.unit.activations.collecting import load, placed, run, run_in_shards

PATIENCE_SECONDS = 120
CHANGES = ("posix_fallocate", "pwrite", "fsync", "replace")
"""Calls of `os` that a collection changes the disk with."""
WIDE = [
    Hookpoint(layer, stream)
    for layer in range(2)
    for stream in ("attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
]


def server() -> Any:
    """What starts processes in milliseconds; each is a fork of one that imported this module."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "tests.e2e.faults.collecting_child"])
    return context


def start(context: Any, function: Callable[..., None], *arguments: Any) -> tuple[Any, Any]:
    """(process, queue of what it reports)."""
    reported = context.SimpleQueue()
    process = context.Process(target=function, args=(*arguments, reported), daemon=True)
    process.start()
    return process, reported


def end(process: Any) -> int:
    """Its exit code, once it has ended."""
    process.join(PATIENCE_SECONDS)
    return process.exitcode


def at_each_change(do: Callable[[Callable[..., Any], Any], None]) -> None:
    """`do(call, its arguments)` before each call that changes the disk."""

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def both(*arguments: Any) -> Any:
            do(call, arguments)
            return call(*arguments)

        return both

    for name in CHANGES:
        setattr(os, name, watched(getattr(os, name)))


def collect_to_be_killed(folder: Path, cache: Path, kill_at: int, go: Any, queue: Any) -> None:
    """SIGKILL at the n-th change of the disk, a write half done; says seconds and changes."""
    n_changes = 0

    def count(call: Callable[..., Any], arguments: Any) -> None:
        nonlocal n_changes
        n_changes += 1
        if n_changes == kill_at:
            if call.__name__ == "pwrite":
                file, data, at = arguments
                call(file, data[: len(data) // 2], at)
            os.kill(os.getpid(), signal.SIGKILL)

    at_each_change(count)
    model = load(folder)
    assert model.blocks is not None, "weights are read before the start"
    go.wait()
    began = time.perf_counter()
    run_in_shards(model, cache)
    queue.put((time.perf_counter() - began, n_changes))


def meet(meeting_folder: Path, n: int) -> None:
    """Wait until n processes are here; by files, since a killed one would keep a barrier's lock."""
    (meeting_folder / str(os.getpid())).touch()
    began = time.monotonic()
    while len(list(meeting_folder.iterdir())) < n:
        assert time.monotonic() - began < PATIENCE_SECONDS
        time.sleep(0.002)


def collect_at_once(
    folder: Path, cache: Path, meeting_folder: Path, n: int, stay: bool, queue: Any
) -> None:
    """Collect, but end the first pass when n are in theirs, or, to `stay`, never; says tokens."""
    model, waited = load(folder), False

    def wait(*_: object) -> None:
        nonlocal waited
        if not waited:
            waited = True
            meet(meeting_folder, n)
            time.sleep(PATIENCE_SECONDS if stay else 0)

    model.blocks[0].register_forward_pre_hook(wait)
    _, stats = run_in_shards(model, cache)
    queue.put(stats.tokens_forwarded)


def collect_much(cache: Path, n_texts: int, queue: Any) -> None:
    """Says (bytes of all activations, peak bytes of memory)."""
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = LanguageModel.wrap(LlamaForCausalLM(config), tokenizer())
    texts = [f"{n} {TEXTS[n % 3]}" for n in range(n_texts)]
    store, _ = run(model, cache, WIDE, placed(texts), shard_rows=512, batch_tokens=1024)
    n_bytes = store.n_rows * len(WIDE) * 256 * 4
    queue.put((n_bytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def collect_to_pass(folder: Path, cache: Path, last_pass: int, ready: Any, reported: Any) -> None:
    """SIGKILL at the n-th forward pass (0: none); reports the tokens that it forwarded."""
    model, n_passes = load(folder), 0

    def count(*_: object) -> None:
        nonlocal n_passes
        n_passes += 1
        if n_passes == last_pass:
            os.kill(os.getpid(), signal.SIGKILL)

    model.blocks[0].register_forward_pre_hook(count)
    ready.set()
    _, stats = run_in_shards(model, cache)
    reported.put(stats.tokens_forwarded)
