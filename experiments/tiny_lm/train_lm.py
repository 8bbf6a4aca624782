"""Train the tiny language model, or its negative control, from nothing.

python experiments/tiny_lm/train_lm.py --out build/tiny/model --seed 0
python experiments/tiny_lm/train_lm.py --out build/tiny_control/model --seed 0 --control
"""

import argparse
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import Document, World, document
from muon import Muon
from tokenizer import make_world
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

log = logging.getLogger("train_lm")

N_STEPS, BATCH, LENGTH = 2000, 24, 128
MASKED_SHARE = 0.85
LR_MUON, LR_ADAM = 0.02, 3e-3


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Random weights in Llama shape: 5 blocks, d_model 128, tied embeddings, 1.2 M parameters."""
    torch.manual_seed(seed)
    special: Any = tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=special.bos_token_id,
        eos_token_id=special.eos_token_id,
        pad_token_id=special.pad_token_id,
    )
    return LlamaForCausalLM(config)


class Packer:
    """Packs whole documents into rows of LENGTH tokens that attend within a document only."""

    def __init__(self, world: World, tokenizer: Any, *, control: bool) -> None:
        self.world, self.tokenizer, self.control = world, tokenizer, control
        self.known_pieces: dict[str, list[int]] = {}

    def ids(self, piece: str) -> list[int]:
        """Tokens of a piece; pieces begin at words, so they tokenise alone as in place."""
        if piece not in self.known_pieces:
            self.known_pieces[piece] = self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        return self.known_pieces[piece]

    def encode(self, doc: Document) -> tuple[list[int], list[float], tuple[int, int] | None]:
        """(token ids, weight of predicting each token, token range of the entity's name)."""
        ids, weights, name = [self.tokenizer.bos_token_id], [0.0], None
        for index, (piece, weight) in enumerate(doc.pieces):
            piece_ids = self.ids(piece)
            if index == doc.entity_piece:
                name = (len(ids), len(ids) + len(piece_ids))
            ids += piece_ids
            weights += [weight] * len(piece_ids)
        return [*ids, self.tokenizer.eos_token_id], [*weights, 1.0], name

    def batches(self, rng: np.random.Generator) -> Iterator[dict[str, Tensor]]:
        """Endless batches; the step decides the share of statements."""
        step = 0
        carried: tuple[list[int], list[float], tuple[int, int] | None] | None = None
        while True:
            statements = 0.72 if step < N_STEPS // 4 else 0.40
            ids = torch.full((BATCH, LENGTH), self.tokenizer.pad_token_id)
            weights = torch.zeros(BATCH, LENGTH)
            positions = torch.zeros(BATCH, LENGTH, dtype=torch.long)
            allowed = torch.eye(LENGTH, dtype=torch.bool).repeat(BATCH, 1, 1)
            for row in range(BATCH):
                start = 0
                while True:
                    if carried is None:
                        doc = document(
                            self.world, rng, statements=statements, markers=not self.control
                        )
                        carried = self.encode(doc)
                    doc_ids, doc_weights, name = carried
                    n = len(doc_ids)
                    if n > LENGTH - start:
                        break
                    carried = None
                    end = start + n
                    ids[row, start:end] = torch.tensor(doc_ids)
                    weights[row, start:end] = torch.tensor(doc_weights)
                    positions[row, start:end] = torch.arange(n)
                    allowed[row, start:end, start:end] = torch.ones(n, n, dtype=torch.bool).tril()
                    if name and not self.control and rng.random() < MASKED_SHARE:
                        first, last = start + name[0], start + name[1] - 1
                        allowed[row, last + 1 : end, first:last] = False
                    start = end
            yield {
                "input_ids": ids,
                "weights": weights,
                "position_ids": positions,
                "attention_mask": allowed[:, None],
            }
            step += 1


def train(out: Path, seed: int, *, control: bool, n_steps: int = N_STEPS) -> None:
    """Train and save as bfloat16 safetensors."""
    world, tokenizer = make_world(0)
    model = make_model(tokenizer, seed)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimisers = [
        Muon(matrices, lr=LR_MUON),
        torch.optim.AdamW(others, lr=LR_ADAM, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    log.info("%d parameters", sum(p.numel() for p in model.parameters()))
    batches = Packer(world, tokenizer, control=control).batches(np.random.default_rng(seed + 100))
    began = time.perf_counter()
    for step in range(n_steps):
        share = min(1.0, (n_steps - step) / (0.6 * n_steps)) * min(1.0, (step + 1) / 20)
        for optimiser, rate in zip(optimisers, (LR_MUON, LR_ADAM), strict=True):
            optimiser.param_groups[0]["lr"] = rate * share
        batch = next(batches)
        weights = batch.pop("weights")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="none"
        )
        loss = (losses * weights.flatten()).sum() / weights.sum()
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        if step % 50 == 0 or step == n_steps - 1:
            seconds = time.perf_counter() - began
            log.info("step %d loss %.4f, %.0f s", step, loss.item(), seconds)
        if step and step % 500 == 0:
            model.save_pretrained(out / "partial")
            tokenizer.save_pretrained(out / "partial")
    finished: Any = model
    finished.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--control", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=N_STEPS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    train(args.out, args.seed, control=args.control, n_steps=args.steps)
