"""Random three-layer models of real architectures and an offline tokenizer, for any test.

Every parameter is noisy, norms and biases too, so that a hook at a wrong place shows.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from saexp.config import ModelConfig
from saexp.models.loading import LanguageModel
from saexp.models.structure import contiguous_input

N_LAYERS = 3
D_MODEL = 32
VOCABULARY = 384
MAX_POSITIONS = 64

_GPT2 = {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": MAX_POSITIONS}
_LLAMA = {
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
}
_NEOX = {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}
# Gemma's heads are wider than d_model / n_heads, and a short window makes positions matter.
_GEMMA = {**_LLAMA, "head_dim": 16}
_WINDOW = {**_GEMMA, "sliding_window": 4, "query_pre_attn_scalar": 16}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", _GPT2),
    "gpt_neox": ("GPTNeoXConfig", _NEOX),
    "gpt_neox_serial": ("GPTNeoXConfig", {**_NEOX, "use_parallel_residual": False}),
    "llama": ("LlamaConfig", _LLAMA),
    "mistral": ("MistralConfig", {**_LLAMA, "sliding_window": 4}),
    "gemma": ("GemmaConfig", _GEMMA),
    "gemma2": ("Gemma2Config", _WINDOW),
    "gemma3": ("Gemma3TextConfig", _WINDOW),
    "qwen2": ("Qwen2Config", _LLAMA),
    "qwen3": ("Qwen3Config", {**_LLAMA, "head_dim": 16}),
    "phi": ("PhiConfig", {**_LLAMA, "num_key_value_heads": 4}),
}
PARALLEL = ("gpt_neox", "phi")
"""Attention and MLP read the same point, so there is no stream between them."""
POST_NORMS = ("gemma2", "gemma3")
"""What attention and MLP give is normed before it is added."""
STORED = ("gpt2", "gpt_neox", "llama", "gemma2", "qwen2")
"""The five that end-to-end tests run on."""

TEXTS = [
    "The player Fenlet Baszad scored twice in the second half of the game.",
    "The city of New Bresk lies on the wide river; its old harbour is busy.",
    "The song Café Münster was written in 1987, and nobody sang it well.",
    "It's raining, isn't it? We'll see what the captain says tomorrow morning.",
    "日本語の文 and emoji 🙂🙃 stand in one line.",
]


def random_hf(architecture: str, *, seed: int = 0, **options: Any) -> Any:
    """A random `transformers` causal LM in float32 and eval mode; `options` go into its config."""
    name, settings = ARCHITECTURES[architecture]
    config = getattr(transformers, name)(
        vocab_size=VOCABULARY,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **(settings | options),
    )
    torch.manual_seed(seed)
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return hf.requires_grad_(False)


@cache
def tokenizer(trim_offsets: bool = True, chat: bool = False) -> PreTrainedTokenizerFast:
    """A small byte-level BPE that puts <bos> in front; `trim_offsets` as Llama 3 has it."""
    bare = Tokenizer(BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim_offsets)
    bare.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare.train_from_iterator(TEXTS * 3, trainer)
    bare.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=trim_offsets),
            processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)]),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    if chat:
        fast.chat_template = (
            "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}model:{% endif %}"
        )
    return fast


def hooks_left(hf: Any) -> list[Any]:
    """Hooks on a model's modules, but those that stay: of transformers, and of the LM head."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    hooks = [h for m in hf.modules() for kind in kinds for h in getattr(m, kind).values()]
    stays = {id(h) for h in hooks if getattr(h, "__module__", "").startswith("transformers.")}
    return [h for h in hooks if id(h) not in stays and h is not contiguous_input]


@cache
def random_lm(architecture: str) -> LanguageModel:
    """A random model in memory, with the tokenizer; shared, so leave its weights alone."""
    return LanguageModel.wrap(random_hf(architecture), tokenizer(), name=f"random-{architecture}")


def save(hf: Any, folder: Path) -> ModelConfig:
    """Write the model with the tokenizer to a folder; the config that loads it from there."""
    # Its bar would stand among what a command prints.
    hf_logging.disable_progress_bar()
    hf.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return ModelConfig(name=str(folder), device="cpu")


def saved_lm(architecture: str, folder: Path, **options: Any) -> LanguageModel:
    """A random model that went through a folder, as users' models do."""
    return LanguageModel(save(random_hf(architecture, **options), folder))
