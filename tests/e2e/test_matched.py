"""Latents matched at a sweep's end: against the SAEs themselves, and when one is gone."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
import torch
from sklearn.metrics import matthews_corrcoef
from torch.nn import functional

import saexp
from saexp.context import ObjectCache
from saexp.pipeline import objects
from saexp.reports.contrast import MATCHES, MATCHES_NOTES, adjacent, read_matches
from saexp.reports.sweep import write_sweep
from saexp.saes import SparseAutoencoder
from saexp.sweeps import planning
from tests.shipped_texts import FEW_NEUTRAL
from tests.unit.reports.run_outputs import page_of

CELLS = [(3, 256), (2, 256), (2, 512)]
SMALL = ["tracker=none", "intervention=none", "analyzer.n_bootstrap=0", "dataset.n_examples=40"]
SMALL += ["analyzer.n_background=500", FEW_NEUTRAL]


@pytest.fixture(scope="module")
def finished_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four cells, two of them of the same SAE."""
    folder, shared = tmp_path_factory.mktemp("sweep"), ObjectCache()
    for number, (layer, width) in enumerate(CELLS):
        cell_folder = folder / f"{number}_cell"
        words = [f"layer={layer}", f"width={width}"]
        cfg = saexp.compose([*SMALL, *words, f"cache_dir={folder}/cache"])
        saexp.run(cfg, cell_folder, objects=shared)
        (cell_folder / ".hydra").mkdir()
        (cell_folder / ".hydra/overrides.yaml").write_text(json.dumps(words))
    shutil.copytree(folder / "2_cell", folder / "3_cell")
    planning.match_cells(folder, ObjectCache())
    return folder


@pytest.fixture
def sweep(finished_sweep: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(
        shutil.copytree(finished_sweep, tmp_path / "copy", ignore=shutil.ignore_patterns("cache"))
    )


@cache
def load(layer: int, width: str) -> SparseAutoencoder:
    return saexp.build("sae", saexp.compose([f"layer={layer}", f"width={width}"]).sae)


def test_every_leading_latent_has_its_nearest_in_every_other_sae(finished_sweep: Path) -> None:
    matches, notes = read_matches(finished_sweep)
    assert notes == []
    assert set(matches["from_cell"]) == set(matches["to_cell"]) == {0, 1, 2}
    for cell in range(3):
        leading = pd.read_parquet(finished_sweep / f"{cell}_cell/activations.parquet")[
            "latent"
        ].unique()
        of_cell = matches[matches["from_cell"] == cell]
        assert len(of_cell) == 2 * len(leading) > 0
        assert set(of_cell["latent"]) == set(leading)
    for row in matches.to_dict("records"):
        own = load(row["from_layer"], row["from_width"]).W_dec[row["latent"]]
        decoder = load(row["to_layer"], row["to_width"]).W_dec
        cosines = functional.cosine_similarity(own[None], decoder)
        assert row["nearest"] == int(cosines.argmax())
        assert row["cosine"] == pytest.approx(float(cosines.max()), abs=1e-5)
        assert row["to_d_sae"] == len(decoder)


@cache
def activations(cell: Path) -> pd.DataFrame:
    return pd.read_parquet(cell / "activations.parquet")


@cache
def fires(cell: Path, latent: int) -> pd.Series:
    table = activations(cell)
    of_latent = table[(table["latent"] == latent) & (table["split"] == "test")]
    return of_latent.set_index("example_id")["value"] > 1e-6


def test_cofiring_is_the_best_of_the_others_leading_latents(finished_sweep: Path) -> None:
    matches, _ = read_matches(finished_sweep)
    assert matches["phi"].notna().any()
    for row in matches.dropna(subset=["phi"]).to_dict("records"):
        first, second = (finished_sweep / f"{row[f'{end}_cell']}_cell" for end in ("from", "to"))
        own = fires(first, row["latent"])
        leading = activations(second)["latent"].unique()
        phi = {}
        for latent in leading:
            other = fires(second, latent).loc[own.index]
            if own.nunique() > 1 and other.nunique() > 1:
                phi[latent] = matthews_corrcoef(own, other)
        assert row["phi"] == pytest.approx(max(phi.values()))
        assert phi[row["cofiring"]] == pytest.approx(max(phi.values()))
        assert row["n_rows"] == len(own)


def test_neighbours_differ_in_one_step_of_one_axis(finished_sweep: Path) -> None:
    matches, _ = read_matches(finished_sweep)
    pairs = set(zip(adjacent(matches)["from_cell"], adjacent(matches)["to_cell"], strict=True))
    assert pairs == {(0, 1), (1, 0), (1, 2), (2, 1)}


def test_the_page_shows_the_flows_and_the_table(sweep: Path) -> None:
    _, figures = write_sweep(sweep)
    assert {"flow_over_width", "flow_over_layer"} <= figures.keys()
    body = page_of(sweep)
    assert '<div class="plot" id="fig-flow_over_width">' in body
    assert "Similar latents of different SAEs" in body
    matches, _ = read_matches(sweep)
    assert f"{len(adjacent(matches))} matches between neighbours" in body


def break_load(
    monkeypatch: pytest.MonkeyPatch, bad: Callable[[int, int], bool], error: BaseException
) -> None:
    whole = objects.sparse_autoencoder

    def load_or_not(cfg, model, objects):
        if bad(cfg.layer, cfg.width):
            raise error
        return whole(cfg, model, objects)

    monkeypatch.setattr(planning, "sparse_autoencoder", load_or_not)


def test_an_sae_that_cannot_be_loaded_is_a_note_and_the_others_are_matched(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_load(monkeypatch, lambda layer, _: layer == 3, OSError("the disk is gone"))
    planning.match_cells(sweep, ObjectCache())
    matches, notes = read_matches(sweep)
    assert notes == ["latents of layer 3, width 256 were not matched: the disk is gone"]
    assert set(matches["from_cell"]) == {1, 2}
    write_sweep(sweep)
    assert "<p>latents of layer 3, width 256 were not matched: the disk is gone</p>" in page_of(
        sweep
    )


@pytest.mark.parametrize("error", [MemoryError("no room"), KeyboardInterrupt()], ids=repr)
def test_the_report_is_written_though_nothing_can_be_matched(
    sweep: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_load(monkeypatch, lambda *_: True, error)
    planning.match_cells(sweep, ObjectCache())
    assert not (sweep / MATCHES).exists()
    assert json.loads((sweep / MATCHES_NOTES).read_text("utf-8"))
    table, figures = write_sweep(sweep)
    assert len(table) == 4
    assert not [name for name in figures if name.startswith("flow")]
    assert "<b>Notes</b>" in page_of(sweep)


def test_one_sae_and_no_sweep_leave_nothing(sweep: Path, tmp_path: Path) -> None:
    for cell in (0, 1):
        shutil.rmtree(sweep / f"{cell}_cell")
    planning.match_cells(sweep, ObjectCache())
    (tmp_path / "empty").mkdir()
    planning.match_cells(tmp_path / "empty", ObjectCache())
    for folder in (sweep, tmp_path / "empty"):
        assert not (folder / MATCHES).exists()
        assert not (folder / MATCHES_NOTES).exists()


def test_cells_of_tasks_without_an_sae_are_passed_over(sweep: Path) -> None:
    about = json.loads((sweep / "0_cell/provenance.json").read_text("utf-8"))
    del about["sae"]
    (sweep / "0_cell/provenance.json").write_text(json.dumps(about))
    (sweep / "0_cell/activations.parquet").unlink()
    planning.match_cells(sweep, ObjectCache())
    matches, notes = read_matches(sweep)
    assert set(matches["from_cell"]) == {1, 2}
    assert notes == []


def test_an_older_table_is_not_left_behind(sweep: Path) -> None:
    (sweep / MATCHES_NOTES).write_text('["old"]')
    planning.match_cells(sweep, ObjectCache())
    assert read_matches(sweep)[1] == []
    assert torch.is_grad_enabled()
