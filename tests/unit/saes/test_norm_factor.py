"""The factor that inputs are scaled by: given by the user, estimated, or asked for in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import saexp
from saexp.config import SAEConfig
from saexp.errors import ConfigError, SAEError
from saexp.registry import build
from saexp.saes.loading import ASSETS, estimate_factor
from tests.unit.saes.make import D_IN, HOOK_NAME, parameters, points, sae, write_saelens

CFG = {"architecture": "standard", "metadata": {"hook_name": HOOK_NAME}}
FIXED = {"normalize_activations": "expected_average_only_in"}
SHIPPED = ASSETS / "tiny/sae/layer_2/width_256"


def folder(place: Path, **changed: Any) -> Path:
    return write_saelens(place, {**CFG, **changed}, parameters("standard"))


def loaded(place: Path, factor: Any = None) -> Any:
    return build("sae", SAEConfig(name="s", loader="path", path=str(place), norm_factor=factor))


def test_a_missing_factor_is_one_line(tmp_path: Path) -> None:
    place = folder(tmp_path, **FIXED)
    for load in (loaded, saexp.load_sae):
        with pytest.raises(SAEError) as caught:
            load(place)
        assert str(caught.value).endswith(
            ": its inputs are scaled by a factor that its files do not give; type sae.norm_factor="
            "<number>, or sae.norm_factor=estimate to derive it from the activations"
        )
    made, x = sae("standard", **FIXED), points(3, D_IN)
    for use in (lambda: made.encode(x), lambda: made.decode(torch.ones(3, made.d_sae))):
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
    made, x = loaded(folder(tmp_path, **FIXED), "estimate"), points(50, D_IN)
    assert made.lacks_factor
    factor = estimate_factor(made, [x[:20], x[20:]])
    assert factor == pytest.approx(float(D_IN**0.5 / x.norm(dim=-1).mean()))
    scaled = made.with_factor(factor)
    assert scaled.settings.norm_factor == factor == scaled.metadata["norm_factor"]
    assert made.lacks_factor and "norm_factor" not in made.metadata
    assert scaled.W_dec is made.W_dec
    with pytest.raises(AttributeError):
        made.hookpoint = made.hookpoint
    with pytest.raises(SAEError, match="not a positive number"):
        made.with_factor(0.0)
    assert float((x * factor).norm(dim=-1).mean()) == pytest.approx(D_IN**0.5)
    with pytest.raises(SAEError, match="every activation is zero"):
        estimate_factor(made, [torch.zeros(3, D_IN)])


@pytest.mark.filterwarnings("ignore")
def test_it_is_estimated_as_sae_lens_does(tmp_path: Path) -> None:
    from sae_lens.training.activation_scaler import ActivationScaler

    scaler, x = ActivationScaler(), points(50, D_IN)
    scaler.estimate_scaling_factor(D_IN, iter([x]), n_batches_for_norm_estimate=1)
    made = loaded(folder(tmp_path, **FIXED), "estimate")
    assert scaler.scaling_factor == pytest.approx(estimate_factor(made, [x]))


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


def test_a_run_estimates_it_and_says_so(tmp_path: Path) -> None:
    """The shipped SAE in units of sqrt(d_in), as if its scaling had been left out of its files."""
    weights = {n: w.float() for n, w in load_file(SHIPPED / "sae_weights.safetensors").items()}
    cfg = json.loads((SHIPPED / "cfg.json").read_text("utf-8"))
    words = ["tracker=none", "intervention=none", "analyzer.n_bootstrap=0", "layer=2"]
    words.append(f"cache_dir={tmp_path}/cache")
    shipped = saexp.run(saexp.compose(words), tmp_path / "shipped")
    wanted = shipped.metrics["reconstruction/explained_variance"]
    # With another factor than the true one it would be an SAE of another stream.
    factor = 128**0.5 / norm_of_neutral_text(tmp_path)
    for name in ("b_enc", "b_dec", "threshold"):
        weights[name] = weights[name] * factor
    place = write_saelens(tmp_path / "sae", {**cfg, **FIXED}, weights)
    more = ["sae=local", f"sae.path={place}", "sae.norm_factor=estimate"]
    result = saexp.run(saexp.compose([*words, *more]), tmp_path / "run")
    assert result.metrics["reconstruction/explained_variance"] == pytest.approx(wanted, abs=1e-3)
    (note,) = [n for n in result.notes if "norm_factor" in n]
    assert note.startswith(f"sae.norm_factor={factor:.6g} was estimated from ")
    about = json.loads((tmp_path / "run/provenance.json").read_text("utf-8"))
    assert about["sae"]["norm_factor"] == pytest.approx(factor)
    assert about["sae"]["norm_factor_by"] == "estimate"


def norm_of_neutral_text(folder: Path) -> float:
    stores = [saexp.open_store(p.parent) for p in folder.glob("cache/activations/*/manifest.json")]
    (neutral,) = [s for s in stores if s.manifest["about"]["dataset"] == "background"]
    return float(neutral.acts(2).double().norm(dim=-1).mean())
