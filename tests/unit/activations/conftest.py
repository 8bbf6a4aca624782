"""A saved model, and what an undisturbed collection of it leaves."""

import pytest

from tests.random_models import random_hf, save
from tests.unit.activations.collecting import digests, load, run_in_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model_folder = tmp_path_factory.mktemp("model")
    save(random_hf("llama"), model_folder)
    return model_folder


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    """(digests, tokens) of a collection that nothing happened to."""
    store, stats = run_in_shards(load(folder), tmp_path_factory.mktemp("whole"))
    return digests(store.path), stats.tokens_forwarded
