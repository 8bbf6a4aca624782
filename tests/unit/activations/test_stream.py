"""Streams of activations: mixed as sae-lens mixes them, and continued exactly."""

import copy
from itertools import islice

import numpy as np
import pytest
import torch

from saexp.activations.stream import ActivationStream, ContextActivations, StreamSettings
from saexp.data.corpora import Corpus
from saexp.errors import StoreError
from saexp.models import Hookpoint
from saexp.models.loading import LanguageModel
from saexp.stats.significance import derived_seed
from tests.random_models import random_hf, random_lm, tokenizer
from tests.unit.activations.test_corpus_rows import corpus  # noqa: F401

HOOKPOINTS = [Hookpoint(0, "resid_post"), Hookpoint(1, "mlp_out")]
SETTINGS = StreamSettings(buffer_rows=300, batch_size=32, seed=3, batch_tokens=60)
N = 60
"""Batches: several refills of the buffer and several epochs."""


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return random_lm("llama")


def source(model: LanguageModel, corpus: Corpus) -> ContextActivations:  # noqa: F811
    contexts = np.arange(0, len(corpus), 2)
    return ContextActivations(model, corpus, contexts, HOOKPOINTS, SETTINGS)


@pytest.fixture(scope="module")
def batches(model, corpus):  # noqa: F811
    stream = ActivationStream(source(model, corpus), SETTINGS)
    first = list(islice(stream, N))
    assert stream.source.at.epoch >= 1
    assert stream.source.at.n_refills > 3
    return first


def test_batches_equal_those_of_the_mixing_buffer_of_sae_lens(model, corpus, batches, monkeypatch):  # noqa: F811
    from sae_lens.training.mixing_buffer import multi_hook_concat_split_iter

    permute, refills = torch.randperm, iter(range(10**6))

    def seeded(n: int) -> torch.Tensor:
        seed = derived_seed(SETTINGS.seed, "buffer", str(next(refills)))
        return permute(n, generator=torch.Generator().manual_seed(seed))

    monkeypatch.setattr(torch, "randperm", seeded)
    passes = ({h.name: acts for h, acts in one.items()} for one in source(model, corpus))
    theirs = multi_hook_concat_split_iter(
        SETTINGS.buffer_rows, SETTINGS.batch_size, passes, [h.name for h in HOOKPOINTS]
    )
    for ours, other in zip(batches, islice(theirs, N), strict=True):
        for hookpoint in HOOKPOINTS:
            assert torch.equal(ours[hookpoint], other[hookpoint.name])
    theirs.close()


def test_a_stream_that_was_not_read_has_mean_norms_and_no_buffer(model, corpus):  # noqa: F811
    stream = ActivationStream(source(model, corpus), SETTINGS)
    assert stream.mean_norms
    assert not stream.state()[0]


# The last is in the second epoch.
@pytest.mark.parametrize("n_before", [1, 9, 47])
def test_a_resumed_stream_gives_the_batches_of_the_uninterrupted_one(
    model,
    corpus,  # noqa: F811
    batches,
    n_before,
):
    first = ActivationStream(source(model, corpus), SETTINGS)
    list(islice(first, n_before))
    state = copy.deepcopy(first.state())
    second = ActivationStream(source(model, corpus), SETTINGS)
    second.resume(*state)
    for ours, other in zip(islice(second, N - n_before), batches[n_before:], strict=True):
        for hookpoint in HOOKPOINTS:
            assert torch.equal(ours[hookpoint], other[hookpoint])


def test_an_epoch_serves_every_ordinary_position_of_its_contexts_once(model, corpus):  # noqa: F811
    activations = source(model, corpus)
    rows = []
    while activations.at.epoch == 0 and activations.at.context < len(activations.contexts):
        rows.append(next(activations)[HOOKPOINTS[0]])
    served = torch.cat(rows)
    ids = torch.from_numpy(corpus.ids(activations.contexts))
    with torch.no_grad():
        hidden = model.hf(ids, output_hidden_states=True).hidden_states[1]
    expected = hidden[~torch.isin(ids, torch.tensor(tokenizer().all_special_ids))]
    assert len(served) == len(expected)
    assert not torch.allclose(served, expected, rtol=1e-3, atol=1e-4)
    # Sorted by the first numbers, since the order of contexts is shuffled.
    order = [torch.argsort(rows[:, 0] * 1e3 + rows[:, 1]) for rows in (served, expected)]
    torch.testing.assert_close(served[order[0]], expected[order[1]], rtol=1e-3, atol=1e-4)


def test_each_epoch_reads_the_contexts_in_an_order_of_its_own(model, corpus):  # noqa: F811
    orders = [source(model, corpus)._order_of(epoch) for epoch in (0, 1, 0)]
    assert orders[0].tolist() == orders[2].tolist() != orders[1].tolist()
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(0, len(corpus), 2))


def test_a_value_that_is_not_finite_names_the_text(corpus):  # noqa: F811
    hf = random_hf("llama")
    with torch.no_grad():
        hf.model.embed_tokens.weight[int(corpus.ids(np.arange(1))[0, 3])] = float("nan")
    model = LanguageModel.wrap(hf, tokenizer(), name="damaged")
    with pytest.raises(StoreError, match=r"NaN or Inf at layer_0\.resid_post in the text ' ?\w+"):
        next(iter(ActivationStream(source(model, corpus), SETTINGS)))
