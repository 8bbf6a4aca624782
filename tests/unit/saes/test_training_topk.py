"""Training with sums over the active latents: the same gradients and training as sae-lens'."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saexp.config import SAETrainerConfig
from saexp.models import Hookpoint
from saexp.saes.training import TrainingSource
from saexp.saes.training_architectures import training_sae
from saexp.saes.training_step import Active, SparseReconstruction, largest_of_rows
from tests.unit.saes.lens_training import lens_trainer
from tests.unit.saes.make import D_IN, points

pytestmark = pytest.mark.filterwarnings("ignore")
D_SAE = 64


def training_class(name: str, **options: Any) -> Any:
    torch.manual_seed(1)
    cfg = SAETrainerConfig(name=name, options={"k": 4, **options})
    source = TrainingSource("m", Hookpoint(3, "resid_post"), D_IN, 64)
    return training_sae(cfg, D_SAE, source, torch.device("cpu"), 100)


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("listed", [[0, 3, 7, 9, 20, 23], [5, 6], []])
def test_gradients_are_those_of_finite_differences(subtracts: bool, listed: list[int]) -> None:
    """Rows and latents without an active entry, too; the activations follow from the weights."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, dtype=torch.float64)
    active = Active.of(torch.tensor(listed, dtype=torch.long), torch.Size((4, 6)))

    def reconstruct(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> Any:
        read = x - b_dec if subtracts else x
        acts = (read @ W_enc + b_enc).detach()[active.rows, active.latents]
        return SparseReconstruction.apply(W_enc, b_enc, W_dec, b_dec, x, active, acts, subtracts)

    shapes = ((3, 6), (6,), (6, 3), (3,))
    weights = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(reconstruct, weights)


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rescale_acts_by_decoder_norm": False},
        {"apply_b_dec_to_input": False},
        {"k": 1, "aux_loss_coefficient": 0.1},
    ],
)
def test_it_is_trained_as_sae_lens_trains_its_own(
    lens: ModuleType, name: str, options: dict[str, Any]
) -> None:
    """Losses, activations and weights in 15 steps of Adam; latents die on the way."""
    from sae_lens.registry import get_sae_training_class

    ours, batches = (
        training_class(name, **options),
        [b + 0.1 * i for i, b in enumerate(points(15, 16, D_IN))],
    )
    theirs = get_sae_training_class(name)[0](ours.cfg)
    theirs.load_state_dict(ours.state_dict())
    assert type(ours) is not type(theirs)
    trainers = [lens_trainer(lens, model, len(batches), 16) for model in (ours, theirs)]
    n_dead: list[int] = []
    for number, batch in enumerate(batches, start=1):
        n_dead.append(int(trainers[1].dead_neurons.sum()))
        own, other = (trainer.step(batch) for trainer in trainers)
        assert own.feature_acts.is_sparse
        assert float(own.loss) == pytest.approx(float(other.loss), rel=1e-5)
        assert own.losses.keys() == other.losses.keys()
        torch.testing.assert_close(
            own.feature_acts.to_dense(), other.feature_acts, rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(own.hidden_pre, other.hidden_pre, rtol=1e-4, atol=1e-4)
        for trainer in trainers:
            trainer.n_training_steps = number
    assert max(n_dead) > D_IN // 2
    for name_, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name_], value, rtol=1e-4, atol=1e-5)
    for counter in ("act_freq_scores", "n_forward_passes_since_fired"):
        assert torch.equal(*(getattr(trainer, counter) for trainer in trainers))
    numbers = [
        t.build_train_step_log_dict(o, 1) for t, o in zip(trainers, (own, other), strict=True)
    ]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-3)


@pytest.mark.parametrize(
    ("width", "k"), [(256, 1), (256, 8), (1027, 5), (64, 8), (40, 12), (512, 3)]
)
@pytest.mark.parametrize("kind", ["random", "neighbours", "equal", "columns", "negative"])
def test_the_largest_of_rows_are_those_of_a_sort(width: int, k: int, kind: str) -> None:
    """Also where the largest are in one group, equal, in the same columns, or below 0."""
    rng = np.random.default_rng(width + k)
    values = rng.normal(size=(32, width)).astype(np.float32)
    if kind == "neighbours":
        groups = np.arange(width) % (width // max(1, min(16, width // (4 * k))))
        values += 5 * (groups < 2)
    elif kind == "equal":
        values = values.round()
    elif kind == "columns":
        values[:, : k + 1] += 9
    elif kind == "negative":
        values -= 2.5
    for rows, n in ((values, k), (values.reshape(1, -1), 32 * k)):
        least = np.sort(rows, axis=1)[:, -n, None]
        expected = np.flatnonzero((rows >= least) & (rows > 0))
        assert np.array_equal(largest_of_rows(rows, n), expected)


def test_of_equal_activations_k_are_active() -> None:
    sae = training_class("topk", k=2)
    scored = torch.tensor([[3.0, 1.0, 1.0, 1.0], [1.0, 0.0, -1.0, -2.0], [2.0, 3.0, 1.0, 0.5]])
    active = Active.of(sae.active_indices(scored), scored.shape)
    assert torch.bincount(active.rows).tolist() == [2, 1, 2]
    assert active.starts.tolist() == [0, 2, 3]
    activations = torch.zeros_like(scored)
    activations[active.rows, active.latents] = scored[active.rows, active.latents]
    assert activations[0].sum() == 4.0 and activations[1].tolist() == [1.0, 0, 0, 0]
    assert activations[2].tolist() == [2.0, 3.0, 0, 0]


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_where_many_latents_are_active_the_products_are_dense(name: str) -> None:
    from sae_lens.saes.sae import TrainStepInput

    (batch,) = points(1, 16, D_IN)
    for k, is_sparse in ((D_SAE // 8, True), (D_SAE // 8 + 1, False)):
        step_input = TrainStepInput(
            sae_in=batch,
            dead_neuron_mask=None,
            coefficients={},
            n_training_steps=0,
            is_logging_step=False,
        )
        acts = training_class(name, k=k).training_forward_pass(step_input).feature_acts
        assert acts.is_sparse is is_sparse
