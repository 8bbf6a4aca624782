"""Train BatchTopK SAEs on every layer of a tiny model and keep them as JumpReLU, SAELens format.

python experiments/tiny_lm/train_saes.py --model build/tiny/model --out build/tiny/sae
"""

import argparse
import json
import logging
import time
from pathlib import Path

import numpy as np
import torch
from corpus import document
from safetensors.torch import save_file
from tokenizer import make_world
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

log = logging.getLogger("train_saes")

N_DOCUMENTS, BATCH = 16_000, 2048
N_STEPS, N_FIXED_STEPS = 1100, 400
THRESHOLD_SHARE = 0.25
LR, AUX_WEIGHT, DEAD_AFTER = 2e-3, 1 / 32, 100
K_OF_WIDTH = {256: 7, 512: 11}


@torch.inference_mode()
def collect(path: Path, seed: int) -> dict[int, Tensor]:
    """`resid_post` of every block at every token but BOS of fresh documents: layer -> `[n, d]`."""
    world, _ = make_world(0)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    rng = np.random.default_rng(seed + 500)
    texts = [document(world, rng, statements=0.5).text for _ in range(N_DOCUMENTS)]
    lists = sorted(tokenizer(texts)["input_ids"], key=len)
    kept: dict[int, list[Tensor]] = {}
    hooks = [
        block.register_forward_hook(
            lambda _m, _a, out, i=i: kept.setdefault(i, []).append(
                (out if isinstance(out, Tensor) else out[0])[mask]
            )
        )
        for i, block in enumerate(model.model.layers)
    ]
    for start in range(0, len(lists), 256):
        batch = lists[start : start + 256]
        ids = torch.full((len(batch), max(map(len, batch))), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for i, tokens in enumerate(batch):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            mask[i, 1 : len(tokens)] = True
        model.model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return {i: torch.cat(parts) for i, parts in kept.items()}


def train(data: Tensor, width: int, k: int, seed: int) -> dict[str, Tensor]:
    """BatchTopK (Bussmann et al. 2024) with an auxiliary loss for dead latents (Gao et al. 2024).

    The last N_FIXED_STEPS run as JumpReLU with fixed thresholds: a latent's is THRESHOLD_SHARE of
    its 99th percentile where active, and at least the one that gives mean L0 k. Weak stray firings
    end there. Returns parameters in the stream's own scale, decoder rows of unit norm.
    """
    generator = torch.Generator().manual_seed(seed)
    n, d = data.shape
    factor = d**0.5 / data.norm(dim=-1).mean()
    b_dec = (data.mean(0) * factor).clone().requires_grad_()
    start = data[torch.randperm(n, generator=generator)[:width]] * factor - b_dec.detach()
    start = start + 0.1 * torch.randn(width, d, generator=generator)
    w_dec = torch.nn.functional.normalize(start, dim=-1).requires_grad_()
    w_enc = (w_dec.detach().T.clone() * 0.5).requires_grad_()
    b_enc = torch.zeros(width, requires_grad=True)
    parameters = [w_enc, w_dec, b_enc, b_dec]
    optimiser = torch.optim.Adam(parameters, lr=LR, betas=(0.9, 0.99))
    silent = torch.zeros(width)
    thresholds: Tensor | None = None
    for step in range(N_STEPS + N_FIXED_STEPS):
        left = (N_STEPS + N_FIXED_STEPS - step) / (0.5 * (N_STEPS + N_FIXED_STEPS))
        optimiser.param_groups[0]["lr"] = LR * min(1, left)
        x = data[torch.randint(n, (BATCH,), generator=generator)] * factor
        pre = ((x - b_dec) @ w_enc + b_enc).relu()
        if step == N_STEPS:
            sample = data[torch.randint(n, (30_000,), generator=generator)] * factor
            with torch.no_grad():
                thresholds = _thresholds(((sample - b_dec) @ w_enc + b_enc).relu(), k)
        cut = thresholds
        if cut is None:
            cut = pre.detach().flatten().kthvalue(pre.numel() - k * BATCH).values
        acts = pre * (pre > cut)
        error = x - (acts @ w_dec + b_dec)
        loss = error.square().sum(-1).mean()
        silent = torch.where((acts.detach() > 0).any(0), 0, silent + 1)
        dead = silent > DEAD_AFTER
        if thresholds is None and bool(dead.any()):
            raw = ((x - b_dec) @ w_enc[:, dead] + b_enc[dead]).relu()
            top = raw.topk(min(2 * k, raw.shape[1]), dim=-1)
            guess = torch.zeros_like(raw).scatter(-1, top.indices, top.values) @ w_dec[dead]
            loss = loss + AUX_WEIGHT * (error.detach() - guess).square().sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            w_dec /= w_dec.norm(dim=-1, keepdim=True)
    assert thresholds is not None
    return {
        "W_enc": w_enc.detach(),
        "b_enc": b_enc.detach() / factor,
        "W_dec": w_dec.detach(),
        "b_dec": b_dec.detach() / factor,
        "threshold": thresholds / factor,
    }


def _thresholds(pre: Tensor, k: int) -> Tensor:
    """One per latent: `[n, width]` pre-activations, zeros where negative -> `[width]`."""
    least = pre.flatten().kthvalue(pre.numel() - k * len(pre)).values
    active = [column[column > least] for column in pre.T]
    high = torch.stack([a.quantile(0.99) if len(a) else least for a in active])
    return torch.maximum(least, THRESHOLD_SHARE * high)


def save(parameters: dict[str, Tensor], folder: Path, layer: int, model_name: str) -> None:
    """SAELens layout; weights as float16 to stay small."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {n: p.to(torch.float16).contiguous() for n, p in parameters.items()}
    save_file(half, folder / "sae_weights.safetensors")
    d_in, d_sae = parameters["W_enc"].shape
    cfg = {
        "architecture": "jumprelu",
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "model_name": f"saexp/{model_name}",
            "hook_name": f"blocks.{layer}.hook_resid_post",
            "hook_head_index": None,
            "prepend_bos": True,
            "context_size": 128,
        },
    }
    (folder / "cfg.json").write_text(json.dumps(cfg, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--widths", type=int, nargs="+", default=sorted(K_OF_WIDTH))
    parser.add_argument("--layers", type=int, nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    streams = collect(args.model, args.seed)
    for layer, acts in streams.items():
        for width in args.widths if args.layers is None or layer in args.layers else ():
            began = time.perf_counter()
            trained = train(acts, width, K_OF_WIDTH[width], args.seed)
            folder = args.out / f"layer_{layer}" / f"width_{width}"
            save(trained, folder, layer, args.model.resolve().parent.name)
            log.info("layer %d width %d: %.0f s", layer, width, time.perf_counter() - began)
