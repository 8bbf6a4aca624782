"""Greedy texts by a plain loop: one prompt at a time, a hand-written hook, `hf.generate`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saexp.models.loading import LanguageModel

Change = Callable[[Tensor], Tensor]
"""`[n, d]` of the changed positions -> their new values."""


@dataclass(frozen=True)
class Hooked:
    """What the hand-written hook does at a block's output."""

    layer: int
    change: Change
    positions: Sequence[int]
    """Prompt tokens that are changed."""
    generated: bool = False


def plain_generate(
    model: LanguageModel, ids: Sequence[int], max_new_tokens: int, hooked: Hooked | None = None
) -> list[int]:
    """New tokens without the end token, as transformers gives them for this prompt alone."""
    passes = []

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        assert hooked is not None
        stream = (output if isinstance(output, Tensor) else output[0]).clone()
        n = stream.shape[1]
        # Every pass but the first is over one new token, or, where the model computes its keys
        # anew, over the prompt and all that was generated.
        whole = not passes or n > 1
        passes.append(n)
        places = list(hooked.positions) if whole else []
        if hooked.generated:
            places += range(len(ids) if whole else 0, n)
        if places:
            stream[0, places] = hooked.change(stream[0, places])
        return stream if isinstance(output, Tensor) else (stream, *output[1:])

    handle = None if hooked is None else model.blocks[hooked.layer].register_forward_hook(hook)
    try:
        with torch.inference_mode():
            out = model.hf.generate(
                torch.tensor([list(ids)]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=list(model.eos_ids),
                pad_token_id=model.pad_id,
            )
    finally:
        if handle is not None:
            handle.remove()
    return [t for t in out[0, len(ids) :].tolist() if t not in model.eos_ids]
