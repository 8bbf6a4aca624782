"""Blocks and sites are found by shape; what can't be found is an error that says what to set."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Glm4Config,
    GraniteConfig,
    MambaConfig,
    OPTConfig,
)

from saexp.config import ModelConfig
from saexp.errors import ModelError
from saexp.models import Hookpoint
from saexp.models.hooks import run_truncated
from saexp.models.loading import LanguageModel
from saexp.models.structure import find_blocks
from tests.random_models import ARCHITECTURES, D_MODEL, N_LAYERS, random_hf, random_lm

SMALL = {
    "vocab_size": 64,
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def wrapped(config, **options) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel.wrap(AutoModelForCausalLM.from_config(config))
    model.cfg = ModelConfig(name="in-memory", **options)
    return model


def opt(**options) -> LanguageModel:
    return wrapped(OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=D_MODEL), **options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_are_those_that_the_forward_pass_runs(architecture):
    model = random_lm(architecture)
    ran = []
    handles = [
        module.register_forward_hook(lambda m, *_: ran.append(m))
        for _, module in model.hf.named_modules()
        if type(module) is type(model.blocks[0])
    ]
    model.hf(input_ids=torch.tensor([[1, 5, 9]]))
    for handle in handles:
        handle.remove()
    assert model.n_layers == len(model.blocks) == N_LAYERS
    assert model.d_model == D_MODEL
    assert ran == list(model.blocks)


def test_an_unknown_shape_is_an_error_that_names_the_key():
    with pytest.raises(ModelError) as error:
        find_blocks(random_hf("llama").model.norm, N_LAYERS)
    assert str(error.value) == (
        "LlamaRMSNorm has 0 lists of 3 blocks; type model.blocks=<module path> to choose one"
    )


def test_blocks_whose_parts_have_unknown_names_are_found():
    model = opt()
    assert model.blocks is model.hf.model.decoder.layers


def test_two_lists_that_fit_are_an_error_too():
    both = nn.ModuleDict({"one": random_hf("gpt2"), "two": random_hf("gpt2")})
    with pytest.raises(ModelError, match="^ModuleDict has 2 lists of 3 blocks; type"):
        find_blocks(both, N_LAYERS)


def test_vision_towers_are_passed_over():
    both = nn.ModuleDict({"vision_tower": random_hf("gpt2"), "language": random_hf("llama")})
    assert find_blocks(both, N_LAYERS) is both["language"].model.layers


def test_model_blocks_makes_an_unknown_shape_usable():
    model = opt(blocks="model.decoder.layers")
    ids = torch.tensor([[1, 5, 9, 7]])
    hidden = model.hf(input_ids=ids, output_hidden_states=True).hidden_states
    for layer in range(N_LAYERS):
        point = Hookpoint(layer, "resid_pre")
        got = run_truncated(model, ids, torch.ones_like(ids), [point])[point]
        torch.testing.assert_close(got, hidden[layer], atol=1e-5, rtol=0)


def test_a_block_that_joins_the_tokens_of_all_texts_has_no_mlp_streams():
    with pytest.raises(ModelError) as error:
        opt().module(Hookpoint(0, "mlp_out"))
    assert str(error.value) == (
        "OPTDecoderLayer joins the tokens of all texts at its MLP, so saexp cannot read mlp_out; "
        "use resid_pre or resid_post"
    )


def test_a_block_of_one_module_has_no_streams_within():
    config = MambaConfig(vocab_size=64, hidden_size=D_MODEL, num_hidden_layers=N_LAYERS)
    for stream in ("mlp_out", "attn_z"):
        with pytest.raises(ModelError) as error:
            wrapped(config).module(Hookpoint(0, stream))
        assert str(error.value) == f"MambaBlock has no {stream}; only resid_pre and resid_post"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("model.nowhere", "model.blocks=model.nowhere: OPTForCausalLM has no such module"),
        ("model.decoder", "model.blocks=model.decoder is not a list of 3 blocks"),
    ],
)
def test_a_wrong_model_blocks_is_an_error(path, message):
    with pytest.raises(ModelError) as error:
        _ = opt(blocks=path).blocks
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("architecture", "block"), [("gpt_neox", "GPTNeoXLayer"), ("phi", "PhiDecoderLayer")]
)
def test_parallel_blocks_have_no_resid_mid(architecture, block):
    with pytest.raises(ModelError) as error:
        random_lm(architecture).module(Hookpoint(1, "resid_mid"))
    assert str(error.value) == (
        f"{block} adds attention and MLP at once, so it has no resid_mid; "
        "use resid_pre or resid_post"
    )


def test_attention_with_an_unknown_output_projection_is_an_error():
    model = LanguageModel.wrap(random_hf("llama"))
    attention = model.blocks[0].self_attn
    attention.strange = attention.o_proj
    del attention.o_proj
    with pytest.raises(ModelError, match="^LlamaAttention has no output projection known to saexp"):
        model.module(Hookpoint(0, "attn_z"))


@pytest.mark.parametrize("stream", ["attn_out", "mlp_out"])
@pytest.mark.parametrize(
    ("block", "config"),
    [
        (
            "BloomBlock",
            BloomConfig(vocab_size=64, hidden_size=D_MODEL, n_layer=N_LAYERS, n_head=4),
        ),
        (
            "GraniteDecoderLayer",
            GraniteConfig(**SMALL, intermediate_size=48, residual_multiplier=0.5),
        ),
    ],
    ids=["bloom", "granite"],
)
def test_outputs_that_are_not_added_as_they_are_count_as_absent(block, config, stream):
    with pytest.raises(ModelError) as error:
        wrapped(config).module(Hookpoint(1, stream))
    assert str(error.value) == (
        f"{block} does not add the unchanged outputs of its attention and MLP to the stream, "
        f"so it has no {stream}; use resid_pre or resid_post"
    )


def test_glm4_post_norms_are_part_of_what_is_added():
    config = Glm4Config(**SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8)
    model = wrapped(config)
    ids = torch.tensor([[1, 5, 9, 7]])
    streams = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    points = {s: Hookpoint(1, s) for s in streams}
    record = run_truncated(model, ids, torch.ones_like(ids), list(points.values()))
    pre, attn, mid, mlp, post = (record[points[s]] for s in streams)
    torch.testing.assert_close(pre + attn, mid)
    torch.testing.assert_close(mid + mlp, post)
