"""Compare greedy generation from many prompts with transformers' own `generate`.

    python experiments/benchmarks/generate.py                              # the CPU
    python experiments/benchmarks/generate.py --device cuda --shape 2b

Random weights of Gemma-2's shape and prompts of 8 to 64 random tokens, without edits. saexp sorts
prompts by length, sets the batch size itself and drops finished rows; `generate` gets the prompts
in the data's order, in batches of `--batch-size`. Both continue every prompt by exactly
`--new-tokens` tokens, unless the end token comes first. Times are medians of `--repeats`
alternating runs, for each of `--dtypes` in turn.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from peers import SHAPES, greedy
from transformers import Gemma2Config, Gemma2ForCausalLM

from saexp.interventions.cached_generation import batch_tokens_for, generate
from saexp.interventions.stream_edits import Row
from saexp.models.forward import padded
from saexp.models.loading import LanguageModel
from saexp.models.resolution import pick_device, short_name

Prompts = list[tuple[int, ...]]


class _Ids:
    """The tokenizer methods that generation calls; the prompts are token ids already."""

    eos_token_id, pad_token_id = 1, 0

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


def random_prompts(n: int, vocabulary: int) -> Prompts:
    """Prompts of 8 to 64 tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 65, (n,), generator=generator).tolist()
    return [
        tuple(torch.randint(5, vocabulary, (length,), generator=generator).tolist())
        for length in lengths
    ]


def ours(model: LanguageModel, prompts: Prompts, n_new: int) -> list[list[int]]:
    """All prompts in one call."""
    rows = [Row(ids) for ids in prompts]
    return generate(model, rows, max_new_tokens=n_new, batch_tokens=batch_tokens_for(model, "auto"))


def theirs(model: LanguageModel, prompts: Prompts, n_new: int, batch_size: int) -> list[list[int]]:
    """Batches in the data's order."""
    continuations = []
    for start in range(0, len(prompts), batch_size):
        some = prompts[start : start + batch_size]
        ids, mask = padded(some, model.pad_id, model.device, padding_side="left")
        out = greedy(model, ids, mask, n_new)
        for tokens in out[:, ids.shape[1] :].tolist():
            ends = [i for i, token in enumerate(tokens) if token in model.eos_ids]
            continuations.append(tokens[: ends[0]] if ends else tokens)
    return continuations


def seconds(function: Callable[[], Any], model: LanguageModel) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    function()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compare(hf: Any, args: argparse.Namespace, prompts: Prompts) -> dict[str, Any]:
    """Both ways in the model's dtype."""
    model = LanguageModel.wrap(hf, _Ids(), f"random Gemma-2, {args.shape}")
    ways: dict[str, Callable[[], list[list[int]]]] = {
        "saexp": lambda: ours(model, prompts, args.new_tokens),
        "reference": lambda: theirs(model, prompts, args.new_tokens, args.batch_size),
    }
    first, second = (way() for way in ways.values())
    timed: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, way in ways.items():
            timed[name].append(seconds(way, model))
    n_tokens = sum(map(len, first))
    pairs = zip(timed["reference"], timed["saexp"], strict=True)
    return {
        "dtype": short_name(model.dtype),
        "equal": sum(a == b for a, b in zip(first, second, strict=True)) / len(prompts),
        "tokens": n_tokens,
        "seconds": timed,
        "tokens_per_second": {k: n_tokens / statistics.median(v) for k, v in timed.items()},
        "ratio": statistics.median(a / b for a, b in pairs),
    }


def main() -> None:
    """Print the table, write it as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16, help="of transformers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "measured")
    args = parser.parse_args()
    device = pick_device(args.device)
    torch.manual_seed(0)
    config = Gemma2Config(**SHAPES[args.shape])  # pyright: ignore
    with torch.device(device):
        hf: Any = Gemma2ForCausalLM(config).eval()
    hf.generation_config.eos_token_id = _Ids.eos_token_id
    prompts = random_prompts(args.prompts, config.vocab_size)
    results = []
    for name in args.dtypes.split(","):
        results.append(compare(hf.to(getattr(torch, name)), args, prompts))
    about = {
        "shape": args.shape,
        "device": device.type,
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
        "prompts": args.prompts,
        "versions": {p: metadata.version(p) for p in ("torch", "transformers")},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"generate_{args.shape}_{device.type}.json"
    content = json.dumps({"about": about, "results": results}, indent=1)
    file.write_text(content + "\n", encoding="utf-8")
    lines = ["| dtype | saexp, tokens/s | transformers, tokens/s | ratio | equal texts |"]
    lines += ["|---|---|---|---|---|"]
    for one in results:
        own, other = one["tokens_per_second"].values()
        cells = (one["dtype"], f"{own:.0f}", f"{other:.0f}", f"{one['ratio']:.2f}")
        lines.append(f"| {' | '.join(cells)} | {one['equal']:.2f} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
