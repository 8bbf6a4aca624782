"""Small tokenizers of the published ones' kinds, trained on the shipped neutral text.

Each is (tokenizer.json, tokenizer_config.json) as the model's repository has them.
"""

import json
from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from saexp.data.datasets import ASSETS

TokenizerPair = tuple[Tokenizer, dict[str, Any]]
VOCABULARY = 1024
END = "<|endoftext|>"
# What google/gemma-2-2b-it does with messages: <bos>, then turns between two marks.
CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _train(tokenizer: Tokenizer, special: list[str], alphabet: list[str]) -> Tokenizer:
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (ASSETS / "background.txt").read_text("utf-8").splitlines(), trainer
    )
    return tokenizer


def _byte_level(special: list[str], pre_tokenizer: Any, post_processor: Any) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, special, pre_tokenizers.ByteLevel.alphabet())
    tokenizer.post_processor = post_processor
    return tokenizer


def _bos_first(token: str, number: int) -> Any:
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, number)]
    )


@cache
def gpt_2() -> TokenizerPair:
    """No token in front; its config says nothing but the length."""
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = _byte_level([END], pre, processors.ByteLevel(trim_offsets=False))
    return tokenizer, {"model_max_length": 1024}


@cache
def gpt_neox() -> TokenizerPair:
    """No token in front, and no padding token in its config."""
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = _byte_level([END, "<|padding|>"], pre, processors.ByteLevel(trim_offsets=True))
    special_tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END)
    settings = {"add_prefix_space": False, "tokenizer_class": "GPTNeoXTokenizer"}
    return tokenizer, {**settings, **special_tokens}


@cache
def llama_3() -> TokenizerPair:
    """<|begin_of_text|> in front, put there by the post-processor; no padding token."""
    begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    pre = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    post = processors.Sequence([processors.ByteLevel(trim_offsets=True), _bos_first(begin, 0)])
    settings = {
        "bos_token": begin,
        "eos_token": end,
        "clean_up_tokenization_spaces": True,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131072,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return _byte_level([begin, end], pre, post), settings


@cache
def gemma_2(chat: bool = False) -> TokenizerPair:
    """Spaces as "\u2581", unknown characters as bytes, <bos> in front; `chat` adds the template."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    learned = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True))
    learned.normalizer = normalizers.Replace(" ", "\u2581")
    learned.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    model = json.loads(_train(learned, special, [*"0123456789\n\u2581"]).to_str())["model"]
    vocabulary = dict(model["vocab"])
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(
        BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.add_special_tokens(special)
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = _bos_first("<bos>", special.index("<bos>"))
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        **{f"{t}_token": f"<{t}>" for t in ("bos", "eos", "pad", "unk")},
        "additional_special_tokens": special[4:],
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "GemmaTokenizer",
    }
    return tokenizer, {**settings, "chat_template": CHAT} if chat else settings
