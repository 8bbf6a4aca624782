"""Take the SAEs of `task=train` to where the package ships them, a threshold for each latent.

BatchTopK leaves one threshold for all latents, above which strong latents fire weakly all over the
text. Here a latent's becomes THRESHOLD_SHARE of the 99th percentile of its activations, where that
is higher; the decoder is then fitted to what is left. Weights are kept as float16 to stay small.

python experiments/tiny_lm/ship_saes.py --sweeps build/tiny/training --name tiny \
    --out build/tiny/sae
"""

import argparse
import json
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from saexp import api
from saexp.saes.loading import load_sae

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
THRESHOLD_SHARE, N_ROWS = 0.25, 30_000
N_PRIOR = 10
"""Typical firings that count for a decoder row as trained when it is fitted."""
READ_BY = (
    "architecture",
    "d_in",
    "d_sae",
    "dtype",
    "device",
    "apply_b_dec_to_input",
    "normalize_activations",
    "reshape_activations",
)


def thresholds(
    weights: dict[str, Tensor], acts: Float[Tensor, "n d_in"]
) -> Float[Tensor, " d_sae"]:
    """A latent's own where it fires on `acts`, the given one elsewhere; at least the given one."""
    learned = weights["threshold"]
    pre = (acts - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    active = [column[column > least] for column, least in zip(pre.T, learned, strict=True)]
    high = torch.stack(
        [a.quantile(0.99) if len(a) else g for a, g in zip(active, learned, strict=True)]
    )
    return torch.maximum(learned, THRESHOLD_SHARE * high)


def fitted(weights: dict[str, Tensor], acts: Float[Tensor, "n d_in"]) -> dict[str, Tensor]:
    """The decoder that reconstructs `acts` best (ridge towards the given one), rows of unit norm.

    Which latents fire where stays as it was; their activations take the rows' norms.
    """
    w_enc, w_dec, b_dec = (weights[n] for n in ("W_enc", "W_dec", "b_dec"))
    pre = (acts - b_dec) @ w_enc + weights["b_enc"]
    fired = pre * (pre > weights["threshold"])
    error = (acts - fired @ w_dec - b_dec).double()
    design = torch.cat([fired, torch.ones(len(fired), 1)], dim=1).double()
    prior = torch.full((design.shape[1],), float(fired.square().sum() / (fired > 0).sum()))
    prior[-1] = 0.0
    gram = design.T @ design + N_PRIOR * torch.diag(prior).double()
    change = torch.linalg.solve(gram, design.T @ error).float()
    rows, moved = w_dec + change[:-1], change[-1]
    norms = rows.norm(dim=-1)
    return {
        "W_enc": w_enc * norms,
        "b_enc": (weights["b_enc"] + moved @ w_enc) * norms,
        "W_dec": rows / norms[:, None],
        "b_dec": b_dec + moved,
        "threshold": weights["threshold"] * norms,
    }


def ship(run: Path, out: Path, name: str) -> Path:
    """The SAE of a run of `task=train` as `layer_<n>/width_<n>` below `out`, SAELens format.

    `name` is the shipped model's. The config keeps what an SAE is read by, not how it was trained.
    """
    sae_folder = run / "sae"
    hookpoint = load_sae(sae_folder).hookpoint
    weights = load_file(sae_folder / WEIGHTS)
    about = json.loads((run / "provenance.json").read_text("utf-8"))
    stored = api.open_store(about["store"]["path"]).acts(hookpoint.layer, hookpoint.stream)
    order = torch.randperm(len(stored), generator=torch.Generator().manual_seed(0))
    acts = stored[order[:N_ROWS].sort().values].float()
    weights["threshold"] = thresholds(weights, acts)
    weights = fitted(weights, acts)
    cfg = json.loads((sae_folder / CONFIG).read_text("utf-8"))
    folder = out / f"layer_{hookpoint.layer}" / f"width_{cfg['d_sae']}"
    folder.mkdir(parents=True, exist_ok=True)
    half = {n: p.to(torch.float16).contiguous() for n, p in weights.items()}
    save_file(half, folder / WEIGHTS)
    read_by = {key: cfg[key] for key in READ_BY}
    read_by["metadata"] = {
        "model_name": f"saexp/{name}",
        "hook_name": cfg["metadata"]["hook_name"],
        "hook_head_index": None,
        "prepend_bos": True,
        "context_size": cfg["metadata"]["context_size"],
    }
    (folder / CONFIG).write_text(json.dumps(read_by, indent=1) + "\n", encoding="utf-8")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweeps", type=Path, required=True, help="folder with sweeps' folders")
    parser.add_argument("--name", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for config in sorted(args.sweeps.rglob(f"sae/{CONFIG}")):
        ship(config.parent.parent, args.out, args.name)
