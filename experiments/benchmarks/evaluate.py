"""Compare the evaluation of an SAE with sae-lens' `run_evals` on the same tokens, in one process.

    python experiments/benchmarks/evaluate.py                    # small GPT-2-shaped model, CPU
    python experiments/benchmarks/evaluate.py --shape gpt2 --device cuda

Random weights of a real GPT-2 config, a random JumpReLU SAE on resid_post of the middle block,
texts of one length (no padding on either side). Both compute loss and KL with the reconstruction
and with zeros in place of the stream, L0, densities and variance metrics, and saexp intervals; a
second row of saexp adds the mean ablation, which sae-lens lacks. sae-lens runs on the same Hugging
Face model (its AutoModelForCausalLM route) and on a HookedTransformer of the same shape. Every way
runs once to warm up, then `--repeats` times in turn; the table holds medians and ratios, and below
it both tools' numbers.
"""

import argparse
import json
import logging
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from saexp.analysis.evaluation import EvaluationSettings, Numbers, densities, evaluate_saes, numbers
from saexp.analysis.evaluation_passes import Where
from saexp.data.tokenization import TokenizedText
from saexp.models import Hookpoint
from saexp.models.hooks import run_truncated
from saexp.models.loading import LanguageModel
from saexp.models.resolution import pick_device
from saexp.saes.loading import load_sae

SHAPES: dict[str, dict[str, Any]] = {
    "small": {"n_embd": 256, "n_layer": 8, "n_head": 8, "vocab_size": 16384},
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257},
}
BOS = 0
SHOWN = {
    "reconstruction/ce_clean": "ce_loss_without_sae",
    "reconstruction/ce_sae": "ce_loss_with_sae",
    "reconstruction/ce_zero": "ce_loss_with_ablation",
    "reconstruction/kl_sae": "kl_div_with_sae",
    "reconstruction/explained_variance": "explained_variance",
    "sparsity/l0": "l0",
}


class _Tokenizer:
    """The tokenizer methods that both tools call; the texts are token ids already."""

    bos_token_id, eos_token_id, pad_token_id, unk_token_id = BOS, None, None, None
    sep_token_id, cls_token_id, decoder_start_token_id = None, None, None
    padding_side = "right"


class _Tokens:
    """The methods of an activation store that `run_evals` calls."""

    def __init__(self, tokens: torch.Tensor, batch_size: int) -> None:
        self.tokens, self.store_batch_size_prompts = tokens, batch_size
        self.context_size, self.at = tokens.shape[1], 0

    def get_batch_tokens(self, n: int) -> torch.Tensor:
        """The next texts, starting over after the last."""
        start = self.at % len(self.tokens)
        self.at = start + n
        return self.tokens[start : start + n]

    def reset_input_dataset(self) -> None:
        """Start over."""
        self.at = 0


def write_sae(folder: Path, stream: torch.Tensor, layer: int) -> Path:
    """A random JumpReLU SAE with d_sae = 8 d_in for `stream [n, d_in]`, whose latents are active at
    5 % of its rows."""
    generator = torch.Generator().manual_seed(1)
    d_in = stream.shape[1]
    d_sae = 8 * d_in
    decoder = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=-1)
    weights = {
        "W_enc": decoder.T.contiguous(),
        "W_dec": decoder,
        "b_enc": torch.zeros(d_sae),
        "b_dec": torch.zeros(d_in),
        "threshold": torch.quantile(stream @ decoder.T, 0.95, dim=0).clamp(min=0),
    }
    save_file(weights, folder / "sae_weights.safetensors")
    cfg = {
        "architecture": "jumprelu",
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": f"blocks.{layer}.hook_resid_post", "model_name": "random"},
    }
    (folder / "cfg.json").write_text(json.dumps(cfg), encoding="utf-8")
    return folder


def saexp_way(
    model: LanguageModel, folder: Path, tokens: torch.Tensor, ablations: tuple[str, ...]
) -> Callable[[], Numbers]:
    """`evaluate_saes`, numbers with intervals, densities."""
    n = tokens.shape[1]
    special = (True, *(False,) * (n - 1))
    texts = [TokenizedText("", tuple(r), ((0, 0),) * n, special, False) for r in tokens.tolist()]
    sae = load_sae(folder).to(model.device)
    settings = EvaluationSettings(where=Where(ablate_special=True), ablations=ablations)

    def run() -> Numbers:
        (one,) = evaluate_saes(model, [sae], texts, settings)
        densities(one)
        return numbers(one, 1000, 0)

    return run


def sae_lens_way(
    proxy: Any, hook_name: str, folder: Path, tokens: torch.Tensor, batch_size: int
) -> Callable[[], Numbers]:
    """`run_evals` with all metrics."""
    from sae_lens import SAE
    from sae_lens.evals import get_eval_everything_config, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    sae = SAE.load_from_disk(folder, device=str(tokens.device))
    sae.cfg.metadata.hook_name = hook_name
    n_batches = len(tokens) // batch_size
    config = get_eval_everything_config(batch_size, n_batches, n_batches)

    def run() -> Numbers:
        store: Any = _Tokens(tokens, batch_size)
        metrics, _ = run_evals(sae, store, proxy, ActivationScaler(), config)
        return {name: value for of in metrics.values() for name, value in of.items()}

    return run


def hooked_transformer(hf: Any, tokens: torch.Tensor) -> Any:
    """A TransformerLens model of the same shape, with other random weights."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=hf.config.n_layer,
        d_model=hf.config.n_embd,
        n_ctx=hf.config.n_positions,
        d_head=hf.config.n_embd // hf.config.n_head,
        n_heads=hf.config.n_head,
        d_mlp=4 * hf.config.n_embd,
        d_vocab=hf.config.vocab_size,
        act_fn="gelu_new",
        normalization_type="LN",
        device=str(tokens.device),
        seed=0,
    )
    hooked: Any = HookedTransformer(config).eval()
    hooked.tokenizer = _Tokenizer()
    return hooked


def main() -> None:
    """Run, print the table, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16, help="of sae-lens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    warnings.simplefilter("ignore")
    from sae_lens.load_model import HookedProxyLM

    device = pick_device(args.device)
    torch.manual_seed(0)
    config = GPT2Config(**SHAPES[args.shape], bos_token_id=BOS, eos_token_id=BOS)
    hf: Any = GPT2LMHeadModel(config)
    hf = hf.to(device).eval().requires_grad_(False)
    layer = config.n_layer // 2
    tokens = torch.randint(1, config.vocab_size, (args.texts, args.length)).to(device)
    tokens[:, 0] = BOS
    model = LanguageModel.wrap(hf, _Tokenizer(), f"random GPT-2, {args.shape}")
    with tempfile.TemporaryDirectory() as directory:
        at = Hookpoint(layer, "resid_post")
        mask = torch.ones_like(tokens[:8])
        stream = run_truncated(model, tokens[:8], mask, [at])[at][:, 1:].flatten(0, 1)
        folder = write_sae(Path(directory), stream.float().cpu(), layer)
        tokenizer: Any = _Tokenizer()
        hook_name = f"transformer.h.{layer}"
        proxy = HookedProxyLM(hf, tokenizer, hook_names=[hook_name])
        lens = hooked_transformer(hf, tokens)
        lens_name = f"blocks.{layer}.hook_resid_post"
        ways = {
            "saexp": saexp_way(model, folder, tokens, ("zero",)),
            "saexp, with mean ablation": saexp_way(model, folder, tokens, ("zero", "mean")),
            "sae-lens run_evals, AutoModelForCausalLM": sae_lens_way(
                proxy, hook_name, folder, tokens, args.batch_size
            ),
            "sae-lens run_evals, HookedTransformer": sae_lens_way(
                lens, lens_name, folder, tokens, args.batch_size
            ),
        }
        results = {name: run() for name, run in ways.items()}
        timed: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.repeats):
            for name, run in ways.items():
                _sync(device)
                began = time.perf_counter()
                run()
                _sync(device)
                timed[name].append(time.perf_counter() - began)
    report(args, device, timed, results)


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def report(
    args: argparse.Namespace,
    device: torch.device,
    timed: dict[str, list[float]],
    results: dict[str, Numbers],
) -> None:
    """A table of medians, and the metrics of both tools on the same model."""
    median = {name: statistics.median(times) for name, times in timed.items()}
    own, other = (list(results.values())[i] for i in (0, 2))
    lines = ["| way | seconds | saexp is faster by |", "|---|---|---|"]
    for name, seconds in median.items():
        faster = "" if name == "saexp" else f"{seconds / median['saexp']:.2f} x"
        lines.append(f"| {name} | {seconds:.2f} | {faster} |")
    lines += ["", "| same model | saexp | sae-lens |", "|---|---|---|"]
    lines += [
        f"| {theirs} | {own[ours]:.5f} | {other[theirs]:.5f} |" for ours, theirs in SHOWN.items()
    ]
    machine = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    about = {
        "machine": machine,
        "shape": SHAPES[args.shape],
        "tokens": args.texts * args.length,
        "repeats": args.repeats,
        "versions": {
            p: metadata.version(p)
            for p in ("torch", "transformers", "transformer-lens", "sae-lens")
        },
    }
    sys.stdout.write("\n".join([*lines, "", json.dumps(about)]) + "\n")
    if args.out:
        content = {"about": about, "seconds": timed, "numbers": results}
        args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
