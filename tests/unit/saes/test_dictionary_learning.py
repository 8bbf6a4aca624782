"""dictionary_learning folders: every class against its formula, and the library where installed."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import saexp
from saexp.config import SAEConfig
from saexp.errors import SAEError
from saexp.models import Hookpoint
from saexp.registry import build
from saexp.saes.catalogue import catalogue
from tests.unit.saes.make import D_IN, K, parameters, points, publish
from tests.unit.saes.make_formats import (
    CLASSES,
    THRESHOLD,
    assert_near,
    dictionary,
    double,
    jump,
    largest,
    write_dictionary,
)

AT = Hookpoint(3, "resid_post")
MODULES = {
    "AutoEncoderTopK": "trainers.top_k",
    "BatchTopKSAE": "trainers.batch_top_k",
    "MatryoshkaBatchTopKSAE": "trainers.matryoshka_batch_top_k",
}


def formula(kind: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """(activations, reconstruction) as the library computes them, in float64."""
    p = double(parameters(CLASSES[kind][0]))
    x = x.double()
    if kind == "AutoEncoder":
        norm = p["W_dec"].norm(dim=-1)
        acts = ((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]).clamp(min=0)
        return acts * norm, acts @ p["W_dec"] + p["b_dec"]
    if kind == "GatedAutoEncoder":
        inner = (x - p["b_dec"]) @ p["W_enc"]
        acts = (inner * p["r_mag"].exp() + p["b_mag"]).clamp(min=0)
        acts = torch.where(inner + p["b_gate"] > 0, acts, 0.0)
    elif kind in ("AutoEncoderNew", "JumpReluAutoEncoder"):
        acts = jump(x @ p["W_enc"] + p["b_enc"], p.get("threshold", torch.zeros(())))
    else:
        pre = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
        acts = largest(pre, K) if kind == "AutoEncoderTopK" else jump(pre, THRESHOLD)
    return acts, acts @ p["W_dec"] + p["b_dec"]


@pytest.mark.parametrize("kind", CLASSES)
def test_formula(tmp_path: Path, kind: str) -> None:
    sae = saexp.load_sae(write_dictionary(tmp_path, kind))
    x = points(30, D_IN)
    acts, reconstruction = formula(kind, x)
    assert 0.05 < (acts != 0).double().mean() < 0.95
    assert_near(sae.encode(x), acts)
    assert_near(sae.decode(sae.encode(x)), reconstruction)
    assert (sae.hookpoint, sae.is_transcoder) == (AT, False)
    assert sae.metadata["format"] == f"dictionary_learning {kind}"
    assert sae.metadata["model"] == "EleutherAI/pythia-70m-deduped"
    if kind == "AutoEncoder":
        torch.testing.assert_close(sae.directions([3, 4]).norm(dim=-1), torch.ones(2))


@pytest.mark.parametrize("kind", CLASSES)
def test_the_library(
    other: Callable[[str], ModuleType],
    tmp_path: Path,
    kind: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = other(f"dictionary_learning.{MODULES.get(kind, 'dictionary')}")
    write_dictionary(tmp_path, kind)
    options = {"k": K} if kind in MODULES else {}
    theirs = getattr(module, kind).from_pretrained(tmp_path / "ae.pt", **options)
    capsys.readouterr()
    ours, x = saexp.load_sae(tmp_path), points(30, D_IN)
    with torch.no_grad():
        assert_near(ours.encode(x), theirs.encode(x))
        assert_near(ours.decode(ours.encode(x)), theirs(x))


def test_an_untrained_threshold_keeps_all_positive(tmp_path: Path) -> None:
    """The library starts it at -1, and takes the ReLU first."""
    tensors = {**dictionary("BatchTopKSAE"), "threshold": torch.tensor(-1.0)}
    sae, x = (
        saexp.load_sae(write_dictionary(tmp_path, "BatchTopKSAE", tensors=tensors)),
        points(9, D_IN),
    )
    p = parameters("standard")
    torch.testing.assert_close(sae.encode(x), ((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]).relu())


def test_a_decoder_row_of_zeros_stays(tmp_path: Path) -> None:
    tensors = dictionary("AutoEncoder")
    tensors["decoder.weight"][:, 4] = 0
    sae = saexp.load_sae(write_dictionary(tmp_path, "AutoEncoder", tensors=tensors))
    assert sae.encode(points(3, D_IN)).isfinite().all()


@pytest.mark.parametrize(
    ("name", "folder", "stream", "expected"),
    [
        ("resid_post_layer_3", "x", None, "resid_post"),
        ("mlp_out_layer_3", "x", None, "mlp_out"),
        ("attention_out_layer_3", "x", None, "attn_out"),
        ("attn", "x", None, "attn_out"),
        ("resid_pre", "x", None, "resid_pre"),
        ("gpt_neox.layers.3.mlp", "x", None, "mlp_out"),
        (None, "resid_post_layer_3/trainer_0", None, "resid_post"),
        (None, "mlp_out_layer_3_checkpoints/trainer_0_step_9", None, "mlp_out"),
        (None, "x", "mlp_out", "mlp_out"),
        ("my block", "x", "resid_mid", "resid_mid"),
        ("resid_post_layer_3", "resid_post_layer_3/trainer_0", "resid_post", "resid_post"),
    ],
)
def test_where_it_belongs(
    tmp_path: Path, name: str | None, folder: str, stream: str | None, expected: str
) -> None:
    path = write_dictionary(tmp_path / folder, "BatchTopKSAE", submodule_name=name)
    assert saexp.load_sae(path, stream=stream).hookpoint == Hookpoint(3, expected)


@pytest.mark.parametrize(
    ("folder", "changed", "message"),
    [
        (
            "x",
            {"submodule_name": None},
            "neither its config nor its folder's name contains a stream; set sae.st",
        ),
        (
            "x",
            {"submodule_name": "gate"},
            "submodule_name 'gate', which is not a stream that saexp knows; set",
        ),
        (
            "x",
            {"layer": 4},
            "says layer=4, submodule_name=resid_post_layer_3, its folder .*/x; correct",
        ),
        (
            "mlp_out_layer_3/trainer_0",
            {},
            "submodule_name=resid_post_layer_3, its folder mlp_out_layer_3/trainer_0; correct",
        ),
        (
            "x",
            {"layer": None, "submodule_name": "attn"},
            "config.json: 'layer' is missing, so the hookpoint",
        ),
        (
            "x",
            {"dict_class": "CrossCoder"},
            "dict_class 'CrossCoder' is not supported; saexp reads A",
        ),
        ("x", {"k": 7}, "its config says k=7, its weights k=5"),
        ("x", {"buffer": {"io": "in"}}, "trained on io='in' of its module; saexp reads 'out'"),
        (
            "x",
            {"lm_name": "google/gemma-2-2b", "submodule_name": "mlp_out"},
            "the output of the module of layer_3.mlp_out, but google/gemma-2-2b applies a norm",
        ),
    ],
)
def test_configs_that_do_not_fit(
    tmp_path: Path, folder: str, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(SAEError, match=message) as caught:
        saexp.load_sae(write_dictionary(tmp_path / folder, "AutoEncoderTopK", **changed))
    assert "\n" not in str(caught.value)


def without(kind: str, name: str) -> dict[str, Tensor]:
    return {n: t for n, t in dictionary(kind).items() if n != name}


@pytest.mark.parametrize(
    ("kind", "tensors", "message"),
    [
        (
            "GatedAutoEncoder",
            without("GatedAutoEncoder", "r_mag"),
            "needs 'r_mag', which is missing",
        ),
        (
            "BatchTopKSAE",
            without("BatchTopKSAE", "threshold"),
            "needs 'threshold', which is missing",
        ),
        (
            "AutoEncoder",
            without("AutoEncoder", "bias"),
            "a AutoEncoder needs 'bias', which is missing",
        ),
        (
            "AutoEncoder",
            {**dictionary("AutoEncoder"), "bias": torch.ones(5)},
            r"b_dec has shape \[5\], not \[12\]",
        ),
        (
            "AutoEncoder",
            {**dictionary("AutoEncoder"), "encoder.bias": torch.ones(5)},
            r"b_enc has shape \[5\], not \[40\]",
        ),
        (
            "AutoEncoder",
            {**dictionary("AutoEncoder"), "more": torch.ones(1)},
            "its files hold 'more'",
        ),
        ("AutoEncoder", [1, 2], "ae.pt is not a plain file of tensors; it holds other objects too"),
        ("AutoEncoder", {"state": {}}, "ae.pt is not a plain file of tensors; it holds other obj"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, kind: str, tensors: Any, message: str) -> None:
    with pytest.raises(SAEError, match=message):
        saexp.load_sae(write_dictionary(tmp_path, kind, tensors=tensors))


class Boobytrap:
    """Writes a file when unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_no_pickle_runs_anything(tmp_path: Path) -> None:
    sound = write_dictionary(tmp_path / "sound", "AutoEncoder")
    assert saexp.load_sae(sound / "ae.pt").hookpoint == AT
    trapped = {**dictionary("AutoEncoder"), "x": Boobytrap(tmp_path / "sprung")}
    with pytest.raises(SAEError, match=r"ae.pt is not a plain file of tensors \(") as caught:
        saexp.load_sae(write_dictionary(tmp_path / "bad", "AutoEncoder", tensors=trapped))
    assert not (tmp_path / "sprung").exists()
    assert "\n" not in str(caught.value)
    (sound / "ae.pt").rename(sound / "sae.pt")
    with pytest.raises(SAEError, match=r"holds only a pickle file \(sae.pt\), which can run code"):
        saexp.load_sae(sound)


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04 cut off", b"\x80\x02cut"])
def test_damaged(tmp_path: Path, content: bytes) -> None:
    (write_dictionary(tmp_path, "AutoEncoder") / "ae.pt").write_bytes(content)
    with pytest.raises(SAEError, match=r"ae.pt is not a plain file of tensors \("):
        saexp.load_sae(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(
        SAEError, match="config.json has no 'trainer', which gives the class of the SAE"
    ):
        saexp.load_sae(tmp_path)


def test_release(tmp_path: Path, hub_cache: Path) -> None:
    """Without a submodule_name, as on the hub: the folder says the stream."""
    name, sae_id = (
        "sae_bench_pythia70m_sweep_standard_ctx128_0712",
        "blocks.3.hook_resid_post__trainer_10",
    )
    [record] = [s for s in catalogue()[name]["saes"] if s["id"] == sae_id]
    repo = catalogue()[name]["repo_id"]
    write_dictionary(tmp_path / "made" / record["path"], "AutoEncoder", submodule_name=None)
    publish(hub_cache, repo, tmp_path / "made")
    sae = build("sae", SAEConfig(name="d", loader="release", release=name, id=sae_id))
    by_path, x = saexp.load_sae(f"{repo}/{record['path']}"), points(9, D_IN)
    assert sae.hookpoint == by_path.hookpoint == AT
    assert_near(sae.encode(x), formula("AutoEncoder", x)[0])
    assert torch.equal(by_path.encode(x), sae.encode(x))
    assert sae.metadata["neuronpedia_id"] == record["neuronpedia"]
    assert sae.metadata["fingerprint"] == Path(sae.metadata["path"]).resolve().name
