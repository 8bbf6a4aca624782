"""Damaged and hostile files through the command line: exit code 1, one line, and no code is run."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from saexp.models.resolution import ASSETS
from tests.e2e.faults.injection import command, one_line

WORDS = ("dataset.n_examples=6", "tracker=none", "hydra.run.dir=run", "intervention=none")
SAE = ("sae=local", "sae.path=sae", "layer=2")


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.fixture()
def sae(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ASSETS / "tiny/sae/layer_2/width_256", tmp_path / "sae"))


@pytest.fixture()
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ASSETS / "tiny/model", tmp_path / "model"))


def line(cwd: Path, *words: str) -> str:
    return one_line(command([*WORDS, *words], cwd))


def test_sae_weights_with_nan(sae: Path, tmp_path: Path) -> None:
    file = sae / "sae_weights.safetensors"
    tensors = load_file(file)
    tensors["W_enc"][3, :5] = torch.nan
    save_file(tensors, file)
    expected = "sae/sae_weights.safetensors: W_enc holds 5 NaN of 32,768 values"
    assert line(tmp_path, *SAE) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_in": -1}, "sae/cfg.json: d_in is -1, not a positive integer"),
        (
            {"apply_b_dec_to_input": "no"},
            'sae/cfg.json: apply_b_dec_to_input is "no", not true or false',
        ),
    ],
)
def test_sae_settings(sae: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    cfg = json.loads((sae / "cfg.json").read_text())
    (sae / "cfg.json").write_text(json.dumps({**cfg, **changes}))
    assert line(tmp_path, *SAE) == message


def test_hostile_pickles_are_not_run(model: Path, tmp_path: Path) -> None:
    proof = tmp_path / "it ran"
    (tmp_path / "trainer").mkdir()
    torch.save({"bias": Hostile(proof)}, tmp_path / "trainer/ae.pt")
    about = {"dict_class": "AutoEncoder", "layer": 2, "submodule_name": "resid_post_layer_2"}
    (tmp_path / "trainer/config.json").write_text(json.dumps({"trainer": about}))
    message = line(tmp_path, "sae=local", "sae.path=trainer", "layer=2")
    assert message.startswith("trainer/ae.pt is not a plain file of tensors (")
    file = tmp_path / "layer_2/params.npz"
    file.parent.mkdir()
    np.savez(file, W_enc=np.array([Hostile(proof)], dtype=object))
    npz = ("sae=local", "sae.path=layer_2/params.npz", "layer=2", "sae.stream=resid_post")
    assert "is not an npz file of plain arrays (" in line(tmp_path, *npz)
    (model / "model.safetensors").unlink()
    torch.save({"x": Hostile(proof)}, model / "pytorch_model.bin")
    message = line(tmp_path, "model=hf", "model.name=model", "sae=random", "layer=2")
    assert "its weights cannot be loaded (a pickle that is damaged or holds more than" in message
    assert not proof.exists()


def test_a_faulty_chat_template(model: Path, tmp_path: Path) -> None:
    file = model / "tokenizer_config.json"
    about = json.loads(file.read_text())
    words = ("model=hf", "model.name=model", "model.chat=true", "layer=2", "sae=random")
    for template, message in (
        ("{{ raise_exception('no') }}", "its chat template fails (TemplateError: no)"),
        ("Hello", "its chat template leaves out the user's message"),
    ):
        file.write_text(json.dumps({**about, "chat_template": template}))
        assert line(tmp_path, *words) == f"model: {message}; set model.chat=false"


def test_a_damaged_manifest_is_made_anew_and_nothing_is_collected_again(tmp_path: Path) -> None:
    words = [*WORDS, "task=collect", "layer=2", "cache_dir=cache"]
    first = command(words, tmp_path)
    assert first.code == 0, first.err
    (manifest,) = tmp_path.glob("cache/activations/*/manifest.json")
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[:100])
    listed = command(["task=cache", "cache_dir=cache", "hydra.run.dir=listed"], tmp_path)
    assert listed.code == 0
    assert f"{manifest.parent.name}: missing or damaged manifest.json" in listed.out
    again = command(words, tmp_path)
    assert again.code == 0
    assert "0 tokens forwarded" in again.out
    assert "is rebuilt from the shards: 1 shard kept, 0 collected again where needed" in again.err
    assert manifest.read_bytes() == whole
