"""Reading and changing streams: context managers that leave no hook behind.

Shapes: b batch, t tokens, d the stream's width, n positions wanted.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saexp.models.hookpoints import Hookpoint
from saexp.models.loading import LanguageModel
from saexp.models.structure import Site

Positions = tuple[Int[Tensor, " n"], Int[Tensor, " n"]]
"""(row in the batch, index into the padded tokens) of each position wanted."""

EditFunction = Callable[[Tensor], Tensor]
"""`[b, t, d]` -> new `[b, t, d]`; must not write to its input."""


class _Stop(Exception):
    """Ends a forward pass once everything wanted was seen."""


def _first(values: Any) -> Tensor:
    return values if isinstance(values, Tensor) else values[0]


def _with_first(values: Any, new: Tensor) -> Any:
    return new if isinstance(values, Tensor) else (new, *values[1:])


def _at(values: Tensor, positions: Positions | None) -> Tensor:
    """A copy: some blocks (Falcon's) add to their parts' outputs in place."""
    if positions is None:
        return values.clone()
    # Blocks of one model may be on several devices.
    rows, tokens = (p.to(values.device) for p in positions)
    return values[rows, tokens]


def _at_site(site: Site, function: EditFunction) -> EditFunction:
    """The edit of a stream as one of the values at its module."""
    if site.gain is None:
        return function

    def edited(values: Tensor) -> Tensor:
        stream = site.read(values)
        return site.changed(values, stream, function(stream))

    return edited


class _Mid:
    """An edit of resid_mid. The MLP's norm and the sum after the MLP both read that stream, and
    only the first is a module's input, so the change is added to the block's output as well."""

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

    A function that returns its argument itself changes no bit of the forward pass.
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

            def on_output(_m: Any, _a: Any, output: Any, f: EditFunction = function) -> Any:
                return _with_first(output, f(_first(output)))

            def on_input(_m: Any, args: Any, kwargs: Any, f: EditFunction = function) -> Any:
                if args:
                    return (f(args[0]), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": f(kwargs["hidden_states"])}

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

    Values are `[b, t, d]`, or `[n, d]` at `positions`. With `stop`, a forward pass ends, silently,
    as soon as every hookpoint was seen: later blocks and the LM head don't run, and the rest of the
    `with` body is skipped.
    """
    record: dict[Hookpoint, Tensor] = {}
    wanted = set(hookpoints)

    def keep(hookpoint: Hookpoint, values: Tensor) -> Tensor:
        record[hookpoint] = _at(values, positions).detach()
        if stop and record.keys() == wanted:
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

    Position ids follow the mask, so padding may stand on either side. A `cache` of keys and values
    is read and added to; the mask, `[b, s + t]`, begins with the s tokens that it holds.
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
