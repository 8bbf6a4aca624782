"""Checks a Hugging Face model's config, and finds and checks its blocks, norms and streams."""

import json
import logging
import math
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saexp.errors import ModelError
from saexp.models import ATTENTION, MIXERS, MLPS, Hookpoint

log = logging.getLogger(__name__)

_MOST_LAYERS = 10_000
"""A config with more blocks would fill the memory before any weight is read."""
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


_OUT_PROJECTION = ("o_proj", "c_proj", "dense", "out_proj", "Wo", "linear_out")
_PRE_MLP_NORM = (
    "pre_feedforward_layernorm",
    "pre_mlp_layernorm",
    "pre_ff_layernorm",
    "feedforward_layernorm",
    "ffn_norm",
    "mlp_norm",
    "channel_pre_norm",
    "ln_2",
    "norm_2",
)
_BETWEEN = "post_attention_layernorm"
"""The norm before the MLP in Llama, and the norm after attention in Gemma 2."""
_MIXER_POST_NORM = ("post_self_attn_layernorm", "post_operator_norm", "post_norm1")
_MLP_POST_NORM = (
    "post_feedforward_layernorm",
    "post_mlp_layernorm",
    "post_ffn_norm",
    "post_norm2",
)
_OTHER_MODALITIES = ("vision", "visual", "audio")


def check_depth(config: Path, name: str) -> None:
    """Raise ModelError for a config.json with more blocks than any model has."""
    try:
        content = json.loads(config.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        # Reported when it is loaded.
        return
    holders = [content, content.get("text_config")] if isinstance(content, dict) else []
    for holder in (h for h in holders if isinstance(h, dict)):
        for key in _DEPTHS:
            value = holder.get(key)
            if isinstance(value, int | float) and value > _MOST_LAYERS:
                raise ModelError(
                    f"model.name={name}: its config has {key}={value}; saexp loads models of up "
                    f"to {_MOST_LAYERS:,} layers"
                )


def check_sizes(config: Any, name: str) -> None:
    """Raise ModelError where the number of blocks or the width is not a positive integer."""
    for key in ("num_hidden_layers", "hidden_size"):
        value = getattr(config, key, None)
        if type(value) is not int or value < 1:
            raise ModelError(
                f"model.name={name}: its config has {key}={value!r}, not a positive integer"
            )


def shards_in(index: Path) -> list[str]:
    """Names of the files that a weights index lists. Raises ValueError where it is damaged."""
    content = json.loads(index.read_text("utf-8"))
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{index.name} has no weight_map")
    names = list(listed.values())
    for name in names:
        inside = isinstance(name, str) and ".." not in PurePosixPath(name).parts
        if not inside or PurePosixPath(name).is_absolute():
            raise ValueError(f"{index.name} lists the file {name!r}")
    return sorted(set(names))


def token_ids(value: Any, key: str, name: str) -> list[int]:
    """Token ids of a config entry (one id, a list or None). Raises ModelError for anything else."""
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ModelError(f"model.name={name}: its {key} is {value!r}, not a token id or a list")
    return list(ids)


@dataclass(frozen=True)
class Site:
    """A module whose input or output is a stream."""

    module: nn.Module
    side: str
    """`input` or `output`."""
    gain: Tensor | None = None
    """`[d]`: the values at the module are the stream times this gain; None if they are equal."""
    bias: Tensor | None = None
    """`[d]`, added after the multiplication by the gain."""

    def read(self, values: Tensor) -> Tensor:
        """The stream `[..., d]`, from the values at the module."""
        if self.gain is None:
            return values
        wide = values.to(self.gain.dtype)
        return ((wide if self.bias is None else wide - self.bias) / self.gain).to(values.dtype)

    def changed(self, values: Tensor, stream: Tensor, new: Tensor) -> Tensor:
        """The values at the module for a stream `new`; `values` itself where nothing changes."""
        if new is stream:
            return values
        if self.gain is None:
            return new
        # Not new * gain: values of unchanged parts of the stream stay bit-equal.
        return values + ((new - stream).to(self.gain.dtype) * self.gain).to(values.dtype)


def child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """The child module with the first of these names that exists."""
    children = dict(module.named_children())
    return next((children[n] for n in names if n in children), None)


def find_blocks(hf: nn.Module, n_layers: int, path: str | None = None) -> nn.ModuleList:
    """The list of transformer blocks. Raises ModelError with the setting to use."""
    if path is not None:
        try:
            blocks = hf.get_submodule(path)
        except AttributeError as error:
            raise ModelError(
                f"model.blocks={path}: {type(hf).__name__} has no such module"
            ) from error
        if isinstance(blocks, nn.ModuleList) and len(blocks) == n_layers:
            return blocks
        raise ModelError(f"model.blocks={path} is not a list of {n_layers} blocks")
    lists: dict[str, nn.ModuleList] = {}
    for name, module in hf.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        other = any(word in name for word in _OTHER_MODALITIES)
        fits = isinstance(module, nn.ModuleList) and len(module) == n_layers
        if isinstance(module, nn.ModuleList) and fits and not inside and not other:
            lists[name] = module
    candidates = [
        blocks
        for blocks in lists.values()
        if all(child(block, MIXERS) is not None and child(block, MLPS) for block in blocks)
    ]
    # Blocks with modules of unknown names still have a residual stream between them.
    candidates = candidates or list(lists.values())
    if len(candidates) == 1:
        return candidates[0]
    raise ModelError(
        f"{type(hf).__name__} has {len(candidates)} lists of {n_layers} blocks; "
        "type model.blocks=<module path> to choose one"
    )


def find_site(blocks: nn.ModuleList, hookpoint: Hookpoint, config: Any) -> Site:
    """The module whose input or output is the stream. Raises ModelError where there is none."""
    block = blocks[hookpoint.layer]
    stream = hookpoint.stream
    if stream in ("embed", "resid_pre"):
        return Site(block, "input")
    if stream == "resid_post":
        return Site(block, "output")
    if stream == "attn_z":
        return Site(_projection(_mixer(block, stream)), "input")
    if stream == "attn_out":
        return Site(_after(block, _MIXER_POST_NORM) or _mixer(block, stream), "output")
    if stream == "resid_mid":
        return _between(block, config)
    first, last = _mlp(block, stream)
    if stream == "mlp_out":
        return Site(child(block, _MLP_POST_NORM) or last, "output")
    if stream == "mlp_in":
        return Site(first, "input")
    norm = _mlp_norm(block)
    if norm is None or getattr(norm, "weight", None) is None:
        raise ModelError(
            f"{type(block).__name__} has no norm with a gain just before its MLP, so it has no "
            f"{stream}; use mlp_in"
        )
    return Site(first, "input", *_affine(norm))


def _mixer(block: nn.Module, stream: str) -> nn.Module:
    mixer = child(block, MIXERS)
    if mixer is None:
        raise ModelError(f"{type(block).__name__} has no {stream}; only resid_pre and resid_post")
    return mixer


def _mlp(block: nn.Module, stream: str) -> tuple[nn.Module, nn.Module]:
    """(module that reads the MLP's input, module that returns its output)."""
    mlp = child(block, MLPS)
    if mlp is not None:
        return mlp, mlp
    first, last = child(block, ("fc1",)), child(block, ("fc2",))
    if first is None or last is None:
        raise ModelError(f"{type(block).__name__} has no {stream}; only resid_pre and resid_post")
    return first, last


def _projection(mixer: nn.Module) -> nn.Module:
    """The output projection; GPT-Neo wraps its attention in a second module of the same name."""
    for holder in (mixer, child(mixer, ATTENTION)):
        if holder is not None and (projection := child(holder, _OUT_PROJECTION)) is not None:
            return projection
    raise ModelError(
        f"{type(mixer).__name__} has no output projection known to saexp, so it has no attn_z; "
        "use attn_out"
    )


def _norms_mixer(block: nn.Module) -> bool:
    """Whether post_attention_layernorm normalises the output of attention, as in Gemma 2."""
    if child(block, _MIXER_POST_NORM) is not None or child(block, (_BETWEEN,)) is None:
        return False
    return child(block, (*_PRE_MLP_NORM, "post_feedforward_layernorm")) is not None


def _after(block: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return child(block, (_BETWEEN,)) if _norms_mixer(block) else child(block, names)


def _mlp_norm(block: nn.Module) -> nn.Module | None:
    """The norm whose output the MLP reads; None where the MLP has none (Phi, OLMo 2)."""
    norm = child(block, _PRE_MLP_NORM)
    if norm is None and not _norms_mixer(block):
        norm = child(block, (_BETWEEN,))
    if norm is None and child(block, MLPS) is None:
        norm = child(block, ("final_layer_norm",))
    return norm


def _between(block: nn.Module, config: Any) -> Site:
    """The site of resid_mid: the input of the MLP's norm, or of the MLP itself in OLMo 2."""
    norm = _mlp_norm(block)
    if norm is None and _norms_mixer(block):
        return Site(_mlp(block, "resid_mid")[0], "input")
    if getattr(config, "use_parallel_residual", False) or norm is None:
        raise ModelError(
            f"{type(block).__name__} adds attention and MLP at once, so it has no resid_mid; "
            "use resid_pre or resid_post"
        )
    return Site(norm, "input")


def _affine(norm: Any) -> tuple[Tensor, Tensor | None]:
    """(gain, bias) of a LayerNorm or RMSNorm; Gemma's gain is 1 + weight."""
    weight = norm.weight.detach()
    if weight.is_meta:
        raise ModelError(
            f"the gain of {type(norm).__name__} before the MLP is offloaded, so it cannot be "
            "divided out; use mlp_in, or leave model.device_map out"
        )
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    # Each norm maps values of equal size and alternating sign to +1 and -1, apart from epsilon.
    probe = torch.full_like(weight, 64.0)
    probe[1::2] = -64.0
    with torch.no_grad():
        # `forward` calls no hook, which would treat this as a stream.
        bias = norm.forward(torch.zeros_like(probe)[None])[0].to(wide.dtype)
        tried = (norm.forward(probe[None])[0].to(wide.dtype) - bias) * probe.sign()
    fits = {float((tried - gain).abs().max()): gain for gain in (wide, wide + 1)}
    gain = fits[min(fits)]
    near = 0.02 * float(gain.abs().max())
    if not math.isfinite(min(fits)) or min(fits) > near or not bool((gain != 0).all()):
        raise ModelError(
            f"{type(norm).__name__} before the MLP has no gain that can be divided out of its "
            "output; use mlp_in"
        )
    return gain, bias if bool(bias.any()) else None


ADDING = ("attn_out", "resid_mid", "mlp_out")
"""Streams that are meaningful only where the block adds them up."""
_READ = ("resid_pre", *ADDING, "mlp_in", "resid_post")
_INSIDE = (*ADDING, "mlp_in", "mlp_in_normalized")
_TOKENS = (5, 7, 11, 6)
"""Ordinary tokens (or bytes) in every common vocabulary."""
_ROUNDING = 4
"""Tolerated error of an addition, in units of the dtype's precision."""


def needs_check(hf: Any, stream: str) -> bool:
    """Whether a stream must be checked on the values of this model.

    The streams between blocks are what their names say in every model that transformers implements;
    custom code of a repository may pass on more than one stream.
    """
    return stream in _INSIDE or not type(hf).__module__.startswith("transformers.")


def broken_streams(hf: Any, blocks: nn.ModuleList, config: Any) -> dict[Hookpoint, str]:
    """Hookpoints that are not what their names say -> the reason.

    Runs a few tokens through the blocks, without the LM head and without the hooks on the blocks;
    weights and hooks are unchanged. Empty where the model cannot be run on tokens alone.
    """
    with _without_hooks(blocks):
        streams = _recorded_streams(hf, blocks, config)
    return {} if streams is None else _find_broken(streams, blocks)


@contextmanager
def _without_hooks(blocks: nn.ModuleList) -> Iterator[None]:
    """Remove all hooks, so that open edits and captures neither change nor record the check."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    removed = [(m, kind, getattr(m, kind)) for m in blocks.modules() for kind in kinds]
    try:
        for module, kind, _ in removed:
            setattr(module, kind, OrderedDict())
        yield
    finally:
        for module, kind, hooks in removed:
            setattr(module, kind, hooks)


def _recorded_streams(
    hf: Any, blocks: nn.ModuleList, config: Any
) -> dict[Hookpoint, Tensor] | None:
    """Every stream of every block; None where the model cannot be run on tokens alone."""
    sites = _sites(blocks, config)
    streams: dict[Hookpoint, Tensor] = {}
    handles = []

    def keep(at: Hookpoint, values: Any) -> None:
        first = values if isinstance(values, Tensor) else values[0]
        # Some blocks (Falcon's) add to these in place.
        streams[at] = first.detach().clone()

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
        # Offloaded weights are moved to where they run, and so are their inputs.
        device = torch.device("cpu") if device.type == "meta" else device
        with torch.inference_mode():
            hf.base_model(input_ids=torch.tensor([_TOKENS], device=device), use_cache=False)
    except Exception as error:
        # A model that needs more inputs than tokens raises the error again in the run.
        log.debug("streams of %s not checked: %s", type(hf).__name__, error)
        return None
    finally:
        for handle in handles:
            handle.remove()
    return streams


def _sites(blocks: nn.ModuleList, config: Any) -> dict[Hookpoint, Site]:
    sites: dict[Hookpoint, Site] = {}
    for layer in range(len(blocks)):
        for stream in _READ:
            at = Hookpoint(layer, stream)
            try:
                sites[at] = find_site(blocks, at, config)
            except ModelError:
                # Raised again when the stream is requested.
                continue
    return sites


def _find_broken(streams: dict[Hookpoint, Tensor], blocks: nn.ModuleList) -> dict[Hookpoint, str]:
    broken: dict[Hookpoint, str] = {}
    for layer, block in enumerate(blocks):
        kind = type(block).__name__
        values = {s: streams.get(Hookpoint(layer, s)) for s in _READ}
        for stream in _wrong(values):
            broken[Hookpoint(layer, stream)] = (
                f"{kind} does not add the unchanged outputs of its attention and MLP to the "
                f"stream, so it has no {stream}; use resid_pre or resid_post"
            )
        for stream in ("mlp_in", "mlp_in_normalized", "mlp_out", "resid_mid"):
            # Both are read from the same input.
            value = values["mlp_in" if stream == "mlp_in_normalized" else stream]
            if value is not None and value.ndim == 2:
                broken[Hookpoint(layer, stream)] = (
                    f"{kind} joins the tokens of all texts at its MLP, so saexp cannot read "
                    f"{stream}; use resid_pre or resid_post"
                )
        after, following = values["resid_post"], streams.get(Hookpoint(layer + 1, "resid_pre"))
        if after is None or after.ndim != 3:
            reason = f"{kind} does not return one vector per token"
        elif following is not None and not _same(after, following):
            reason = f"the output of {kind} at layer {layer} is not the input of the next block"
        else:
            continue
        for at in (Hookpoint(layer, "resid_post"), Hookpoint(layer + 1, "resid_pre")):
            broken[at] = f"{reason}, so it has no {at.stream}; choose another stream"
    return broken


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are bit-equal; NaN equals NaN."""
    return one.shape == other.shape and torch.allclose(
        one.cpu(), other.cpu(), rtol=0.0, atol=0.0, equal_nan=True
    )


def _wrong(values: dict[str, Tensor | None]) -> list[str]:
    """The streams of ADDING that the block does not add up.

    An edit of resid_mid is added to the block's output, which must therefore be resid_mid plus a
    term that depends on its norm only: the MLP's output, possibly times a factor.
    """
    pre, attention, mid, mlp, post = (
        values[s] for s in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    )
    if mid is None:
        correct = {s: _adds([pre, attention, mlp], post) for s in ("attn_out", "mlp_out")}
    else:
        correct = {
            "attn_out": attention is None or _adds([pre, attention], mid),
            "mlp_out": mlp is None or _adds([mid, mlp], post),
            "resid_mid": _leads(pre, attention, mid) and _leads(mid, mlp, post),
        }
    return [s for s, holds in correct.items() if not holds and values[s] is not None]


def _leads(before: Tensor | None, part: Tensor | None, after: Tensor | None) -> bool:
    """Whether `after` is `before` plus a multiple of the part, or the part itself (the sum)."""
    if before is None or part is None or after is None or part.numel() != after.numel():
        return part is None
    if _adds([part], after) or _adds([before, part], after):
        return True
    wide, start, end = (t.reshape(-1).cpu().double() for t in (part, before, after))
    # Weighted by precision: attention sinks have values of 10^4 among values of 1.
    exact = 1 / (start.abs() + wide.abs() + end.abs()).clamp(min=1e-300) ** 2
    factor = float((exact * wide) @ (end - start) / ((exact * wide) @ wide).clamp(min=1e-300))
    return _adds([before, part], after, factor)


def _adds(parts: list[Tensor | None], whole: Tensor | None, factor: float = 1.0) -> bool:
    """Whether the parts, the last times the factor, add up to the whole, apart from rounding."""
    known = [p for p in parts if p is not None]
    if whole is None or len(known) < len(parts):
        return False
    wide = [p.reshape(-1, p.shape[-1]).cpu().double() for p in (*known, whole)]
    if len({p.shape for p in wide}) > 1:
        return False
    wide[-2] = wide[-2] * factor
    precision = max(torch.finfo(p.dtype).eps for p in (*known, whole))
    size = torch.stack([p.abs() for p in wide]).sum(0)
    error = (torch.stack(wide[:-1]).sum(0) - wide[-1]).abs()
    # Values that overflow are reported when they are collected.
    return bool(((error <= _ROUNDING * precision * size) | ~error.isfinite()).all())


def make_head_input_contiguous(hf: nn.Module) -> None:
    """Let the LM head read a contiguous copy of selected positions, such as `hidden[:, -n:]`.

    PyTorch multiplies a view `[b, n, d]` of a longer tensor row by row: on a CPU 6 to 10 times as
    slow in float32, and in bfloat16 hundreds of times, with a copy of the weights for each row.
    """
    head = hf.get_output_embeddings() if isinstance(hf, PreTrainedModel) else None
    if isinstance(head, nn.Linear):
        head.register_forward_pre_hook(contiguous_input)


def contiguous_input(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Hook that makes a module's first argument contiguous."""
    return (args[0].contiguous(), *args[1:])


@dataclass
class ObservedBehavior:
    """Properties of a model's code that forward passes have shown, so that each is tested once."""

    blocks_can_be_skipped: bool = True
    """False once a block returned more than the stream (`models.forward`)."""
    shares_prefixes: bool = True
    """False once a text behind a shared prefix had other values (`activations.shared_prefixes`)."""
    n_blocks_compared: int = 0
    """Number of blocks up to which such values were compared with those of the whole text."""
