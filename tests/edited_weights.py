"""Models whose weights are edited by hand, and how far their predictions move."""

import copy
from typing import Any

import torch
from torch import Tensor

_OUT = ("o_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h")


def by_hand(hf: Any, directions: Tensor, norms: bool = False) -> Any:
    """A copy that writes nothing along the directions: W - Q Q^T W, or its norms' outputs."""
    edited = copy.deepcopy(hf)
    q = torch.linalg.qr(directions.double().T)[0].float()
    for name, module in edited.named_modules():
        last = name.rpartition(".")[2]
        if norms and last in ("post_attention_layernorm", "post_feedforward_layernorm"):
            module.register_forward_hook(lambda _m, _a, out: out - out @ q @ q.T)
        elif not norms and last in _OUT:
            conv = type(module).__name__ == "Conv1D"
            with torch.no_grad():
                w = module.weight
                w.sub_(w @ q @ q.T if conv else q @ q.T @ w)
                if module.bias is not None:
                    module.bias.sub_(q @ q.T @ module.bias)
    return edited


def divergence(before: Any, after: Any, ids: list[int]) -> float:
    """Mean over all positions but the first, one prompt alone."""
    with torch.no_grad():
        first, second = (hf(torch.tensor([ids])).logits[0, 1:] for hf in (before, after))
    logs = [x.double().log_softmax(-1) for x in (second, first)]
    kl = torch.nn.functional.kl_div(*logs, log_target=True, reduction="none")
    return float(kl.sum(-1).mean())
