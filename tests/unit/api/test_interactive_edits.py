"""Steering, ablation and edits of the interactive API against hooks written by hand."""

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import saexp
from saexp.api.latents import median_norm
from saexp.api.model import InteractiveModel
from saexp.config import DatasetConfig
from saexp.data.datasets import background_texts
from saexp.errors import ConfigError, DataError, InterventionError, ModelError, SAEError
from saexp.models import Hookpoint
from saexp.pipeline.collect import collect_neutral
from saexp.saes import SAESettings, SparseAutoencoder
from tests.random_models import STORED, TEXTS, hooks_left, random_lm, tokenizer
from tests.unit.interventions.test_engine import made_sae

AT = Hookpoint(1, "resid_post")
SHORT = [" ".join(text.split()[:6]) for text in TEXTS[:2]]
"""Of different lengths, so one of them is padded in a batch."""


@pytest.fixture(params=STORED)
def model(request: pytest.FixtureRequest) -> InteractiveModel:
    return loaded(request.param)


@pytest.fixture
def llama() -> InteractiveModel:
    return loaded("llama")


def loaded(architecture: str) -> InteractiveModel:
    return saexp.load_model(random_lm(architecture).hf, tokenizer=tokenizer())


@pytest.fixture
def sae() -> SparseAutoencoder:
    return made_sae()


@contextmanager
def hook(
    model: InteractiveModel, change: Callable[[Tensor], Tensor], first: int = 1
) -> Iterator[None]:
    """Change all tokens but the first (BOS) of the prompt, and every generated token."""

    def on_output(_m: object, _a: object, out: Tensor | tuple[Tensor, ...]) -> object:
        stream = (out if isinstance(out, Tensor) else out[0]).clone()
        start = first if stream.shape[1] > 1 else 0
        stream[:, start:] = change(stream[:, start:])
        return stream if isinstance(out, Tensor) else (stream, *out[1:])

    handle = model.blocks[AT.layer].register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def plain(model: InteractiveModel, text: str) -> Tensor:
    return model.hf(torch.tensor([model.tokenizer(text)["input_ids"]])).logits[0]


@torch.inference_mode()
def continued(model: InteractiveModel, text: str) -> str:
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    mask = torch.ones_like(ids)
    whole = model.hf.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    return model.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=3e-4, rtol=1e-3)


def test_steering_equals_a_hook_that_adds_the_direction(
    model: InteractiveModel, sae: SparseAutoencoder
) -> None:
    vector = 3 * sae.directions([4, 9]).sum(0)
    before = [model.logits(t) for t in SHORT]
    with saexp.steer(model, sae, [4, 9], coefficient=3, unit="raw"):
        all_logits, texts = model.logits(SHORT), model.generate(SHORT, max_new_tokens=6)
    for text, logits, continuation, old in zip(SHORT, all_logits, texts, before, strict=True):
        with hook(model, lambda x: x + vector):
            close(logits, plain(model, text))
            assert continuation == continued(model, text)
        assert not torch.allclose(logits, old, atol=1e-2)


def test_ablation_equals_a_hook_that_subtracts_the_contribution(
    model: InteractiveModel, sae: SparseAutoencoder
) -> None:
    latents = [0, 5, 17]

    def subtract(x: Tensor) -> Tensor:
        return x - sae.encode(x)[..., latents] @ sae.W_dec[latents]

    with saexp.ablate(model, sae, latents):
        all_logits = model.logits(SHORT)
        left = saexp.encode(model, sae, SHORT[0]).dense()
        texts = model.generate(SHORT, max_new_tokens=6)
    for text, logits, continuation in zip(SHORT, all_logits, texts, strict=True):
        with hook(model, subtract):
            close(logits, plain(model, text))
            assert continuation == continued(model, text)
    assert left.shape[1] == sae.d_sae


def test_activations_are_edited_at_the_stream_and_after_it(
    llama: InteractiveModel, sae: SparseAutoencoder
) -> None:
    before = [llama.activations(SHORT[0], layer) for layer in range(3)]
    with saexp.steer(llama, sae, 4, coefficient=2, unit="raw"):
        after = [llama.activations(SHORT[0], layer) for layer in range(3)]
    assert torch.equal(after[0], before[0])
    close(after[1][1:] - before[1][1:], 2 * sae.directions([4]).expand(len(before[1]) - 1, -1))
    assert torch.equal(after[1][0], before[1][0]), "BOS is left as it is"
    assert not torch.allclose(after[2], before[2], atol=1e-2)


def test_coefficient_zero_is_bit_equal(llama: InteractiveModel, sae: SparseAutoencoder) -> None:
    logits, acts = llama.logits(SHORT), llama.activations(SHORT, 2)
    sample = llama.generate(SHORT, max_new_tokens=8, temperature=1.0)
    with saexp.steer(llama, sae, 4, coefficient=0, unit="raw"), saexp.edit(llama, {1: lambda x: x}):
        assert all(map(torch.equal, llama.logits(SHORT), logits))
        assert all(map(torch.equal, llama.activations(SHORT, 2), acts))
        assert llama.generate(SHORT, max_new_tokens=8, temperature=1.0) == sample


def test_an_inner_edit_reads_what_the_outer_one_leaves(
    model: InteractiveModel, sae: SparseAutoencoder
) -> None:
    vector = 3 * sae.directions([4])[0]

    def change(x: Tensor) -> Tensor:
        x = x + vector
        return x - sae.encode(x)[..., [4]] @ sae.W_dec[[4]]

    with saexp.steer(model, sae, 4, coefficient=3, unit="raw"), saexp.ablate(model, sae, 4):
        logits, continuation = model.logits(SHORT[0]), model.generate(SHORT, max_new_tokens=6)
    with hook(model, change):
        close(logits, plain(model, SHORT[0]))
        assert continuation == [continued(model, text) for text in SHORT]


def test_nested_edits_may_change_different_tokens(
    llama: InteractiveModel, sae: SparseAutoencoder
) -> None:
    before = llama.activations(SHORT[0], 1)
    step = sae.directions([4])[0]
    with (
        saexp.steer(llama, sae, 4, 1, "raw", where=[0, 2]),
        saexp.steer(llama, sae, 4, 2, "raw", where="last"),
        saexp.steer(llama, sae, 4, 5, "raw", where="generated"),
    ):
        change = llama.activations(SHORT[0], 1) - before
    sizes = torch.zeros(len(before))
    sizes[[0, 2]], sizes[-1] = 1.0, 2.0
    close(change, sizes[:, None] * step)


def test_generated_tokens_alone_can_be_steered(
    llama: InteractiveModel, sae: SparseAutoencoder
) -> None:
    with saexp.steer(llama, sae, 4, 5, "raw", where="generated"):
        continuation = llama.generate(SHORT[0], max_new_tokens=6)
    with hook(llama, lambda x: x + 5 * sae.directions([4])[0], first=10**6):
        assert continuation == continued(llama, SHORT[0])


def test_any_exit_removes_the_edits(llama: InteractiveModel, sae: SparseAutoencoder) -> None:
    before = llama.logits(SHORT[0])
    with (
        pytest.raises(RuntimeError, match="stop"),
        saexp.steer(llama, sae, 4, 1.0, "raw"),
        saexp.ablate(llama, sae, 5),
        saexp.edit(llama, {(1, "mlp_out"): lambda x: 2 * x}),
    ):
        llama.logits(SHORT[0])
        raise RuntimeError("stop")
    assert llama.active_edits == ()
    assert not hooks_left(llama.hf)
    assert torch.equal(llama.logits(SHORT[0]), before)


def test_edit_applies_functions(llama: InteractiveModel) -> None:
    with saexp.edit(llama, {1: lambda x: 0.5 * x}):
        logits, continuation = llama.logits(SHORT[0]), llama.generate(SHORT[0], max_new_tokens=6)
    with hook(llama, lambda x: 0.5 * x, first=0):
        close(logits, plain(llama, SHORT[0]))
        assert continuation == continued(llama, SHORT[0])


def test_units_scale_the_direction(llama: InteractiveModel, sae: SparseAutoencoder) -> None:
    text, before = SHORT[0], llama.activations(SHORT[0], 1)
    with saexp.edit(llama, {1: lambda x: 100 * x}):
        norm = median_norm(llama, AT)
    own = torch.cat(llama.activations(TEXTS, 1)).norm(dim=-1).median()
    assert 0.3 * own < norm < 3 * own, "measured without the open edit"
    for unit, length in (("resid_norm", norm), ("absolute", 1.0)):
        for latents in ([4], [4, 9, 11]):
            with saexp.steer(llama, sae, latents, 0.5, unit):
                change = llama.activations(text, 1)[-1] - before[-1]
            assert float(change.norm()) == pytest.approx(0.5 * length, rel=1e-3)
    assert llama.median_norms == {AT: norm}


def test_the_median_norm_of_the_shipped_model_is_that_of_a_run(tmp_path: object) -> None:
    tiny = saexp.load_model("tiny", device="cpu")
    # The first block's stream, for which no other block is computed.
    at = Hookpoint(0, "resid_post")
    norm = median_norm(tiny, at)
    cfg = saexp.compose(["layer=0", "device=cpu", f"cache_dir={tmp_path}/cache", "tracker=none"])
    neutral = collect_neutral(cfg, tiny, [at], cfg.analyzer.n_background)
    assert norm == pytest.approx(neutral.ordinary([at]).median_norm(at), rel=2e-2)


def test_errors_name_what_to_type(llama: InteractiveModel, sae: SparseAutoencoder) -> None:
    def refused(error: type[Exception], match: str, latents: Sequence[int], **options: object):
        with pytest.raises(error, match=match):
            saexp.steer(llama, sae, latents, 1.0, **options)  # type: ignore[arg-type]

    refused(InterventionError, "latents 0-47", [48])
    refused(InterventionError, "is empty", [])
    refused(ConfigError, "unit", [1], unit="norms")
    refused(ConfigError, "where", [1], unit="raw", where="everywhere")
    with pytest.raises(SAEError, match="d_model=32"):
        saexp.ablate(llama, saexp.load_sae("tiny", layer=2), [1])
    with pytest.raises(ModelError, match="layer=9"):
        saexp.edit(llama, {9: lambda x: x})
    with (
        saexp.ablate(llama, sae, 1),
        pytest.raises(InterventionError, match="another SAE"),
        saexp.ablate(llama, made_sae(), 1),
    ):
        pass
    with pytest.raises(DataError, match="text 0"), saexp.ablate(llama, sae, 1, where="entity_last"):
        llama.logits("a")


@torch.inference_mode()
def test_a_transcoder_is_read_at_its_input_and_written_at_its_output(
    llama: InteractiveModel,
) -> None:
    read, written = Hookpoint(1, "mlp_in"), Hookpoint(1, "mlp_out")
    base = made_sae()
    parameters = {name: getattr(base, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    sae = SparseAutoencoder(
        parameters, SAESettings(architecture="standard", hookpoint=read, hookpoint_out=written)
    )
    x = llama.activations(SHORT[0], 1, stream="mlp_in")
    y = llama.activations(SHORT[0], 1, stream="mlp_out")
    close(saexp.encode(llama, sae, SHORT[0]).dense(), sae.encode(x))
    with saexp.steer(llama, sae, 4, 2.0, "raw"):
        steered = llama.activations(SHORT[0], 1, stream="mlp_out")
    close(steered[1:], y[1:] + 2 * sae.directions([4]))
    with saexp.ablate(llama, sae, 4):
        ablated = llama.activations(SHORT[0], 1, stream="mlp_out")
    close(ablated[1:], (y - sae.encode(x)[:, [4]] @ sae.W_dec[[4]])[1:])


def test_units_of_activation_are_measured_on_neutral_text(
    llama: InteractiveModel, sae: SparseAutoencoder
) -> None:
    before = llama.activations(SHORT[0], 1)[-1]
    with saexp.steer(llama, sae, 4, 1.0, "max_act"):
        largest = (llama.activations(SHORT[0], 1)[-1] - before).norm()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saexp.api.latents.background_texts", None)
        with saexp.steer(llama, sae, 4, 1.0, "p99_act"):
            high = (llama.activations(SHORT[0], 1)[-1] - before).norm()
    # Every fourth text here; there random tokens of all texts, which are read once.
    texts = background_texts(DatasetConfig(name="text"))[::4]
    acts = torch.cat([a[1:] for a in llama.activations([t[:120] for t in texts], 1)])
    values = sae.encode(acts)[:, 4]
    assert largest == pytest.approx(float(values.max()), rel=0.1)
    assert high == pytest.approx(float(values[values > 0].quantile(0.99)), rel=0.1)
    other = copy.deepcopy(sae)
    other.W_enc.data *= 3
    with saexp.steer(llama, other, 4, 1.0, "max_act"):
        of_other = (llama.activations(SHORT[0], 1)[-1] - before).norm()
    # Transformers' own module cannot be pickled once it was asked for hidden states.
    state = [v for v in llama.__getstate__().values() if not isinstance(v, torch.nn.Module)]
    assert pickle.dumps(state)
    assert of_other == pytest.approx(float(other.encode(acts)[:, 4].max()), rel=0.1)
