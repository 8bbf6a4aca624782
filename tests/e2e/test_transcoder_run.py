"""Runs with a transcoder: it reads one stream, and its metrics compare with the other."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import saexp
from saexp.activations import ActivationStore
from saexp.models import Hookpoint
from saexp.results import Result
from tests.shipped_texts import FEW_NEUTRAL
from tests.unit.saes.make import write_saelens

LAYER, WIDTH, D = 1, 256, 128
HOOKS = {
    "hook_name": f"blocks.{LAYER}.mlp.hook_in",
    "hook_name_out": f"blocks.{LAYER}.hook_mlp_out",
    "model_name": "saexp/tiny",
}
WORDS = ["tracker=none", "intervention=none", "analyzer.n_bootstrap=0", "dataset.n_examples=20"]
WORDS += ["analyzer.n_background=500", FEW_NEUTRAL, "sae=local", f"layer={LAYER}"]


def stores(folder: Path) -> dict[str, ActivationStore]:
    """By the name of their data set."""
    opened = [saexp.open_store(p.parent) for p in folder.glob("activations/*/manifest.json")]
    return {
        "neutral" if s.manifest["about"]["dataset"] == "background" else "own": s for s in opened
    }


def streams(store: ActivationStore) -> tuple[Tensor, Tensor]:
    return store.acts(LAYER, "mlp_in").float(), store.acts(LAYER, "mlp_out").float()


def skip_transcoder(folder: Path, x: Tensor, y: Tensor, wrong: int = 0) -> Path:
    """Random latents; the skip connection is the least-squares map from x to y less theirs."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        "W_enc": torch.randn(D, WIDTH, generator=generator) / D**0.5,
        "b_enc": torch.full((WIDTH,), -0.5),
        "W_dec": torch.randn(WIDTH, D, generator=generator) / WIDTH,
    }
    acts = (x @ weights["W_enc"] + weights["b_enc"]).relu()
    ones = torch.ones(len(x), 1)
    left = y - acts @ weights["W_dec"]
    solved = torch.linalg.lstsq(torch.cat([x, ones], 1).double(), left.double()).solution.float()
    weights |= {"W_skip": solved[:-1].T.contiguous(), "b_dec": solved[-1]}
    hooks = {k: v.replace(f".{LAYER}.", f".{LAYER + wrong}.") for k, v in HOOKS.items()}
    return write_saelens(folder, {"architecture": "skip_transcoder", "metadata": hooks}, weights)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both streams of all blocks at the run's positions and at those of its neutral text."""
    folder = tmp_path_factory.mktemp("cache")
    sae_folder = write_saelens(
        folder / "tiny",
        {"architecture": "transcoder", "metadata": HOOKS},
        {
            "W_enc": torch.full((D, WIDTH), 1e-9),
            "b_enc": torch.full((WIDTH,), 1.0),
            "W_dec": torch.full((WIDTH, D), 1e-9),
            "b_dec": torch.zeros(D),
        },
    )
    run(folder, folder / "run", sae_folder)
    return folder


def run(cache: Path, folder: Path, sae_folder: Path, *words: str) -> Result:
    cfg = saexp.compose([*WORDS, f"sae.path={sae_folder}", f"cache_dir={cache}", *words])
    return saexp.run(cfg, folder)


class Fitted(NamedTuple):
    """A transcoder that is fitted to neutral text, and a run with it."""

    sae: Path
    folder: Path
    result: Result


@pytest.fixture(scope="module")
def fitted(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    folder = tmp_path_factory.mktemp("fitted")
    sae_folder = skip_transcoder(folder / "sae", *streams(stores(cache)["neutral"]))
    return Fitted(sae_folder, folder / "run", run(cache, folder / "run", sae_folder))


def test_metrics_are_of_the_stream_that_is_predicted(cache: Path, fitted: Fitted) -> None:
    sae_folder, run_folder, result = fitted
    assert result.metrics["collection/tokens_forwarded"] == 0
    sae, (x, y) = saexp.load_sae(sae_folder), streams(stores(cache)["own"])
    acts = sae.encode(x)
    error = (sae.decode(acts, x) - y).double().square().sum(-1)
    spread = (y.double() - y.double().mean(0)).square().sum(-1)
    metrics = result.metrics
    assert metrics["reconstruction/explained_variance"] == pytest.approx(
        1 - float(error.sum() / spread.sum()), abs=1e-6
    )
    assert metrics["reconstruction/mse"] == pytest.approx(float(error.mean()), rel=1e-5)
    assert metrics["sparsity/l0"] == pytest.approx(float((acts != 0).sum(-1).double().mean()))
    assert (run_folder / "report.html").is_file()
    about = json.loads((run_folder / "provenance.json").read_text("utf-8"))
    assert about["sae"]["hookpoint"] == f"layer_{LAYER}.mlp_in"
    assert about["sae"]["hookpoint_out"] == f"layer_{LAYER}.mlp_out"


def test_the_check_compares_with_the_other_stream(
    cache: Path, fitted: Fitted, tmp_path: Path
) -> None:
    """Fitted to neutral text it fits there; one block off, the right block is named."""
    x, y = streams(stores(cache)["neutral"])
    assert not torch.allclose(x, y)
    fits = fitted.result
    assert fits.metrics["check/explained_variance"] > 0.4
    # At the positions analysed it explains little, which is noted; its reading is not in doubt.
    assert not any("on neutral text, " in n or "looks trained" in n for n in fits.notes)
    sae_folder = skip_transcoder(tmp_path / "b", x, y, wrong=1)
    wrong = run(cache, tmp_path / "wrong", sae_folder, f"layer={LAYER + 1}")
    (note,) = [n for n in wrong.notes if "of the variance" in n]
    assert f"at layer_{LAYER + 1}.mlp_out on neutral text" in note
    assert f"at layer_{LAYER}.mlp_in: it looks trained on that layer" in note


def test_another_analyzer_reads_both_streams_too(
    cache: Path, fitted: Fitted, tmp_path: Path
) -> None:
    contrast = fitted.result.metrics
    stats = run(cache, tmp_path / "stats", fitted.sae, "analyzer=stats").metrics
    name = "reconstruction/explained_variance"
    assert stats[name] == contrast[name]


def test_cells_ahead_want_both_streams() -> None:
    from saexp.pipeline.collect import hookpoints_in_model

    class Four:
        n_layers = 4

    model: Any = Four()
    both = [Hookpoint(1, "mlp_in"), Hookpoint(1, "mlp_out")]
    near = [Hookpoint(2, "mlp_in"), Hookpoint(2, "mlp_out")]
    planned = hookpoints_in_model(model, [*both, *near], [(3, None), (0, "resid_post"), (9, None)])
    assert planned == [
        *(Hookpoint(3, "mlp_in"), Hookpoint(3, "mlp_out")),
        Hookpoint(0, "resid_post"),
    ]
