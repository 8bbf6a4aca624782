"""task=train of transcoders on the shipped model: held-out numbers, a stop, runs with them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import saexp
from saexp.activations import ActivationStore
from saexp.errors import ConfigError, ModelError
from saexp.models.resolution import ASSETS
from saexp.reports.analysis import headline
from saexp.results import Result
from saexp.saes import training as module
from saexp.saes.training import TRANSCODERS

WORDS = [
    "task=train",
    "layer=2",
    "width=128",
    "tracker=none",
    "dataset=text",
    f"dataset.path={ASSETS / 'tiny/background.txt'}",
    "sae_trainer.n_samples=20000",
    "sae_trainer.batch_size=256",
    "sae_trainer.checkpoint_every=10",
    "sae_trainer.log_every=5",
]
BOTH = "task.streams=[mlp_in,mlp_out]"
SKIP = "sae_trainer.options.skip=true"
VARIANTS = [(name, number % 2 == 1) for number, name in enumerate(TRANSCODERS)]
"""(trainer, with skip): each trainer, every other one with a skip connection."""
pytestmark = pytest.mark.filterwarnings("ignore")


def trained(cache: Path, folder: Path, *words: str) -> Result:
    cfg = saexp.compose([*WORDS, f"cache_dir={cache}", *words])
    return saexp.run(cfg, folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def runs(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Result]:
    """(trainer, with skip) -> result; all of them from one collection."""
    return {
        (name, skip): trained(
            cache,
            tmp_path_factory.mktemp(name),
            f"sae_trainer={name}",
            BOTH,
            f"sae_trainer.options.skip={str(skip).lower()}",
        )
        for name, skip in VARIANTS
    }


def store(cache: Path) -> ActivationStore:
    (manifest,) = cache.glob("activations/*/manifest.json")
    return saexp.open_store(manifest.parent)


@pytest.mark.parametrize(("name", "skip"), VARIANTS)
def test_it_predicts_the_output_on_texts_it_never_saw_and_sae_lens_agrees(
    runs: dict[tuple[str, bool], Result], cache: Path, name: str, skip: bool
) -> None:
    from sae_lens import SAE as LensSAE

    run = runs[name, skip]
    folder, streams = run.path / "sae", store(cache)
    ours, theirs = saexp.load_sae(folder), LensSAE.load_from_disk(folder)
    assert "Transcoder" in type(theirs).__name__
    assert (hasattr(theirs, "W_skip"), ours.W_skip is not None) == (skip, skip)
    x, y = streams.acts(2, "mlp_in").float(), streams.acts(2, "mlp_out").float()
    with torch.no_grad():
        acts = theirs.encode(x)
        torch.testing.assert_close(ours.encode(x), acts, rtol=1e-4, atol=1e-4)
        predicted = theirs(x)
        torch.testing.assert_close(ours.decode(acts, x), predicted, rtol=1e-4, atol=1e-3)
    # Held out: a tenth of the texts, chosen anew here from the seed.
    texts = np.unique(streams.rows["text_id"])
    chosen = np.random.default_rng(0).permutation(texts)[: round(0.1 * len(texts))]
    out = torch.from_numpy(streams.rows["text_id"].isin(chosen).to_numpy())
    error = (predicted - y)[out].double().square().sum(-1)
    spread = (y[out].double() - y[out].double().mean(0)).square().sum(-1)
    metrics, active = run.metrics, acts[out] != 0
    assert metrics["sparsity/n_positions"] == int(out.sum())
    assert metrics["reconstruction/explained_variance"] == pytest.approx(
        1 - float(error.sum() / spread.sum()), abs=1e-5
    )
    assert metrics["sparsity/l0"] == pytest.approx(float(active.sum(-1).double().mean()), rel=1e-3)
    dead = float((~active.any(0)).double().mean())
    assert metrics["sparsity/dead_fraction"] == pytest.approx(dead, abs=1 / 128)
    assert metrics["reconstruction/explained_variance"] > 0.3
    assert 0 < metrics["sparsity/l0"] < 128


def test_all_variants_come_from_one_collection(runs: dict[tuple[str, bool], Result]) -> None:
    forwarded = [runs[variant].metrics["collection/tokens_forwarded"] for variant in VARIANTS]
    assert forwarded[0] > 0
    assert forwarded[1:] == [0] * (len(VARIANTS) - 1)


def test_a_training_stopped_within_a_checkpoint_goes_on_to_the_same_weights(
    runs: dict[tuple[str, bool], Result],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As test_train.py does with a process that is killed."""
    from sae_lens.training.sae_trainer import SAETrainer

    # Another key, so that the run it is compared with has left no checkpoint of it.
    words = ["sae_trainer=batchtopk_transcoder", BOTH, SKIP, "sae_trainer.dead_feature_window=501"]
    save = SAETrainer.save_trainer_state

    def half(trainer: Any, folder: Path) -> None:
        if trainer.n_training_steps == 50:
            raise KeyboardInterrupt
        save(trainer, folder)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SAETrainer, "save_trainer_state", half)
        trained(cache, tmp_path / "stopped", *words)
    real, steps = module.Training._record, []
    monkeypatch.setattr(
        module.Training, "_record", lambda s, step, o: steps.append(step) or real(s, step, o)
    )
    again, whole = trained(cache, tmp_path / "again", *words), runs["batchtopk_transcoder", True]
    assert steps[0] == 45, "it went on from the checkpoint at step 40"
    one, other = (saexp.load_sae(r.path / "sae") for r in (whole, again))
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "W_skip", "threshold"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    pd.testing.assert_frame_equal(whole.tables["training"], again.tables["training"])


def test_the_report_names_both_hookpoints(runs: dict[tuple[str, bool], Result]) -> None:
    run = runs["batchtopk_transcoder", True]
    page = (run.path / "report.html").read_text("utf-8")
    finding = headline(run.path)
    explained = run.metrics["reconstruction/explained_variance"]
    assert finding.startswith(
        "batchtopk_transcoder with 128 latents and a skip connection, from layer_2.mlp_in to "
        f"layer_2.mlp_out of tiny: explained variance of layer_2.mlp_out {explained:.3f} and L0"
    )
    assert finding in page
    assert "It reads layer_2.mlp_in and predicts layer_2.mlp_out; explained variance" in page
    about = json.loads((run.path / "provenance.json").read_text("utf-8"))["sae"]
    assert (about["hookpoint"], about["hookpoint_out"]) == ("layer_2.mlp_in", "layer_2.mlp_out")
    cfg = json.loads((run.path / "sae/cfg.json").read_text("utf-8"))
    assert cfg["architecture"] == "jumprelu_skip_transcoder"
    assert cfg["metadata"]["hook_name"] == "blocks.2.mlp.hook_in"
    assert cfg["metadata"]["hook_name_out"] == "blocks.2.hook_mlp_out"
    assert cfg["metadata"]["training_architecture"] == "batchtopk_transcoder"


def test_what_was_trained_is_spliced(
    runs: dict[tuple[str, bool], Result], cache: Path, tmp_path: Path
) -> None:
    """Spliced in on the texts it was trained on, it does what the MLP does, better than zeros.
    Runs that analyse a transcoder are in test_transcoder_run.py."""
    sae_folder = runs["batchtopk_transcoder", True].path / "sae"
    words = ["task=evaluate", "task.n_texts=40", "task.n_bootstrap=0", "layer=2", "tracker=none"]
    words += ["sae=local", f"sae.path={sae_folder}", f"cache_dir={cache}"]
    metrics = saexp.run(saexp.compose(words), tmp_path / "evaluate").metrics
    assert metrics["reconstruction/explained_variance"] > 0.7
    assert metrics["reconstruction/ce_sae"] < metrics["reconstruction/ce_zero"]


@pytest.mark.parametrize("streams", ["attn_z,attn_out"])
def test_other_pairs_of_streams(cache: Path, tmp_path: Path, streams: str) -> None:
    words = ["sae_trainer=batchtopk_transcoder", f"task.streams=[{streams}]", SKIP]
    result = trained(cache, tmp_path, *words)
    first, second = streams.split(",")
    sae: Any = saexp.load_sae(result.path / "sae")
    assert [h.name for h in sae.hookpoints] == [f"layer_2.{first}", f"layer_2.{second}"]
    assert result.metrics["reconstruction/explained_variance"] > 0.5


@pytest.mark.parametrize(
    ("words", "error", "part"),
    [
        ([], ConfigError, "reads one stream and predicts another of the block; type 'task.st"),
        (["task.streams=[mlp_in]"], ConfigError, "type 'task.streams=[mlp_in,mlp_out]'"),
        (["task.streams=[mlp_in,mlp_in]"], ConfigError, "comes after the one it reads"),
        (["task.streams=[mlp_out,mlp_in]"], ConfigError, "comes after the one it reads"),
        (["task.streams=[embed,resid_pre]", "layer=0"], ConfigError, "comes after the one"),
        (["task.streams=[mlp_in,mlp_ou]"], ModelError, "did you mean mlp_out"),
        ([BOTH, "sae_trainer=batchtopk"], ConfigError, "takes two streams"),
        ([BOTH, "layer=7"], ModelError, "layer=7"),
        (
            [BOTH, "sae_trainer.name=gated_transcoder"],
            ConfigError,
            "sae-lens has no inference class",
        ),
        ([BOTH, "+task.x=1"], ConfigError, "no key 'task.x'"),
    ],
)
def test_what_cannot_be_trained_is_one_line(
    cache: Path, tmp_path: Path, words: list[str], error: type[Exception], part: str
) -> None:
    with pytest.raises(error) as caught:
        trained(cache, tmp_path, "sae_trainer=batchtopk_transcoder", *words)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
