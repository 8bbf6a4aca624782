"""How long a text a model can read, and the errors for one that is longer."""

from pathlib import Path

import pytest
import torch
import transformers

from saexp.analysis.top_latents import attribute
from saexp.errors import ModelError
from saexp.interventions.cached_generation import LogitReader, generate, read_logits
from saexp.interventions.stream_edits import Row
from saexp.models.forward import check_positions, context_limit, position_limit
from saexp.models.loading import LanguageModel
from tests.random_models import (
    ARCHITECTURES,
    D_MODEL,
    MAX_POSITIONS,
    VOCABULARY,
    random_lm,
    saved_lm,
    tokenizer,
)
from tests.rope_models import CONTEXT, rope_lm
from tests.unit.interventions.test_engine import made_sae


def with_a_table(kind: str) -> LanguageModel:
    """Other models whose positions stand in a table."""
    settings = {
        "OPT": {
            "hidden_size": D_MODEL,
            "num_hidden_layers": 1,
            "ffn_dim": 16,
            "num_attention_heads": 4,
            "max_position_embeddings": MAX_POSITIONS,
            "word_embed_proj_dim": D_MODEL,
        },
        "GPTJ": {
            "n_embd": D_MODEL,
            "n_layer": 1,
            "n_head": 4,
            "n_positions": MAX_POSITIONS,
            "rotary_dim": 4,
        },
    }[kind]
    config = getattr(transformers, f"{kind}Config")(vocab_size=VOCABULARY, **settings)
    hf = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return LanguageModel.wrap(hf, tokenizer(), kind)


def can_read(model: LanguageModel, n: int) -> bool:
    try:
        with torch.inference_mode():
            model.hf(torch.full((1, n), 5))
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "OPT", "GPTJ"])
def test_positions_end_exactly_where_the_model_itself_fails(architecture: str) -> None:
    model = random_lm(architecture) if architecture in ARCHITECTURES else with_a_table(architecture)
    limit = position_limit(model)
    assert can_read(model, MAX_POSITIONS)
    assert can_read(model, MAX_POSITIONS + 1) == (limit is None)
    assert limit in (None, MAX_POSITIONS)


def test_dynamic_ntk_has_no_longest_text() -> None:
    assert context_limit(rope_lm("llama_dynamic")) is None
    assert context_limit(rope_lm("phi3_longrope")) == 4 * CONTEXT
    assert context_limit(random_lm("llama")) == MAX_POSITIONS


def test_a_generation_that_outgrows_the_positions_is_one_line_beforehand() -> None:
    model, key = random_lm("gpt2"), "intervention.max_new_tokens"
    rows = [Row((5,) * 10), Row((5,) * 60)]
    fits = generate(model, rows, max_new_tokens=4, batch_tokens=1000, key=key)
    assert len(fits) == 2
    with pytest.raises(ModelError) as error:
        generate(model, rows, max_new_tokens=30, batch_tokens=1000, key=key)
    assert str(error.value) == (
        "a prompt of 60 tokens and 30 new ones do not fit into the 64 positions of random-gpt2; "
        "type intervention.max_new_tokens=4, or dataset.max_length=34, which leaves longer "
        "prompts out"
    )
    # Rotary models have no table that ends.
    assert len(generate(random_lm("llama"), rows, max_new_tokens=30, batch_tokens=1000)) == 2


@pytest.mark.parametrize(
    ("longest", "n_new", "ending"),
    [
        (70, 0, "type dataset.max_length=64, or shorten the prompt"),
        (64, 5, "type dataset.max_length=59, which leaves longer prompts out"),
        (64, 70, "type a smaller key"),
        (10, 64, "type key=54, or a smaller key"),
    ],
)
def test_the_suggested_setting_fits(longest: int, n_new: int, ending: str) -> None:
    with pytest.raises(ModelError) as error:
        check_positions(random_lm("gpt2"), longest, n_new, "key")
    assert str(error.value).endswith(ending)


def test_prompts_longer_than_the_positions_are_one_line_where_logits_are_read() -> None:
    model, ids = random_lm("gpt2"), (5,) * 70
    with pytest.raises(ModelError, match="a prompt is 70 tokens long, but random-gpt2 has 64"):
        read_logits(
            model, [Row(ids)], None, LogitReader(lambda _r, x: x[0].numpy(), "x"), batch_tokens=100
        )
    with pytest.raises(ModelError, match="a prompt is 70 tokens long"):
        attribute(model, made_sae(), [ids], [(3,)], [5])


def test_a_model_that_nothing_is_run_on_is_not_loaded(tmp_path: Path) -> None:
    """Where every result is stored."""
    model = saved_lm("gpt2", tmp_path)
    budget = {"batch_tokens": 64}
    reader = LogitReader(lambda _row, x: x.numpy(), "x")
    assert read_logits(model, [], None, reader, **budget) == []
    assert generate(model, [], max_new_tokens=10**6, **budget) == []
    assert not model.loaded
