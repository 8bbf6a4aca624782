"""The gradient of an answer's logit at a stream, for a batch of prompts of any lengths.

Shapes: b prompts, t padded tokens, d the stream's width, n positions.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saexp.models.hookpoints import Hookpoint
from saexp.models.hooks import edit, position_ids
from saexp.models.loading import LanguageModel
from saexp.models.unembedding import only_at, right_padded


@dataclass(frozen=True)
class LogitGradient:
    """Of one batch, at its positions, prompt by prompt."""

    rows: Int[Tensor, " n"]
    """Prompt of each position."""
    acts: Float[Tensor, "n d_read"]
    """The stream that was read."""
    gradient: Float[Tensor, "n d"]
    """d logit difference / d the other stream (or the same one)."""
    final: Float[Tensor, "n d_model"]
    """What the final norm read."""
    logit: Float[Tensor, " b"]
    """The answer's logit, less the foil's; at least float32, on the CPU."""


def logit_gradient(
    model: LanguageModel,
    prompts: Sequence[tuple[int, ...]],
    positions: Sequence[Sequence[int]],
    answers: Int[Tensor, " b"],
    foils: Int[Tensor, " b"] | None,
    *,
    reads: Hookpoint,
    writes: Hookpoint,
    norm: nn.Module,
) -> LogitGradient:
    """One forward and one backward pass, from each prompt's last token to the stream `writes`.

    The logits' sum over the batch is differentiated, since prompts don't mix. Parameters of the
    model get no gradient. `norm` is the final norm. Prompts are padded on the right: there every
    token attends to something, so no gradient is undefined.
    """
    ids, mask = right_padded(prompts, model.pad_id, model.device)
    rows = torch.tensor([row for row, of in enumerate(positions) for _ in of])
    tokens = torch.tensor([p for of in positions for p in of])
    kept: dict[str, Tensor] = {}

    def at(values: Tensor) -> Tensor:
        return values.detach()[rows.to(values.device), tokens.to(values.device)]

    def leaf(stream: Tensor) -> Tensor:
        if reads == writes:
            kept["acts"] = at(stream)
        kept["leaf"] = stream.detach().requires_grad_()
        return kept["leaf"]

    def read(stream: Tensor) -> Tensor:
        kept["acts"] = at(stream)
        return stream

    def on_norm(_module: Any, args: tuple[Any, ...]) -> None:
        kept["final"] = at(args[0])

    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(only_at(model, torch.tensor([len(p) - 1 for p in prompts])))
        stack.enter_context(edit(model, {reads: read, writes: leaf}))
        stack.callback(norm.register_forward_pre_hook(on_norm).remove)
        out = model.hf(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position_ids(mask),
            use_cache=False,
        )
        logits = out.logits[:, 0]
        wide = torch.promote_types(logits.dtype, torch.float32)
        logit = logits.gather(1, answers.to(logits.device)[:, None])[:, 0].to(wide)
        if foils is not None:
            logit = logit - logits.gather(1, foils.to(logits.device)[:, None])[:, 0].to(wide)
        (gradient,) = torch.autograd.grad(logit.sum(), kept["leaf"])
    return LogitGradient(rows, kept["acts"], at(gradient), kept["final"], logit.detach().cpu())
