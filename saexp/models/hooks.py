"""Reads and edits streams with context managers that leave no hook behind.

Shapes: b batch, t tokens, d width of the stream, n positions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saexp.errors import ModelError
from saexp.models.hookpoints import Hookpoint
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
    """A copy, because some blocks (Falcon's) add to the outputs of their modules in place."""
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
    attention_mask: Int[Tensor, "b held_and_t"],
    hookpoints: Sequence[Hookpoint],
    positions: Positions | None = None,
    *,
    cache: Any = None,
) -> dict[Hookpoint, Float[Tensor, "..."]]:
    """One forward pass up to the deepest hookpoint; no later block and no LM head runs.

    Position ids follow the mask, so padding may be on either side. A `cache` of keys and values is
    read and extended; the mask, `[b, s + t]`, begins with the s tokens in the cache.
    """
    held = {} if cache is None else {"past_key_values": cache}
    with capture(model, hookpoints, positions=positions, stop=True) as record:
        model.hf(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids(attention_mask)[:, -input_ids.shape[1] :],
            use_cache=cache is not None,
            **held,
        )
    return record


def position_ids(attention_mask: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """0-based positions of unmasked tokens; masked ones get 0."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)
