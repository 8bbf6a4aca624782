"""Names of hookpoints: round trips, aliases, errors."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saexp.errors import ModelError
from saexp.models import STREAMS, Hookpoint

POINTS = st.builds(
    lambda layer, stream: Hookpoint(0 if stream == "embed" else layer, stream),
    st.integers(0, 200),
    st.sampled_from(STREAMS),
)


@given(POINTS)
def test_names_round_trip(point):
    assert Hookpoint.parse(point.name) == point
    lens = Hookpoint.parse(point.transformer_lens)
    assert lens.stored == point.stored
    assert lens == point or point.stream == "embed"


@given(POINTS)
def test_every_point_is_stored_at_one_place(point):
    assert point.stored.stored == point.stored
    assert point.stored.stream != "resid_pre"


@given(st.integers(1, 200))
def test_resid_pre_is_stored_as_the_last_blocks_resid_post(layer):
    assert Hookpoint(layer, "resid_pre").stored == Hookpoint(layer - 1, "resid_post")


def test_resid_pre_of_block_0_is_stored_as_embed():
    assert Hookpoint(0, "resid_pre").stored == Hookpoint(0, "embed")


@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("blocks.12.hook_resid_post", (12, "resid_post")),
        ("blocks.8.hook_resid_pre", (8, "resid_pre")),
        ("blocks.3.hook_resid_mid", (3, "resid_mid")),
        ("blocks.3.hook_attn_out", (3, "attn_out")),
        ("blocks.3.attn.hook_z", (3, "attn_z")),
        ("blocks.3.mlp.hook_in", (3, "mlp_in")),
        ("blocks.3.ln2.hook_normalized", (3, "mlp_in_normalized")),
        ("blocks.3.hook_mlp_out", (3, "mlp_out")),
        ("model.layers.12", (12, "resid_post")),
        ("model.language_model.layers.12", (12, "resid_post")),
        ("layers.5", (5, "resid_post")),
        ("transformer.h.3", (3, "resid_post")),
        ("transformer.h.3.attn", (3, "attn_out")),
        ("transformer.h.3.mlp", (3, "mlp_out")),
        ("gpt_neox.layers.2.attention", (2, "attn_out")),
        ("model.layers.2.self_attn", (2, "attn_out")),
        ("model.layers.2.linear_attn", (2, "attn_out")),
        ("model.layers.2.block_sparse_moe", (2, "mlp_out")),
    ],
)
def test_other_tools_names(name, point):
    assert Hookpoint.parse(name) == Hookpoint(*point)


@pytest.mark.parametrize(
    "name",
    ["", "resid_post", "blocks.1.hook_q", "blocks.x.hook_resid_post", "model.layers.1.mlp.up_proj"],
)
def test_a_name_of_nothing_is_an_error(name):
    with pytest.raises(ModelError) as error:
        Hookpoint.parse(name)
    assert str(error.value) == (
        f"'{name}' is not a hookpoint; type one such as layer_12.resid_post, "
        "blocks.12.hook_resid_post or model.layers.12"
    )


def test_a_name_with_two_meanings_is_refused():
    with pytest.raises(ModelError) as error:
        Hookpoint.parse("blocks.3.hook_mlp_in")
    assert str(error.value) == (
        "blocks.3.hook_mlp_in is the MLP's input before its norm in TransformerLens, and after it "
        "in Gemma Scope 2's configs; type layer_3.resid_mid or layer_3.mlp_in"
    )


def test_an_unknown_stream_lists_the_nearest():
    message = "^no stream 'resid_pst'; did you mean resid_post, resid_pre"
    for make in (lambda: Hookpoint(1, "resid_pst"), lambda: Hookpoint.parse("layer_1.resid_pst")):
        with pytest.raises(ModelError, match=message):
            make()


@pytest.mark.parametrize(("layer", "stream"), [(-1, "resid_post"), (3, "embed")])
def test_a_layer_without_the_stream_is_an_error(layer, stream):
    with pytest.raises(ModelError, match=re.escape(f"layer={layer} has no stream '{stream}'")):
        Hookpoint(layer, stream)


def test_points_sort_by_layer_first():
    points = [Hookpoint(2, "attn_out"), Hookpoint(10, "attn_out"), Hookpoint(2, "resid_post")]
    assert sorted(points) == [points[0], points[2], points[1]]


def test_hook_embed_of_transformer_lens_is_refused():
    """In GPT-2 TransformerLens' hook_embed lacks the position embeddings that block 0 reads."""
    assert Hookpoint(0, "embed").transformer_lens == "blocks.0.hook_resid_pre"
    with pytest.raises(ModelError, match=r"hook_embed is the token embedding before any position"):
        Hookpoint.parse("hook_embed")
