"""The tiny model's byte-level BPE tokenizer: name words are two tokens, plain words mostly one."""

import numpy as np
from corpus import ENTITY_TYPES, World, tokenizer_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 1024


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train it on generated texts; `<bos>` comes first by itself, as with Gemma and Llama."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = tokenizer_text(np.random.default_rng(seed + 1), 6000)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


def check_names(world: World, tokenizer: PreTrainedTokenizerFast) -> int:
    """Token count of every name, which must be one and the same; returned."""
    names = [
        e.name for t in ENTITY_TYPES for group in (world.known, world.held_out) for e in group[t]
    ]
    counts = {len(tokenizer(f" {n}", add_special_tokens=False)["input_ids"]) for n in names}
    assert len(counts) == 1, f"names have token counts {sorted(counts)}; they must all be equal"
    return counts.pop()


def make_world(seed: int) -> tuple[World, PreTrainedTokenizerFast]:
    """Tokenizer and world of a seed; names are made of words of two tokens only."""
    tokenizer = make_tokenizer(seed)

    def two_tokens(word: str) -> bool:
        return len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 2

    world = World.make(seed, two_tokens)
    check_names(world, tokenizer)
    return world, tokenizer
