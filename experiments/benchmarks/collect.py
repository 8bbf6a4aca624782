"""Compare activation collection with the bare forward pass and with other tools, in one process.

    python experiments/benchmarks/collect.py                     # small Gemma-2-shaped model, CPU
    python experiments/benchmarks/collect.py --shape 2b --device cuda --dtype bfloat16
    python experiments/benchmarks/collect.py --shared 128 --longest 40   # few-shot prompts

The model has random weights of a real Gemma-2 config. Texts have 6 to 99 tokens; one position per
text is read, at resid_post of the last block of the lower half (layer 12 of Gemma-2-2B's 26;
`--layer` sets another). Every tool runs once to warm up, then `--repeats` times, alternating; the
table holds medians and ratios. With `--shared` all texts begin with the same tokens, which only
saexp computes once. TransformerLens and nnsight are included where they are installed (extra
`bench`).
"""

import argparse
import json
import logging
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import PEERS, SHAPES, Batch, bare_forward, sync
from transformers import Gemma2Config, Gemma2ForCausalLM

from saexp.activations.collection import collect
from saexp.activations.collector import CollectionRequest, HuggingFaceCollector
from saexp.activations.shared_prefixes import units
from saexp.config import CollectorConfig, PositionsConfig, StoreConfig
from saexp.data import Example
from saexp.data.positions import resolve_positions
from saexp.data.rows import PositionTable
from saexp.data.tokenization import TokenizedText
from saexp.models import Hookpoint
from saexp.models.forward import TokenBudget, batches, padded
from saexp.models.loading import LanguageModel
from saexp.models.resolution import pick_device, pick_precision
from saexp.registry import build as build_component

log = logging.getLogger("collect")


@dataclass(frozen=True)
class Setting:
    """The input of every tool."""

    model: LanguageModel
    placement: PositionTable
    layer: int
    batch_size: int


class _Tokenizer:
    """The tokenizer methods that collection calls; the texts are token ids already."""

    eos_token_id, pad_token_id, all_special_tokens, all_special_ids = 1, 0, (), ()

    def get_vocab(self) -> dict[str, int]:
        return {}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [str(i) for i in ids]


def setting(args: argparse.Namespace) -> Setting:
    """A random-weight model and texts, from a fixed seed."""
    torch.manual_seed(0)
    config = Gemma2Config(**SHAPES[args.shape], sliding_window=4096)  # pyright: ignore
    device = pick_device(args.device)
    checkpoint = torch.bfloat16 if device.type == "cuda" else None
    dtype = pick_precision(args.dtype, device, checkpoint).dtype
    torch.set_default_dtype(dtype)
    with torch.device(device):
        hf = Gemma2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    rng = np.random.default_rng(0)
    lengths = rng.integers(6, args.longest + 1, args.texts)
    begin = [int(i) for i in rng.integers(2, hf.config.vocab_size, args.shared)]
    texts = []
    for n_own in lengths:
        ids = (*begin, *(int(i) for i in rng.integers(2, hf.config.vocab_size, n_own)))
        n = len(ids)
        spans = tuple((i, i + 1) for i in range(n))
        texts.append(TokenizedText(" ".join(map(str, ids)), ids, spans, (False,) * n, False))
    examples = [Example(id=str(i), text=t.text) for i, t in enumerate(texts)]
    positions = build_component("positions", PositionsConfig(name="last"))
    tokenizer = _Tokenizer()
    placement = resolve_positions(examples, texts, positions, tokenizer, 0)
    model = LanguageModel.wrap(hf, tokenizer, f"random Gemma-2, {args.shape}")
    layer = hf.config.num_hidden_layers // 2 - 1 if args.layer is None else args.layer
    return Setting(model, placement, layer, args.batch_size)


def limit(workload: Setting) -> Callable[[], None]:
    """The bare forward pass of the required blocks on saexp's batches, prepared beforehand."""
    model = workload.model
    todo = units(workload.placement, np.arange(len(workload.placement.rows)))
    budget = TokenBudget("auto", model.device)
    ready = []
    for chosen in batches([len(u.ids) for u in todo], budget):
        ids, mask = padded(
            [todo[i].ids for i in chosen], model.pad_id, model.device, padding_side="right"
        )
        ready.append((ids, mask))
    return bare_forward(model, workload.layer, ready)


def saexp_way(workload: Setting) -> Callable[[], None]:
    """`collect` into an empty store: batching, forward passes, checks, checksums, synced files."""
    # Computed once per process and model, independent of what is collected.
    _ = workload.model.fingerprint
    digest = workload.model.fingerprint
    type(workload.model).fingerprint = property(lambda _: digest)  # pyright: ignore

    def run() -> None:
        folder = tempfile.mkdtemp()
        request = CollectionRequest(
            positions=workload.placement,
            hookpoints=[Hookpoint(workload.layer, "resid_post")],
            max_length=4096,
        )
        cfg = CollectorConfig(name="hf")
        collector = HuggingFaceCollector(cfg, model=workload.model, store=StoreConfig())
        collect(collector, request, cache_dir=folder)
        sync(workload.model.device)
        shutil.rmtree(folder)

    return run


def in_order(workload: Setting) -> list[Batch]:
    """Batches as in most notebooks: in the order of the data, padded to the longest text."""
    texts = [t.ids for t in workload.placement.texts]
    text_batches = []
    for start in range(0, len(texts), workload.batch_size):
        some = texts[start : start + workload.batch_size]
        ids, mask = padded(some, workload.model.pad_id, workload.model.device, padding_side="right")
        text_batches.append(Batch(ids, mask, torch.tensor([len(t) - 1 for t in some])))
    return text_batches


def ways(workload: Setting) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, one timed run) of every tool that is installed."""
    yield "bare forward pass of the required blocks (limit)", limit(workload)
    yield "saexp", saexp_way(workload)
    for name, make in PEERS.items():
        try:
            yield (
                name,
                make(
                    workload.model,
                    in_order(workload),
                    workload.layer,
                    lambda: sync(workload.model.device),
                ),
            )
        except ImportError as error:
            log.warning("%s is left out: %s", name, error)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of one large matrix product here."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        sync(device)
        began = time.perf_counter()
        torch.matmul(a, a)
        sync(device)
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def main() -> None:
    """Run, print the table, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--layer", type=int)
    parser.add_argument("--texts", type=int, default=320)
    parser.add_argument("--longest", type=int, default=99, help="tokens of a text at most")
    parser.add_argument("--shared", type=int, default=0, help="tokens before each, all the same")
    parser.add_argument("--batch-size", type=int, default=16, help="of the other tools")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    workload = setting(args)
    timed: dict[str, list[float]] = {}
    runs = dict(ways(workload))
    for name, run in runs.items():
        run()
        timed[name] = []
    for _ in range(args.repeats):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            timed[name].append(time.perf_counter() - began)
    report(args, workload, timed)


def report(args: argparse.Namespace, workload: Setting, timed: dict[str, list[float]]) -> None:
    """Print a table of medians, relative to the limit and to saexp."""
    median = {name: statistics.median(times) for name, times in timed.items()}
    bound, own = (median[name] for name in list(median)[:2])
    n_tokens = sum(len(t) for t in workload.placement.texts)
    model, device = workload.model, workload.model.device
    used = sum(p.numel() for b in model.blocks[: workload.layer + 1] for p in b.parameters())
    lines = ["| way | seconds | share of the limit | saexp is faster by |", "|---|---|---|---|"]
    for name, seconds in median.items():
        faster = "" if name == list(median)[0] else f"{seconds / own:.2f} x"
        lines.append(f"| {name} | {seconds:.2f} | {bound / seconds:.2f} | {faster} |")
    n_parameters = sum(p.numel() for p in model.hf.parameters())
    machine = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    about: dict[str, Any] = {
        "machine": machine,
        "dtype": str(model.dtype),
        "parameters": n_parameters,
        "layer": [workload.layer, model.n_layers],
        "texts": args.texts,
        "tokens that all begin with": args.shared,
        "tokens": n_tokens,
        "repeats": args.repeats,
        "saexp tokens per second": round(n_tokens / own),
        # With a shared prefix most tokens are not computed, and large half-precision products on a
        # CPU do not measure its peak.
        "saexp share of peak matrix throughput": (
            round(2 * used * n_tokens / own / peak_flops(device, model.dtype), 3)
            if not args.shared and (device.type == "cuda" or model.dtype == torch.float32)
            else None
        ),
        "versions": {
            p: _version(p) for p in ("torch", "transformers", "transformer-lens", "nnsight")
        },
    }
    sys.stdout.write("\n".join([*lines, "", json.dumps(about)]) + "\n")
    if args.out:
        content = {"about": about, "seconds": timed}
        args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
