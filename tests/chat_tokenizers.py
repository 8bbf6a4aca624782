"""Tokenizers with and without BOS, EOS and a chat template, as models in use have them."""

import copy
from functools import cache
from typing import Any

from tokenizers import processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from saexp.models.loading import LanguageModel
from tests.hub_tokenizers import CHAT, END, TokenizerPair, gemma_2, gpt_2, llama_3
from tests.random_models import random_lm

# Llama 3's and Gemma 2's trim the message, ChatML and Mistral's take it as it is.
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant, important and constant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
UPPER = "{% for m in messages %}user: {{ m['content'] | upper }}\nmodel:{% endfor %}"
TWICE = "{% for m in messages %}{{ m['content'] }}\nAgain: {{ m['content'] }}\nA:{% endfor %}"


class WithoutOffsets:
    """A real tokenizer as slow ones are: ids from text, text from ids, no offsets."""

    is_fast = False

    def __init__(self, fast: Any) -> None:
        self.fast = fast

    def __getattr__(self, name: str) -> Any:
        if name == "fast":
            raise AttributeError(name)
        return getattr(self.fast, name)

    def __call__(self, text: str, **options: Any) -> dict[str, Any]:
        assert not options.keys() & {"return_offsets_mapping", "return_special_tokens_mask"}
        return {"input_ids": self.fast(text, **options)["input_ids"]}


def _loaded(
    pair: TokenizerPair, template: str | None = None, **settings: Any
) -> PreTrainedTokenizerFast:
    tokenizer, own = copy.deepcopy(pair)
    own = {k: v for k, v in own.items() if k.endswith("_token") or k.startswith("additional")}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**own, **settings})
    # transformers makes one of its own for some sets of special tokens.
    fast.backend_tokenizer.post_processor = tokenizer.post_processor
    fast.chat_template = template
    return fast


def _appending(pair: TokenizerPair, bos: str | None, eos: str) -> TokenizerPair:
    """With an EOS token behind every text, as T5's and some fine-tunes' tokenizers have it."""
    tokenizer, settings = copy.deepcopy(pair)
    names = [n for n in (bos, eos) if n is not None]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}" if bos else f"$A {eos}",
        special_tokens=[(n, tokenizer.token_to_id(n)) for n in names],
    )
    return tokenizer, {**settings, "bos_token": bos or eos, "eos_token": eos}


def _byte_level(template: str | None = None) -> ByT5Tokenizer:
    """transformers' own slow tokenizer; it appends </s> and has no BOS token."""
    slow = ByT5Tokenizer()
    slow.chat_template = template
    return slow


@cache
def base_tokenizers() -> dict[str, Any]:
    """Name -> a tokenizer without a template."""
    return {
        "no bos": _loaded(gpt_2(), bos_token=END, eos_token=END),
        "bos": _loaded(llama_3()),
        "bos and eos": _loaded(_appending(gemma_2(), "<bos>", "<eos>")),
        "eos": _loaded(_appending(gpt_2(), None, END)),
        "slow, bos": WithoutOffsets(_loaded(llama_3())),
        "slow, bos and eos": WithoutOffsets(
            _loaded(_appending(llama_3(), "<|begin_of_text|>", "<|end_of_text|>"))
        ),
        "slow, eos": _byte_level(),
    }


@cache
def chat_tokenizers() -> dict[str, Any]:
    """Name -> a tokenizer whose template takes the message as it is, or trimmed."""
    return {
        "gemma": _loaded(gemma_2(), CHAT),
        "llama 3": _loaded(llama_3(), LLAMA_3),
        # The tokenizer adds BOS to texts, the template has none.
        "no bos in template": _loaded(llama_3(), CHATML),
        # As Qwen's: neither has one, and a system prompt stands in front.
        "no bos at all": _loaded(gpt_2(), CHATML, bos_token=END, eos_token=END),
        "bos in template alone": _loaded(gpt_2(), MISTRAL, bos_token=END, eos_token=END),
        "eos appended": _loaded(_appending(gemma_2(), "<bos>", "<eos>"), CHAT),
        "slow": WithoutOffsets(_loaded(llama_3(), LLAMA_3)),
        "slow, eos appended": _byte_level(CHATML),
    }


@cache
def changing_tokenizers() -> dict[str, Any]:
    """Name -> a tokenizer whose template changes the message or repeats it."""
    return {"upper": _loaded(gpt_2(), UPPER), "twice": _loaded(gpt_2(), TWICE)}


def with_tokenizer(tokenizer: Any, *, chat: bool = False) -> LanguageModel:
    """A model that is asked for nothing but how it reads prompts."""
    model = LanguageModel.wrap(random_lm("llama").hf, tokenizer)
    model.cfg.chat = chat
    return model
