"""Learning curves that coincide or are constant can be read."""

from pathlib import Path

import pandas as pd

from saexp.reports.training import training_figures
from tests.unit.reports.written import write_json


def test_equal_losses_and_constant_fractions_can_be_read(tmp_path: Path) -> None:
    write_json(tmp_path / "provenance.json", {"status": "finished"})
    history = pd.DataFrame({"step": [0, 1, 2], "overall_loss": [3.0, 2.0, 1.0]})
    history = history.assign(mse_loss=history["overall_loss"], l0=16.0, dead_fraction=0.0)
    history["explained_variance"] = [0.1, 0.5, 0.7]
    history.to_parquet(tmp_path / "training.parquet")
    for name, column in (("density", "frequency"), ("active", "n_active"), ("values", "value")):
        pd.DataFrame({column: [0.1, 0.2]}).to_parquet(tmp_path / f"{name}.parquet")
    figures = training_figures(tmp_path)
    below, above = figures["losses"].data
    assert (below.name, below.line.dash) == ("mse loss", None)
    assert (above.name, above.line.dash) == ("overall loss", "dot")
    layout = figures["progress"].layout
    titles = {layout[f"yaxis{n}"].title.text: layout[f"yaxis{n}"].range for n in ("", 2, 3)}
    assert titles == {
        "L0": None,
        "explained variance": None,
        "fraction of dead latents": (-0.03, 1.03),
    }
