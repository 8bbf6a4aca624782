"""An SAE that does not fit its stream is noticed, and the reason told apart, on the tiny model."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

import saexp
from saexp.errors import SAEError
from saexp.saes.loading import ASSETS

SHIPPED = ASSETS / "tiny/sae/layer_2/width_256"
FIXED = ["tracker=none", "intervention=none", "analyzer.n_bootstrap=0"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def notes(cache, tmp_path):
    def run(*words):
        cfg = saexp.compose([*FIXED, f"cache_dir={cache}", *words])
        result = saexp.run(cfg, tmp_path / "run")
        return [n for n in result.notes if "of the variance" in n], result.metrics

    return run


@pytest.fixture
def altered(tmp_path):
    """A copy of a shipped SAE that says it reads another stream, or lacks its input scaling."""

    def make(hook_name="blocks.2.hook_resid_post", factor=1.0):
        folder = tmp_path / "sae"
        shutil.copytree(SHIPPED, folder)
        cfg = json.loads((folder / "cfg.json").read_text("utf-8"))
        cfg["metadata"]["hook_name"] = hook_name
        (folder / "cfg.json").write_text(json.dumps(cfg), encoding="utf-8")
        weights = {n: w.float() for n, w in load_file(folder / "sae_weights.safetensors").items()}
        for name in ("b_enc", "b_dec", "threshold"):
            weights[name] = weights[name] * factor
        save_file(weights, folder / "sae_weights.safetensors")
        return ["sae=local", f"sae.path={folder}", f"layer={hook_name.split('.')[1]}"]

    return make


@pytest.mark.parametrize("layer", range(5))
def test_a_fitting_sae_gets_no_remark(notes, layer):
    told, metrics = notes(f"layer={layer}")
    assert told == []
    assert metrics["check/explained_variance"] > 0.8


def test_a_wrong_layer_names_the_one_it_fits(notes, altered):
    (told,), _ = notes(*altered("blocks.3.hook_resid_post"))
    assert "at layer_2.resid_post: it looks trained on that layer" in told


def test_a_wrong_stream_says_that_nothing_fits(notes, altered):
    (told,), _ = notes(*altered("blocks.2.hook_mlp_out"))
    assert "no more under any other reading" in told


def test_a_missing_scaling_is_named(notes, altered):
    (told,), _ = notes(*altered(factor=128**0.5 / 1000))
    assert "scaled to norm sqrt(d_in)" in told
    assert "norm_scaling_factor" in told


def test_special_tokens_let_in_are_named(notes):
    (told,), _ = notes("layer=2", "positions=all", "positions.include_special=true")
    assert "without special tokens" in told


def test_error_stops_the_run_and_off_does_not_look(notes, altered):
    words = altered("blocks.3.hook_resid_post")
    with pytest.raises(SAEError, match=r"sae\.check=warn goes on"):
        notes(*words, "sae.check=error")
    told, metrics = notes(*words, "sae.check=off")
    assert told == []
    assert "check/l0" not in metrics
