"""Orthogonalised weights write nothing along the directions, and come back byte by byte."""

from contextlib import ExitStack
from functools import cache

import pytest
import torch

from saexp.errors import ModelError
from saexp.models import Hookpoint
from saexp.models.hooks import capture, edit
from saexp.models.loading import LanguageModel
from saexp.models.unembedding import orthogonalized
from tests import random_models
from tests.random_models import (
    ARCHITECTURES,
    D_MODEL,
    N_LAYERS,
    POST_NORMS,
    VOCABULARY,
    hooks_left,
    random_hf,
)
from tests.random_models import random_lm as shared_lm

IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
PAIR = torch.randn(2, D_MODEL, generator=torch.Generator().manual_seed(2))
PAIR[1] += PAIR[0]
ONE = PAIR[:1]
LAYERS = range(N_LAYERS)
PARTS = ("attn_out", "mlp_out")
EVERY = pytest.mark.parametrize("architecture", [*ARCHITECTURES, "olmo2"])


@pytest.fixture(autouse=True)
def _olmo2(monkeypatch):
    """A norm after the sublayer and none before it."""
    monkeypatch.setitem(
        random_models.ARCHITECTURES, "olmo2", ("Olmo2Config", ARCHITECTURES["llama"][1])
    )


def random_lm(architecture, **options):
    return LanguageModel.wrap(random_hf(architecture, **options))


@cache
def restored_lm(architecture):
    """Shared by tests that leave the model as it was."""
    return random_lm(architecture)


def basis(directions):
    """Orthonormal rows by another way than the code's."""
    return torch.linalg.qr(directions.double().T)[0].T.float()


def component(values, directions):
    """Length of the part in the span over the length of all, the largest of any token."""
    values, q = values.double(), basis(directions).double()
    return float(((values @ q.T).norm(dim=-1) / values.norm(dim=-1)).max())


@torch.no_grad()
def run(model, points, ids=IDS):
    with capture(model, points) as record:
        logits = model.hf(ids).logits
    return record, logits


@EVERY
@pytest.mark.parametrize("directions", [ONE, PAIR], ids=["one", "two"])
def test_with_the_embedding_no_stream_has_the_directions(architecture, directions):
    model = restored_lm(architecture)
    before, plain = model.fingerprint, model.hf(IDS).logits
    points = [Hookpoint(0, "embed"), *(Hookpoint(n, "resid_post") for n in LAYERS)]
    with orthogonalized(model, directions, embedding=True):
        record, logits = run(model, points)
    assert all(component(record[p], directions) < 1e-5 for p in points)
    assert not torch.allclose(logits, plain, atol=1e-2)
    assert model.fingerprint == before
    assert torch.equal(model.hf(IDS).logits, plain)


@EVERY
def test_without_the_embedding_what_is_added_has_none_of_them(architecture):
    model = restored_lm(architecture)
    points = [Hookpoint(n, s) for n in LAYERS for s in (*PARTS, "resid_post")]
    embed = model.hf.get_input_embeddings().weight
    with orthogonalized(model, PAIR):
        record, _ = run(model, points)
        assert model.hf.get_input_embeddings().weight is embed
    for point in points:
        assert (component(record[point], PAIR) < 1e-5) == (point.stream in PARTS)


@EVERY
def test_it_equals_projecting_the_outputs_by_hand(architecture):
    model, q = restored_lm(architecture), basis(PAIR)

    def without(values):
        return values - (values @ q.T) @ q

    by_hand = {Hookpoint(n, s): without for n in LAYERS for s in PARTS}
    with torch.no_grad(), edit(model, by_hand):
        expected = model.hf(IDS).logits
    with orthogonalized(model, PAIR):
        _, logits = run(model, [])
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
    with torch.no_grad(), edit(model, {**by_hand, Hookpoint(0, "embed"): without}):
        expected = model.hf(IDS).logits
    with orthogonalized(model, PAIR, embedding=True):
        _, logits = run(model, [])
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "gemma2", "qwen2"])
def test_only_the_chosen_layers_change(architecture):
    model = restored_lm(architecture)
    points = [Hookpoint(n, s) for n in LAYERS for s in PARTS]
    with orthogonalized(model, ONE, layers=[1]):
        record, _ = run(model, points)
    assert [component(record[p], ONE) < 1e-5 for p in points] == [p.layer == 1 for p in points]


def test_lengths_and_repetitions_of_directions_do_not_matter():
    model = restored_lm("llama")
    logits = []
    for directions in (PAIR, torch.stack([1e-6 * PAIR[0], 1e6 * PAIR[1], PAIR[0] - PAIR[1]])):
        with orthogonalized(model, directions):
            logits.append(run(model, [])[1])
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "llama"])
def test_the_unembedding_never_changes(architecture, tied):
    model = random_lm(architecture, tie_word_embeddings=tied)
    hf = model.hf
    table, head = hf.get_input_embeddings(), hf.get_output_embeddings()
    assert (table.weight is head.weight) == tied
    weight = head.weight
    with orthogonalized(model, ONE, embedding=True):
        assert head.weight is weight
        assert component(table.weight, ONE) < 1e-6
        assert component(weight, ONE) > 1e-2
    assert (table.weight is head.weight) == tied


def test_learned_positions_are_projected_with_the_embedding_only():
    model = restored_lm("gpt2")
    positions = model.hf.transformer.wpe
    with orthogonalized(model, ONE):
        assert component(positions.weight, ONE) > 1e-2
    with orthogonalized(model, ONE, embedding=True):
        assert component(positions.weight, ONE) < 1e-6


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "gpt_neox"])
def test_everything_is_put_back_after_an_exception(architecture):
    model = restored_lm(architecture)
    before = model.fingerprint
    parameters = dict(model.hf.named_parameters())
    flags = {n: p.requires_grad for n, p in parameters.items()}
    with pytest.raises(ZeroDivisionError), orthogonalized(model, PAIR, embedding=True):
        assert model.fingerprint != before or architecture in POST_NORMS
        raise ZeroDivisionError
    assert model.fingerprint == before
    after = dict(model.hf.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[n] is p and p.requires_grad == flags[n] for n, p in parameters.items())
    assert hooks_left(model.hf) == []


def test_contexts_can_be_nested():
    model = random_lm("gpt2")
    before = model.fingerprint
    points = [Hookpoint(n, s) for n in LAYERS for s in PARTS]
    with ExitStack() as stack:
        stack.enter_context(orthogonalized(model, PAIR[:1]))
        stack.enter_context(orthogonalized(model, PAIR[1:]))
        record, _ = run(model, points)
    assert all(component(record[p], PAIR[1:]) < 1e-5 for p in points)
    assert model.fingerprint == before


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2"])
def test_bfloat16(architecture):
    hf = random_hf(architecture).to(torch.bfloat16)
    model = LanguageModel.wrap(hf)
    before = model.fingerprint
    points = [Hookpoint(n, s) for n in LAYERS for s in PARTS]
    plain, _ = run(model, points)
    with orthogonalized(model, PAIR):
        record, logits = run(model, points)
        assert all(p.dtype == torch.bfloat16 for n, p in hf.named_parameters() if "rotary" not in n)
    assert logits.isfinite().all()
    for point in points:
        left, had = component(record[point], PAIR), component(plain[point], PAIR)
        assert left < 0.01 < had
    assert model.fingerprint == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_on_a_gpu(architecture):
    model = LanguageModel.wrap(random_hf(architecture).cuda())
    points = [Hookpoint(n, "resid_post") for n in LAYERS]
    with orthogonalized(model, PAIR.cuda(), embedding=True):
        record, _ = run(model, points, IDS.cuda())
    assert all(component(record[p].cpu(), PAIR) < 1e-5 for p in points)


def test_a_shared_model_is_left_alone():
    model = shared_lm("gpt2")
    before = model.fingerprint
    with orthogonalized(model, ONE), torch.inference_mode():
        model.hf(IDS)
    assert model.fingerprint == before


def refused(match, model, directions, **options):
    with pytest.raises(ModelError, match=match), orthogonalized(model, directions, **options):
        pytest.fail("the context was opened")


class TestErrors:
    def test_width(self):
        refused(
            "^directions have 8 components, the model's stream 32$",
            shared_lm("gpt2"),
            torch.ones(1, 8),
        )

    @pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf])
    def test_values(self, bad):
        directions = torch.cat([ONE, torch.full((1, D_MODEL), bad)])
        refused("^a direction .* (all zeros|not finite)$", shared_lm("gpt2"), directions)

    def test_layer(self):
        refused(
            "^layer=3 is out of range: .* has layers 0-2", shared_lm("gpt2"), ONE, layers=[0, 3]
        )

    def test_mixture_of_experts(self, monkeypatch):
        moe = {**ARCHITECTURES["llama"][1], "num_local_experts": 2, "num_experts_per_tok": 1}
        monkeypatch.setitem(random_models.ARCHITECTURES, "mixtral", ("MixtralConfig", moe))
        model = random_lm("mixtral")
        before = model.fingerprint
        refused("no single output projection .*mixture of experts", model, ONE)
        assert model.fingerprint == before

    def test_quantised_weights(self):
        model = random_lm("llama")
        projection = model.blocks[2].mlp.down_proj
        packed = torch.zeros(projection.weight.shape, dtype=torch.int8)
        projection._parameters["weight"] = torch.nn.Parameter(packed, requires_grad=False)
        first = model.blocks[0].mlp.down_proj.weight
        refused("^Linear is not a plain linear layer in memory", model, ONE)
        assert model.blocks[0].mlp.down_proj.weight is first

    def test_another_part_that_writes(self):
        model = random_lm("llama")
        model.blocks[1].add_module("adapter", torch.nn.Linear(D_MODEL, D_MODEL))
        refused("has a part 'adapter' that may write to the stream", model, ONE)

    def test_a_norm_after_the_embedding(self):
        model = random_lm("llama")
        inner = model.hf.model
        layers = inner._modules.pop("layers")
        inner.add_module("norm_of_embedding", torch.nn.LayerNorm(D_MODEL))
        inner.add_module("layers", layers)
        refused("'norm(_of_embedding)?' between its embedding", model, ONE, embedding=True)
