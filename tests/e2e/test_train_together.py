"""task=train of several SAEs in one pass: each is trained as if it were alone."""

import json
import signal
from pathlib import Path

import pandas as pd
import pytest
import torch

import saexp
from saexp.errors import SAEError
from saexp.reports.analysis import headline
from saexp.results import Result
from tests import interpreters

WORDS = [
    "task=train",
    "layer=2",
    "width=128",
    "dataset.n_examples=60",
    "sae_trainer.n_samples=4000",
    "sae_trainer.batch_size=128",
    "sae_trainer.checkpoint_every=10",
    "sae_trainer.log_every=5",
]
VARIANTS = "sae_trainer.variants=[{k:8},{k:16},{name:standard,l1_coefficient:0.5,seed:3}]"
SEVERAL = ["layer=[1,2]", "width=[64,128]", VARIANTS]
FIRST = "layer_1_width_64_batchtopk_k_8_seed_0"
PLAIN = "layer_2_width_128_batchtopk_k_16_seed_0"
"""Labels of two of these."""
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def trained(cache: Path, folder: Path, *words: str) -> Result:
    cfg = saexp.compose([*WORDS, "tracker=jsonl", f"cache_dir={cache}", *words])
    return saexp.run(cfg, folder)


@pytest.fixture(scope="module")
def together(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return trained(cache, tmp_path_factory.mktemp("together"), *SEVERAL)


def assert_same_sae(one: Path, other: Path) -> None:
    first, second = saexp.load_sae(one), saexp.load_sae(other)
    for name, values in first.named_buffers():
        assert torch.equal(values, dict(second.named_buffers())[name]), name


@pytest.fixture(scope="module")
def plain(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The SAE of `PLAIN` trained alone."""
    return trained(cache, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("label", [FIRST, PLAIN])
def test_each_sae_is_the_one_that_is_trained_alone(
    together: Result, plain: Result, cache: Path, tmp_path: Path, label: str
) -> None:
    words = ["layer=1", "width=64", "sae_trainer.options.k=8"]
    alone = plain if label == PLAIN else trained(cache, tmp_path / "run", *words)
    assert together.path is not None and alone.path is not None
    assert_same_sae(together.path / "sae" / label, alone.path / "sae")
    for name in ("training", "density", "active", "values"):
        table = together.tables[name]
        own = table[table["sae"] == label].drop(columns="sae").reset_index(drop=True)
        expected = alone.tables[name]
        pd.testing.assert_frame_equal(own[list(expected.columns)], expected)
    history = alone.tables["training"]
    n_trained_on = json.loads((alone.path / "provenance.json").read_text("utf-8"))["n_trained_on"]
    assert list(history["tokens"]) == list(128 * history["step"])
    assert list(history["epoch"] * n_trained_on) == pytest.approx(list(history["tokens"]))
    assert alone.metrics["train/epochs"] == history["epoch"].iloc[-1]
    for metric, value in alone.metrics.items():
        if metric.startswith(("sparsity/", "reconstruction/", "train/l0", "train/overall")):
            assert together.metrics[f"{metric}_{label}"] == value, metric


def test_a_variants_seed_changes_its_initial_weights_and_not_the_data(
    plain: Result, cache: Path, tmp_path: Path
) -> None:
    words = ["sae_trainer.variants=[{seed:0},{seed:5}]"]
    both = trained(cache, tmp_path / "both", *words).tables["training"].groupby("sae")
    first = plain.tables["training"]
    same = both.get_group("seed_0").drop(columns="sae").reset_index(drop=True)
    pd.testing.assert_frame_equal(same, first)
    other = both.get_group("seed_5").drop(columns="sae").reset_index(drop=True)
    assert (other["overall_loss"] != first["overall_loss"]).all()
    # The same batches at other weights, so that the curves are close.
    assert (other["overall_loss"] / first["overall_loss"]).between(0.8, 1.25).all()


def test_the_report_has_a_row_and_a_curve_for_each(together: Result) -> None:
    assert together.path is not None
    labels = [f.name for f in sorted((together.path / "sae").iterdir())]
    assert len(labels) == 2 * 2 * 3
    saes = together.tables["saes"]
    assert sorted(saes["sae"]) == labels
    assert set(saes["d_sae"]) == {64, 128}
    for row in saes.to_dict("records"):
        assert (
            row["explained_variance"]
            == (together.metrics[f"reconstruction/explained_variance_{row['sae']}"])
        )
        assert Path(row["path"]) == together.path / "sae" / row["sae"]
    assert len(together.figures["progress"].data) == 3 * len(labels)
    assert [t.name for t in together.figures["losses"].data] == list(saes["sae"])
    page = (together.path / "report.html").read_text("utf-8")
    assert "12 SAEs trained together" in page
    assert headline(together.path).startswith("12 SAEs of tiny, trained in one pass: explained")
    lines = (together.path / "tracker.jsonl").read_text("utf-8").splitlines()
    records = [one for line in lines if "train/step" in (one := json.loads(line))]
    assert {k.split("/")[1] for one in records for k in one if k.endswith("overall_loss")} == (
        set(labels)
    )
    assert {(one["event"], one["axis"]) for one in records} == {("series", "train/tokens")}
    steps = {one["train/tokens"] / one["train/step"] for one in records}
    assert len(steps) == 1
    assert [one["train/step"] for one in records] == sorted(one["train/step"] for one in records)


KILLED = """
import os, signal, sys
import saexp
from sae_lens.training.sae_trainer import SAETrainer

def half(self, folder):
    written.append(folder)
    if len(written) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, folder)

written = []
save, SAETrainer.save_trainer_state = SAETrainer.save_trainer_state, half
saexp.run(saexp.compose(sys.argv[3:]), sys.argv[2])
"""
"""A training that is killed within its n-th checkpoint of an SAE."""


def test_a_killed_pass_goes_on_to_the_same_weights(cache: Path, tmp_path: Path) -> None:
    n = 8
    words = ["sae_trainer.variants=[{k:8},{k:16},{k:24}]", f"sae_trainer.lr=0.00{n}"]
    whole = trained(cache, tmp_path / "whole", *words)
    arguments = [*WORDS, *words, f"cache_dir={cache}", "tracker=none"]
    code = ["-W", "ignore", "-c", KILLED, str(n), str(tmp_path / "killed")]
    done = interpreters.run([*code, *arguments])
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    again = trained(cache, tmp_path / "again", *words)
    for label in whole.tables["saes"]["sae"]:
        assert_same_sae(tmp_path / "whole" / "sae" / label, tmp_path / "again" / "sae" / label)
    pd.testing.assert_frame_equal(whole.tables["training"], again.tables["training"])
    assert not list((cache / "training").glob("*/*"))


def test_one_that_diverges_does_not_stop_the_others(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["sae_trainer.variants=[{k:8,lr:1.0e+30},{k:24}]"]
    with pytest.raises(SAEError, match="k_8_lr_1e.30: the loss is .* at step"):
        trained(cache, tmp_path / "run", *words)
    assert "the others go on" in caplog.text
    # The other one is finished: alone it is not trained again.
    caplog.clear()
    trained(cache, tmp_path / "alone", "sae_trainer.options.k=24")
    assert "training 1 SAE: about" not in caplog.text


def test_stored_activations_are_evaluated_when_asked_for(
    plain: Result, cache: Path, tmp_path: Path
) -> None:
    """As task=evaluate measures the trained SAE on the same held-out texts."""
    run = trained(cache, tmp_path / "run", "sae_trainer.evaluate_every=15")
    known = run.tables["training"].dropna(subset=["ce_loss_score"])
    assert list(known["step"]) == [15, 30, 31]
    assert run.metrics["train/ce_loss_score"] == known["ce_loss_score"].iloc[-1]
    assert "ce_loss_score" not in plain.tables["training"] and plain.path is not None
    assert_same_sae(tmp_path / "run" / "sae", plain.path / "sae")
    assert run.metrics["collection/tokens_forwarded"] > 0
    assert plain.metrics["collection/tokens_forwarded"] == 0
