"""Rotary embeddings whose frequencies depend on the length of the sequence.

longrope (Phi-3; Ding et al. 2024, arXiv 2402.13753) has one set of frequencies up to the original
context and another beyond it; dynamic NTK scales them with the exact length beyond the context. A
forward pass uses the set of its longest row for all rows, so only rows that have the same set when
forwarded alone may share a pass.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

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


def reset_rope_before_passes(hf: nn.Module) -> None:
    """Make the frequencies of a pass depend on its own length only.

    transformers' dynamic NTK keeps the frequencies of the longest sequence so far until a sequence
    within the context comes, so that activations would depend on earlier texts.
    """
    for module in hf.modules():
        if _dynamic_prefixes(module):
            module.register_forward_pre_hook(_reset)


def _dynamic_prefixes(module: nn.Module) -> list[str]:
    """Prefixes of the names of a module's dynamic frequencies, one per type of layer."""
    kinds = getattr(module, "rope_type", None)
    if not hasattr(module, "original_max_seq_len") or kinds is None:
        return []
    of_prefix = {f"{k}_": v for k, v in kinds.items()} if isinstance(kinds, dict) else {"": kinds}
    return [prefix for prefix, kind in of_prefix.items() if "dynamic" in str(kind)]


def _reset(module: Any, _args: Any) -> None:
    for prefix in _dynamic_prefixes(module):
        original = getattr(module, f"{prefix}original_inv_freq")
        current = getattr(module, f"{prefix}inv_freq")
        setattr(module, f"{prefix}inv_freq", original.to(current.device))
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
