"""Training classes of transcoders: against sae-lens' own on x -> x, formulas, scaling, options."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import saexp
from saexp.config import SAETrainerConfig
from saexp.errors import ConfigError
from saexp.models import Hookpoint
from saexp.saes.training import TRANSCODERS, TrainingSource
from saexp.saes.training_architectures import training_sae
from tests.unit.saes.lens_training import lens_trainer
from tests.unit.saes.make import D_IN, D_OUT, D_SAE, points

CPU = torch.device("cpu")
OPTIONS: dict[str, dict[str, Any]] = {
    "standard_transcoder": {"l1_coefficient": 0.3},
    "batchtopk_transcoder": {"k": 4},
    "jumprelu_transcoder": {"jumprelu_init_threshold": 0.1, "pre_act_loss_coefficient": 0.01},
    "matryoshka_batchtopk_transcoder": {"k": 4, "matryoshka_widths": [10, 20, D_SAE]},
}
pytestmark = pytest.mark.filterwarnings("ignore")


def make_training_sae(name: str, d_in: int = D_IN, d_out: int = D_OUT, **options: Any) -> Any:
    torch.manual_seed(1)
    cfg = SAETrainerConfig(name=name, options={**OPTIONS.get(name, {}), **options})
    source = TrainingSource("m", Hookpoint(3, "mlp_in"), d_in, 64, Hookpoint(3, "mlp_out"), d_out)
    return training_sae(cfg, D_SAE, source, CPU, 100)


def noisy(model: Any) -> Any:
    """Every parameter away from where it begins, so that one that is left out shows."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator).abs()
    return model


def pairs(n: int) -> tuple[Tensor, Tensor]:
    x = points(n, D_IN)
    return x, torch.tanh(x[:, :D_OUT]) * 3 - x[:, -D_OUT:]


def step_input(lens: ModuleType, batch: Tensor, dead: Tensor | None = None) -> Any:
    return lens.saes.sae.TrainStepInput(
        sae_in=batch,
        coefficients={"l1": 0.3, "l0": 0.2},
        dead_neuron_mask=dead,
        n_training_steps=0,
        is_logging_step=False,
    )


def optimised(lens: ModuleType, model: Any, batches: list[Tensor]) -> list[float]:
    """sae-lens' trainer on these batches, latents dead after two steps; the losses."""
    trainer, losses = lens_trainer(lens, model, len(batches), len(batches[0])), []
    for number, batch in enumerate(batches, start=1):
        losses.append(float(trainer.step(batch).loss.detach()))
        trainer.n_training_steps = number
    assert bool(trainer.dead_neurons.any()), "the loss for dead latents took part"
    return losses


@pytest.mark.parametrize("name", TRANSCODERS)
def test_from_a_stream_to_itself_it_is_trained_as_sae_lens_trains_an_sae(
    lens: ModuleType, name: str
) -> None:
    """Each has the losses and, after 15 steps of Adam, the weights of sae-lens' class."""
    ours = make_training_sae(name, d_out=D_IN)
    cls, config = lens.registry.get_sae_training_class(name.removesuffix("_transcoder"))
    fields = {k: v for k, v in vars(ours.cfg).items() if k not in ("d_out", "skip")}
    theirs = cls(config(**fields))
    theirs.load_state_dict(ours.state_dict())
    batches = [b + 0.1 * i for i, b in enumerate(points(15, 16, D_IN))]
    expected = optimised(lens, theirs, batches)
    losses = optimised(lens, ours, [torch.cat([b, b], -1) for b in batches])
    assert losses == pytest.approx(expected, rel=1e-6)
    for parameter, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[parameter], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", TRANSCODERS)
def test_losses_and_gradients_are_of_the_target(lens: ModuleType, name: str, skip: bool) -> None:
    model, (x, y) = noisy(make_training_sae(name, skip=skip)), pairs(50)
    dead = torch.arange(D_SAE) >= D_SAE - 6
    output = model.training_forward_pass(step_input(lens, torch.cat([x, y], -1), dead))
    acts, linear = output.feature_acts, (x @ model.W_skip.T if skip else 0)
    norms = model.W_dec.norm(dim=-1) if "batchtopk" in name else 1
    pre = (x @ model.W_enc + model.b_enc) * norms
    torch.testing.assert_close(acts[acts > 0], pre[acts > 0])
    predicted = (acts / norms) @ model.W_dec + model.b_dec + linear
    torch.testing.assert_close(output.sae_out, predicted)
    torch.testing.assert_close(output.sae_in, y)
    error = (predicted - y).square().sum(-1).mean()
    torch.testing.assert_close(output.losses["mse_loss"], error)
    if "batchtopk" in name:
        best = pre[:, dead].topk(min(6, D_OUT // 2)).values.min(-1, keepdim=True).values
        auxiliary = torch.where(dead & (pre >= best), pre, 0.0) / norms
        left = (y - predicted).detach()
        spare = (auxiliary @ model.W_dec - left).square().sum(-1).mean()
        torch.testing.assert_close(output.losses["auxiliary_reconstruction_loss"], spare)
    output.losses["mse_loss"].backward()
    wanted = 2 * (predicted - y).detach() / len(x)
    torch.testing.assert_close(model.b_dec.grad, wanted.sum(0))
    if skip:
        torch.testing.assert_close(model.W_skip.grad, wanted.T @ x)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", TRANSCODERS)
def test_a_saved_transcoder_reads_and_predicts_unscaled_streams(
    lens: ModuleType, tmp_path: Path, name: str, skip: bool
) -> None:
    """Trained on 0.3 x and 7 y: sae-lens and saexp then predict y from x with the same latents."""
    model, (x, _) = noisy(make_training_sae(name, skip=skip)).eval(), pairs(400)
    pre = 0.3 * x @ model.W_enc + model.b_enc
    limit = torch.zeros(())
    if "batchtopk" in name:
        pre, limit = pre * model.W_dec.norm(dim=-1), torch.tensor(0.3)
        model.topk_threshold.fill_(0.3)
    if "jumprelu" in name:
        limit = model.threshold
    with torch.no_grad():
        acts = torch.where(pre > limit, pre, 0.0).relu()
        shares = acts / model.W_dec.norm(dim=-1) if "batchtopk" in name else acts
        out = shares @ model.W_dec + model.b_dec
        out = (out + (0.3 * x @ model.W_skip.T if skip else 0)) / 7
        # Saved, a unit of a BatchTopK latent is one of the scaled stream's; so is its direction.
        model.fold_scaling(0.3, 7.0)
        model.save_inference_model(tmp_path)
        theirs, ours = lens.SAE.load_from_disk(tmp_path), saexp.load_sae(tmp_path)
        assert type(theirs).__name__ == {
            ("standard_transcoder", False): "Transcoder",
            ("standard_transcoder", True): "SkipTranscoder",
        }.get((name, skip), "JumpReLUSkipTranscoder" if skip else "JumpReLUTranscoder")
        lens_acts = theirs.encode(x)
        torch.testing.assert_close(lens_acts > 0, acts > 0)
        torch.testing.assert_close(ours.encode(x), lens_acts)
        torch.testing.assert_close(theirs(x), out, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.decode(lens_acts, x), out, rtol=1e-4, atol=1e-4)
    assert 0.05 < float((acts > 0).float().mean()) < 0.95
    assert ours.hookpoints == [Hookpoint(3, "mlp_in"), Hookpoint(3, "mlp_out")]


def test_each_stream_has_a_factor_of_its_own_that_a_checkpoint_keeps(tmp_path: Path) -> None:
    from saexp.saes.training_architectures import PairScaler

    x, y = pairs(5)
    scaler = PairScaler(d_in=D_IN)
    batch = torch.cat([x, y], -1)
    assert torch.equal(scaler(batch), batch)
    scaler.scaling_factor, scaler.factor_out = 0.1, 1 / 3
    scaler.save(str(tmp_path / "scaler.json"))
    again = PairScaler(d_in=D_IN)
    again.load(tmp_path / "scaler.json")
    assert again == scaler
    torch.testing.assert_close(again(batch), torch.cat([x * 0.1, y / 3], -1))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "batchtopk_transcoder",
            {"d_out": 3},
            "d_out: follows from layer, task.streams, width",
        ),
        ("topk", {"dtype": "float16"}, "dtype: follows from layer, task.streams, width and"),
        ("batchtopk_transcoder", {"kk": 3}, "a batchtopk transcoder has no such option; did you"),
        ("batchtopk_transcoder", {"skip": "maybe"}, "skip=maybe is neither true nor false"),
        ("batchtopk_transcoder", {"k": "many"}, "options.k=many is not a number"),
        ("batchtopk_transcoder", {"k": 0}, "k=0 leaves no latent active; type a k such as 16"),
        ("topk", {"k": 2.5}, "options.k=2.5 is not a whole number"),
        ("topk", {}, "options.k=100 is above width=40"),
        ("standard", {"l1_coefficient": True}, "l1_coefficient=True is not a number"),
        (
            "standard_transcoder",
            {"apply_b_dec_to_input": True},
            "a transcoder's b_dec belongs to its output; leave it out",
        ),
        (
            "jumprelu",
            {"jumprelu_sparsity_loss_mode": "quadratic"},
            "sae_trainer.options of a jumprelu SAE: cfg.target_l0 must be set for quadratic",
        ),
        (
            "jumprelu",
            {"jumprelu_sparsity_loss_mode": "tan"},
            "jumprelu_sparsity_loss_mode=tan: did you mean tanh",
        ),
        ("topk_transcoder", {}, "sae-lens has no inference class for such a transcoder; choose"),
        ("batchtopk_transcode", {}, "did you mean batchtopk_transcoder"),
    ],
)
def test_options_that_do_not_fit(name: str, options: dict[str, Any], message: str) -> None:
    torch.manual_seed(0)
    source = TrainingSource("m", Hookpoint(3, "mlp_in"), D_IN, 64)
    if "transcode" in name:
        source = TrainingSource(
            "m", Hookpoint(3, "mlp_in"), D_IN, 64, Hookpoint(3, "mlp_out"), D_OUT
        )
    with pytest.raises(ConfigError, match=message) as caught:
        training_sae(SAETrainerConfig(name=name, options=options), D_SAE, source, CPU, 100)
    assert "\n" not in str(caught.value)
