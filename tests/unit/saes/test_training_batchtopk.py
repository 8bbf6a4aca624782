"""BatchTopK's quicker training class: the same latents kept, the same training as sae-lens'."""

from types import ModuleType
from typing import Any

import pytest
import torch

from saexp.config import SAETrainerConfig
from saexp.models import Hookpoint
from saexp.saes.training import TrainingSource
from saexp.saes.training_architectures import training_sae
from tests.unit.saes.lens_training import lens_trainer
from tests.unit.saes.make import D_IN, D_SAE, points

pytestmark = pytest.mark.filterwarnings("ignore")


def make_training_sae(**options: Any) -> Any:
    torch.manual_seed(1)
    cfg = SAETrainerConfig(name="batchtopk", options={"k": 4, **options})
    source = TrainingSource("m", Hookpoint(3, "resid_post"), D_IN, 64)
    return training_sae(cfg, D_SAE, source, torch.device("cpu"), 100)


@pytest.mark.parametrize("k", [0.5, 4, 7.3, 29, D_SAE])
def test_what_is_kept_and_its_gradient_are_sae_lens_own(lens: ModuleType, k: int | float) -> None:
    """Where all that is positive is kept (k 29 and d_sae), too."""
    from saexp.saes.training_step import QuickBatchTopK

    x = torch.randn(16, D_SAE, generator=torch.Generator().manual_seed(2))
    weight = torch.randn(16, D_SAE, generator=torch.Generator().manual_seed(3))
    outputs, grads = [], []
    for cls in (lens.saes.batchtopk_sae.BatchTopK, QuickBatchTopK):
        inputs = x.clone().requires_grad_()
        outputs.append(cls(k)(inputs))
        (outputs[-1] * weight).sum().backward()
        grads.append(inputs.grad)
    assert torch.equal(*outputs)
    assert torch.equal(*grads)


def test_of_equal_activations_the_first_are_kept() -> None:
    from saexp.saes.training_step import QuickBatchTopK

    x = torch.tensor([[3.0, 1.0, -1.0, 2.0], [1.0, 0.5, 1.0, 1.0]], requires_grad=True)
    activations = QuickBatchTopK(2)(x)
    assert activations.tolist() == [[3.0, 1.0, 0.0, 2.0], [1.0, 0.0, 0.0, 0.0]]
    activations.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, (activations > 0).float())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rescale_acts_by_decoder_norm": False},
        {"apply_b_dec_to_input": False},
        {"k": 5.5, "aux_loss_coefficient": 0.1, "topk_threshold_lr": 0.3},
    ],
)
def test_it_is_trained_as_sae_lens_trains_its_own(
    lens: ModuleType, options: dict[str, Any]
) -> None:
    """Losses, weights and the threshold after 15 steps of Adam; latents die on the way."""
    ours, batches = (
        make_training_sae(**options),
        [b + 0.1 * i for i, b in enumerate(points(15, 16, D_IN))],
    )
    theirs = lens.BatchTopKTrainingSAE(ours.cfg)
    theirs.load_state_dict(ours.state_dict())
    assert type(ours) is not type(theirs)
    losses: list[list[float]] = []
    n_dead: list[int] = []
    for model in (theirs, ours):
        trainer = lens_trainer(lens, model, len(batches), 16)
        losses.append([])
        for number, batch in enumerate(batches, start=1):
            n_dead.append(int(trainer.dead_neurons.sum()))
            losses[-1].append(float(trainer.step(batch).loss.detach()))
            trainer.n_training_steps = number
    assert max(n_dead) > D_IN // 2 and 0 < min(n for n in n_dead if n) <= D_IN // 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    x = points(50, D_IN)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
