"""Compare bfloat16 with float32: matrix products, and a model of SmolLM2-135M's shape.

    python experiments/benchmarks/dtypes.py                       # the CPU, one thread
    python experiments/benchmarks/dtypes.py --threads 2
    python experiments/benchmarks/dtypes.py --device cuda

The model has random weights, equal in both dtypes up to rounding: 30 blocks, d_model 576, 9 heads,
3 key-value heads, MLP of 1536, vocabulary 49152. Passes are over 8 x 128 tokens, as collection runs
them (blocks only) and as evaluation does (with logits); generation is greedy, 16 tokens after each
of 8 prompts. Runs of both dtypes alternate; numbers and ratios are medians, with the smallest and
largest ratio. The rows are appended to `measured/dtypes_<device>.csv`.
"""

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaForCausalLM

from saexp.models.resolution import native_dtypes, short_name

MEASURED = Path(__file__).parent / "measured"
COLUMNS = ("device", "threads", "what", "unit", "float32", "bfloat16", "ratio", "low", "high")
PRODUCTS = ((2048, 2048, 2048), (1024, 576, 1536), (1024, 576, 49152))
Pair = dict[str, Callable[[], Any]]


def compared(pair: Pair, amount: float, repeats: int, device: str) -> dict[str, Any]:
    """Amounts per second of both ways, and their ratio."""

    def seconds(function: Callable[[], Any]) -> float:
        began = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    for function in pair.values():
        function()
    timed = [[seconds(function) for function in pair.values()] for _ in range(repeats)]
    ratios = [full / half for full, half in timed]
    rates = [amount / statistics.median(column) for column in zip(*timed, strict=True)]
    return {
        **{name: round(rate, 1) for name, rate in zip(pair, rates, strict=True)},
        "ratio": round(statistics.median(ratios), 2),
        "low": round(min(ratios), 2),
        "high": round(max(ratios), 2),
    }


def products(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Matrix products of a projection of the model, its LM head, and a square one."""
    for n, d_in, d_out in PRODUCTS:
        x = torch.randn(n, d_in, device=args.device)
        weight = torch.randn(d_out, d_in, device=args.device)
        low, low_weight = x.bfloat16(), weight.bfloat16()
        n_times = max(1, round(2e10 / (2 * n * d_in * d_out)))

        def full(x: Any = x, weight: Any = weight, n_times: int = n_times) -> None:
            for _ in range(n_times):
                linear(x, weight)

        def half(x: Any = low, weight: Any = low_weight, n_times: int = n_times) -> None:
            for _ in range(n_times):
                linear(x, weight)

        amount = 2e-9 * n * d_in * d_out * n_times
        rates = compared({"float32": full, "bfloat16": half}, amount, args.repeats, args.device)
        yield {"what": f"product {n} x {d_in} x {d_out}", "unit": "GFLOP/s", **rates}


@torch.inference_mode()
def model(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Passes and generation of the model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    full: Any = LlamaForCausalLM(config).eval().to(args.device)
    half: Any = LlamaForCausalLM(config).eval()
    half.load_state_dict(full.state_dict())
    half = half.to(args.device, torch.bfloat16)
    ids = torch.randint(0, config.vocab_size, (8, 128), device=args.device)
    exact, rounded = (m.model(ids).last_hidden_state.float() for m in (full, half))
    error = ((exact - rounded).norm(dim=-1) / exact.norm(dim=-1)).mean()
    yield {"what": "relative error of the last hidden state", "bfloat16": round(float(error), 4)}

    def generated(m: Any) -> Any:
        options = {"do_sample": False, "pad_token_id": 0}
        return m.generate(ids[:, :32], max_new_tokens=16, min_new_tokens=16, **options)

    ways: dict[str, tuple[int, Callable[[Any], Any]]] = {
        "model, blocks only": (ids.numel(), lambda m: m.model(ids)),
        "model, with logits": (ids.numel(), lambda m: m(ids)),
        "model, generation": (8 * 16, generated),
    }
    for what, (n_tokens, way) in ways.items():
        pair: Pair = {
            "float32": lambda way=way: way(full),
            "bfloat16": lambda way=way: way(half),
        }
        rates = compared(pair, n_tokens, args.repeats, args.device)
        yield {"what": what, "unit": "tokens/s", **rates}


def main() -> None:
    """Print the rows and append them to the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    native = ", ".join(sorted(map(short_name, native_dtypes(torch.device(args.device)))))
    sys.stdout.write(f"computed natively: {native or 'no 16-bit dtype'}\n")
    out = args.out or MEASURED / f"dtypes_{args.device}.csv"
    is_new = not out.exists()
    with out.open("a", encoding="utf-8", newline="") as file:
        writer: csv.DictWriter[str] = csv.DictWriter(file, COLUMNS)
        if is_new:
            writer.writeheader()
        for measure in (products, model):
            for measurement in measure(args):
                row = {"device": args.device, "threads": args.threads, **measurement}
                writer.writerow(row)
                file.flush()
                sys.stdout.write("  ".join(str(row.get(c, "")) for c in COLUMNS) + "\n")


if __name__ == "__main__":
    main()
