"""Peak memory that does not grow with the rows, measured in processes that hold nothing else."""

import json
import sys
from pathlib import Path

import pytest

from tests.e2e.faults import collecting_child as child
from tests.e2e.faults import training_child
from tests.e2e.faults.collecting_child import end, start
from tests.e2e.faults.growing_tally import D_IN, D_SAE, tally_much


@pytest.mark.slow
def test_memory_of_a_tally_does_not_grow_with_the_rows(server, tmp_path: Path) -> None:
    peak = {}
    for n_rows in (5_000, 60_000):
        process, reported = start(server, tally_much, tmp_path / str(n_rows), n_rows)
        assert end(process) == 0
        n_bytes, peak[n_rows] = json.loads(reported.get())
        assert n_bytes == n_rows * D_IN * 4
    # Half of the latents are active, with eight bytes each. The allocator and the pages of the
    # store account for 60 to 100 MB, which differ from machine to machine.
    if_held = 55_000 * D_SAE // 2 * 8
    assert peak[60_000] - peak[5_000] < 0.4 * if_held


@pytest.fixture(scope="module")
def server():
    return child.server()


@pytest.mark.slow
def test_memory_of_a_collection_does_not_grow_with_the_rows(server, tmp_path):
    n_bytes, peak = {}, {}
    for n_texts in (200, 800):
        process, queue = start(server, child.collect_much, tmp_path / str(n_texts), n_texts)
        assert end(process) == 0
        n_bytes[n_texts], peak[n_texts] = queue.get()
    # Were they all held, the peak would be about a third higher.
    assert n_bytes[800] - n_bytes[200] > 0.25 * peak[200]
    assert peak[800] < 1.1 * peak[200]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA limits no mappings elsewhere")
def test_a_corpus_larger_than_the_memory_is_trained_on(tmp_path: Path) -> None:
    """Neither the tokens of the corpus nor the activations that are trained on fit in memory."""
    context = child.server()
    process, reported = start(context, training_child.train_in_bounds, tmp_path)
    assert end(process) == 0
    result = reported.get()
    assert 2 * result["corpus_tokens"] > training_child.BOUND
    assert result["n_tokens"] > training_child.N_SAMPLES
    assert result["explained_variance"] > 0.3
    assert result["no_memory_for_corpus"] and result["no_memory_for_activations"]
