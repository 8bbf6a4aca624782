"""Where blocks, attention, MLP and norms are in a Hugging Face causal LM, found by its shape."""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from saexp.errors import ModelError
from saexp.models.hookpoints import Hookpoint

_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "block_sparse_moe")
_OUT_PROJECTION = ("o_proj", "c_proj", "dense", "out_proj")
_ATTENTION_POST_NORM = ("post_self_attn_layernorm",)
_MLP_POST_NORM = ("post_feedforward_layernorm", "post_mlp_layernorm")
_MLP_NORM = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2")


@dataclass(frozen=True)
class Site:
    """A module, and whether the stream is what it reads or what it gives."""

    module: nn.Module
    side: str
    """`input` or `output`."""


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
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
    found = [
        module
        for name, module in hf.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == n_layers
        and "vision" not in name
        and "audio" not in name
        and all(_child(block, _ATTENTION) and _child(block, _MLP) for block in module)
    ]
    if len(found) == 1:
        return found[0]
    raise ModelError(
        f"{type(hf).__name__} has {len(found)} lists of {n_layers} blocks with attention and MLP; "
        "say which with model.blocks=<module path>"
    )


def find_site(blocks: nn.ModuleList, hookpoint: Hookpoint, config: Any) -> Site:
    """The module whose input or output is the stream; ModelError where there is none."""
    block = blocks[hookpoint.layer]
    attention, mlp = _child(block, _ATTENTION), _child(block, _MLP)
    children = dict(block.named_children())
    norm_after = "post_feedforward_layernorm" in children
    stream = hookpoint.stream
    if stream in ("embed", "resid_pre"):
        return Site(block, "input")
    if stream == "resid_post":
        return Site(block, "output")
    if attention is None or mlp is None:
        raise ModelError(f"{type(block).__name__} has no {stream}; only resid_pre and resid_post")
    if stream == "mlp_in":
        return Site(mlp, "input")
    if stream in ("attn_out", "mlp_out"):
        _check_added_as_it_is(block, attention, stream, config)
    if stream == "mlp_out":
        return Site(_child(block, _MLP_POST_NORM) or mlp, "output")
    if stream == "attn_out":
        if norm_after:
            return Site(children["post_attention_layernorm"], "output")
        return Site(_child(block, _ATTENTION_POST_NORM) or attention, "output")
    if stream == "attn_z":
        projection = _child(attention, _OUT_PROJECTION)
        if projection is None:
            raise ModelError(f"{type(attention).__name__} has no output projection known to saexp")
        return Site(projection, "input")
    parallel = getattr(config, "use_parallel_residual", False)
    norm = _child(block, _MLP_NORM)
    if norm_after and "pre_feedforward_layernorm" not in children:
        return Site(mlp, "input")
    if parallel or norm is None:
        raise ModelError(
            f"{type(block).__name__} adds attention and MLP at once, so it has no resid_mid; "
            "use resid_pre or resid_post"
        )
    return Site(norm, "input")


def _check_added_as_it_is(block: nn.Module, attention: nn.Module, stream: str, config: Any) -> None:
    """Bloom adds the residual stream inside its attention, Granite scales what it adds."""
    inside = "residual" in inspect.signature(attention.forward).parameters
    if inside or getattr(config, "residual_multiplier", 1.0) != 1.0:
        raise ModelError(
            f"{type(block).__name__} does not add its attention's and MLP's output to the stream "
            f"as it is, so it has no {stream}; use resid_pre or resid_post"
        )
