"""Where blocks, mixers, MLPs and norms are in a Hugging Face causal LM, found by its shape.

Names say where a stream should be; `models.stream_check` then compares what is there with what the
block returns, since families differ in what they add to the stream and how.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saexp.errors import ModelError
from saexp.models.hookpoints import ATTENTION, MIXERS, MLPS, Hookpoint

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
"""Llama's norm before the MLP, Gemma 2's norm after attention."""
_MIXER_POST_NORM = ("post_self_attn_layernorm", "post_operator_norm", "post_norm1")
_MLP_POST_NORM = (
    "post_feedforward_layernorm",
    "post_mlp_layernorm",
    "post_ffn_norm",
    "post_norm2",
)
_OTHER_MODALITIES = ("vision", "visual", "audio")


@dataclass(frozen=True)
class Site:
    """A module, and whether the stream is what it reads or what it gives."""

    module: nn.Module
    side: str
    """`input` or `output`."""
    gain: Tensor | None = None
    """`[d]`, where the stream is the one there before it was multiplied by this."""
    bias: Tensor | None = None
    """`[d]`, added after the multiplication."""

    def read(self, values: Tensor) -> Tensor:
        """The stream `[..., d]` from what is at the module."""
        if self.gain is None:
            return values
        wide = values.to(self.gain.dtype)
        return ((wide if self.bias is None else wide - self.bias) / self.gain).to(values.dtype)

    def changed(self, values: Tensor, stream: Tensor, new: Tensor) -> Tensor:
        """What is to be at the module where the stream becomes `new`; itself if nothing changes."""
        if new is stream:
            return values
        if self.gain is None:
            return new
        # Not new * gain: where the stream keeps its value, so does what is at the module.
        return values + ((new - stream).to(self.gain.dtype) * self.gain).to(values.dtype)


def child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """The first child that has one of these names."""
    children = dict(module.named_children())
    return next((children[n] for n in names if n in children), None)


def find_blocks(hf: nn.Module, n_layers: int, path: str | None = None) -> nn.ModuleList:
    """The list of transformer blocks. Raises ModelError naming the key to set."""
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
        right = isinstance(module, nn.ModuleList) and len(module) == n_layers
        if isinstance(module, nn.ModuleList) and right and not inside and not other:
            lists[name] = module
    found = [
        blocks
        for blocks in lists.values()
        if all(child(block, MIXERS) is not None and child(block, MLPS) for block in blocks)
    ]
    # Parts of unknown names still leave the residual stream between the blocks.
    found = found or list(lists.values())
    if len(found) == 1:
        return found[0]
    raise ModelError(
        f"{type(hf).__name__} has {len(found)} lists of {n_layers} blocks; "
        "say which with model.blocks=<module path>"
    )


def find_site(blocks: nn.ModuleList, hookpoint: Hookpoint, config: Any) -> Site:
    """The module whose input or output is the stream; ModelError where there is none."""
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
    """(module that reads the MLP's input, module that gives its output)."""
    mlp = child(block, MLPS)
    if mlp is not None:
        return mlp, mlp
    first, last = child(block, ("fc1",)), child(block, ("fc2",))
    if first is None or last is None:
        raise ModelError(f"{type(block).__name__} has no {stream}; only resid_pre and resid_post")
    return first, last


def _projection(mixer: nn.Module) -> nn.Module:
    """GPT-Neo wraps its attention in a second module of that name."""
    for holder in (mixer, child(mixer, ATTENTION)):
        if holder is not None and (projection := child(holder, _OUT_PROJECTION)) is not None:
            return projection
    raise ModelError(
        f"{type(mixer).__name__} has no output projection known to saexp, so it has no attn_z; "
        "use attn_out"
    )


def _norms_mixer(block: nn.Module) -> bool:
    """Whether the norm called post_attention_layernorm is of what attention gives (Gemma 2)."""
    if child(block, _MIXER_POST_NORM) is not None or child(block, (_BETWEEN,)) is None:
        return False
    return child(block, (*_PRE_MLP_NORM, "post_feedforward_layernorm")) is not None


def _after(block: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return child(block, (_BETWEEN,)) if _norms_mixer(block) else child(block, names)


def _mlp_norm(block: nn.Module) -> nn.Module | None:
    """The norm that the MLP reads from; None where there is none of its own (Phi, OLMo 2)."""
    norm = child(block, _PRE_MLP_NORM)
    if norm is None and not _norms_mixer(block):
        norm = child(block, (_BETWEEN,))
    if norm is None and child(block, MLPS) is None:
        norm = child(block, ("final_layer_norm",))
    return norm


def _between(block: nn.Module, config: Any) -> Site:
    """Where resid_mid is read: before the MLP's norm, or before the MLP itself in OLMo 2."""
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
    """(gain, bias) of a LayerNorm or RMSNorm, the gain also as Gemma's 1 + weight."""
    weight = norm.weight.detach()
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    # Of equal size and alternating sign: each norm makes it +1 and -1, epsilon aside.
    probe = torch.full_like(weight, 64.0)
    probe[1::2] = -64.0
    with torch.no_grad():
        # Past any hook, which would take this for a stream.
        bias = norm.forward(torch.zeros_like(probe)[None])[0].to(wide.dtype)
        tried = (norm.forward(probe[None])[0].to(wide.dtype) - bias) * probe.sign()
    fits = {float((tried - gain).abs().max()): gain for gain in (wide, wide + 1)}
    gain = fits[min(fits)]
    near = 0.02 * float(gain.abs().max())
    if not math.isfinite(min(fits)) or min(fits) > near or not bool((gain != 0).all()):
        raise ModelError(
            f"{type(norm).__name__} before the MLP has no gain that can be divided out of what "
            "it gives; use mlp_in"
        )
    return gain, bias if bool(bias.any()) else None
