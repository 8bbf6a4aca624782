"""Context managers that read or edit streams and attention patterns, and leave no hook behind.

Shapes: b batch, t tokens, d width of the stream, n positions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from saexp.errors import ModelError
from saexp.models import Hookpoint
from saexp.models.loading import LanguageModel
from saexp.models.structure import Site

Positions = tuple[Int[Tensor, " n"], Int[Tensor, " n"]]
"""(row in the batch, index into the padded tokens) of each requested position."""

EditFunction = Callable[[Tensor], Tensor]
"""`[b, t, d]` -> new `[b, t, d]`; must not write to its input."""


class _Stop(Exception):
    """Ends a forward pass once every requested stream was recorded."""


def _first(values: Any) -> Tensor:
    return values if isinstance(values, Tensor) else values[0]


def _with_first(values: Any, new: Tensor) -> Any:
    return new if isinstance(values, Tensor) else (new, *values[1:])


def _at(values: Tensor, positions: Positions | None) -> Tensor:
    """Values at the positions; a copy, because some blocks (Falcon's) add to them in place."""
    if positions is None:
        return values.clone()
    # Blocks of one model may be on several devices.
    rows, tokens = (p.to(values.device) for p in positions)
    return values[rows, tokens]


def _one_vector_per_token(model: LanguageModel, hookpoint: Hookpoint, values: Tensor) -> Tensor:
    """The values. Raises ModelError where they are not `[b, t, d]` (Gemma 3n has four streams)."""
    if values.dim() == 3:
        return values
    raise ModelError(
        f"{type(model.blocks[hookpoint.layer]).__name__} has values of shape {list(values.shape)} "
        f"at {hookpoint.name}, not one vector per token, so saexp cannot read this stream; choose "
        "another one"
    )


def _at_site(site: Site, function: EditFunction) -> EditFunction:
    """The edit of a stream as an edit of the values at its module."""
    if site.gain is None:
        return function

    def edited(values: Tensor) -> Tensor:
        stream = site.read(values)
        return site.changed(values, stream, function(stream))

    return edited


class _Mid:
    """An edit of resid_mid, which the MLP's norm and the sum after the MLP both read.

    Only the first is the input of a module, so the change is added to the block's output as well.
    """

    def __init__(self, function: EditFunction) -> None:
        self.function = function
        self.change: Tensor | None = None

    def on_norm_input(self, values: Tensor) -> Tensor:
        new = self.function(values)
        self.change = None if new is values else new - values
        return new

    def on_block_output(self, _m: Any, _a: Any, output: Any) -> Any:
        change, self.change = self.change, None
        return output if change is None else _with_first(output, _first(output) + change)


@contextmanager
def edit(model: LanguageModel, edits: Mapping[Hookpoint, EditFunction]) -> Iterator[None]:
    """Replace streams by functions of themselves while the context is open.

    The forward pass is bit-equal where the function returns its argument itself.
    """
    handles = []
    try:
        for hookpoint, function in edits.items():
            site = model.module(hookpoint.stored)
            if hookpoint.stream == "resid_mid":
                mid = _Mid(function)
                function = mid.on_norm_input
                block = model.blocks[hookpoint.layer]
                handles.append(block.register_forward_hook(mid.on_block_output, prepend=True))

            function = _at_site(site, function)
            check = partial(_one_vector_per_token, model, hookpoint)

            def on_output(
                _m: Any, _a: Any, output: Any, f: EditFunction = function, c: Any = check
            ) -> Any:
                return _with_first(output, f(c(_first(output))))

            def on_input(
                _m: Any, args: Any, kwargs: Any, f: EditFunction = function, c: Any = check
            ) -> Any:
                if args:
                    return (f(c(args[0])), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": f(c(kwargs["hidden_states"]))}

            if site.side == "output":
                handles.append(site.module.register_forward_hook(on_output))
            else:
                handles.append(site.module.register_forward_pre_hook(on_input, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def capture(
    model: LanguageModel,
    hookpoints: Sequence[Hookpoint],
    *,
    positions: Positions | None = None,
    stop: bool = False,
) -> Iterator[dict[Hookpoint, Tensor]]:
    """Record streams of the forward passes run inside; yields {hookpoint: values}.

    Values are `[b, t, d]`, or `[n, d]` at `positions`. With `stop`, a forward pass ends without an
    error once every hookpoint was recorded: later blocks and the LM head do not run, and the rest
    of the `with` body is skipped.
    """
    record: dict[Hookpoint, Tensor] = {}
    requested = set(hookpoints)

    def keep(hookpoint: Hookpoint, values: Tensor) -> Tensor:
        record[hookpoint] = _at(values, positions).detach()
        if stop and record.keys() == requested:
            raise _Stop
        return values

    functions = {
        h: (lambda values, h=h: keep(h, values))  # noqa: E731
        for h in hookpoints
    }
    try:
        with edit(model, functions):
            yield record
    except _Stop:
        pass


@torch.inference_mode()
def run_truncated(
    model: LanguageModel,
    input_ids: Int[Tensor, "b t"],
    attention_mask: Int[Tensor, "b past_and_t"],
    hookpoints: Sequence[Hookpoint],
    positions: Positions | None = None,
    *,
    cache: Any = None,
) -> dict[Hookpoint, Float[Tensor, "..."]]:
    """One forward pass up to the deepest hookpoint; no later block and no LM head runs.

    Position ids follow the mask, so padding may be on either side. A `cache` of keys and values is
    read and extended; the mask, `[b, s + t]`, begins with the s tokens in the cache.
    """
    past = {} if cache is None else {"past_key_values": cache}
    with capture(model, hookpoints, positions=positions, stop=True) as record:
        model.hf(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids(attention_mask)[:, -input_ids.shape[1] :],
            use_cache=cache is not None,
            **past,
        )
    return record


def position_ids(attention_mask: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """0-based positions of unmasked tokens; masked ones get 0."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


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


def _check(selected: Tensor, mask: Tensor, what: str) -> None:
    selected = selected.to(mask.device)
    if bool((selected & ~mask).any()):
        row = int((selected & ~mask).any(-1).nonzero()[0, 0])
        raise ModelError(
            f"row {row} of the batch has a {what} on padding; choose tokens of the text"
        )
    if not bool(selected.any(-1).all()):
        row = int((~selected.any(-1)).nonzero()[0, 0])
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
