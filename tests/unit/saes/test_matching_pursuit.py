"""Matching pursuit: latents, training and options are those of sae-lens."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import saexp
from saexp.config import SAETrainerConfig
from saexp.errors import ConfigError
from saexp.models import Hookpoint
from saexp.saes import Pursuit
from saexp.saes.training import TrainingSource
from saexp.saes.training_architectures import training_sae
from saexp.saes.training_step import Trainer
from tests.unit.saes.lens_training import lens_trainer
from tests.unit.saes.make import D_IN, D_SAE, HOOK_NAME, parameters, points, sae, write_saelens

pytestmark = pytest.mark.filterwarnings("ignore")
STOPS: list[dict[str, Any]] = [
    {},
    {"residual_threshold": 3.0},
    {"max_iterations": 1},
    {"max_iterations": 4, "stop_on_duplicate_support": False, "residual_threshold": 0.0},
    {"max_iterations": 60, "stop_on_duplicate_support": False},
    {"residual_threshold": 0.0, "max_iterations": 5},
]


def training_class(**options: Any) -> Any:
    torch.manual_seed(1)
    cfg = SAETrainerConfig(name="matching_pursuit", options=options)
    source = TrainingSource("m", Hookpoint(3, "resid_post"), D_IN, 64)
    return training_sae(cfg, D_SAE, source, torch.device("cpu"), 100)


@pytest.mark.parametrize("subtract", [True, False], ids=["b_dec subtracted", "not subtracted"])
@pytest.mark.parametrize("stop", STOPS, ids=str)
def test_loaded_latents_and_reconstructions_are_those_of_sae_lens(
    lens: ModuleType, tmp_path: Path, stop: dict[str, Any], subtract: bool
) -> None:
    cfg = lens.MatchingPursuitSAEConfig(
        d_in=D_IN,
        d_sae=D_SAE,
        apply_b_dec_to_input=subtract,
        metadata=lens.saes.sae.SAEMetadata(hook_name=HOOK_NAME, model_name="gpt2"),
        **stop,
    )
    theirs = lens.MatchingPursuitSAE(cfg)
    weights = parameters("matching_pursuit")
    # Rows of norm other than 1, as in a training, so that products overshoot.
    weights["W_dec"] *= torch.linspace(0.9, 1.1, D_SAE)[:, None]
    theirs.load_state_dict({name: weights[name] for name in ("W_dec", "b_dec")})
    theirs.save_model(tmp_path)
    ours = saexp.load_sae(tmp_path)
    assert ours.architecture == "matching_pursuit"
    assert ours.settings.pursuit == Pursuit(**stop)
    # Some inputs are below the threshold, or have nothing in common with any row, from the start.
    x = torch.cat([points(7, 9, D_IN), weights["b_dec"].expand(1, 9, D_IN)])
    with torch.no_grad():
        acts = theirs.encode(x)
        assert len(set((acts != 0).sum(-1).flatten().tolist())) > 1 or stop.get("max_iterations")
        torch.testing.assert_close(ours.encode(x), acts, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.decode(acts), theirs.decode(acts))


def test_orthonormal_rows_give_their_products() -> None:
    """Independent of the order of selection: relu of x times each row."""
    rows = torch.linalg.qr(points(D_IN, D_IN))[0]
    one = sae("matching_pursuit")
    one.W_enc, one.W_dec, one.b_dec = rows.T.contiguous(), rows, torch.zeros(D_IN)
    x = points(20, D_IN)
    torch.testing.assert_close(one.encode(x), (x @ rows.T).relu(), rtol=1e-4, atol=2e-2)


@pytest.mark.parametrize("options", [{}, {"max_iterations": 4}, {"residual_threshold": 2.0}])
def test_it_is_trained_as_sae_lens_trains_its_own(
    lens: ModuleType, options: dict[str, Any]
) -> None:
    """Loss and gradients of the first step; losses and weights in 20 steps of Adam."""
    ours = training_class(**options)
    theirs = lens.MatchingPursuitTrainingSAE(
        lens.MatchingPursuitTrainingSAEConfig(
            d_in=D_IN, d_sae=D_SAE, decoder_init_norm=1.0, **options
        )
    )
    theirs.load_state_dict(ours.state_dict())
    batches = [b + 0.1 * i for i, b in enumerate(points(20, 16, D_IN))]
    theirs_trainer = lens_trainer(lens, theirs, len(batches), 16)
    trainer = Trainer(theirs_trainer.cfg, ours)
    step_input = lens.saes.sae.TrainStepInput
    outputs = [
        one.training_forward_pass(step_input(batches[0], {}, None, 0, is_logging_step=False))
        for one in (ours, theirs)
    ]
    for output in outputs:
        output.loss.backward()
    assert float(outputs[0].loss) == float(outputs[1].loss)
    for name, parameter in theirs.named_parameters():
        gradient = dict(ours.named_parameters())[name].grad
        assert gradient is not None and bool(gradient.any())
        assert torch.equal(gradient, parameter.grad)
        parameter.grad = dict(ours.named_parameters())[name].grad = None
    for number, batch in enumerate(batches, start=1):
        own, other = trainer.step(batch), theirs_trainer.step(batch)
        assert float(own.loss) == float(other.loss)
        trainer.n_training_steps = theirs_trainer.n_training_steps = number
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_iterations": 0}, "max_iterations=0 leaves no latent active; type e.g. 16"),
        ({"max_iterations": 1.5}, "max_iterations=1.5 is not a whole number"),
        ({"residual_threshold": -1}, "residual_threshold=-1 is negative; type 0 or more"),
        ({"decoder_init_norm": 0.1}, "decoder_init_norm of a matching_pursuit SAE is 1"),
        ({"k": 4}, "a matching_pursuit SAE has no such option"),
    ],
)
def test_unusable_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        training_class(**options)


def test_a_config_with_an_unusable_value(tmp_path: Path) -> None:
    weights = parameters("matching_pursuit")
    cfg = {"architecture": "matching_pursuit", "hook_name": HOOK_NAME, "max_iterations": 0}
    tensors = {name: weights[name] for name in ("W_dec", "b_dec")}
    write_saelens(tmp_path, {**cfg, "metadata": {}}, tensors)
    with pytest.raises(saexp.errors.SAEError, match="max_iterations"):
        saexp.load_sae(tmp_path)
