"""Runs of a bfloat16 checkpoint: dtype=auto takes its dtype where the CPU computes it natively."""

import json

import pytest
import torch

import saexp
from saexp.models.resolution import native_dtypes
from tests.e2e.test_bos import described
from tests.random_models import TEXTS, random_hf, save

IS_NATIVE = torch.bfloat16 in native_dtypes(torch.device("cpu"))
NOTE = "the model runs in bfloat16, as the checkpoint; dtype=float32 gives exact activations"
FIXED = ["tracker=none", "layer=1", "device=cpu"]


@pytest.fixture(scope="module")
def inputs_folder(tmp_path_factory):
    """A folder with a random bfloat16 Llama, an SAE and texts."""
    folder = tmp_path_factory.mktemp("precision")
    hf = random_hf("llama").bfloat16()
    hf.config.dtype = torch.bfloat16
    save(hf, folder / "model")
    described(folder / "sae", True)
    (folder / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(inputs_folder):
    def start(name, *words):
        cfg = saexp.compose(
            [
                "model=hf",
                f"model.name={inputs_folder / 'model'}",
                "dataset=text",
                f"dataset.path={inputs_folder / 'texts.txt'}",
                f"cache_dir={inputs_folder / 'cache'}",
                *FIXED,
                *words,
            ]
        )
        result = saexp.run(cfg, inputs_folder / name)
        return result, json.loads((inputs_folder / name / "provenance.json").read_text("utf-8"))

    return start


def test_collection_stores_the_checkpoints_own_dtype(run):
    result, about = run("auto", "task=collect", "positions=all")
    kind = "bfloat16" if IS_NATIVE else "float32"
    assert about["model"]["dtype"] == kind
    assert about["model"]["dtype_source"].startswith("dtype=auto, as ")
    assert (NOTE in about["notes"]) == (NOTE in result.notes) == IS_NATIVE
    assert result.notes.count(NOTE) == IS_NATIVE
    acts = saexp.open_store(about["store"]["path"]).acts(1, "resid_post")
    assert str(acts.dtype) == f"torch.{kind}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dtype_that_was_typed(run, dtype):
    result, about = run(f"typed_{dtype}", "task=collect", "positions=last", f"dtype={dtype}")
    assert (about["model"]["dtype"], about["model"]["dtype_source"]) == (dtype, f"dtype={dtype}")
    assert NOTE not in result.notes
    acts = saexp.open_store(about["store"]["path"]).acts(1, "resid_post")
    assert str(acts.dtype) == f"torch.{dtype}"


def test_an_evaluation_in_both_dtypes(run, inputs_folder):
    words = [
        "task=evaluate",
        "sae=local",
        f"sae.path={inputs_folder / 'sae'}",
        "task.n_bootstrap=0",
    ]
    (low, about), (exact, _) = (
        run(f"evaluated_{dtype}", *words, f"dtype={dtype}") for dtype in ("bfloat16", "float32")
    )
    page = (inputs_folder / "evaluated_bfloat16" / "report.html").read_text("utf-8")
    assert "bfloat16 (dtype=bfloat16)" in page
    assert about["model"]["dtype"] == "bfloat16"
    for name, tolerance in {
        "reconstruction/ce_clean": 0.01,
        "reconstruction/ce_sae": 0.02,
        "reconstruction/kl_zero": 0.1,
        "reconstruction/mse": 0.02,
        "sparsity/l0": 0.02,
    }.items():
        assert low.metrics[name] == pytest.approx(exact.metrics[name], rel=tolerance), name
