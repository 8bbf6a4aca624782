"""Padding, batching, partial forward passes, logits at chosen positions, and limits on lengths.

Rotary frequencies may depend on the length of a sequence: longrope (Phi-3; Ding et al. 2024, arXiv
2402.13753) has one set of them up to the original context and another beyond it; dynamic NTK scales
them with the exact length beyond the context. A pass uses the set of its longest row for all rows,
so only rows that have the same set when forwarded alone (a regime) share a pass.
"""

import inspect
import logging
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from saexp.errors import ModelError
from saexp.models.loading import LanguageModel

log = logging.getLogger(__name__)


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


def padded(
    sequences: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device | str = "cpu",
    *,
    padding_side: str,
) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
    """(token ids, attention mask) of one batch, padded on the `left` or the `right`."""
    lengths = np.fromiter(map(len, sequences), dtype=np.int64)[:, None]
    columns = np.arange(lengths.max())
    starts = 0 if padding_side == "right" else len(columns) - lengths
    is_token = (columns >= starts) & (columns < starts + lengths)
    ids = np.full(is_token.shape, pad_id, dtype=np.int64)
    n_tokens = int(lengths.sum())
    ids[is_token] = np.fromiter(chain.from_iterable(sequences), dtype=np.int64, count=n_tokens)
    mask = torch.from_numpy(is_token.astype(np.int64))
    return torch.from_numpy(ids).to(device), mask.to(device)


AUTO_BATCH_TOKENS = {"cuda": 65536, "mps": 8192, "cpu": 1024}
"""Initial tokens per batch by device type; on CUDA they are halved until a batch fits."""


class TokenBudget:
    """Tokens per batch, padding included; reduced permanently when memory runs out."""

    def __init__(self, batch_tokens: int | str, device: torch.device) -> None:
        auto = AUTO_BATCH_TOKENS.get(device.type, AUTO_BATCH_TOKENS["cpu"])
        self.tokens = auto if batch_tokens == "auto" else int(batch_tokens)

    def halve(self, tokens: int) -> None:
        """Reduce the budget after a batch of `tokens` did not fit."""
        self.tokens = max(1, min(self.tokens, tokens) // 2)
        log.warning("out of memory at %d tokens per batch; continuing with %d", tokens, self.tokens)


def batches(
    lengths: Sequence[int | float], budget: TokenBudget, config: Any = None
) -> Generator[list[int], bool | None, None]:
    """Indices sorted by length, longest first, in batches of at most the budget with padding.

    A text longer than the budget is a batch by itself. With the language model's `config`, texts of
    a batch have the same rotary frequencies. After `send(False)` the same batch is yielded again,
    reduced to the current budget.
    """
    for part in by_regime(config, [int(length) for length in lengths]):
        order = sorted(part, key=lambda i: (-lengths[i], i))
        start = 0
        while start < len(order):
            size = max(1, int(budget.tokens // max(1, lengths[order[start]])))
            fits = yield order[start : start + size]
            if fits is not False:
                start += size


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
    outputs = output if isinstance(output, tuple) else (output,)
    stream = outputs[0][of_row.to(outputs[0].device)]

    def as_output(values: Any) -> Any:
        return (values, *outputs[1:]) if isinstance(output, tuple) else values

    def pass_on(hidden_states: Any = None, *_args: Any, **_kwargs: Any) -> Any:
        return as_output(hidden_states)

    def return_stream(*_args: Any, **_kwargs: Any) -> Any:
        return as_output(stream)

    with replaced_blocks(model, [*[pass_on] * (n_blocks - 1), return_stream]):
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

    Selecting positions there avoids computing the logits of a whole batch. Raises ModelError for a
    model without an LM head.
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


@contextmanager
def only_at(model: LanguageModel, tokens: Int[Tensor, " b"]) -> Iterator[None]:
    """Compute logits of one token per row, `[b, 1, v]`, while the context is open.

    The LM head reads only these positions (indices into the padded tokens), so that the logits of a
    whole batch are never computed. Raises ModelError for a model without an LM head.
    """

    def choose(hidden: Tensor) -> Tensor:
        positions = tokens.to(hidden.device)
        rows = torch.arange(len(positions), device=hidden.device)
        return hidden[rows, positions][:, None]

    with head_input(model, choose):
        yield


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


Regime = tuple[int, ...]


def rope_regime(config: Any, length: int) -> Regime:
    """A key that is equal for two sequence lengths where the model uses the same frequencies.

    `config` is that of the language model (`text_config`). Empty where no frequency depends on
    the length.
    """
    return tuple(
        0 if length <= context else 1 if kind == "longrope" else length
        for kind, context in _kinds(config)
    )


def generation_regime(config: Any, length: int, max_new_tokens: int) -> Hashable:
    """As `rope_regime` for a prompt and its continuation: equal for two rows that have the same
    frequencies at every step. Rows whose frequencies change while generating must have prompts of
    equal length."""
    regime = rope_regime(config, length)
    return (regime, length) if changes_while_generating(config, length, max_new_tokens) else regime


def changes_while_generating(config: Any, length: int, max_new_tokens: int) -> bool:
    """Whether the frequencies change between the prompt and the last generated token."""
    last = length + max(max_new_tokens, 1) - 1
    return rope_regime(config, length) != rope_regime(config, last)


def depends_on_length(config: Any) -> bool:
    """Whether any rotary frequency of the model depends on the length."""
    return bool(_kinds(config))


def is_dynamic(config: Any) -> bool:
    """Whether a frequency is scaled by dynamic NTK."""
    return any(kind == "dynamic" for kind, _ in _kinds(config))


def alike(keys: Sequence[Hashable]) -> list[list[int]]:
    """Group the indices of equal keys, in order of first occurrence."""
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def by_regime(config: Any, lengths: Sequence[int], most: int | None = None) -> list[list[int]]:
    """Groups of indices of sequences that may share a forward pass, at most `most` in each."""
    if depends_on_length(config):
        parts = alike([rope_regime(config, length) for length in lengths])
    else:
        parts = [list(range(len(lengths)))] if lengths else []
    if most is None:
        return parts
    return [part[i : i + most] for part in parts for i in range(0, len(part), most)]


def _kinds(config: Any) -> list[tuple[str, int]]:
    """(longrope or dynamic, length up to which the frequencies are the original ones)."""
    return list(dict.fromkeys(_of_parameters(getattr(config, "rope_parameters", None), config)))


def _of_parameters(parameters: Any, config: Any) -> list[tuple[str, int]]:
    """`_kinds` of rope parameters, which some models nest by type of layer."""
    if not isinstance(parameters, dict):
        return []
    kind = str(parameters.get("rope_type", parameters.get("type", "")))
    if "dynamic" in kind:
        return [("dynamic", int(config.max_position_embeddings))]
    if kind in ("longrope", "su"):
        context = parameters.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", config.max_position_embeddings
        )
        return [("longrope", int(context))]
    return [k for value in parameters.values() for k in _of_parameters(value, config)]


def recomputes_beyond(hf: Any, config: Any) -> int | None:
    """The length at which transformers' `generate` drops the cached keys and recomputes all of them
    at the new frequencies (Phi-3); None for models that keep them."""
    for kind, context in _kinds(config):
        cache = DynamicCache()
        cache.update(torch.zeros(1, 1, context, 1), torch.zeros(1, 1, context, 1), 0)
        ids = torch.zeros(1, context + 1, dtype=torch.long)
        inputs = hf.prepare_inputs_for_generation(
            ids,
            past_key_values=cache,
            attention_mask=torch.ones_like(ids),
            use_cache=True,
            next_sequence_length=1,
        )
        if kind == "longrope" and inputs.get("past_key_values") is None:
            return context
    return None
