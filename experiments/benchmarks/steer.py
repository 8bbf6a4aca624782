"""Compare a steering grid with one `generate` call per cell, and the cost of an edit.

    python experiments/benchmarks/steer.py                       # the shipped tiny model, CPU
    python experiments/benchmarks/steer.py --shape 2b --device cuda --dtype bfloat16

The grid has 11 coefficients x 12 latents x 100 prompts, decoded greedily, edited at the entity's
last token. It is compared with transformers' own `generate` on all 100 prompts at once, with a
forward hook that adds the direction, once per (latent, coefficient). The tokens of both are
compared. Times are medians of `--repeats` alternating runs.
"""

import argparse
import json
import logging
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from peers import greedy
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

import saexp
from saexp.data.positions import entity_tokens
from saexp.data.tokenization import tokenize
from saexp.interventions.cached_generation import batch_tokens_for, generate
from saexp.interventions.stream_edits import Add, BatchEdit, Row, Vector
from saexp.models import Hookpoint
from saexp.models.forward import padded
from saexp.models.hooks import edit, position_ids
from saexp.models.loading import LanguageModel
from saexp.models.resolution import pick_device, pick_precision

log = logging.getLogger("steer")
COEFFICIENTS = [round(0.2 * i, 1) for i in range(11)]
Prompt = tuple[tuple[int, ...], int]
"""Token ids and the index of the edited token."""


def tiny(args: argparse.Namespace) -> tuple[LanguageModel, list[Prompt], Hookpoint]:
    """The shipped model and its questions about unknown names."""
    cfg = saexp.compose(["model=tiny", "device=cpu"])
    model = saexp.build("model", cfg.model)
    examples = [e.as_prompt() for e in saexp.build("dataset", cfg.dataset).examples]
    chosen = [e for e in examples if e.spans][:: max(1, len(examples) // args.prompts)]
    chosen = chosen[: args.prompts]
    tokenized = tokenize([e.text for e in chosen], model.tokenizer, 128)
    prompts = [(t.ids, entity_tokens(e, t)[-1]) for e, t in zip(chosen, tokenized, strict=True)]
    return model, prompts, Hookpoint(1, "resid_post")


def gemma(args: argparse.Namespace) -> tuple[LanguageModel, list[Prompt], Hookpoint]:
    """Random weights at Gemma-2-2B's shape; prompts of 12 to 40 random tokens."""
    device = pick_device(args.device)
    torch.manual_seed(0)
    with torch.device(device):
        hf: Any = Gemma2ForCausalLM(Gemma2Config())
    checkpoint = torch.bfloat16 if device.type == "cuda" else None
    hf = hf.to(pick_precision(args.dtype, device, checkpoint).dtype)

    class Ids:
        eos_token_id, pad_token_id = 1, 0

    generator = torch.Generator().manual_seed(0)
    prompts = []
    for _ in range(args.prompts):
        n = int(torch.randint(12, 40, (), generator=generator))
        ids = tuple(torch.randint(5, 200_000, (n,), generator=generator).tolist())
        prompts.append((ids, n - 6))
    return LanguageModel.wrap(hf, Ids()), prompts, Hookpoint(13, "resid_post")


def ours(
    model: LanguageModel, prompts: list[Prompt], at: Hookpoint, vectors: Tensor, n_new: int
) -> list[list[int]]:
    """The whole grid in one call."""
    directions = [Vector(v) for v in vectors]
    rows = [
        Row(ids, (Add(at, vector, c),), (position,))
        for vector in directions
        for c in COEFFICIENTS
        for ids, position in prompts
    ]
    return generate(model, rows, max_new_tokens=n_new, batch_tokens=batch_tokens_for(model, "auto"))


def per_cell(
    model: LanguageModel, prompts: list[Prompt], at: Hookpoint, vectors: Tensor, n_new: int
) -> list[list[int]]:
    """One `generate` call per latent and coefficient."""
    ids, mask = padded([p for p, _ in prompts], model.pad_id, model.device, padding_side="left")
    width = ids.shape[1]
    places = torch.tensor([width - len(p) + k for p, k in prompts], device=model.device)
    rows = torch.arange(len(prompts), device=model.device)
    results = []
    for vector in vectors.to(model.device, model.dtype):
        for coefficient in COEFFICIENTS:

            def hook(_m: Any, _a: Any, out: Any, added: Tensor = coefficient * vector) -> Any:
                stream = out if isinstance(out, Tensor) else out[0]
                if stream.shape[1] == 1:
                    return out
                stream = stream.clone()
                stream[rows, places] += added
                return stream if isinstance(out, Tensor) else (stream, *out[1:])

            handle = model.blocks[at.layer].register_forward_hook(hook)
            out = greedy(model, ids, mask, n_new)
            handle.remove()
            for tokens in out[:, width:].tolist():
                ends = [i for i, t in enumerate(tokens) if t in model.eos_ids]
                results.append(tokens[: ends[0]] if ends else tokens)
    return results


def timed(
    ways: dict[str, Callable[[], Any]], repeats: int, model: LanguageModel
) -> dict[str, float]:
    """Median seconds of each function, alternating, after one warm-up run."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            way()
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - began)
                log.info("%s: %.3f s", name, seconds[name][-1])
    return {name: statistics.median(times) for name, times in seconds.items()}


def overhead(
    model: LanguageModel, prompts: list[Prompt], at: Hookpoint, vectors: Tensor, repeats: int
) -> dict[str, float]:
    """Seconds of a forward pass, bare and with an edit at every token."""
    some = prompts[:32]
    ids, mask = padded([p for p, _ in some], model.pad_id, model.device, padding_side="left")
    vector = Vector(vectors[0])
    rows = [Row(p, (Add(at, vector, 1.0),), tuple(range(len(p)))) for p, _ in some]

    width = ids.shape[1]
    functions = BatchEdit(rows, width, {}, model.device).functions(width)

    @torch.inference_mode()
    def bare() -> Any:
        for _ in range(20):
            model.hf(
                input_ids=ids,
                attention_mask=mask,
                position_ids=position_ids(mask),
                use_cache=False,
                logits_to_keep=1,
            )

    def edited() -> Any:
        with edit(model, functions):
            bare()

    seconds = timed({"bare forward": bare, "with an edit": edited}, repeats, model)
    return {name: s / 20 for name, s in seconds.items()}


def main() -> None:
    """Print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", choices=["tiny", "2b"], default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--latents", type=int, default=12)
    parser.add_argument("--new-tokens", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "measured")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("saexp", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    model, prompts, at = tiny(args) if args.shape == "tiny" else gemma(args)
    model.hf.generation_config.eos_token_id = list(model.eos_ids)
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(args.latents, model.d_model, generator=generator)
    vectors = vectors / vectors.norm(dim=-1, keepdim=True) * model.d_model**0.5
    about = (model, prompts, at, vectors)
    own, theirs = ours(*about, args.new_tokens), per_cell(*about, args.new_tokens)
    same = sum(a == b for a, b in zip(own, theirs, strict=True)) / len(own)
    log.info("equal generations: %.4f of %d", same, len(own))
    grid = timed(
        {
            "saexp, the grid at once": lambda: ours(*about, args.new_tokens),
            "one generate call per cell": lambda: per_cell(*about, args.new_tokens),
        },
        args.repeats,
        model,
    )
    first, second = grid.values()
    passes = overhead(*about, max(args.repeats, 9))
    bare, edited = passes.values()
    results = {
        "grid": [len(COEFFICIENTS), args.latents, len(prompts)],
        "shape": args.shape,
        "device": str(model.device),
        "dtype": str(model.dtype),
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
        "versions": {p: metadata.version(p) for p in ("torch", "transformers")},
        "equal_generations": same,
        "seconds": grid,
        "ratio": second / first,
        "forward_seconds": passes,
        "edit_overhead": edited / bare - 1,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"steer_{args.shape}_{model.device.type}.json"
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    lines = [f"{name:32s} {s:8.2f} s" for name, s in grid.items()]
    lines += [f"{'ratio':32s} {second / first:8.2f} x"]
    lines += [f"{name:32s} {s * 1000:8.2f} ms" for name, s in passes.items()]
    lines += [f"{'overhead of the edit':32s} {100 * (edited / bare - 1):8.1f} %"]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
