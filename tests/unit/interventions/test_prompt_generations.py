"""What is generated after a prompt is what `generate` gives after the tokenizer's own ids."""

import copy
from typing import Any

import pytest
import torch
from tokenizers import processors

from saexp.config import InterventionConfig
from saexp.data import Example
from saexp.interventions.cached_generation import generate
from saexp.interventions.conditions import position_prompts
from saexp.interventions.stream_edits import Row
from tests.chat_tokenizers import CHATML, with_tokenizer
from tests.random_models import TEXTS, tokenizer

N_NEW = 4


def variant(name: str) -> Any:
    """A tokenizer that adds BOS, appends EOS, and has a template with or without BOS."""
    changed = copy.deepcopy(tokenizer(chat="template" in name))
    if "eos" in name:
        changed.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
        )
    if "without bos" in name:
        changed.chat_template = CHATML
    return changed


@pytest.mark.parametrize("sae_wants_bos", [None, True])
@pytest.mark.parametrize(
    "name", ["bos", "bos and eos", "template", "template without bos", "template, eos appended"]
)
def test_texts_equal_those_of_generate(name: str, sae_wants_bos: bool | None) -> None:
    chat = "template" in name
    model = with_tokenizer(variant(name), chat=chat)
    model = model.with_bos(sae_wants_bos)
    examples = [Example(id=str(n), text=text) for n, text in enumerate(TEXTS[:2])]
    cfg = InterventionConfig(name="steer", where="last")
    placed = position_prompts(examples, model, cfg, 512).all()
    rows = [Row(p.tokens.ids, (), p.positions) for p in placed]
    generated = generate(model, rows, max_new_tokens=N_NEW, batch_tokens=4096)
    for prompt, tokens, text in zip(placed, generated, TEXTS, strict=False):
        if chat:
            ids = model.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            )
        else:
            ids = model.tokenizer(text)["input_ids"]
            ids = ids[:-1] if ids[-1] == model.tokenizer.eos_token_id else ids
        with torch.inference_mode():
            whole = model.hf.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=N_NEW,
                do_sample=False,
            )
        wanted = whole[0, len(ids) :].tolist()
        end = next((i for i, t in enumerate(wanted) if t in model.eos_ids), N_NEW)
        assert list(tokens) == wanted[:end]
        assert prompt.positions == (len(ids) - 1,)
