"""A plain evaluation of one SAE: hooks by hand, one text at a time, whole passes."""

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saexp.analysis.evaluation_passes import Where
from saexp.data.tokenization import TokenizedText
from saexp.models.hooks import capture, edit
from saexp.models.loading import LanguageModel
from saexp.saes import SparseAutoencoder

STATES = ("clean", "sae", "zero", "mean")


@torch.no_grad()
def by_hand(
    model: LanguageModel,
    sae: SparseAutoencoder,
    texts: list[TokenizedText],
    where: Where,
    ratio: float = float("inf"),
) -> tuple[pd.DataFrame, dict[str, float], np.ndarray]:
    """One text at a time, whole passes, no padding, no sharing: (sums, metrics, firing counts).

    Positions whose norm is more than `ratio` times the median of what may be spliced keep theirs.
    """
    into, out = sae.hookpoint, sae.hookpoint_out or sae.hookpoint
    streams: list[tuple[Tensor, Tensor]] = []
    masks = []
    for text in texts:
        ids = torch.tensor([text.ids])
        with capture(model, list({into, out})) as seen:
            model.hf(ids)
        ordinary = ~torch.tensor(text.special)
        spliced = ordinary | where.splice_special
        streams.append((seen[into][0, spliced], seen[out][0, spliced]))
        masks.append((spliced, ordinary | where.ablate_special, ordinary | where.score_special))
    x, target = (torch.cat(part) for part in zip(*streams, strict=True))
    norms = [part.norm(dim=-1) for part in (x, target)]
    high = torch.stack([n > ratio * np.median(n) for n in norms]).any(0)
    every = (x, target)
    x, target = x[~high], target[~high]
    mean = target.mean(0)
    of_text = iter(high.split([int(spliced.sum()) for spliced, _, _ in masks]))
    for spliced, ablated, _ in masks:
        high_norm = torch.zeros_like(spliced)
        high_norm[spliced.clone()] = next(of_text)
        spliced &= ~high_norm
        ablated &= ~high_norm
    rows = []
    for text, (spliced, ablated, counted) in zip(texts, masks, strict=True):
        ids = torch.tensor([text.ids])
        read: list[Tensor] = []

        def change(state: str, spliced=spliced, ablated=ablated, read=read):
            def function(stream: Tensor) -> Tensor:
                new = stream.clone()
                if state == "sae":
                    source = read[-1][0, spliced]
                    new[0, spliced] = sae.decode(sae.encode(source), source)
                if state in ("zero", "mean"):
                    new[0, ablated] = mean if state == "mean" else torch.zeros_like(mean)
                return new

            return function

        logs = {}
        for state in STATES:
            writes = change(state)

            def write(stream: Tensor, writes=writes, read=read) -> Tensor:
                if into == out:
                    read[:] = [stream]
                return writes(stream)

            def look(stream: Tensor, read=read) -> Tensor:
                read[:] = [stream]
                return stream

            with edit(model, {out: write} if into == out else {into: look, out: write}):
                logs[state] = model.hf(ids).logits[0].double().log_softmax(-1)
        scored = torch.nonzero(counted[:-1] & counted[1:])[:, 0]
        row = {"n_spliced": int(spliced.sum()), "n_compared": int(counted.sum())}
        row |= {"n_scored": len(scored)}
        for state, log in logs.items():
            kl = (logs["clean"].exp() * (logs["clean"] - log)).sum(-1)
            row[f"kl_{state}"] = float(kl[counted].sum())
            row[f"ce_{state}"] = -float(log[scored, ids[0, scored + 1]].sum())
        rows.append(row)
    sums = pd.DataFrame(rows).drop(columns="kl_clean")
    acts = sae.encode(x)
    again, target = sae.decode(acts, x).double(), target.double()
    error = (target - again).square().sum(-1)
    spread = (target - target.mean(0)).square().sum(-1)
    of_all = every[1].double()
    lost = (of_all - sae.decode(sae.encode(every[0]), every[0]).double()).square().sum()
    distances = (of_all - of_all.mean(0)).square().sum(-1)
    total = sums.sum()
    ce = {s: total[f"ce_{s}"] / total["n_scored"] for s in STATES}
    kl = {s: total[f"kl_{s}"] / total["n_compared"] for s in STATES[1:]}
    metrics = {
        **{f"reconstruction/ce_{s}": v for s, v in ce.items()},
        **{f"reconstruction/kl_{s}": v for s, v in kl.items()},
        "reconstruction/ce_increase": ce["sae"] - ce["clean"],
        "reconstruction/explained_variance": float(1 - error.mean() / spread.mean()),
        "reconstruction/explained_variance_legacy": float((1 - error / spread).mean()),
        "reconstruction/explained_variance_median": float(np.median(1 - error / spread)),
        "reconstruction/explained_variance_all_positions": float(1 - lost / distances.sum()),
        "reconstruction/high_norm_variance_fraction": float(
            distances[high].sum() / distances.sum()
        ),
        "reconstruction/n_high_norm": int(high.sum()),
        "reconstruction/median_norm": float(np.median(target.norm(dim=-1))),
        "reconstruction/mse": float(error.mean()),
        "reconstruction/cosine": float(torch.cosine_similarity(target, again).mean()),
        "reconstruction/l2_ratio": float((again.norm(dim=-1) / target.norm(dim=-1)).mean()),
        "reconstruction/relative_bias": float(
            again.square().sum(-1).mean() / (again * target).sum(-1).mean()
        ),
        "sparsity/l0": float((acts != 0).sum(-1).double().mean()),
        "sparsity/mean_active": float(acts[acts != 0].double().mean()),
        "sparsity/max_active": float(acts.max()),
        "sparsity/dead_fraction": float((acts == 0).all(0).double().mean()),
        "sparsity/n_positions": len(x),
        "sparsity/n_dead": int((acts == 0).all(0).sum()),
        "evaluation/n_units": len(texts),
        "evaluation/n_scored": int(total["n_scored"]),
        "evaluation/n_compared": int(total["n_compared"]),
    }
    for name, ending in (("zero", ""), ("mean", "_mean")):
        lost, score = ce[name] - ce["clean"], (kl[name] - kl["sae"]) / kl[name]
        metrics[f"reconstruction/kl_score{ending}"] = score
        value = (ce[name] - ce["sae"]) / lost if lost > 0 else float("nan")
        metrics[f"reconstruction/ce_loss_score{ending}"] = value
    return sums, metrics, (acts != 0).sum(0).numpy()
