"""A saved model, and what an undisturbed collection of it leaves."""

import pytest

from tests.activations.child import SHARD_ROWS, load
from tests.activations.collecting import digests, run
from tests.random_models import random_hf, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    save(random_hf("llama"), place)
    return place


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    """(digests, tokens) of a collection that nothing happened to."""
    store, stats = run(load(folder), tmp_path_factory.mktemp("whole"), shard_rows=SHARD_ROWS)
    return digests(store.path), stats.tokens_forwarded
