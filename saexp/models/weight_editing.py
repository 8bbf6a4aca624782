"""Weight orthogonalization: weights that cannot write a direction into the residual stream."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from saexp.errors import ModelError
from saexp.models.hookpoints import MIXERS, MLPS, Hookpoint
from saexp.models.loading import LanguageModel

Original = Callable[[], AbstractContextManager[None]]
"""Opens a context inside which a model has its own weights again."""
_MLP_OUT = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "out_proj", "wo", "w2")
_RANK_TOLERANCE = 1e-6
"""Singular values below this share of the largest are no direction of their own."""


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

    Yields a context of its own, inside which the model is as it was, so that both can be compared.

    The model's own tensors are not written to; they are put aside and put back on any exit, so
    weights are byte-equal afterwards. Meanwhile each exchanged weight is held twice. Weights are
    computed in float64 (float32 on mps) and rounded to the model's dtype: a relative component of
    about 1e-8 is left in float32, of about 1e-3 in bfloat16.

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
            f"a direction has {directions.shape[1]} numbers, the model's stream {d_model}"
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
    """A parameter of a block outside attention, MLP and norms."""
    for name, child in block.named_children():
        known = name in (*MIXERS, *MLPS) or _is_norm(child)
        if not known and any(True for _ in child.parameters()):
            return name
    return next((name for name, _ in block.named_parameters(recurse=False)), None)


def _embeddings(model: LanguageModel) -> list[nn.Module]:
    """Token embedding and learned position embeddings: what stands before the blocks."""
    blocks = model.blocks
    parent = next(m for m in model.hf.modules() if any(c is blocks for c in m.children()))
    token = model.hf.get_input_embeddings()
    found: list[nn.Module] = []
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
        found.append(child)
    if not any(child is token for child in found) or token.weight.device.type == "meta":
        raise ModelError(
            f"{type(parent).__name__} has its token embedding where saexp does not know it, or "
            "not in memory, so it cannot be orthogonalized; leave it out"
        )
    return found


def _without(values: Tensor, basis: Tensor) -> Tensor:
    """`[..., d]` less its component in the span."""
    return values - (values @ basis.T) @ basis


class _Exchanged:
    """Projected tensors in the place of a model's own."""

    def __init__(self) -> None:
        self.active = True
        self.tensors: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
        """(module, name, its own, the projected one)."""

    def project(
        self, module: nn.Module, name: str, basis: Tensor, *, transposed: bool = False
    ) -> None:
        """Put a projected tensor in the parameter's place."""
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
        """The projected tensors, or the model's own, in their places."""
        self.active = new
        for module, name, own, projected in self.tensors:
            module._parameters[name] = projected if new else own

    @contextmanager
    def original(self) -> Iterator[None]:
        """The model as it was, for the time of a context."""
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
