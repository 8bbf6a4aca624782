"""Partial forward passes, logits at chosen positions, and limits on the length of texts."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from saexp.errors import ModelError
from saexp.models.loading import LanguageModel
from saexp.models.rope import is_dynamic

_OFFSET = 2
"""OPT's position table has two more rows than positions."""


def context_limit(model: LanguageModel) -> int | None:
    """Maximum number of tokens by the model's config; None where there is no limit.

    Dynamic NTK extends a model beyond the maximum in its config.
    """
    about = model.text_config
    limit = getattr(about, "max_position_embeddings", None)
    return None if limit is None or is_dynamic(about) else int(limit)


def position_limit(model: LanguageModel) -> int | None:
    """Number of positions of a model with a position table (GPT-2, OPT, GPT-J); None for others.

    A rotary model can read texts beyond its maximum, if badly; a table has no more rows.
    """
    about = model.text_config
    limit = getattr(about, "max_position_embeddings", None)
    # A config with rotary parameters decides this without reading the weights.
    if limit is None or getattr(about, "rope_parameters", None):
        return None
    token: Any = model.hf.get_input_embeddings()
    for module in model.hf.modules():
        is_other = isinstance(module, nn.Embedding) and module is not token
        if is_other and limit <= module.num_embeddings <= limit + _OFFSET:
            return int(limit)
        table = getattr(module, "embed_positions", None)
        if not isinstance(table, nn.Module) and table is not None and len(table) == limit:
            return int(limit)
    return None


def check_positions(model: LanguageModel, longest: int, n_new: int = 0, key: str = "") -> None:
    """Raise ModelError where `longest` prompt tokens and `n_new` generated tokens exceed the
    model's positions. `key` is the setting of the number of new tokens.

    With `longest` 0, nothing will be run and the model is not loaded.
    """
    limit = position_limit(model) if longest else None
    if limit is None or longest + n_new <= limit:
        return
    short = model.name.rpartition("/")[2]
    if not n_new:
        raise ModelError(
            f"a prompt is {longest} tokens long, but {short} has {limit} positions; "
            f"type dataset.max_length={limit}, or shorten the prompt"
        )
    fewer = f"{key}={limit - longest}, or " if limit > longest else ""
    shorter = f"dataset.max_length={limit - n_new}, which leaves longer prompts out"
    instead = fewer + (shorter if limit > n_new else f"a smaller {key}")
    raise ModelError(
        f"a prompt of {longest} tokens and {n_new} new ones do not fit into the {limit} positions "
        f"of {short}; type {instead}"
    )


class _Stop(Exception):
    """Ends a forward pass after the last requested block."""


def after_blocks(model: LanguageModel, n_blocks: int, **inputs: Any) -> Any:
    """Output of block `n_blocks - 1` for the model's `inputs`; no later block and no LM head runs.

    As the block returns it: the stream `[b, t, d]`, or a tuple that begins with it.
    """
    outputs: list[Any] = []

    def stop(_m: Any, _a: Any, output: Any) -> None:
        outputs.append(output)
        raise _Stop

    handle = model.blocks[n_blocks - 1].register_forward_hook(stop)
    try:
        model.hf(**inputs)
    except _Stop:
        pass
    finally:
        handle.remove()
    return outputs[0]


@contextmanager
def skipping(
    model: LanguageModel, n_blocks: int, output: Any, of_row: Int[Tensor, " b"]
) -> Iterator[None]:
    """Skip the first `n_blocks` blocks in forward passes while the context is open.

    The last of them returns `output`, which `after_blocks` returned, with row `of_row[i]` as row i.
    Hooks on its output are called as usual.
    """
    whole = output if isinstance(output, tuple) else (output,)
    stream = whole[0][of_row.to(whole[0].device)]

    def like(values: Any) -> Any:
        return (values, *whole[1:]) if isinstance(output, tuple) else values

    def passing(hidden_states: Any = None, *_args: Any, **_kwargs: Any) -> Any:
        return like(hidden_states)

    def giving(*_args: Any, **_kwargs: Any) -> Any:
        return like(stream)

    with replaced_blocks(model, [*[passing] * (n_blocks - 1), giving]):
        yield


@contextmanager
def replaced_blocks(
    model: LanguageModel, functions: Sequence[Callable[..., Any]]
) -> Iterator[None]:
    """Forward passes in which `functions[i]` stands in for block i; later blocks run as usual."""
    blocks: list[Any] = list(model.blocks[: len(functions)])
    # accelerate puts a forward of its own on modules that it spreads over devices.
    own = [block.__dict__.get("forward") for block in blocks]
    try:
        for block, function in zip(blocks, functions, strict=True):
            block.forward = function
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward


def keep_last_logits(model: LanguageModel, n: int) -> dict[str, int]:
    """Option of the model's forward pass for logits at the last `n` positions only; empty where the
    model has no such option.

    With keys and values shared between blocks, Gemma 4 cuts the stream itself to these positions.
    """
    keeps = _has_logits_to_keep(type(model.hf)) and not shares_keys_between_blocks(model)
    return {"logits_to_keep": n} if keeps else {}


@lru_cache
def _has_logits_to_keep(kind: type) -> bool:
    return "logits_to_keep" in inspect.signature(kind.forward).parameters


def shares_keys_between_blocks(model: LanguageModel) -> bool:
    """Whether later blocks read keys and values of earlier ones."""
    return bool(getattr(model.text_config, "num_kv_shared_layers", 0))


@contextmanager
def head_input(model: LanguageModel, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Forward passes in which the LM head reads `function(hidden)`, with `hidden` `[b, t, d]`.

    Selecting positions there keeps a batch's logits from being computed whole. Raises ModelError
    for a model without an LM head.
    """
    head = model.hf.get_output_embeddings()
    if head is None:
        raise ModelError(f"{model.name} has no LM head, so it predicts no next token")

    def replace(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (function(args[0]), *args[1:])

    handle = head.register_forward_pre_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def may_skip(model: LanguageModel) -> bool:
    """Whether blocks can be skipped: each runs once, and none returned more than the stream so far.

    A module that is used as two blocks would be replaced in both.
    """
    return (
        model.observed.blocks_can_be_skipped and len(set(map(id, model.blocks))) == model.n_layers
    )


def can_skip(model: LanguageModel, output: Any) -> bool:
    """Whether a block's output is a stream `[b, t, d]` without other tensors, so that it can be
    reused for other rows. Where it is not, `model.observed` records that for later passes.
    """
    stream, *rest = output if isinstance(output, tuple) else (output,)
    is_stream = isinstance(stream, Tensor) and stream.dim() == 3
    model.observed.blocks_can_be_skipped = is_stream and not any(
        isinstance(x, Tensor) for x in rest
    )
    return model.observed.blocks_can_be_skipped


def is_plain(cache: Any) -> bool:
    """Whether a cache holds only keys and values, so that rows of it can be selected."""
    layers = getattr(cache, "layers", ())
    return bool(layers) and all(
        isinstance(layer, DynamicLayer) and not hasattr(layer, "conv_states") for layer in layers
    )
