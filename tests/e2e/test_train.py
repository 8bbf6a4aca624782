"""task=train on the shipped model: what it makes, that a kill changes nothing, and its errors."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import saexp
from saexp.config import SAETrainerConfig
from saexp.errors import ConfigError, SAEError
from saexp.saes import training as module
from saexp.tasks.train import off_target
from tests import interpreters

WORDS = [
    "task=train",
    "layer=2",
    "width=128",
    "tracker=none",
    "sae_trainer.n_samples=20000",
    "sae_trainer.batch_size=256",
    "sae_trainer.checkpoint_every=10",
    "sae_trainer.log_every=5",
]
TRAINERS = (
    "standard",
    "gated",
    "topk",
    "abstopk",
    "batchtopk",
    "jumprelu",
    "matryoshka_batchtopk",
    "matching_pursuit",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def trained(cache: Path, folder: Path, *words: str):
    cfg = saexp.compose([*WORDS, f"cache_dir={cache}", *words])
    return saexp.run(cfg, folder)


@pytest.fixture(scope="module")
def several(cache, tmp_path_factory):
    """One SAE of each trainer, of one pass (see test_train_together.py)."""
    variants = ",".join(f"{{name:{name}}}" for name in TRAINERS)
    return trained(cache, tmp_path_factory.mktemp("all"), f"sae_trainer.variants=[{variants}]")


@pytest.fixture(scope="module")
def run(cache, tmp_path_factory):
    return trained(cache, tmp_path_factory.mktemp("batchtopk"), "sae_trainer=batchtopk")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRAINERS)
def test_what_is_trained_reconstructs_texts_it_never_saw_and_sae_lens_agrees(several, name):
    from sae_lens import SAE as LensSAE

    metrics = several.metrics
    assert metrics[f"reconstruction/explained_variance_{name}"] > 0.3
    assert 0 < metrics[f"sparsity/l0_{name}"] < 128
    folder = several.path / "sae" / name
    ours, theirs = saexp.load_sae(folder), LensSAE.load_from_disk(folder)
    assert ours.hookpoint.name == "layer_2.resid_post"
    generator = torch.Generator().manual_seed(0)
    x = 500 * torch.randn(64, ours.d_in, generator=generator)
    with torch.no_grad():
        acts = theirs.encode(x)
        torch.testing.assert_close(ours.encode(x), acts, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(ours.decode(acts, x), theirs.decode(acts), rtol=1e-4, atol=1e-2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_jumprelus_default_penalty_leaves_few_latents_active(cache, tmp_path):
    words = ["sae_trainer=jumprelu", "width=256", "layer=1", "sae_trainer.n_samples=100000"]
    words += ["sae_trainer.batch_size=512", "sae_trainer.checkpoint_every=500"]
    metrics = trained(cache, tmp_path / "run", *words).metrics
    assert 10 < metrics["sparsity/l0"] < 40
    assert metrics["reconstruction/explained_variance"] > 0.93


KILLED = """
import os, signal, sys
import saexp
from sae_lens.training.sae_trainer import SAETrainer

def half(self, folder):
    if self.n_training_steps == 50:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, folder)

save, SAETrainer.save_trainer_state = SAETrainer.save_trainer_state, half
saexp.run(saexp.compose(sys.argv[2:]), sys.argv[1])
"""
"""A training that is killed within the checkpoint of step 50, its weights written already."""


@pytest.mark.filterwarnings("ignore")
def test_a_killed_training_goes_on_to_the_same_weights(run, cache, tmp_path, monkeypatch):
    # Another key, so that the run it is compared with has left no checkpoint of it.
    words = ["sae_trainer=batchtopk", "sae_trainer.dead_feature_window=501"]
    arguments = [*WORDS, *words, f"cache_dir={cache}"]
    code = ["-W", "ignore", "-c", KILLED, str(tmp_path / "killed"), *arguments]
    process = interpreters.run(code)
    assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]
    left = sorted(p.name for p in (cache / "training").glob("*/*"))
    assert left[1:] == ["step_000000030", "step_000000040"]
    assert left[0].startswith(".tmp-")
    real, steps = module.Training._record, []
    monkeypatch.setattr(
        module.Training, "_record", lambda s, step, o: steps.append(step) or real(s, step, o)
    )
    again = trained(cache, tmp_path / "again", *words)
    assert steps[0] == 45, "it went on from the checkpoint at step 40"
    assert not list((cache / "training").glob("*/*")), "none is left of a finished training"
    one, other = (saexp.load_sae(r.path / "sae") for r in (run, again))
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    pd.testing.assert_frame_equal(run.tables["training"], again.tables["training"])


def test_the_report_and_tables_say_what_was_measured(run):
    page = (run.path / "report.html").read_text("utf-8")
    assert f"explained variance {run.metrics['reconstruction/explained_variance']:.3f}" in page
    assert set(run.figures) == {"losses", "progress", "density", "active", "values"}
    density = pd.read_parquet(run.path / "density.parquet")
    silent = float((density["frequency"] == 0).mean())
    assert silent == pytest.approx(run.metrics["sparsity/dead_fraction"])
    active = pd.read_parquet(run.path / "active.parquet")["n_active"]
    assert np.mean(active) == pytest.approx(run.metrics["sparsity/l0"])
    about = json.loads((run.path / "provenance.json").read_text("utf-8"))
    assert about["n_trained_on"] + about["n_measured"] == run.metrics["collection/n_rows"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("words", "error", "part"),
    [
        (["sae_trainer.name=topkk"], ConfigError, "did you mean topk"),
        (["sae_trainer.options.kk=3"], ConfigError, "has no such option; did you mean k"),
        (["sae_trainer.options.k=500"], ConfigError, "above width=128"),
        (["layer=null"], ConfigError, "layer is not set"),
        (["sae_trainer.variants=[{k:8},{k:8}]"], ConfigError, "two are the same"),
        (["sae_trainer.variants=[16]"], ConfigError, "is not a mapping; type e.g."),
        (["sae_trainer.variants=[{lr:fast}]"], ConfigError, "{'lr': 'fast'}: Value 'fast'"),
        (["sae_trainer.variants=[{n_samples:9}]"], ConfigError, "type sae_trainer.n_samples=9"),
        (["task.streams=[mlp_in,mlp_out]"], ConfigError, "an SAE reads one stream"),
        (["sae_trainer.held_out=1"], ConfigError, "such as 0.1"),
        (["sae_trainer.lr=1e30"], SAEError, "at step"),
    ],
)
def test_what_cannot_be_trained_is_one_line(cache, tmp_path, words, error, part):
    words = [f"+{w}" if "options.kk" in w else w for w in words]
    with pytest.raises(error) as caught:
        trained(cache, tmp_path, *words)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "l0", "has_note"),
    [
        ("batchtopk", {"k": 16}, 33.0, True),
        ("batchtopk", {"k": 16}, 9.0, True),
        ("batchtopk_transcoder", {"k": 16}, 30.2, True),
        ("batchtopk", {"k": 16}, 17.1, False),
        ("topk", {"k": 16}, 4.0, False),
        ("standard", {}, 80.0, False),
    ],
)
def test_an_l0_far_from_k_is_a_note(name, options, l0, has_note):
    notes = off_target(SAETrainerConfig(name=name, options=options), l0)
    assert [f"L0 is {l0:.1f} on held-out positions, where k is 16" in n for n in notes] == (
        [True] if has_note else []
    )


def test_checkpoints_are_known_by_what_is_trained_on_which_data(cache):
    from types import SimpleNamespace

    from saexp.models import Hookpoint
    from saexp.saes.training_pass import Target, variants_of
    from saexp.tasks.train import _key

    plain = saexp.compose(["task=train", f"cache_dir={cache}"])
    trainer = plain.sae_trainer

    def key(data="store, rows", at="resid_post", layer=1, width=256, **changes) -> str:
        cfg = replace(plain, **changes)
        source = SimpleNamespace(key=lambda streams: [data, [s.name for s in streams]])
        target = Target((Hookpoint(layer, at),), width, variants_of(cfg.sae_trainer)[""])
        return _key(cfg, source, target)

    changed = [
        key(),
        key(seed=1),
        key(sae_trainer=replace(trainer, n_samples=99)),
        key(sae_trainer=replace(trainer, name="topk")),
        key(data="other store"),
        key(layer=2),
        key(at="mlp_out"),
        key(width=512),
    ]
    assert len(set(changed)) == len(changed)
    others = saexp.compose(["task=train", "tracker=none", "intervention=none"])
    assert key(tracker=others.tracker, intervention=others.intervention) == key()
