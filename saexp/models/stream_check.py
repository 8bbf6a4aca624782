"""Whether the streams found by name are what the blocks of this very model add up.

Families differ in what they do between attention, MLP and the stream: norms behind them, factors,
convolutions, a second MLP. One short forward pass shows it, where names do not.

Shapes: t tokens, d the stream's width.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from saexp.errors import ModelError
from saexp.models.hookpoints import Hookpoint
from saexp.models.structure import Site, find_site

log = logging.getLogger(__name__)

ADDING = ("attn_out", "resid_mid", "mlp_out")
"""Streams that are right only where the block adds them up."""
_READ = ("resid_pre", *ADDING, "mlp_in", "resid_post")
_TOKENS = (5, 7, 11, 6)
"""Ordinary tokens (or bytes) in every common vocabulary."""
_ROUNDING = 4
"""Errors of one addition that are let pass, in units of the dtype's precision."""


def broken_streams(hf: Any, blocks: nn.ModuleList, config: Any) -> dict[Hookpoint, str]:
    """Hookpoints that do not hold what their names say, each with the reason.

    One forward pass of a few tokens through the blocks, without the LM head; weights and hooks are
    left as they are. Empty where the model cannot be run on tokens alone.
    """
    sites = _sites(blocks, config)
    seen: dict[Hookpoint, Tensor] = {}
    handles = []

    def keep(at: Hookpoint, values: Any) -> None:
        first = values if isinstance(values, Tensor) else values[0]
        # Some blocks (Falcon's) add to these in place.
        seen[at] = first.detach().clone()

    try:
        for at, site in sites.items():
            if site.side == "output":
                handle = site.module.register_forward_hook(lambda _m, _a, out, h=at: keep(h, out))
            else:
                handle = site.module.register_forward_pre_hook(
                    lambda _m, args, kwargs, h=at: keep(
                        h, args[0] if args else kwargs.get("hidden_states")
                    ),
                    with_kwargs=True,
                )
            handles.append(handle)
        device = hf.get_input_embeddings().weight.device
        with torch.inference_mode():
            hf.base_model(input_ids=torch.tensor([_TOKENS], device=device), use_cache=False)
    except Exception as error:
        # A model that needs more than tokens says so itself, in the run.
        log.debug("streams of %s not checked: %s", type(hf).__name__, error)
        return {}
    finally:
        for handle in handles:
            handle.remove()
    return _judge(seen, blocks)


def _sites(blocks: nn.ModuleList, config: Any) -> dict[Hookpoint, Site]:
    found: dict[Hookpoint, Site] = {}
    for layer in range(len(blocks)):
        for stream in _READ:
            at = Hookpoint(layer, stream)
            try:
                found[at] = find_site(blocks, at, config)
            except ModelError:
                # Said when the stream is asked for.
                continue
    return found


def _judge(seen: dict[Hookpoint, Tensor], blocks: nn.ModuleList) -> dict[Hookpoint, str]:
    broken: dict[Hookpoint, str] = {}
    for layer, block in enumerate(blocks):
        kind = type(block).__name__
        values = {s: seen.get(Hookpoint(layer, s)) for s in _READ}
        for stream in _wrong(values):
            broken[Hookpoint(layer, stream)] = (
                f"{kind} does not add its attention's and MLP's output to the stream as it is, "
                f"so it has no {stream}; use resid_pre or resid_post"
            )
        for stream in ("mlp_in", "mlp_out", "resid_mid"):
            found = values[stream]
            if found is not None and found.ndim == 2:
                broken[Hookpoint(layer, stream)] = (
                    f"{kind} joins the tokens of all texts at its MLP, so saexp cannot read "
                    f"{stream}; use resid_pre or resid_post"
                )
        after, following = values["resid_post"], seen.get(Hookpoint(layer + 1, "resid_pre"))
        if after is None or after.ndim != 3:
            reason = f"{kind} returns no stream of one vector a token"
        elif following is not None and not torch.equal(after.cpu(), following.cpu()):
            reason = f"what {kind} returns at layer {layer} is not what the next block reads"
        else:
            continue
        for at in (Hookpoint(layer, "resid_post"), Hookpoint(layer + 1, "resid_pre")):
            broken[at] = f"{reason}, so it has no {at.stream}; choose another stream"
    return broken


def _wrong(values: dict[str, Tensor | None]) -> list[str]:
    """Of ADDING, the streams that are not what the block adds up.

    An edit of resid_mid is added to what the block returns, so that must be resid_mid and something
    that depends on its norm alone: the MLP's output, or that times a factor, or it is in there.
    """
    pre, attention, mid, mlp, post = (
        values[s] for s in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    )
    if mid is None:
        right = {s: _adds([pre, attention, mlp], post) for s in ("attn_out", "mlp_out")}
    else:
        right = {
            "attn_out": attention is None or _adds([pre, attention], mid),
            "mlp_out": mlp is None or _adds([mid, mlp], post),
            "resid_mid": _leads(pre, attention, mid) and _leads(mid, mlp, post),
        }
    return [s for s, holds in right.items() if not holds and values[s] is not None]


def _leads(before: Tensor | None, part: Tensor | None, after: Tensor | None) -> bool:
    """Whether `after` is `before` and the part times a factor, or the part, which has both."""
    if before is None or part is None or after is None or part.numel() != after.numel():
        return part is None
    if _adds([part], after) or _adds([before, part], after):
        return True
    wide, start, end = (t.reshape(-1).cpu().double() for t in (part, before, after))
    # Each number as far as it is exact: attention sinks have some of 10^4 among those of 1.
    exact = 1 / (start.abs() + wide.abs() + end.abs()).clamp(min=1e-300) ** 2
    factor = float((exact * wide) @ (end - start) / ((exact * wide) @ wide).clamp(min=1e-300))
    return _adds([before, part], after, factor)


def _adds(parts: list[Tensor | None], whole: Tensor | None, factor: float = 1.0) -> bool:
    """Whether the parts' sum, the last times the factor, is the whole, rounding aside."""
    there = [p for p in parts if p is not None]
    if whole is None or len(there) < len(parts):
        return False
    wide = [p.reshape(-1, p.shape[-1]).cpu().double() for p in (*there, whole)]
    if len({p.shape for p in wide}) > 1:
        return False
    wide[-2] = wide[-2] * factor
    precision = max(torch.finfo(p.dtype).eps for p in (*there, whole))
    size = torch.stack([p.abs() for p in wide]).sum(0)
    error = (torch.stack(wide[:-1]).sum(0) - wide[-1]).abs()
    # A model whose values overflow is told so elsewhere.
    return bool(((error <= _ROUNDING * precision * size) | ~error.isfinite()).all())
