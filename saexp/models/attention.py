"""Attention of every head to chosen tokens, layer by layer, with edits of streams applied.

Shapes: b batch, t tokens (padded).
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from saexp.errors import ModelError
from saexp.models.hookpoints import Hookpoint
from saexp.models.hooks import EditFunction, edit, position_ids
from saexp.models.loading import LanguageModel


@torch.inference_mode()
def attention_to(
    model: LanguageModel,
    input_ids: Int[Tensor, "b t"],
    attention_mask: Int[Tensor, "b t"],
    keys: Bool[Tensor, "b t"],
    queries: Bool[Tensor, "b t"] | None = None,
    edits: Mapping[Hookpoint, EditFunction] | None = None,
) -> Float[Tensor, "b n_layers n_heads"]:
    """Attention weight from `queries` to `keys`, summed over keys and averaged over queries.

    By default, the query is the last unmasked token of each row. Padding may be on either side.
    Weights are those after the softmax, with the model's soft-capping and sliding windows (0 for a
    key outside the window), in float32 on the CPU. The `eager` implementation of attention runs,
    because others do not return weights; its streams differ by rounding, so compare edited with
    unedited weights of this function. The weights of one layer at a time are in memory, and no LM
    head runs. The model's attention implementation is restored on any exit.

    Raises ModelError for a row without a key or query, for ones on padding, and for a model whose
    attention gives no weights.
    """
    mask = attention_mask.bool()
    if queries is None:
        queries = _last(mask)
    _check(keys, mask, "key")
    _check(queries, mask, "query")
    n_heads = int(model.text_config.num_attention_heads)
    attention_weights = torch.full((len(input_ids), model.n_layers, n_heads), torch.nan)

    def keep(layer: int, weights: Any) -> None:
        if not isinstance(weights, Tensor) or weights.shape[-2:] != (keys.shape[1],) * 2:
            raise ModelError(
                f"{type(model.hf).__name__}'s attention gives no weights of each token to each, "
                "so attention to tokens cannot be measured; leave it out"
            )
        query_weights = queries.to(weights.device, torch.float32)
        query_weights = query_weights / query_weights.sum(-1, keepdim=True)
        key_mask = keys.to(weights.device, torch.float32)
        attention_weights[:, layer] = _between(weights, query_weights, key_mask).cpu()

    with ExitStack() as stack:
        for layer, block in enumerate(model.blocks):
            projection = model.module(Hookpoint(layer, "attn_z")).module
            attention = next(
                c for c in block.children() if any(m is projection for m in c.modules())
            )

            def on_output(_m: Any, _a: Any, output: Any, layer: int = layer) -> None:
                keep(layer, output[1] if isinstance(output, tuple) and len(output) > 1 else None)

            stack.callback(attention.register_forward_hook(on_output).remove)
        stack.enter_context(eager_attention(model))
        stack.enter_context(edit(model, edits or {}))
        model.hf.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids(attention_mask),
            use_cache=False,
        )
    return attention_weights


def _between(weights: Tensor, queries: Tensor, keys: Tensor) -> Float[Tensor, "b heads"]:
    """`[b, heads, t, t]` weighted by `queries [b, t]` and `keys [b, t]`; only the rows of queries
    are read."""
    rows, tokens = queries.nonzero(as_tuple=True)
    of_queries = weights[rows, :, tokens].float()
    to_keys = torch.einsum("nhk,nk->nh", of_queries, keys[rows]) * queries[rows, tokens, None]
    out = torch.zeros(weights.shape[:2], device=weights.device)
    return out.index_add_(0, rows, to_keys)


def _last(mask: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
    """The last unmasked token of each row."""
    tokens = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, tokens, -1).amax(-1, keepdim=True)
    return tokens == last


def _check(chosen: Tensor, mask: Tensor, what: str) -> None:
    chosen = chosen.to(mask.device)
    if bool((chosen & ~mask).any()):
        row = int((chosen & ~mask).any(-1).nonzero()[0, 0])
        raise ModelError(
            f"row {row} of the batch has a {what} on padding; choose tokens of the text"
        )
    if not bool(chosen.any(-1).all()):
        row = int((~chosen.any(-1)).nonzero()[0, 0])
        raise ModelError(f"row {row} of the batch has no {what}; leave it out of the batch")


@contextmanager
def eager_attention(model: LanguageModel) -> Iterator[None]:
    """Switch to the `eager` attention, which returns weights; restored on any exit.

    Raises ModelError for a model that cannot be switched.
    """
    configs = _configs(model.hf)
    before = [(config, config._attn_implementation) for config in configs]
    try:
        model.hf.set_attn_implementation("eager")
        if model.hf.config.get_text_config()._attn_implementation != "eager":
            raise ModelError(
                f"{type(model.hf).__name__} cannot switch to an attention implementation that "
                "returns weights; load it with attn_implementation='eager'"
            )
        yield
    finally:
        # Setting a config sets nested ones too, so the outermost is restored first.
        for config, value in before:
            config._attn_implementation = value


def _configs(hf: Any) -> list[Any]:
    """Every config that selects the attention implementation, outermost first."""
    configs: dict[int, Any] = {}

    def add(config: Any) -> None:
        if id(config) not in configs:
            configs[id(config)] = config
            for name in config.sub_configs:
                if (inner := getattr(config, name, None)) is not None:
                    add(inner)

    add(hf.config)
    for module in hf.modules():
        if isinstance(module, PreTrainedModel):
            add(module.config)
    return list(configs.values())
