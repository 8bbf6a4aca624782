"""The unembedding as a linear map, gradients of logits, and weight orthogonalization."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from saexp.errors import ModelError
from saexp.models import MIXERS, MLPS, Hookpoint
from saexp.models.forward import only_at, padded
from saexp.models.hooks import edit, position_ids
from saexp.models.loading import LanguageModel

ADDED = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
"""Streams that are the residual stream or are added to it, and so have a direct path to the
logits."""
_MAX_LOGITS = 32 * 2**20
"""Number of logits in memory at once."""


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
        """Device of the unembedding."""
        return self.weight.device

    def _fit(self) -> None:
        """Find out on a random vector which known norm this is; its name does not say."""
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
        """The vector that gives a logit as its dot product with a stream: C (gain * W_U[token])."""
        return self._read(self.weight[tokens.to(self.device)])

    def _read(self, rows: Tensor) -> Tensor:
        read = rows.detach().to(self._exact) * self._gain.to(rows.device)
        return read - read.mean(-1, keepdim=True) if self._centred else read

    @torch.no_grad()
    def top_tokens(self, directions: Float[Tensor, "n d"], k: int) -> Int[Tensor, "n k"]:
        """Tokens that each direction promotes most, best first: the logit lens of a direction.

        The norm's bias is left out, because it does not depend on the direction; its scale does not
        change the order.
        """
        placed = directions.to(self.device, self._exact)
        n_tokens = len(self.weight)
        k = min(k, n_tokens)
        step = max(k, _MAX_LOGITS // max(len(placed), self.model.d_model))
        best = torch.empty(len(placed), 0, dtype=self._exact, device=self.device)
        tokens = torch.empty(len(placed), 0, dtype=torch.long, device=self.device)
        for start in range(0, n_tokens, step):
            logits = placed @ self._read(self.weight[start : start + step]).T
            here = torch.arange(start, start + logits.shape[1], device=self.device)
            best = torch.cat([best, logits], dim=1)
            tokens = torch.cat([tokens, here.expand(len(placed), -1)], dim=1)
            top = best.topk(min(k, best.shape[1]), dim=1)
            best, tokens = top.values, tokens.gather(1, top.indices)
        return tokens.cpu()


def _final_norm(model: LanguageModel) -> nn.Module:
    """The final norm: the only norm after the blocks, in the same module."""
    blocks = model.blocks
    parent = next(m for m in model.hf.modules() if any(c is blocks for c in m.children()))
    after, norms = False, []
    for child in parent.children():
        after = after or child is blocks
        if after and "norm" in type(child).__name__.lower():
            norms.append(child)
    if len(norms) != 1 or getattr(norms[0], "weight", None) is None:
        raise ModelError(
            f"{type(parent).__name__} has {len(norms)} norms with weights after its blocks, and "
            "one is needed to say what a direction adds to a logit"
        )
    return norms[0]


@dataclass(frozen=True)
class LogitGradient:
    """Gradient of the logit difference in one batch, at its positions, prompt by prompt."""

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
    ids, mask = padded(prompts, model.pad_id, model.device, padding_side="right")
    rows = torch.tensor([row for row, of in enumerate(positions) for _ in of])
    tokens = torch.tensor([p for of in positions for p in of])
    streams: dict[str, Tensor] = {}

    def at(values: Tensor) -> Tensor:
        return values.detach()[rows.to(values.device), tokens.to(values.device)]

    def leaf(stream: Tensor) -> Tensor:
        if reads == writes:
            streams["acts"] = at(stream)
        streams["leaf"] = stream.detach().requires_grad_()
        return streams["leaf"]

    def read(stream: Tensor) -> Tensor:
        streams["acts"] = at(stream)
        return stream

    def on_norm(_module: Any, args: tuple[Any, ...]) -> None:
        streams["final"] = at(args[0])

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
        (gradient,) = torch.autograd.grad(logit.sum(), streams["leaf"])
    return LogitGradient(
        rows, streams["acts"], at(gradient), streams["final"], logit.detach().cpu()
    )


Original = Callable[[], AbstractContextManager[None]]
"""Opens a context in which a model has its own weights again."""
_MLP_OUT = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "out_proj", "wo", "w2")
_RANK_TOLERANCE = 1e-6
"""Singular values below this fraction of the largest do not count as a direction."""


@contextmanager
def orthogonalized(
    model: LanguageModel,
    directions: Float[Tensor, "k d"],
    *,
    layers: Sequence[int] | None = None,
    embedding: bool = False,
) -> Iterator[Original]:
    """Nothing that attention and MLPs of `layers` (all, if None) add to the stream has a component
    along the span of `directions`, which need be neither orthogonal nor of unit norm.

    Weight and bias of the output projections are exchanged for W - Q^T Q W, with Q an orthonormal
    basis of the span. Where a norm stands between projection and stream (Gemma 2 and 3, OLMo 2,
    GLM 4), no new projection weight gives W - Q^T Q W after it, since the norm divides by the
    length of what it reads; there the norm's output is projected by a hook, ahead of any other.

    With `embedding`, token embedding and learned position embeddings are projected too, so that
    the stream has no such component anywhere (if `layers` is all). The unembedding never changes:
    where it is tied to the embedding, it keeps the original tensor while the context is open.

    Yields a function that opens a context with the original weights, so that both can be compared.

    The model's own tensors are not written to; they are set aside and restored on any exit, so that
    weights are byte-equal afterwards. Meanwhile each replaced weight is in memory twice. Weights
    are computed in float64 (float32 on mps) and rounded to the model's dtype: a relative component
    of about 1e-8 is left in float32, of about 1e-3 in bfloat16.

    Raises ModelError for directions of another width, not finite or all zero; a layer the model
    lacks; mixtures of experts, quantised or offloaded weights, and blocks with other parts that
    write to the stream.
    """
    basis = _basis(directions, model.d_model)
    chosen = range(model.n_layers) if layers is None else layers
    writers: dict[int, nn.Module] = {}
    norms: dict[int, nn.Module] = {}
    for layer in chosen:
        model.check_layer(layer)
        for stream in ("attn_out", "mlp_out"):
            writer, norm = _writer(model, layer, stream)
            if writer is not None:
                writers[id(writer)] = writer
            if norm is not None:
                norms[id(norm)] = norm
    embeddings = _embeddings(model) if embedding else []
    with ExitStack() as stack:
        exchanged = _Exchanged()
        stack.callback(exchanged.put, new=False)
        for norm in norms.values():
            hook = norm.register_forward_hook(_projecting(basis, exchanged), prepend=True)
            stack.callback(hook.remove)
        for writer in writers.values():
            # A linear layer's weight is [d, d_in]; GPT-2's Conv1D has it the other way round.
            linear = isinstance(writer, nn.Linear)
            exchanged.project(writer, "weight", basis, transposed=linear)
            if writer.bias is not None:
                exchanged.project(writer, "bias", basis)
        for table in embeddings:
            exchanged.project(table, "weight", basis)
        yield exchanged.original


def _basis(directions: Tensor, d_model: int) -> Float[Tensor, "r d"]:
    """Orthonormal rows that span the directions, float64, on the CPU."""
    if directions.shape[1] != d_model:
        raise ModelError(
            f"directions have {directions.shape[1]} components, the model's stream {d_model}"
        )
    rows = directions.detach().cpu().double()
    if not bool(torch.isfinite(rows).all()):
        raise ModelError("a direction has values that are not finite")
    norms = rows.norm(dim=-1, keepdim=True)
    if not len(rows) or not bool((norms > 0).all()):
        raise ModelError("a direction to take out of the weights is all zeros")
    _, values, right = torch.linalg.svd(rows / norms, full_matrices=False)
    return right[values > _RANK_TOLERANCE * values[0]]


def _writer(
    model: LanguageModel, layer: int, stream: str
) -> tuple[nn.Module | None, nn.Module | None]:
    """(output projection, None), or (None, norm) where one stands between it and the stream."""
    block = model.blocks[layer]
    site = model.module(Hookpoint(layer, stream)).module
    if (other := _others(block)) is not None:
        raise ModelError(
            f"{type(block).__name__} has a part '{other}' that may write to the stream too, so its "
            "weights cannot be orthogonalized; use intervention=project_out"
        )
    if _is_norm(site):
        return None, site
    if stream == "attn_out":
        projection = model.module(Hookpoint(layer, "attn_z")).module
    else:
        children = dict(site.named_children())
        projection = next((children[n] for n in _MLP_OUT if n in children), None)
    many = any(isinstance(m, nn.ModuleList) for m in site.modules())
    if projection is None or many or any(p.ndim > 2 for p in site.parameters()):
        raise ModelError(
            f"{type(site).__name__} has no single output projection known to saexp (a mixture of "
            "experts?), so its weights cannot be orthogonalized; use intervention=project_out"
        )
    _check_projection(projection, model.d_model)
    return projection, None


def _check_projection(module: nn.Module, d_model: int) -> None:
    weight = getattr(module, "weight", None)
    axis = 1 if isinstance(module, Conv1D) else 0
    # Quantised weights are packed or of one byte; offloaded ones are on no device.
    if (
        not isinstance(module, Conv1D | nn.Linear)
        or not isinstance(weight, Tensor)
        or not weight.is_floating_point()
        or weight.element_size() < 2
        or weight.device.type == "meta"
        or weight.shape[axis] != d_model
    ):
        raise ModelError(
            f"{type(module).__name__} is not a plain linear layer in memory (quantised or "
            "offloaded?), so its weights cannot be orthogonalized; load the model without that"
        )


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _others(block: nn.Module) -> str | None:
    """Name of a part of a block with parameters that is not attention, MLP or norm."""
    for name, child in block.named_children():
        known = name in (*MIXERS, *MLPS) or _is_norm(child)
        if not known and any(True for _ in child.parameters()):
            return name
    return next((name for name, _ in block.named_parameters(recurse=False)), None)


def _embeddings(model: LanguageModel) -> list[nn.Module]:
    """Token embedding and learned position embeddings, which come before the blocks."""
    blocks = model.blocks
    parent = next(m for m in model.hf.modules() if any(c is blocks for c in m.children()))
    token = model.hf.get_input_embeddings()
    tables: list[nn.Module] = []
    for name, child in parent.named_children():
        if child is blocks:
            break
        if not any(True for _ in child.parameters()):
            continue
        if not isinstance(child, nn.Embedding) or child.embedding_dim != model.d_model:
            raise ModelError(
                f"{type(parent).__name__} has a part '{name}' between its embedding and its "
                "blocks, so the embedding cannot be orthogonalized; leave it out"
            )
        tables.append(child)
    if not any(child is token for child in tables) or token.weight.device.type == "meta":
        raise ModelError(
            f"{type(parent).__name__} has its token embedding where saexp does not know it, or "
            "not in memory, so it cannot be orthogonalized; leave it out"
        )
    return tables


def _without(values: Tensor, basis: Tensor) -> Tensor:
    """`[..., d]` without its component in the span."""
    return values - (values @ basis.T) @ basis


class _Exchanged:
    """Projected tensors that replace those of a model."""

    def __init__(self) -> None:
        self.active = True
        self.tensors: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
        """(module, name, its own, the projected one)."""

    def project(
        self, module: nn.Module, name: str, basis: Tensor, *, transposed: bool = False
    ) -> None:
        """Replace a parameter by its projection."""
        old = module._parameters[name]
        assert old is not None
        exact = torch.float32 if old.device.type == "mps" else torch.float64
        with torch.no_grad():
            values, q = old.detach().to(exact), basis.to(old.device, exact)
            new = _without(values.T, q).T.contiguous() if transposed else _without(values, q)
            parameter = nn.Parameter(new.to(old.dtype), requires_grad=old.requires_grad)
        self.tensors.append((module, name, old, parameter))
        module._parameters[name] = parameter

    def put(self, *, new: bool) -> None:
        """Set the projected tensors, or the model's own."""
        self.active = new
        for module, name, own, projected in self.tensors:
            module._parameters[name] = projected if new else own

    @contextmanager
    def original(self) -> Iterator[None]:
        """The model's own weights while the context is open."""
        self.put(new=False)
        try:
            yield
        finally:
            self.put(new=True)


def _projecting(basis: Tensor, exchanged: _Exchanged) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    placed: dict[torch.device, Tensor] = {}

    def project(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        if not exchanged.active:
            return output
        exact = torch.promote_types(output.dtype, torch.float32)
        if output.device not in placed:
            placed[output.device] = basis.to(exact).to(output.device)
        q = placed[output.device]
        return _without(output.to(exact), q).to(output.dtype)

    return project
