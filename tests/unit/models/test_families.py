"""Streams of many families of causal LMs: each is right by an identity, or refused in one line."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from saexp.errors import ModelError
from saexp.models import Hookpoint
from saexp.models.hooks import capture, edit, run_truncated
from saexp.models.loading import LanguageModel
from tests.random_models import D_MODEL, N_LAYERS

STREAMS = ("resid_pre", "attn_out", "attn_z", "resid_mid", "mlp_in", "mlp_out", "resid_post")
IDS = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
_SMALL = {
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "head_dim": 8,
}
_OLD = {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 64}
_OPT = {"hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4}
_MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 8}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}
_NEO = {"attention_types": [[["global", "local", "global"], 1]], "window_size": 4}
ADDED = {"attn_out", "mlp_out"}
MIDDLE = {"resid_mid"}
MLP = {"resid_mid", "mlp_in", "mlp_out"}

FAMILIES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "gpt_neo": ("GPTNeoConfig", {**_OPT, **_NEO}, set()),
    "gptj": ("GPTJConfig", {**_OLD, "rotary_dim": 4}, MIDDLE),
    "falcon": ("FalconConfig", _OPT, MIDDLE),
    "opt": ("OPTConfig", {**_OPT, "ffn_dim": 48, "word_embed_proj_dim": D_MODEL}, MLP),
    "xglm": (
        "XGLMConfig",
        {"d_model": D_MODEL, "num_layers": N_LAYERS, "attention_heads": 4, "ffn_dim": 48},
        set(),
    ),
    "bloom": ("BloomConfig", {"hidden_size": D_MODEL, "n_layer": N_LAYERS, "n_head": 4}, ADDED),
    "mpt": ("MptConfig", {"d_model": D_MODEL, "n_layers": N_LAYERS, "n_heads": 4}, {"mlp_out"}),
    "openai-gpt": ("OpenAIGPTConfig", _OLD, ADDED | MIDDLE),
    "cohere": ("CohereConfig", _SMALL, MIDDLE),
    "granite": ("GraniteConfig", {**_SMALL, "residual_multiplier": 0.3}, ADDED),
    "stablelm": ("StableLmConfig", _SMALL, set()),
    "apertus": ("ApertusConfig", _SMALL, set()),
    "afmoe": ("AfmoeConfig", {**_SMALL, **_MOE, "num_experts": 4, "num_dense_layers": 1}, set()),
    "olmo3": ("Olmo3Config", _SMALL, set()),
    "exaone4": ("Exaone4Config", {**_SMALL, "sliding_window": 4}, set()),
    "glm4": ("Glm4Config", _SMALL, set()),
    "doge": ("DogeConfig", _SMALL, ADDED | MIDDLE),
    "minimax": ("MiniMaxConfig", {**_SMALL, "num_local_experts": 4}, ADDED | MIDDLE),
    "gpt_oss": ("GptOssConfig", {**_SMALL, "num_local_experts": 4}, set()),
    "mixtral": ("MixtralConfig", {**_SMALL, "num_local_experts": 4}, set()),
    "qwen3_moe": ("Qwen3MoeConfig", {**_SMALL, **_MOE, "num_experts": 4}, set()),
    "qwen3_next": ("Qwen3NextConfig", {**_SMALL, **_MOE, **_LINEAR, "num_experts": 4}, set()),
    "qwen3_5": ("Qwen3_5TextConfig", {**_SMALL, **_LINEAR}, set()),
    "lfm2": ("Lfm2Config", {**_SMALL, "layer_types": ["conv", "full_attention", "conv"]}, set()),
    "jamba": ("JambaConfig", {**_SMALL, **_MOE, "num_experts": 4, "attn_layer_offset": 1}, set()),
    "mamba": ("MambaConfig", {**_OPT, "state_size": 8}, set(STREAMS[1:-1])),
}
"""Name -> (config, its settings, streams that are refused)."""


def model_of(family: str) -> LanguageModel:
    kind, settings, _ = FAMILIES[family]
    config = getattr(transformers, kind)(
        vocab_size=128, bos_token_id=1, eos_token_id=2, pad_token_id=0, **settings
    )
    torch.manual_seed(0)
    hf: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return LanguageModel.wrap(hf.requires_grad_(False))


@pytest.fixture(params=FAMILIES, scope="module")
def case(request: pytest.FixtureRequest) -> tuple[LanguageModel, set[str]]:
    return model_of(request.param), FAMILIES[request.param][2]


@pytest.fixture(scope="module")
def every(case: tuple[LanguageModel, set[str]]) -> list[dict[str, Tensor]]:
    """The streams of each block, those of the middle one each from a pass of its own."""
    return [(read if layer == 1 else read_together)(case[0], layer) for layer in range(N_LAYERS)]


def points_of(model: LanguageModel, layer: int) -> list[Hookpoint]:
    """The streams of a block that the model has."""
    points = []
    for stream in STREAMS:
        try:
            model.module(Hookpoint(layer, stream))
        except ModelError as error:
            assert "\n" not in str(error)
            continue
        points.append(Hookpoint(layer, stream))
    return points


def read(model: LanguageModel, layer: int) -> dict[str, Tensor]:
    """Streams of a block, each from a pass of its own."""
    points = points_of(model, layer)
    return {at.stream: run_truncated(model, IDS, MASK, [at])[at] for at in points}


def read_together(model: LanguageModel, layer: int) -> dict[str, Tensor]:
    """Streams of a block, from one pass."""
    record = run_truncated(model, IDS, MASK, points_of(model, layer))
    return {at.stream: values for at, values in record.items()}


def test_a_stream_is_there_or_refused(
    case: tuple[LanguageModel, set[str]], every: list[dict[str, Tensor]]
) -> None:
    for layer, got in enumerate(every):
        assert set(STREAMS) - got.keys() == case[1], f"layer {layer}"


def test_what_is_there_adds_up(every: list[dict[str, Tensor]]) -> None:
    for layer, got in enumerate(every):
        if layer:
            assert torch.equal(got["resid_pre"], every[layer - 1]["resid_post"])
        if {"attn_out", "resid_mid"} <= got.keys():
            torch.testing.assert_close(
                got["resid_pre"] + got["attn_out"], got["resid_mid"], **CLOSE
            )
        if {"resid_mid", "mlp_out"} <= got.keys():
            torch.testing.assert_close(
                got["resid_mid"] + got["mlp_out"], got["resid_post"], **CLOSE
            )
        if got.keys() >= ADDED and "resid_mid" not in got:
            total = got["resid_pre"] + got["attn_out"] + got["mlp_out"]
            torch.testing.assert_close(total, got["resid_post"], **CLOSE)


def test_every_stream_of_one_pass_is_that_of_a_pass_of_its_own(
    case: tuple[LanguageModel, set[str]], every: list[dict[str, Tensor]]
) -> None:
    """Falcon adds to its MLP's output in place."""
    model, alone = case[0], every[1]
    points = [Hookpoint(1, s) for s in alone]
    with torch.no_grad(), capture(model, points) as record:
        model.hf(IDS)
    for at in points:
        torch.testing.assert_close(record[at], alone[at.stream], **CLOSE)


def test_a_change_of_resid_mid_reaches_the_mlp_and_the_sum(
    case: tuple[LanguageModel, set[str]], every: list[dict[str, Tensor]]
) -> None:
    """As adding the change to the block's input would, were it not for attention."""
    model, refused = case
    if refused & {"resid_mid", "mlp_out", "attn_out"}:
        pytest.skip("has not all of them")
    mid, out, post = (Hookpoint(1, s) for s in ("resid_mid", "mlp_out", "resid_post"))
    change = torch.linspace(-1, 1, D_MODEL)
    with (
        torch.no_grad(),
        edit(model, {mid: lambda x: x + change}),
        capture(model, [mid, out, post]) as record,
    ):
        model.hf(IDS)
    torch.testing.assert_close(record[mid] + record[out], record[post], **CLOSE)
    assert not torch.allclose(record[mid], every[1]["resid_mid"], atol=1e-2)


@pytest.mark.parametrize(
    ("family", "layer", "projection"),
    [
        ("gpt_neo", 0, "attn.attention.out_proj"),
        ("gpt_neo", 1, "attn.attention.out_proj"),
        ("qwen3_5", 0, "linear_attn.out_proj"),
        ("qwen3_5", 1, "self_attn.o_proj"),
        ("qwen3_next", 2, "linear_attn.out_proj"),
        ("lfm2", 0, "conv.out_proj"),
    ],
)
def test_attn_z_through_the_output_projection_is_attn_out(
    family: str, layer: int, projection: str
) -> None:
    model = model_of(family)
    got = read(model, layer)
    out = model.blocks[layer].get_submodule(projection)(got["attn_z"])
    torch.testing.assert_close(out, got["attn_out"], **CLOSE)


def test_qwen_3_5_inside_its_multimodal_model() -> None:
    """Its vision tower has blocks of attention and MLP too, here as many."""
    text = transformers.Qwen3_5TextConfig(vocab_size=128, **_SMALL, **_LINEAR)
    config = transformers.Qwen3_5Config(
        text_config=text.to_dict(),
        vision_config={
            "depth": N_LAYERS,
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 16,
            "out_hidden_size": D_MODEL,
        },
    )
    hf = transformers.Qwen3_5ForConditionalGeneration(config).eval()
    model = LanguageModel.wrap(hf)
    assert model.blocks is hf.model.language_model.layers
    assert (model.n_layers, model.d_model) == (N_LAYERS, D_MODEL)
    hidden = hf(input_ids=IDS, output_hidden_states=True).hidden_states
    for layer in range(N_LAYERS):
        torch.testing.assert_close(read(model, layer)["resid_pre"], hidden[layer], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["stablelm", "granite", "qwen3_5", "gpt_neo"])
def test_numbers_of_very_different_sizes_break_no_stream(family: str, dtype: torch.dtype) -> None:
    """Attention sinks hold numbers of 10^4 in a stream of numbers of 1."""
    hf = model_of(family).hf
    embedding = hf.get_input_embeddings().weight
    embedding[:, 3] *= 2e4
    embedding[::2, 5] *= 3e3
    model = LanguageModel.wrap(hf.to(dtype))
    assert len(model.blocks) == N_LAYERS
    refused = {h.stream for h in model.broken_streams}
    assert refused == FAMILIES[family][2]


def test_the_input_of_an_mlp_that_joins_texts_is_refused_under_each_name() -> None:
    model = model_of("opt")
    for stream in ("mlp_in", "mlp_in_normalized"):
        with pytest.raises(ModelError, match=f"joins the tokens of all texts .* read {stream};"):
            model.module(Hookpoint(1, stream))


def test_values_that_overflow_break_no_stream() -> None:
    model = model_of("qwen3_5")
    model.hf.get_input_embeddings().weight.fill_(torch.nan)
    assert model.broken_streams == {}


def test_streams_between_blocks_need_no_pass_of_their_own() -> None:
    """A pass through all blocks of a large model takes seconds, and reads every weight."""
    model = model_of("mixtral")
    passes: list[int] = []
    handle = model.hf.model.register_forward_pre_hook(lambda *_: passes.append(1))
    points = [Hookpoint(1, s) for s in ("resid_pre", "resid_post", "attn_z")]
    run_truncated(model, IDS, MASK, points)
    assert len(passes) == 1
    model.module(Hookpoint(1, "mlp_out"))
    model.module(Hookpoint(2, "attn_out"))
    assert len(passes) == 2, "one check for all streams"
    handle.remove()


@pytest.mark.parametrize("family", ["granite", "mixtral"])
def test_the_check_does_not_see_edits_in_progress(family: str) -> None:
    model = model_of(family)
    seen: list[torch.Size] = []

    def change(stream: Tensor) -> Tensor:
        seen.append(stream.shape)
        return stream + 1

    with edit(model, {Hookpoint(1, "resid_post"): change}):
        assert {h.stream for h in model.broken_streams} == FAMILIES[family][2]
        assert not seen
        model.hf(IDS)
    assert seen == [(*IDS.shape, D_MODEL)]


def test_offloaded_weights_are_checked_too(tmp_path: Path) -> None:
    """accelerate keeps them on disk, and no device has them between passes."""
    accelerate = pytest.importorskip("accelerate")
    model, alone = model_of("granite"), read(model_of("granite"), 1)
    accelerate.disk_offload(model.hf, str(tmp_path), execution_device=torch.device("cpu"))
    assert {h.stream for h in model.broken_streams} == FAMILIES["granite"][2]
    offloaded = read(model, 1)
    for stream, values in alone.items():
        torch.testing.assert_close(offloaded[stream], values, **CLOSE)
    with pytest.raises(ModelError, match="is offloaded, so it cannot be divided out; use mlp_in"):
        model.module(Hookpoint(1, "mlp_in_normalized"))


def test_a_model_that_cannot_be_run_on_tokens_alone_is_not_checked() -> None:
    model = model_of("stablelm")

    def needs_more(**_: Any) -> None:
        raise TypeError("an image is missing")

    model.hf.model.forward = needs_more
    assert model.broken_streams == {}


def test_a_block_with_more_than_one_stream_is_refused() -> None:
    """As Gemma 3n, whose blocks hand on four."""
    model = model_of("stablelm")

    class Four(nn.Module):
        def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
            return hidden_states[None].expand(4, -1, -1, -1)

    model.hf.model.layers[1] = Four()
    for at in (Hookpoint(1, "resid_post"), Hookpoint(2, "resid_pre")):
        with pytest.raises(ModelError, match=r"of shape \[4, 2, 7, 32\] at .*, not one vector per"):
            run_truncated(model, IDS, MASK, [at])


def test_a_block_that_changes_its_parts_is_seen_without_a_known_name() -> None:
    """A model's own code may scale, gate or norm what it adds under any name."""
    model = model_of("stablelm")
    inner = model.hf.model.layers[1].mlp.forward

    class Halved(nn.Module):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return inner(hidden_states)

    block = model.hf.model.layers[1]
    own = block.forward

    def scaled(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return own(hidden_states, *args, **kwargs) * 0.5

    block.mlp = Halved()
    block.forward = scaled
    for stream in ("mlp_out", "resid_mid"):
        with pytest.raises(
            ModelError, match="does not add the unchanged outputs of its attention and MLP to"
        ):
            model.module(Hookpoint(1, stream))
    assert model.module(Hookpoint(1, "resid_post")).module is block
    assert model.module(Hookpoint(0, "mlp_out")).module is model.blocks[0].mlp
