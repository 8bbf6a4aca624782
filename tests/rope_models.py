"""Small random models whose rotary frequencies depend on the length of the sequence."""

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from saexp.models.loading import LanguageModel
from tests.random_models import D_MODEL, N_LAYERS, VOCABULARY, tokenizer

CONTEXT = 24
"""The original context, in tokens."""
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [3.0, 4.0, 5.0, 6.0],
    "original_max_position_embeddings": CONTEXT,
}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
ROPE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3_longrope": (
        "Phi3Config",
        {
            "max_position_embeddings": 4 * CONTEXT,
            "original_max_position_embeddings": CONTEXT,
            "rope_parameters": _LONGROPE,
        },
    ),
    "llama_longrope": (
        "LlamaConfig",
        {"max_position_embeddings": 4 * CONTEXT, "rope_parameters": _LONGROPE},
    ),
    "llama_dynamic": (
        "LlamaConfig",
        {"max_position_embeddings": CONTEXT, "rope_parameters": _DYNAMIC},
    ),
    "qwen2_dynamic": (
        "Qwen2Config",
        {"max_position_embeddings": CONTEXT, "rope_parameters": _DYNAMIC},
    ),
}
ONE_OF_EACH_KIND = ("phi3_longrope", "qwen2_dynamic")


def rope_hf(name: str) -> Any:
    """A new one, which has not seen any sequence."""
    kind, settings = ROPE_MODELS[name]
    before = hf_logging.get_verbosity()
    # transformers advises on how longrope's factor is written.
    hf_logging.set_verbosity_error()
    config = getattr(transformers, kind)(**_COMMON, **settings)
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    hf_logging.set_verbosity(before)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return hf.requires_grad_(False)


def rope_lm(name: str) -> LanguageModel:
    """The same in memory, with a tokenizer."""
    return LanguageModel.wrap(rope_hf(name), tokenizer(), name=name)
