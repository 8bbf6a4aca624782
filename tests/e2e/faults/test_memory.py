"""Peak memory that does not grow with the rows, measured in processes that hold nothing else."""

import itertools
import json
import sys
from pathlib import Path

import pytest

from tests.e2e.faults import collecting_child as child
from tests.e2e.faults import training_child
from tests.e2e.faults.collecting_child import end, start
from tests.e2e.faults.growing_tally import tally_much


@pytest.mark.slow
def test_memory_of_a_tally_does_not_grow_with_the_rows(server, tmp_path: Path) -> None:
    peak = {}
    # The least of two: what the system keeps in memory beside differs from time to time.
    for attempt, n_rows in itertools.product(range(2), (5_000, 20_000)):
        process, said = start(server, tally_much, tmp_path / f"{attempt}-{n_rows}", n_rows)
        assert end(process) == 0
        n_bytes, n_peak = json.loads(said.get())
        assert n_bytes == n_rows * 64 * 4
        peak[n_rows] = min(n_peak, peak.get(n_rows, n_peak))
    # Held sparse, all latents would be 40 MB and 160 MB.
    assert peak[20_000] < 1.1 * peak[5_000]


@pytest.fixture(scope="module")
def server():
    return child.server()


@pytest.mark.slow
def test_memory_of_a_collection_does_not_grow_with_the_rows(server, tmp_path):
    n_bytes, peak = {}, {}
    for n_texts in (200, 800):
        process, said = start(server, child.collect_much, tmp_path / str(n_texts), n_texts)
        assert end(process) == 0
        n_bytes[n_texts], peak[n_texts] = said.get()
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
