"""Numbers of probes in a sweep's page: sentences, figure and columns, from a table by hand."""

import numpy as np
import pandas as pd
import pytest

from saexp.reports.findings import probe_columns, probe_figure, probe_findings, probes_of


@pytest.fixture
def done() -> pd.DataFrame:
    """Two layers; the one that is better on train is worse on the test split."""
    table = pd.DataFrame({"cell": [0, 1], "status": "finished", "layer": [3, 1], "width": 256})
    numbers = {
        "dense_auroc": [0.99, 0.95],
        "dense_auroc_test": [0.90, 0.93],
        "dense_auroc_ci_low_test": [0.85, 0.88],
        "dense_auroc_ci_high_test": [0.94, 0.97],
        "dense_minus_surface_test": [0.2, 0.21],
        "dense_minus_surface_ci_low_test": [0.1, 0.11],
        "dense_minus_surface_ci_high_test": [0.3, 0.31],
        "surface_auroc": [0.8, 0.8],
        "surface_auroc_test": [0.7, 0.72],
        "majority_auroc_test": [0.5, 0.5],
        "sparse_1_auroc_test": [np.nan, np.nan],
    }
    return table.assign(**{f"probe/{name}": values for name, values in numbers.items()})


def test_a_sentence_per_probe_on_the_cell_chosen_on_train(done: pd.DataFrame) -> None:
    assert probes_of(done) == ["dense", "surface"]
    dense, surface = probe_findings(done)
    assert dense.startswith(
        "whole stream, logistic: held-out AUROC 0.900 [0.850, 0.940] at layer 3"
    )
    assert "+0.200 [0.100, 0.300] against the text alone; 0.900 to 0.930 over the sweep (" in dense
    assert "against the text alone" not in surface
    assert probe_columns(done)["probe/dense_auroc_test"] == "AUROC: whole stream, logistic"


def test_the_cross_validated_auroc_chooses_the_cell_of_a_fitted_probe(done: pd.DataFrame) -> None:
    # A probe with many weights has 1.0 on its own rows at every layer.
    values = {"probe/dense_auroc": 1.0, "probe/dense_cv_auroc": [0.88, 0.92]}
    dense, surface = probe_findings(done.assign(**values))
    assert "held-out AUROC 0.930 [0.880, 0.970] at layer 1" in dense
    assert dense.endswith("(cell chosen by the cross-validated AUROC on train).")
    assert surface.endswith("(cell chosen by the AUROC on train).")


def test_the_figure_has_a_line_per_probe_in_the_order_of_layers(done: pd.DataFrame) -> None:
    figure = probe_figure(done)
    assert figure is not None
    dense, surface = figure.data
    assert list(dense.x) == [1, 3]
    assert list(dense.y) == [0.93, 0.90]
    assert dense.error_y.array == pytest.approx([0.04, 0.04])
    assert "text alone" in surface.name


def test_without_probes_there_is_nothing(done: pd.DataFrame) -> None:
    bare = done[["cell", "status", "layer", "width"]]
    assert probe_findings(bare) == []
    assert probe_figure(bare) is None
    assert probe_figure(done.head(1).drop(columns="layer")) is None


def test_more_probes_than_colours_differ_by_their_marker(done: pd.DataFrame) -> None:
    names = [f"probe/sparse_{k}_auroc_test" for k in range(1, 12)]
    figure = probe_figure(done.assign(**dict.fromkeys(names, 0.6)))
    assert figure is not None
    looks = [(trace.line.color, trace.marker.symbol) for trace in figure.data]
    assert len(set(looks)) == len(looks) == 13
