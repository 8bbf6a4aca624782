"""Edits equal hand-written hooks, a truncated pass runs nothing more, and no hook stays behind."""

from collections import Counter

import pytest
import torch

from saexp.errors import ModelError
from saexp.models import Hookpoint
from saexp.models.hooks import capture, edit, run_truncated
from saexp.models.loading import LanguageModel
from tests.random_models import (
    ARCHITECTURES,
    D_MODEL,
    N_LAYERS,
    PARALLEL,
    VOCABULARY,
    hooks_left,
    random_hf,
    random_lm,
)

IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
STREAMS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "attn_z", "mlp_in", "mlp_out")
EVERY = pytest.mark.parametrize("architecture", ARCHITECTURES)


def n_hooks(model) -> int:
    return len(hooks_left(model.hf))


def points_of(architecture):
    there = [s for s in STREAMS if s != "resid_mid" or architecture not in PARALLEL]
    return [Hookpoint(0, "embed"), *(Hookpoint(n, s) for n in range(N_LAYERS) for s in there)]


@torch.no_grad()
def logits_of(model):
    return model.hf(IDS).logits


@EVERY
def test_the_identity_at_every_point_leaves_the_logits_bit_equal(architecture):
    model = random_lm(architecture)
    before, seen = logits_of(model), Counter()

    def identity(name):
        def function(values):
            seen[name] += 1
            return values

        return function

    with edit(model, {h: identity(h) for h in points_of(architecture)}):
        during = logits_of(model)
    assert torch.equal(during, before)
    assert seen == Counter(points_of(architecture))
    assert n_hooks(model) == 0


@EVERY
def test_adding_a_vector_equals_a_hand_written_hook(architecture):
    model, vector = random_lm(architecture), torch.linspace(-1, 1, D_MODEL)

    def by_hand(_module, _args, output):
        return output + vector if torch.is_tensor(output) else (output[0] + vector, *output[1:])

    handle = model.blocks[1].register_forward_hook(by_hand)
    expected = logits_of(model)
    handle.remove()
    with edit(model, {Hookpoint(1, "resid_post"): lambda x: x + vector}):
        got = logits_of(model)
    assert torch.equal(got, expected)
    assert not torch.allclose(got, logits_of(model), atol=1e-3)


@EVERY
@pytest.mark.parametrize("stream", ["attn_out", "mlp_out"])
def test_zeroing_what_a_part_adds_takes_it_out_of_the_stream(architecture, stream):
    model = random_lm(architecture)
    points = [Hookpoint(1, s) for s in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
    with (
        torch.no_grad(),
        edit(model, {Hookpoint(1, stream): torch.zeros_like}),
        capture(model, points) as record,
    ):
        model.hf(IDS)
    pre, attn, mlp, post = (record[p] for p in points)
    assert not (attn if stream == "attn_out" else mlp).any()
    torch.testing.assert_close(pre + attn + mlp, post)


@pytest.mark.parametrize("stream", ["embed", "mlp_in", "attn_z", "resid_mid"])
def test_an_edit_of_an_input_reaches_what_reads_it(stream):
    model, point = random_lm("llama"), Hookpoint(0, stream)
    with torch.no_grad(), edit(model, {point: lambda x: x + 1}), capture(model, [point]) as record:
        logits = model.hf(IDS).logits
    plain = run_truncated(model, IDS, MASK, [point])[point]
    assert torch.equal(record[point], plain + 1)
    assert not torch.allclose(logits, logits_of(model), atol=1e-3)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a not in PARALLEL])
def test_an_edit_of_resid_mid_changes_the_stream_and_not_only_what_the_mlp_reads(architecture):
    model, vector = random_lm(architecture), torch.linspace(-1, 1, D_MODEL)
    points = [Hookpoint(1, s) for s in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
    # In this order on purpose: the block's output is edited last whatever the order given.
    edits = {
        Hookpoint(1, "resid_post"): lambda x: x * 2,
        Hookpoint(1, "resid_mid"): lambda x: x + vector,
    }
    with torch.no_grad(), edit(model, edits), capture(model, points) as record:
        model.hf(IDS)
    pre, attn, mlp, post = (record[p] for p in points)
    torch.testing.assert_close(post, 2 * (pre + attn + vector + mlp), atol=1e-5, rtol=0)
    # The same by way of the attention's output, which is added to the same stream.
    with torch.no_grad(), edit(model, {points[1]: lambda x: x + vector}):
        expected = model.hf(IDS).logits
    with torch.no_grad(), edit(model, {Hookpoint(1, "resid_mid"): lambda x: x + vector}):
        torch.testing.assert_close(model.hf(IDS).logits, expected, atol=1e-4, rtol=0)


def test_one_blocks_input_and_the_last_ones_output_are_one_place_for_edits():
    model = random_lm("qwen2")
    with edit(model, {Hookpoint(2, "resid_pre"): lambda x: x + 1}):
        got = logits_of(model)
    with edit(model, {Hookpoint(1, "resid_post"): lambda x: x + 1}):
        assert torch.equal(got, logits_of(model))


def test_edits_of_several_points_all_count():
    model = random_lm("gpt2")
    vector = torch.linspace(-1, 1, D_MODEL)
    both = {
        Hookpoint(0, "resid_post"): lambda x: x + vector,
        Hookpoint(2, "mlp_out"): lambda x: x * 3,
    }
    with edit(model, both):
        got = logits_of(model)
    for point, function in both.items():
        with edit(model, {point: function}):
            assert not torch.allclose(got, logits_of(model), atol=1e-3)


class Boom(Exception):
    pass


def boom(_values):
    raise Boom


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
class TestNoHookStays:
    @pytest.fixture()
    def model(self, architecture):
        model = LanguageModel.wrap(random_hf(architecture))
        assert n_hooks(model) == 0
        return model

    def test_after_an_exception_in_the_body(self, model, architecture):
        points = points_of(architecture)
        with pytest.raises(Boom), capture(model, points):
            assert n_hooks(model) > 0
            raise Boom
        with pytest.raises(Boom), edit(model, {h: torch.neg for h in points}):
            raise Boom
        assert n_hooks(model) == 0

    def test_after_an_exception_in_the_edit(self, model):
        with pytest.raises(Boom), edit(model, {Hookpoint(1, "attn_out"): boom}):
            model.hf(IDS)
        assert n_hooks(model) == 0

    def test_after_a_hookpoint_that_is_not_there(self, model):
        points = [Hookpoint(0, "resid_post"), Hookpoint(99, "resid_post")]
        with pytest.raises(ModelError, match="^layer=99 is out of range: in-memory has layers 0-2"):
            run_truncated(model, IDS, MASK, points)
        assert n_hooks(model) == 0

    def test_after_a_truncated_pass(self, model):
        run_truncated(model, IDS, MASK, [Hookpoint(0, "mlp_out"), Hookpoint(1, "resid_pre")])
        assert n_hooks(model) == 0

    def test_after_positions_outside_the_text(self, model):
        outside = (torch.tensor([0]), torch.tensor([IDS.shape[1]]))
        with pytest.raises(IndexError):
            run_truncated(model, IDS, MASK, [Hookpoint(0, "embed")], outside)
        assert n_hooks(model) == 0


def calls(model, run) -> Counter:
    """How often each block and the LM head ran."""
    count, handles = Counter(), []
    modules = {**{n: b for n, b in enumerate(model.blocks)}, "head": model.hf.lm_head}
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: count.update([name])))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return count


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2", "qwen2"])
@pytest.mark.parametrize(
    ("points", "blocks"),
    [
        ([(0, "embed")], [0]),
        ([(0, "resid_post")], [0]),
        ([(1, "resid_pre")], [0]),
        ([(1, "attn_out"), (0, "mlp_out")], [0, 1]),
        ([(2, "resid_post"), (0, "embed")], [0, 1, 2]),
    ],
)
def test_a_truncated_pass_runs_no_later_block_and_no_head(architecture, points, blocks):
    model = random_lm(architecture)
    wanted = [Hookpoint(*p) for p in points]
    ran = calls(model, lambda: run_truncated(model, IDS, MASK, wanted))
    assert ran == Counter(blocks)
    assert calls(model, lambda: logits_of(model)) == Counter([0, 1, 2, "head"])


def test_stop_skips_the_rest_of_the_body_and_keeps_what_was_seen():
    model, point, reached = random_lm("llama"), Hookpoint(1, "resid_post"), []
    with torch.no_grad(), capture(model, [point], stop=True) as record:
        model.hf(IDS)
        reached.append("after the pass")
    assert not reached
    assert record[point].shape == (*IDS.shape, D_MODEL)


def test_an_edit_writes_nothing_into_the_models_own_tensors():
    model, points = random_lm("gpt2"), [Hookpoint(0, "resid_post"), Hookpoint(1, "resid_pre")]
    plain = run_truncated(model, IDS, MASK, points[:1])[points[0]]
    original = plain.clone()
    with edit(model, {points[0]: lambda x: x + 1}):
        after = run_truncated(model, IDS, MASK, points[1:])[points[1]]
    assert torch.equal(plain, original)
    assert torch.equal(after, original + 1)
