"""The factor that inputs are scaled by: given by the user, estimated, or asked for in one line."""

from pathlib import Path
from typing import Any

import pytest
import torch

import saexp
from saexp.config import SAEConfig
from saexp.errors import ConfigError, SAEError
from saexp.registry import build
from saexp.saes.loading import estimate_factor
from tests.unit.saes.make import D_IN, HOOK_NAME, parameters, points, sae, write_saelens

CFG = {"architecture": "standard", "metadata": {"hook_name": HOOK_NAME}}
FIXED = {"normalize_activations": "expected_average_only_in"}


def folder(path: Path, **changed: Any) -> Path:
    return write_saelens(path, {**CFG, **changed}, parameters("standard"))


def loaded(path: Path, factor: Any = None) -> Any:
    return build("sae", SAEConfig(name="s", loader="path", path=str(path), norm_factor=factor))


def test_a_missing_factor_is_one_line(tmp_path: Path) -> None:
    path = folder(tmp_path, **FIXED)
    for load in (loaded, saexp.load_sae):
        with pytest.raises(SAEError) as caught:
            load(path)
        assert str(caught.value).endswith(
            ": its inputs are scaled by a factor that its files do not give; type sae.norm_factor="
            "<number>, or sae.norm_factor=estimate to derive it from the activations"
        )
    autoencoder, x = sae("standard", **FIXED), points(3, D_IN)
    for use in (
        lambda: autoencoder.encode(x),
        lambda: autoencoder.decode(torch.ones(3, autoencoder.d_sae)),
    ):
        with pytest.raises(SAEError, match="type sae.norm_factor=<number> .with task=analyze"):
            use()


@pytest.mark.parametrize("says_so", [True, False], ids=["files say it is scaled", "do not say"])
def test_a_factor_given_by_the_user_is_as_one_in_the_files(tmp_path: Path, says_so: bool) -> None:
    ours = loaded(folder(tmp_path / "a", **(FIXED if says_so else {})), 0.37)
    same = loaded(folder(tmp_path / "b", **FIXED, norm_scaling_factor=0.37))
    x = points(7, D_IN)
    assert torch.equal(ours.encode(x), same.encode(x))
    assert torch.equal(ours.decode(ours.encode(x)), same.decode(same.encode(x)))
    assert ours.metadata["norm_factor_by"] == "sae.norm_factor"


def test_it_is_estimated_to_norm_sqrt_d_in(tmp_path: Path) -> None:
    autoencoder, x = loaded(folder(tmp_path, **FIXED), "estimate"), points(50, D_IN)
    assert autoencoder.lacks_factor
    factor = estimate_factor(autoencoder, [x[:20], x[20:]])
    assert factor == pytest.approx(float(D_IN**0.5 / x.norm(dim=-1).mean()))
    scaled = autoencoder.with_factor(factor)
    assert scaled.settings.norm_factor == factor == scaled.metadata["norm_factor"]
    assert autoencoder.lacks_factor and "norm_factor" not in autoencoder.metadata
    assert scaled.W_dec is autoencoder.W_dec
    with pytest.raises(AttributeError):
        autoencoder.hookpoint = autoencoder.hookpoint
    with pytest.raises(SAEError, match="not a positive number"):
        autoencoder.with_factor(0.0)
    assert float((x * factor).norm(dim=-1).mean()) == pytest.approx(D_IN**0.5)
    with pytest.raises(SAEError, match="every activation is zero"):
        estimate_factor(autoencoder, [torch.zeros(3, D_IN)])


@pytest.mark.filterwarnings("ignore")
def test_it_is_estimated_as_sae_lens_does(tmp_path: Path) -> None:
    from sae_lens.training.activation_scaler import ActivationScaler

    scaler, x = ActivationScaler(), points(50, D_IN)
    scaler.estimate_scaling_factor(D_IN, iter([x]), n_batches_for_norm_estimate=1)
    autoencoder = loaded(folder(tmp_path, **FIXED), "estimate")
    assert scaler.scaling_factor == pytest.approx(estimate_factor(autoencoder, [x]))


@pytest.mark.parametrize(
    ("changed", "factor", "message"),
    [
        ({**FIXED, "norm_scaling_factor": 0.5}, 0.4, "say 0.5; leave it out"),
        ({**FIXED, "norm_scaling_factor": 0.5}, "estimate", "say 0.5; leave it out"),
        ({"normalize_activations": "layer_norm"}, 0.4, "are not scaled by one factor; leave it"),
    ],
)
def test_contradictions(tmp_path: Path, changed: Any, factor: Any, message: str) -> None:
    with pytest.raises(SAEError, match=message):
        loaded(folder(tmp_path, **changed), factor)


@pytest.mark.parametrize("factor", ["guess", 0, -1.0, True])
def test_no_factor(factor: Any) -> None:
    with pytest.raises(ConfigError, match="type a number above 0, or estimate"):
        SAEConfig(name="s", loader="path", norm_factor=factor)
