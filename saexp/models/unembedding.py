"""The final norm and unembedding as a linear map, and gradients of logits at a stream."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saexp.errors import ModelError
from saexp.models.hookpoints import Hookpoint
from saexp.models.hooks import edit, position_ids
from saexp.models.loading import LanguageModel

ADDED = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
"""Streams that are the residual stream, or are added to it: what is written there has a direct path
to the logits."""
_NUMBERS = 32 * 2**20
"""Logits held at once."""


class Unembedding:
    """logit(token) = x . readout(token) / scale(x) + a constant of the token, for a final stream x.

    Holds for LayerNorm and RMSNorm (any gain, also Gemma's 1 + weight), y = gain * C x / s(x) + b,
    with C the subtraction of the mean or nothing. The logits are those before soft-capping (Gemma
    2) and before a fixed factor (Cohere, Granite). Raises ModelError for any other final norm.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.norm: Any = _final_norm(model)
        head = model.hf.get_output_embeddings()
        if head is None or head.weight.shape[-1] != model.d_model:
            raise ModelError(f"{type(model.hf).__name__} has no unembedding of its stream")
        self.weight: Tensor = head.weight
        """`[v, d]`."""
        self.softcap: float | None = getattr(model.text_config, "final_logit_softcapping", None)
        self._fit()

    @property
    def device(self) -> torch.device:
        """Where the unembedding is."""
        return self.weight.device

    def _fit(self) -> None:
        """Which of the known norms this one is: tried on a vector, since names don't tell."""
        weight = self.norm.weight.detach()
        self._exact = torch.promote_types(weight.dtype, torch.float32)
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(len(weight), generator=generator, dtype=self._exact) + 1
        probe = probe.to(weight.device, weight.dtype)[None]
        with torch.no_grad():
            self._bias = self.norm(torch.zeros_like(probe))[0].to(self._exact)
        wide = weight.to(self._exact)
        # Norms compute in float32 even where the model is float64.
        coarse = max(torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps)
        best, tolerance = 1.0, 16 * coarse
        for gain in (wide, wide + 1):
            for centred in (False, True):
                error = self._misfit(probe, gain, centred)
                if error < best:
                    best, self._gain, self._centred = error, gain, centred
        if best > tolerance:
            raise ModelError(
                f"{type(self.norm).__name__} at the end of the model is neither LayerNorm nor "
                "RMSNorm, so what a direction adds to a logit is not defined"
            )

    def _scaled(self, x: Tensor, gain: Tensor, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(numerator gain * C x, norm's own output less its bias, scale s(x))."""
        with torch.no_grad():
            out = self.norm(x).to(self._exact) - self._bias
        wide = x.to(self._exact)
        above = gain * (wide - wide.mean(-1, keepdim=True) if centred else wide)
        size = (out * out).sum(-1)
        return above, out, (above * out).sum(-1) / size

    def _misfit(self, probe: Tensor, gain: Tensor, centred: bool) -> float:
        above, out, scale = self._scaled(probe, gain, centred)
        return float((above / scale[:, None] - out).norm() / out.norm())

    def scale(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """s(x) of final streams, epsilon included; in float32 or float64."""
        placed = x.to(self._gain.device, self.norm.weight.dtype)
        return self._scaled(placed, self._gain, self._centred)[2]

    def readout(self, tokens: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """The vector that a final stream is read with: C (gain * W_U[token])."""
        return self._read(self.weight[tokens.to(self.device)])

    def _read(self, rows: Tensor) -> Tensor:
        read = rows.detach().to(self._exact) * self._gain.to(rows.device)
        return read - read.mean(-1, keepdim=True) if self._centred else read

    @torch.no_grad()
    def top_tokens(self, directions: Float[Tensor, "n d"], k: int) -> Int[Tensor, "n k"]:
        """Tokens that each direction raises most, best first: the logit lens of a direction.

        The norm's bias, which is no direction's own, is left out; its scale changes no order.
        """
        placed = directions.to(self.device, self._exact)
        n_tokens = len(self.weight)
        k = min(k, n_tokens)
        step = max(k, _NUMBERS // max(len(placed), self.model.d_model))
        best = torch.empty(len(placed), 0, dtype=self._exact, device=self.device)
        tokens = torch.empty(len(placed), 0, dtype=torch.long, device=self.device)
        for start in range(0, n_tokens, step):
            logits = placed @ self._read(self.weight[start : start + step]).T
            here = torch.arange(start, start + logits.shape[1], device=self.device)
            best = torch.cat([best, logits], dim=1)
            tokens = torch.cat([tokens, here.expand(len(placed), -1)], dim=1)
            kept = best.topk(min(k, best.shape[1]), dim=1)
            best, tokens = kept.values, tokens.gather(1, kept.indices)
        return tokens.cpu()


def _final_norm(model: LanguageModel) -> nn.Module:
    """The one norm that stands beside the blocks, after them."""
    blocks = model.blocks
    parent = next(m for m in model.hf.modules() if any(c is blocks for c in m.children()))
    after, found = False, []
    for child in parent.children():
        after = after or child is blocks
        if after and "norm" in type(child).__name__.lower():
            found.append(child)
    if len(found) != 1 or getattr(found[0], "weight", None) is None:
        raise ModelError(
            f"{type(parent).__name__} has {len(found)} norms with weights after its blocks, and "
            "one is needed to say what a direction adds to a logit"
        )
    return found[0]


@contextmanager
def only_at(model: LanguageModel, tokens: Int[Tensor, " b"]) -> Iterator[None]:
    """Logits of one token a row, `[b, 1, v]`, in forward passes run inside.

    The LM head reads these positions (indices into the padded tokens) only, so a whole batch's
    logits are never made. Raises ModelError for a model without an LM head.
    """
    head = model.hf.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model.hf).__name__} has no LM head")

    def choose(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        places = tokens.to(hidden.device)
        rows = torch.arange(len(places), device=hidden.device)
        return (hidden[rows, places][:, None], *args[1:])

    handle = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()


def right_padded(
    prompts: Sequence[tuple[int, ...]], pad_id: int, device: torch.device
) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
    """(token ids, mask); token indices are those of the unpadded prompts."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, : len(prompt)] = torch.tensor(prompt)
        mask[i, : len(prompt)] = 1
    return ids.to(device), mask.to(device)


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
