"""Blocks below the first changed stream run once for rows of one prompt, and nothing tells."""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from saexp.interventions.cached_generation import generate
from saexp.interventions.generation import greedy_tokens, last_logits
from saexp.interventions.stream_edits import Add, Patch, Row, Vector
from saexp.models import Hookpoint
from saexp.models.forward import after_blocks, can_skip, may_skip
from saexp.models.loading import LanguageModel
from tests.random_models import ARCHITECTURES, D_MODEL, TEXTS, random_lm, tokenizer

UNTOUCHED = {
    Hookpoint(2, "resid_post"): 3,
    Hookpoint(1, "resid_post"): 2,
    Hookpoint(2, "resid_pre"): 2,
    Hookpoint(1, "attn_out"): 1,
    Hookpoint(1, "mlp_out"): 1,
    Hookpoint(2, "resid_mid"): 2,
    Hookpoint(0, "resid_post"): 1,
    Hookpoint(0, "resid_pre"): 0,
}


ADD_AT_ONCE = ("random-gpt_neox", "random-phi")


GRIDS = [
    (architecture, list(UNTOUCHED)[(i + 3 * k) % len(UNTOUCHED)])
    for i, architecture in enumerate(ARCHITECTURES)
    for k in range(2)
]
"""Two hookpoints for each architecture, so that each hookpoint is tried in several of them."""


def grid(model: LanguageModel, at: Hookpoint, places: Callable[[int], int]) -> list[Row]:
    """Prompts of different lengths, each with six edits of the stream."""
    generator = torch.Generator().manual_seed(7)
    ids = [
        tuple(model.tokenizer(t)["input_ids"][:n])
        for t, n in zip(TEXTS, (13, 9, 11, 6), strict=False)
    ]
    vectors = [Vector(torch.randn(D_MODEL, generator=generator)) for _ in range(2)]
    return [
        Row(p, (Add(at, vector, c),), (places(len(p)),))
        for p in ids
        for vector in vectors
        for c in (0.0, 1.0, 3.0)
    ]


def rows_run(model: LanguageModel, function: Callable[[], Tensor]) -> tuple[list[int], Tensor]:
    """Batch rows that went through each block's MLP in all passes, and what came out."""
    seen = [0] * model.n_layers

    def count(layer: int) -> Callable[..., None]:
        def hook(_m: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            values = args[0] if args else next(iter(kwargs.values()))
            seen[layer] += len(values)

        return hook

    handles = [
        model.module(Hookpoint(n, "mlp_out")).module.register_forward_pre_hook(
            count(n), with_kwargs=True
        )
        for n in range(model.n_layers)
    ]
    try:
        result = function()
    finally:
        for handle in handles:
            handle.remove()
    return seen, result


@pytest.mark.parametrize(
    ("architecture", "at"), GRIDS, ids=lambda value: getattr(value, "name", value)
)
def test_a_grid_equals_its_rows_one_by_one(architecture: str, at: Hookpoint) -> None:
    model = random_lm(architecture)
    if at.stream == "resid_mid" and model.name in ADD_AT_ONCE:
        pytest.skip("adds attention and MLP at once, so it has no resid_mid")
    # From the first tokens on (no prefix to share), and at the last one (a prefix in a cache).
    for position_of in (lambda _: 0, lambda n: n - 1):
        rows = grid(model, at, position_of)
        forwards = [block.forward for block in model.blocks]
        seen, together = rows_run(model, lambda rows=rows: last_logits(model, rows, None, 1))
        alone = torch.cat([last_logits(model, [row], None, 1) for row in rows])
        torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)
        n_prompts = len({row.ids for row in rows})
        prefixes = n_prompts if position_of(9) else 0
        shared = UNTOUCHED[at]
        assert all(n <= n_prompts + prefixes for n in seen[:shared]), seen
        assert all(n >= len(rows) for n in seen[shared:]), seen
        assert [block.forward for block in model.blocks] == forwards


def test_the_edit_is_seen_at_the_stream_given_in_place_of_the_blocks() -> None:
    model = random_lm("llama")
    rows = grid(model, Hookpoint(1, "resid_post"), lambda n: n - 2)
    logits = last_logits(model, rows, None, 1)[:, -1]
    same, one, three = logits[0], logits[1], logits[2]
    assert float((one - same).abs().max()) > 0.01
    assert float((three - one).abs().max()) > 0.01
    assert greedy_tokens(model, rows, {}, [1] * len(rows)) == logits.argmax(-1)[:, None].tolist()


def test_other_operations_of_the_batch_keep_their_lower_blocks() -> None:
    """One row that changes an early stream makes every row run from there on."""
    model = random_lm("llama")
    rows = grid(model, Hookpoint(2, "resid_post"), lambda _: 0)
    patch = Patch(Hookpoint(0, "resid_post"), Vector(torch.ones(1, D_MODEL)), 1.0)
    rows.append(Row(rows[0].ids, (patch,), (2,)))
    seen, together = rows_run(model, lambda: last_logits(model, rows, None, 1))
    alone = torch.cat([last_logits(model, [row], None, 1) for row in rows])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)
    assert seen[0] == 4
    assert seen[1] == len(rows)


def test_after_an_error_the_blocks_run_as_before() -> None:
    model = random_lm("llama")
    rows = grid(model, Hookpoint(1, "resid_post"), lambda _: 0)
    before = last_logits(model, rows[:1], None, 1)

    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    handle = model.blocks[2].register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="broken"):
        last_logits(model, rows, None, 1)
    handle.remove()
    assert torch.equal(last_logits(model, rows[:1], None, 1), before)
    assert all("forward" not in block.__dict__ for block in model.blocks)


def of_config(config: str = "LlamaConfig", **settings: object) -> LanguageModel:
    """A model of its own, as what is remembered of it must not reach other tests."""
    about = getattr(transformers, config)(**_SMALL, **settings)
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(about, dtype=torch.float32).eval().requires_grad_(False)
    return LanguageModel.wrap(hf, tokenizer(), name=config)


def test_a_block_that_gives_more_than_the_stream_is_not_skipped() -> None:
    model = of_config()
    ids = torch.tensor([rows.ids for rows in grid(model, Hookpoint(0, "mlp_out"), lambda _: 0)[:1]])
    with torch.inference_mode():
        stream = after_blocks(model, 1, input_ids=ids, use_cache=False)
    assert can_skip(model, stream)
    assert can_skip(model, (stream, None))
    assert may_skip(model)
    assert not can_skip(model, (stream, torch.ones(1, 4, 3, 3)))
    assert not may_skip(model)


def test_what_cannot_be_skipped_is_tried_once() -> None:
    """Later batches of the model don't run the lower blocks first, to no use."""
    model = of_config()
    for block in model.blocks:
        block.register_forward_hook(lambda _m, _a, out: (out, torch.ones(1)))
        block.register_forward_pre_hook(
            lambda _m, args: (args[0][0], *args[1:]) if isinstance(args[0], tuple) else args
        )
    norm = model.hf.model.norm
    norm.register_forward_pre_hook(lambda _m, args: (args[0][0],))
    rows = grid(model, Hookpoint(2, "resid_post"), lambda _: 0)
    alone = torch.cat([last_logits(model, [row], None, 1) for row in rows])
    for tried in (len({row.ids for row in rows}), 0):
        seen, together = rows_run(model, lambda: last_logits(model, rows, None, 1))
        torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)
        assert seen == [len(rows) + tried] * 3 + [len(rows)]


def test_a_block_that_stands_at_two_places_is_not_skipped() -> None:
    model = of_config()
    model.blocks[2] = model.blocks[0]
    rows = grid(model, Hookpoint(1, "resid_post"), lambda _: 0)
    alone = torch.cat([last_logits(model, [row], None, 1) for row in rows])
    torch.testing.assert_close(last_logits(model, rows, None, 1), alone, atol=2e-5, rtol=1e-4)


_SMALL = {
    "vocab_size": 384,
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
UNLIKE = {
    # Later blocks read keys and values of earlier ones, and the stream is cut before the LM head.
    "Gemma4TextConfig": {
        "head_dim": 8,
        "global_head_dim": 8,
        "sliding_window": 4,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 384,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    # Beside keys and values its cache holds states of a convolution and a recurrence.
    "FalconH1Config": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
}


@pytest.mark.parametrize("config", UNLIKE)
@pytest.mark.parametrize("layer", [1, 3])
def test_models_whose_blocks_share_more_than_the_stream(config: str, layer: int) -> None:
    model = of_config(config, **UNLIKE[config])
    for position_of in (lambda _: 0, lambda n: n - 1):
        rows = grid(model, Hookpoint(layer, "resid_post"), position_of)
        alone = [last_logits(model, [row], None, 1) for row in rows]
        together = last_logits(model, rows, None, 1)
        torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=1e-4)
        texts = generate(model, rows, max_new_tokens=4, batch_tokens=4096)
        # Of each prompt and each edit some.
        for row, text in list(zip(rows, texts, strict=True))[::5]:
            assert generate(model, [row], max_new_tokens=4, batch_tokens=4096) == [text]
