"""Training with matrix products in bfloat16 and float32 weights, and on a device of its own."""

import itertools
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from saexp.config import SAETrainerConfig
from saexp.models import Hookpoint
from saexp.models.resolution import native_dtypes
from saexp.saes.training import Training, TrainingSource
from saexp.tasks.train import _resolved
from tests.train_alone import train_alone

D_IN, D_SAE, BATCH, N_STEPS = 32, 128, 256, 250
OPTIONS: dict[str, dict[str, Any]] = {
    "batchtopk": {"k": 4},
    "topk": {"k": 4},
    "standard": {"l1_coefficient": 0.5},
}
SOURCE = TrainingSource("random", Hookpoint(0, "resid_post"), D_IN, 16)
DICTIONARY = torch.randn(D_SAE, D_IN, generator=torch.Generator().manual_seed(1))


@cache
def batch(step: int) -> Tensor:
    """Sparse sums of the rows of a dictionary."""
    latents = torch.rand(BATCH, D_SAE, generator=torch.Generator().manual_seed(step))
    return (latents * (latents > 0.97)) @ DICTIONARY


def reader(step: int) -> Iterator[Tensor]:
    """The batches of the steps from this one on."""
    return map(batch, itertools.count(step))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("unused")


@cache
def trained(folder: Path, name: str, device: str = "cpu", **settings: Any) -> Training:
    """Nothing is written to the folder."""
    cfg = SAETrainerConfig(
        name=name,
        options=OPTIONS[name],
        batch_size=BATCH,
        n_samples=N_STEPS * BATCH,
        dead_feature_window=50,
        lr=3e-3,
        **settings,
    )
    training = Training(cfg, D_SAE, SOURCE, folder, torch.device(device), writable=False)
    for _ in train_alone(training, reader):
        pass
    return training


@pytest.mark.parametrize("name", OPTIONS)
def test_autocast_reaches_the_explained_variance_of_float32(name: str, folder: Path) -> None:
    full, half = (trained(folder, name, autocast=on) for on in (False, True))
    ends = [sum(r["train/explained_variance"] for r in t.records[-4:]) / 4 for t in (full, half)]
    assert ends[0] > 0.6
    # Two seeds in float32 differ as much.
    assert ends[1] == pytest.approx(ends[0], abs=0.01)
    optimizer = half.trainer.optimizer.state.values()
    tensors = [*half.sae.parameters(), half.trainer.act_freq_scores]
    tensors += [half.trainer.n_forward_passes_since_fired]
    tensors += [state[key] for state in optimizer for key in ("exp_avg", "exp_avg_sq")]
    assert {t.dtype for t in tensors} == {torch.float32}
    assert not torch.equal(full.sae.W_enc, half.sae.W_enc)
    # Weights are not rounded to bfloat16.
    assert not torch.equal(half.sae.W_dec, half.sae.W_dec.bfloat16().float())


@pytest.mark.parametrize("name", OPTIONS)
def test_the_loss_of_a_step_in_autocast_is_that_of_float32_up_to_rounding(
    name: str, folder: Path
) -> None:
    losses = []
    for autocast in (False, True):
        cfg = SAETrainerConfig(
            name=name, options=OPTIONS[name], batch_size=BATCH, autocast=autocast
        )
        cfg.normalize_activations = "none"
        training = Training(cfg, D_SAE, SOURCE, folder, torch.device("cpu"), writable=False)
        output = training.make_step(next(reader(0)))
        assert output.loss.dtype == torch.float32
        losses.append(float(output.loss.detach()))
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("name", ["topk", "standard"])
def test_training_in_float32_is_bitwise_that_of_sae_lens(name: str, folder: Path) -> None:
    from sae_lens.training.sae_trainer import SAETrainer

    ours = trained(folder, name, autocast=False)
    cfg = ours.cfg
    theirs = Training(cfg, D_SAE, SOURCE, folder / "other", torch.device("cpu"), writable=False)
    trainer = SAETrainer(theirs.trainer.cfg, theirs.sae, iter(()))
    trainer.activation_scaler.scaling_factor = ours.trainer.activation_scaler.scaling_factor
    for group in trainer.optimizer.param_groups:
        # The same update of Adam, whose rounding differs.
        group["fused"] = name == "topk"
    batches = reader(0)
    for _ in range(N_STEPS):
        trainer.step(next(batches))
        trainer.n_training_steps += 1
    for one, other in zip(ours.sae.parameters(), theirs.sae.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("dtype", "is_native"),
    [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True)],
)
def test_autocast_is_on_where_the_model_is_computed_in_native_bfloat16(
    dtype: torch.dtype, is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    natives = frozenset([torch.bfloat16] if is_native else [])
    monkeypatch.setattr("saexp.tasks.train.native_dtypes", lambda _: natives)
    model: Any = SimpleNamespace(dtype=dtype, device=torch.device("cpu"))
    expected = is_native and dtype == torch.bfloat16
    assert _resolved(SAETrainerConfig(name="topk"), model).autocast is expected
    for autocast in (True, False):
        assert (
            _resolved(SAETrainerConfig(name="topk", autocast=autocast), model).autocast is autocast
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_an_sae_on_another_device_than_its_batches(folder: Path) -> None:
    """The batches are on the CPU."""
    here, there = (trained(folder, "topk", device, autocast=False) for device in ("cpu", "cuda"))
    assert there.sae.W_dec.is_cuda
    ends = [t.records[-1]["train/explained_variance"] for t in (here, there)]
    assert ends[1] == pytest.approx(ends[0], abs=0.01)
    assert torch.bfloat16 in native_dtypes(torch.device("cuda"))
