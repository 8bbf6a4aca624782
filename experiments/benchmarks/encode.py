"""Compare the dense encode of saexp with sae-lens on the same tensors, and measure memory.

    OMP_NUM_THREADS=1 python experiments/benchmarks/encode.py --out measured/encode_cpu.json

Random weights and inputs; both libraries hold the very same weight tensors, run once to warm up and
then `--repeats` times in turn; the table holds medians and ratios. sae-lens has no BatchTopK for
inference: it saves such SAEs as JumpReLU with one threshold, which is what it is timed with here.
The memory is that of `encode_rows` on one chunk of a JumpReLU SAE of 1M latents, above what weights
and inputs take, as the kernel counts it (Linux only).
"""

import argparse
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saexp.latents import CHUNK_BYTES, encode_rows
from saexp.models import Hookpoint
from saexp.models.resolution import pick_device
from saexp.saes import SAESettings, SparseAutoencoder

AT = Hookpoint(0, "resid_post")
K = 32
ARCHITECTURES = ("standard", "jumprelu", "topk", "batchtopk", "gated")
SIZES = [(768, 16384), (768, 65536), (2304, 16384), (2304, 65536)]
BOUND_CHUNKS = 2
"""Upper bound of the memory for encoding one chunk, in dense chunks."""


def parameters(architecture: str, d_in: int, d_sae: int, device: torch.device) -> dict[str, Tensor]:
    """Unit-norm decoder rows, tied encoder, and thresholds at which about K latents are active."""
    generator = torch.Generator(device).manual_seed(0)
    decoder = torch.randn(d_sae, d_in, generator=generator, device=device)
    decoder /= decoder.norm(dim=-1, keepdim=True)
    bias = torch.zeros(d_sae, device=device)
    # Pre-activations are standard normal.
    share = torch.tensor(1 - K / d_sae, dtype=torch.float64)
    height = float(2**0.5 * torch.erfinv(2 * share - 1))
    weights = {"W_enc": decoder.T.contiguous(), "W_dec": decoder, "b_dec": torch.zeros(d_in)}
    weights["b_dec"] = weights["b_dec"].to(device)
    if architecture == "gated":
        return {**weights, "b_gate": bias - height, "b_mag": bias.clone(), "r_mag": bias + 0.1}
    if architecture in ("jumprelu", "batchtopk"):
        weights["threshold"] = bias + height
    return {**weights, "b_enc": bias - height if architecture == "standard" else bias}


def ours(architecture: str, weights: dict[str, Tensor]) -> SparseAutoencoder:
    """The encoder of saexp."""
    k = K if architecture == "topk" else None
    return SparseAutoencoder(weights, SAESettings(architecture=architecture, hookpoint=AT, k=k))


def theirs(architecture: str, weights: dict[str, Tensor]) -> Any:
    """The encoder of sae-lens with the same tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sae_lens
        from sae_lens.saes.sae import SAEMetadata
    names = {"standard": "Standard", "topk": "TopK", "gated": "Gated"}
    name = names.get(architecture, "JumpReLU")
    d_in, d_sae = weights["W_enc"].shape
    options = {"k": K} if architecture == "topk" else {}
    config = getattr(sae_lens, f"{name}SAEConfig")(
        # Made small: its own random weights are replaced.
        d_in=2,
        d_sae=max(2, K),
        device=str(weights["W_enc"].device),
        metadata=SAEMetadata(hook_name=AT.transformer_lens),
        **options,
    )
    sae = getattr(sae_lens, f"{name}SAE")(config)
    sae.cfg.d_in, sae.cfg.d_sae = d_in, d_sae
    for parameter, value in weights.items():
        getattr(sae, parameter).data = value
    return sae


def timed(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, alternating, after one warm-up run of each."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(-1, repeats):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


@torch.inference_mode()
def compare(
    architecture: str, d_in: int, d_sae: int, args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """One row of the table; both must give the same activations."""
    weights = parameters(architecture, d_in, d_sae, device)
    x = torch.randn(
        args.rows, d_in, generator=torch.Generator(device).manual_seed(1), device=device
    )
    own, other = ours(architecture, weights), theirs(architecture, weights)
    same = (own.encode(x) - other.encode(x)).abs().max()
    assert float(same) < 1e-3, f"{architecture}: activations differ by {float(same)}"
    seconds = timed(
        {"saexp": lambda: own.encode(x), "sae-lens": lambda: other.encode(x)}, args.repeats
    )
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "rows": args.rows,
        "median_seconds": {name: round(value, 4) for name, value in median.items()},
        "sae_lens_over_saexp": round(median["sae-lens"] / median["saexp"], 3),
        "seconds": {name: [round(v, 4) for v in values] for name, values in seconds.items()},
    }


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise ValueError(name)


def chunk_memory(d_in: int = 64, d_sae: int = 2**20) -> dict[str, Any]:
    """Peak memory of encoding one chunk, and its upper bound."""
    sae = ours("jumprelu", parameters("jumprelu", d_in, d_sae, torch.device("cpu")))
    n_rows = max(1, CHUNK_BYTES // (4 * d_sae))
    acts, rows = torch.randn(n_rows, d_in), pd.DataFrame({"row": range(n_rows)})
    # Whatever the first call allocates for good.
    encode_rows(acts, np.arange(1), sae, rows[:1])
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", "utf-8")
    encode_rows(acts, np.arange(n_rows), sae, rows)
    used = _status("VmHWM") - before
    bound = BOUND_CHUNKS * CHUNK_BYTES
    assert used <= bound, f"{used} bytes used, {bound} allowed"
    return {
        "d_in": d_in,
        "d_sae": d_sae,
        "rows": n_rows,
        "dense_chunk_bytes": CHUNK_BYTES,
        "peak_bytes": used,
        "peak_in_chunks": round(used / CHUNK_BYTES, 2),
        "bound_in_chunks": BOUND_CHUNKS,
    }


def main() -> None:
    """Run, print the table, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = pick_device(args.device)
    rows = [
        compare(architecture, d_in, d_sae, args, device)
        for d_in, d_sae in SIZES
        for architecture in ARCHITECTURES
    ]
    lines = ["| SAE | d_in | d_sae | saexp, s | sae-lens, s | saexp is faster by |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        own, other = row["median_seconds"].values()
        lines.append(
            f"| {row['architecture']} | {row['d_in']} | {row['d_sae']} | {own:.3f} | {other:.3f} "
            f"| {row['sae_lens_over_saexp']:.2f} x |"
        )
    memory = chunk_memory() if sys.platform == "linux" else None
    cuda = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    about = {
        "machine": cuda or f"{platform.machine()}, {torch.get_num_threads()} threads",
        "dtype": "float32",
        "repeats": args.repeats,
        "versions": {p: metadata.version(p) for p in ("torch", "sae-lens")},
    }
    sys.stdout.write("\n".join([*lines, "", json.dumps(memory), json.dumps(about)]) + "\n")
    if args.out:
        content = {"about": about, "encode": rows, "memory_of_a_chunk": memory}
        args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
