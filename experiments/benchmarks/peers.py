"""The same collection as users of other tools write it; each function returns one run to time."""

import importlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saexp.models.hooks import position_ids
from saexp.models.loading import LanguageModel

Sync = Callable[[], None]
LONGEST = 128
"""Sequence length of the paper's tensor, independent of the batch."""


SHAPES: dict[str, dict[str, int]] = {
    "small": {
        "hidden_size": 320,
        "intermediate_size": 1280,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 18432,
    },
    "2b": {},
}
"""Sizes that differ from Gemma-2-2B; `small` keeps the vocabulary's fraction of the weights."""


def greedy(model: LanguageModel, ids: Tensor, mask: Tensor, n_new: int) -> Tensor:
    """transformers' greedy `generate`."""
    with torch.inference_mode():
        return model.hf.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=n_new,
            eos_token_id=list(model.eos_ids),
            pad_token_id=model.pad_id,
        )


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bare_forward(
    model: LanguageModel, layer: int, batches: Sequence[tuple[Tensor, Tensor]]
) -> Callable[[], None]:
    """The bare forward pass of the blocks up to `layer` on batches (token ids, attention mask)."""
    inner = model.hf.base_model

    def run() -> None:
        whole = inner.layers
        inner.layers = whole[: layer + 1]
        try:
            with torch.inference_mode():
                for ids, mask in batches:
                    inner(
                        input_ids=ids,
                        attention_mask=mask,
                        position_ids=position_ids(mask),
                        use_cache=False,
                    )
            sync(model.device)
        finally:
            inner.layers = whole

    return run


@dataclass(frozen=True)
class Batch:
    """Right-padded ids and mask `[b, t]`, and the position to read in each row `[b]`."""

    ids: Tensor
    mask: Tensor
    last: Tensor


def full_forward(
    model: LanguageModel, batches: list[Batch], layer: int, sync: Sync
) -> Callable[[], None]:
    """transformers with `output_hidden_states`: the whole model and the LM head run."""

    def run() -> None:
        acts = []
        with torch.inference_mode():
            for batch in batches:
                out = model.hf(
                    input_ids=batch.ids,
                    attention_mask=batch.mask,
                    output_hidden_states=True,
                    use_cache=False,
                )
                acts.append(_at(out.hidden_states[layer + 1], batch).cpu())
        sync()

    return run


def all_layers(
    model: LanguageModel, batches: list[Batch], _layer: int, sync: Sync
) -> Callable[[], None]:
    """The published code of Ferrando et al. 2024 (arXiv 2411.14257).

    Per batch a zeroed float32 tensor `[b, layers, 128, d_model]`, filled by a hook before every
    block that copies and adds; the whole model runs as called, cache and LM head included; then
    the one position wanted is cut out at every layer and put into a float32 file.
    """
    blocks = model.blocks
    n_texts = sum(len(batch.ids) for batch in batches)
    width = max(LONGEST, *(batch.ids.shape[1] for batch in batches))

    def kept_by(into: Tensor) -> Callable[..., None]:
        def keep(_module: Any, inputs: Any) -> None:
            into[:] += inputs[0].clone().to(into)

        return keep

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            shape = (n_texts, len(blocks), model.d_model)
            file = np.memmap(f"{folder}/acts.dat", dtype=np.float32, mode="w+", shape=shape)
            first = 0
            for batch in batches:
                n, longest = batch.ids.shape
                acts = torch.zeros(n, len(blocks), width, model.d_model, device=model.device)
                handles = [
                    block.register_forward_pre_hook(kept_by(acts[:, i, :longest]))
                    for i, block in enumerate(blocks)
                ]
                try:
                    model.hf(input_ids=batch.ids, attention_mask=batch.mask)
                finally:
                    for handle in handles:
                        handle.remove()
                whole = acts.cpu()
                file[first : first + n] = whole[torch.arange(n), :, batch.last].numpy()
                first += n
            file.flush()
        sync()

    return run


def transformer_lens(
    model: LanguageModel, batches: list[Batch], layer: int, sync: Sync
) -> Callable[[], None]:
    """`run_with_cache` with `stop_at_layer` and a names filter, on a model of the same shape."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    about = model.text_config
    config = HookedTransformerConfig(
        n_layers=about.num_hidden_layers,
        d_model=about.hidden_size,
        n_ctx=512,
        d_head=about.head_dim,
        n_heads=about.num_attention_heads,
        n_key_value_heads=about.num_key_value_heads,
        d_mlp=about.intermediate_size,
        d_vocab=about.vocab_size,
        act_fn="gelu_pytorch_tanh",
        gated_mlp=True,
        normalization_type="RMS",
        use_normalization_before_and_after=True,
        positional_embedding_type="rotary",
        rotary_dim=about.head_dim,
        rotary_base=10000,
        attn_scores_soft_cap=about.attn_logit_softcapping,
        device=str(model.device),
        dtype=model.dtype,
        seed=0,
    )
    lens = HookedTransformer(config).eval()
    name = f"blocks.{layer}.hook_resid_post"

    def run() -> None:
        acts = []
        with torch.inference_mode():
            for batch in batches:
                _, cache = lens.run_with_cache(
                    batch.ids,
                    attention_mask=batch.mask,
                    names_filter=name,
                    stop_at_layer=layer + 1,
                )
                acts.append(_at(cache[name], batch).cpu())
        sync()

    return run


def nnsight_trace(
    model: LanguageModel, batches: list[Batch], layer: int, sync: Sync
) -> Callable[[], None]:
    """nnsight's `trace` that saves the block's output."""
    # Not a dependency of the project.
    traced = importlib.import_module("nnsight").NNsight(model.hf)

    def run() -> None:
        acts = []
        with torch.inference_mode():
            for batch in batches:
                with traced.trace(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False):
                    values = traced.model.layers[layer].output.save()
                whole = values if isinstance(values, Tensor) else values[0]
                acts.append(_at(whole, batch).cpu())
        sync()

    return run


def _at(values: Tensor, batch: Batch) -> Tensor:
    return values[torch.arange(len(values), device=values.device), batch.last.to(values.device)]


PEERS: dict[str, Callable[..., Callable[[], None]]] = {
    "transformers, output_hidden_states": full_forward,
    "all layers hooked, float32 sequences": all_layers,
    "TransformerLens run_with_cache, stop_at_layer": transformer_lens,
    "nnsight trace": nnsight_trace,
}
