"""The lower blocks of a model once for several batch rows that are alike up to there.

Shapes: b batch rows, t tokens, d the stream's width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Int
from torch import Tensor

from saexp.models.loading import LanguageModel


class _Stop(Exception):
    """Ends a forward pass after the last block wanted."""


def after_blocks(model: LanguageModel, n_blocks: int, **inputs: Any) -> Any:
    """What block `n_blocks - 1` gives for the model's `inputs`; no later block and no LM head runs.

    As the block returns it: the stream `[b, t, d]`, or a tuple that begins with it.
    """
    found: list[Any] = []

    def stop(_m: Any, _a: Any, output: Any) -> None:
        found.append(output)
        raise _Stop

    handle = model.blocks[n_blocks - 1].register_forward_hook(stop)
    try:
        model.hf(**inputs)
    except _Stop:
        pass
    finally:
        handle.remove()
    return found[0]


@contextmanager
def skipping(
    model: LanguageModel, n_blocks: int, output: Any, of_row: Int[Tensor, " b"]
) -> Iterator[None]:
    """Forward passes in which the first `n_blocks` blocks don't run.

    The last of them gives `output` instead (of `after_blocks`), row `of_row[i]` of it as row i;
    hooks on its output are called as ever.
    """
    whole = output if isinstance(output, tuple) else (output,)
    stream = whole[0][of_row.to(whole[0].device)]

    def like(values: Any) -> Any:
        return (values, *whole[1:]) if isinstance(output, tuple) else values

    def passing(hidden_states: Any = None, *_args: Any, **_kwargs: Any) -> Any:
        return like(hidden_states)

    def giving(*_args: Any, **_kwargs: Any) -> Any:
        return like(stream)

    blocks: list[Any] = list(model.blocks[:n_blocks])
    own = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks[:-1]:
            block.forward = passing
        blocks[-1].forward = giving
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward


def may_skip(model: LanguageModel) -> bool:
    """Whether blocks can be left out: each runs once, and none was seen to give what can't be kept.

    A module that stands at two places would be replaced at both.
    """
    return model.skippable and len(set(map(id, model.blocks))) == model.n_layers


def can_skip(model: LanguageModel, output: Any) -> bool:
    """Whether it is a stream `[b, t, d]`, and nothing beside it that rows must be chosen of.

    Where it is not, the model is remembered as one whose blocks can't be left out.
    """
    stream, *rest = output if isinstance(output, tuple) else (output,)
    is_stream = isinstance(stream, Tensor) and stream.dim() == 3
    model.skippable = is_stream and not any(isinstance(x, Tensor) for x in rest)
    return model.skippable
