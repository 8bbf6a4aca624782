"""An SAE that does not fit its stream is noticed, and the reason found, on the tiny model."""

import json
import shutil

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import saexp
from saexp.context import ObjectCache
from saexp.errors import SAEError
from saexp.models.resolution import ASSETS
from saexp.pipeline.validation import variance_notes
from tests.shipped_texts import FEW_NEUTRAL
from tests.unit.saes.conftest import hub_cache  # noqa: F401
from tests.unit.saes.make import publish

SHIPPED = ASSETS / "tiny/sae/layer_2/width_256"
FIXED = [
    "tracker=none",
    "intervention=none",
    "analyzer=stats",
    "dataset.n_examples=40",
    FEW_NEUTRAL,
]
OBJECTS = ObjectCache()
"""Shared by the runs of this file, as by the cells of a sweep (see test_shared.py)."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def notes(cache, tmp_path):
    def run(*words):
        cfg = saexp.compose([*FIXED, f"cache_dir={cache}", *words])
        result = saexp.run(cfg, tmp_path / "run", objects=OBJECTS)
        return [n for n in result.notes if "of the variance" in n], result.metrics

    return run


@pytest.fixture
def altered(tmp_path):
    """A copy of a shipped SAE that says it reads another stream, or lacks its input scaling."""

    def make(hook_name="blocks.2.hook_resid_post", factor=1.0):
        folder = tmp_path / "sae"
        shutil.copytree(SHIPPED, folder)
        cfg = json.loads((folder / "cfg.json").read_text("utf-8"))
        cfg["metadata"]["hook_name"] = hook_name
        (folder / "cfg.json").write_text(json.dumps(cfg), encoding="utf-8")
        weights = {n: w.float() for n, w in load_file(folder / "sae_weights.safetensors").items()}
        for name in ("b_enc", "b_dec", "threshold"):
            weights[name] = weights[name] * factor
        save_file(weights, folder / "sae_weights.safetensors")
        return ["sae=local", f"sae.path={folder}", f"layer={hook_name.split('.')[1]}"]

    return make


def test_fitting_saes_get_no_remark(notes):
    remarks, metrics = notes("layer=[0,1,2,3,4]")
    assert remarks == []
    assert all(metrics[f"check/explained_variance_layer_{n}"] > 0.8 for n in range(5))


def test_a_wrong_layer_names_the_one_it_fits(notes, altered):
    (note,), _ = notes(*altered("blocks.3.hook_resid_post"))
    assert "at layer_2.resid_post: it looks trained on that layer" in note


def test_a_wrong_stream_says_that_nothing_fits(notes, altered):
    (note,), _ = notes(*altered("blocks.2.hook_mlp_out"))
    assert "no more under any other reading" in note


@pytest.mark.parametrize(
    ("here", "neutral", "has_note"),
    [(0.04, 0.9, True), (-0.3, 0.9, True), (0.3, 0.9, False), (0.1, 0.15, False), (0.0, -1, False)],
)
def test_an_sae_that_explains_nothing_at_the_positions_is_noted(here, neutral, has_note):
    metrics = {"reconstruction/explained_variance": here, "check/explained_variance": neutral}
    notes = variance_notes(metrics)
    assert bool(notes) == has_note
    if has_note:
        assert notes[0].startswith(f"the SAE explains {here:.3f} of the variance at the positions")
    assert variance_notes({**metrics, "check/explained_variance": None}) == []
    assert variance_notes({}) == []


def test_a_missing_scaling_is_noted(notes, altered):
    (note,), _ = notes(*altered(factor=128**0.5 / 1000))
    assert "scaled to norm sqrt(d_in)" in note
    assert "norm_scaling_factor" in note


def test_special_tokens_among_the_positions_are_noted(notes):
    (note,), _ = notes("layer=2", "positions=all", "positions.include_special=true")
    assert "without special tokens" in note


def test_error_stops_the_run_and_off_does_not_look(notes, altered):
    words = altered("blocks.3.hook_resid_post")
    with pytest.raises(SAEError, match=r"sae\.check=warn goes on"):
        notes(*words, "sae.check=error")
    remarks, metrics = notes(*words, "sae.check=off")
    assert remarks == []
    assert "check/l0" not in metrics


def checked(cache, folder, *words):
    """(notes, table `check` by quantity, metrics, report) of a run."""
    cfg = saexp.compose([*FIXED, f"cache_dir={cache}", *words])
    result = saexp.run(cfg, folder, objects=OBJECTS)
    table = pd.read_parquet(folder / "check.parquet").set_index("quantity")
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    return result.notes, table, metrics, (folder / "report.html").read_text("utf-8")


def recorded(folder, frequency):
    tensor = torch.log10(torch.as_tensor(frequency) + 1e-10).float()
    save_file({"sparsity": tensor}, folder / "sparsity.safetensors")


def test_the_table_says_unknown_where_nothing_is_said(cache, tmp_path):
    notes, table, metrics, page = checked(cache, tmp_path / "run", "layer=2")
    verdicts = table["verdict"].value_counts()
    assert verdicts["unknown"] == 5
    assert "differs" not in verdicts
    assert table["expected"].isna().all()
    assert metrics["check/n_positions"] >= 1000
    assert not [k for k in metrics if k.startswith("check/expected")]
    assert "Does the SAE fit the model?" in page
    assert f"never fire in {metrics['check/n_positions']:,} positions" in page
    for reading in ("at layer_1.resid_post", "at layer_3.resid_post", "centred"):
        assert table.loc[f"explained variance {reading}", "verdict"] == "other reading"


@pytest.mark.parametrize("fits", [True, False])
def test_recorded_frequencies_are_compared(cache, altered, tmp_path, fits):
    """The SAE's own frequencies fit; those of one whose latents nearly all fire do not."""
    words = altered()
    frequency = torch.full((256,), 0.2)
    if fits:
        own = checked(cache, tmp_path / "first", "layer=2")[2]
        dead = round(own["check/inactive_fraction"] * 256)
        frequency[:dead] = 1e-7
    recorded(tmp_path / "sae", frequency)
    notes, table, metrics, _ = checked(cache, tmp_path / "run", *words)
    [silent] = [q for q in table.index if q.startswith("share of latents that never fire in")]
    gap = metrics["check/inactive_fraction"] - metrics["check/expected_inactive_fraction"]
    differences = [n for n in notes if "recorded in training" in n]
    assert (abs(gap) <= 0.25) == fits
    assert table["verdict"].to_dict()[silent] == ("fits" if fits else "differs")
    assert bool(differences) == (not fits)


@pytest.mark.parametrize(("block", "l0", "harm"), [(2, 18.0, 0.0), (3, 23.0, 2.0)])
def test_a_release_is_held_against_its_catalogue(
    cache,
    tmp_path,
    hub_cache,  # noqa: F811
    block,
    l0,
    harm,
):
    """gpt2-small-res-jb: by the catalogue 0.999 of the variance and an L0 of 18 or 23; its
    files here are the tiny model's, as they are, or with noise in the decoder."""
    folder = tmp_path / f"made/blocks.{block}.hook_resid_pre"
    shutil.copytree(ASSETS / f"tiny/sae/layer_{block - 1}/width_256", folder)
    cfg = json.loads((folder / "cfg.json").read_text("utf-8"))
    cfg["metadata"]["hook_name"] = f"blocks.{block}.hook_resid_pre"
    (folder / "cfg.json").write_text(json.dumps(cfg), encoding="utf-8")
    weights = {n: w.float() for n, w in load_file(folder / "sae_weights.safetensors").items()}
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(weights["W_dec"].shape, generator=generator) / 128**0.5
    weights["W_dec"] = weights["W_dec"] + harm * noise
    save_file(weights, folder / "sae_weights.safetensors")
    recorded(folder, torch.full((256,), 0.05))
    publish(hub_cache, "jbloom/GPT2-Small-SAEs-Reformatted", tmp_path / "made")
    words = ["sae=saelens", "sae.release=gpt2-small-res-jb", f"layer={block}"]
    notes, table, metrics, _ = checked(cache, tmp_path / "run", *words)
    assert metrics["check/expected_explained_variance"] == 0.999
    assert metrics["check/expected_l0"] == l0
    assert "check/expected_inactive_fraction" in metrics
    differences = [n for n in notes if "the catalogue reports 1.00, more than 0.2 above" in n]
    assert table.loc["explained variance", "verdict"] == ("differs" if harm else "fits")
    assert bool(differences) == bool(harm)
    # A problem is what sae.check=error stops at.
    if harm:
        with pytest.raises(SAEError, match=r"of the variance at layer_3\.resid_pre"):
            checked(cache, tmp_path / "2", *words, "sae.check=error")


def test_a_factor_made_for_other_vectors_is_noted(cache, tmp_path):
    """The scaling of another model or layer: its mean norm is not this stream's."""
    folder = tmp_path / "sae"
    shutil.copytree(SHIPPED, folder)
    cfg = json.loads((folder / "cfg.json").read_text("utf-8"))
    cfg["normalize_activations"], cfg["norm_scaling_factor"] = "expected_average_only_in", 30.0
    (folder / "cfg.json").write_text(json.dumps(cfg), encoding="utf-8")
    words = ["sae=local", f"sae.path={folder}", "layer=2"]
    notes, table, metrics, _ = checked(cache, tmp_path / "run", *words)
    assert table.loc["mean norm of the vectors read", "verdict"] == "differs"
    assert metrics["check/expected_mean_norm"] == pytest.approx(128**0.5 / 30)
    assert [n for n in notes if "was scaled for vectors of mean norm 0.3771" in n]
