"""Fingerprints follow the weights: not the place, not what lies beside them, not what is loaded."""

import hashlib
import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from saexp.config import ModelConfig
from saexp.errors import ModelError
from saexp.models.loading import LanguageModel
from tests.random_models import random_hf, save, tokenizer

SHARD = "60KB"


def fingerprint(folder, **options) -> str:
    return LanguageModel(ModelConfig(name=str(folder), device="cpu", **options)).fingerprint


@pytest.fixture()
def folder(tmp_path):
    save(random_hf("llama"), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture()
def sharded(tmp_path):
    random_hf("llama").save_pretrained(tmp_path / "sharded", max_shard_size=SHARD)
    tokenizer().save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    return tmp_path / "sharded"


def change_one_number(file: Path) -> None:
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[3] += 1
    save_file(tensors, file, {"format": "pt"})


def test_a_copy_has_the_same_and_reads_no_weights(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    model = LanguageModel(ModelConfig(name=str(tmp_path / "copy"), device="cpu"))
    assert model.fingerprint == fingerprint(folder)
    assert not model.loaded


@pytest.mark.parametrize("which", ["folder", "sharded"])
def test_one_changed_number_changes_it(which, request):
    model_folder = request.getfixturevalue(which)
    before = fingerprint(model_folder)
    change_one_number(sorted(model_folder.glob("*.safetensors"))[-1])
    assert fingerprint(model_folder) != before


def test_a_changed_config_changes_it(folder):
    before = fingerprint(folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rms_norm_eps": 1e-3}))
    assert fingerprint(folder) != before


def test_files_that_are_not_read_do_not_count(folder):
    before = fingerprint(folder)
    torch.save({}, folder / "training_args.bin")
    torch.save({}, folder / "pytorch_model.bin")
    save_file({"x": torch.zeros(1)}, folder / "consolidated.safetensors")
    (folder / "README.md").write_text("changed")
    assert fingerprint(folder) == before


def test_torch_weights_count_where_there_are_no_others(folder):
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    before = fingerprint(folder)
    tensors["model.norm.weight"][0] += 1
    torch.save(tensors, folder / "pytorch_model.bin")
    assert fingerprint(folder) != before


def test_a_lacking_shard_is_an_error(sharded):
    name = sorted(p.name for p in sharded.glob("model-*.safetensors"))[0]
    (sharded / name).unlink()
    with pytest.raises(ModelError, match=rf"its weights cannot be loaded \(no file named {name}\)"):
        fingerprint(sharded)


def to_hub_cache(folder: Path, hub: Path, *, skip: tuple[str, ...] = ()) -> Path:
    """The layout of a real cache: content-named blobs, a ref, and a snapshot of links."""
    repository = hub / "models--org--name"
    commit = "a" * 40
    snapshot = repository / "snapshots" / commit
    for subfolder in (repository / "blobs", repository / "refs", snapshot):
        subfolder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for file in folder.iterdir():
        blob = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, repository / "blobs" / blob)
        if file.name not in skip:
            (snapshot / file.name).symlink_to(f"../../blobs/{blob}")
    return snapshot


@pytest.fixture()
def hub(tmp_path, monkeypatch):
    hub_cache = tmp_path / "home" / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub_cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return hub_cache


@pytest.mark.parametrize("which", ["folder", "sharded"])
def test_a_hub_cache_has_that_of_the_files_in_it(which, request, hub):
    model_folder = request.getfixturevalue(which)
    to_hub_cache(model_folder, hub)
    model = LanguageModel(ModelConfig(name="org/name", device="cpu"))
    assert model.fingerprint == fingerprint(model_folder)
    assert not model.loaded
    ids = torch.tensor([[1, 5, 9]])
    assert torch.equal(model.hf(ids).logits, random_hf("llama")(ids).logits)
    assert fingerprint("org/name") == model.fingerprint


def test_a_hub_cache_is_identified_by_the_names_of_its_blobs(folder, hub):
    """Blobs are not read: tens of gigabytes would have to be."""
    snapshot = to_hub_cache(folder, hub)
    before = fingerprint("org/name")
    (snapshot / "model.safetensors").resolve().write_bytes(b"not read")
    assert fingerprint("org/name") == before
    other = snapshot.parent.parent / "blobs" / ("b" * 64)
    other.write_bytes(b"other weights")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{other.name}")
    assert fingerprint("org/name") != before


def test_a_hub_cache_that_lacks_the_weights_is_an_error(folder, hub):
    to_hub_cache(folder, hub, skip=("model.safetensors",))
    with pytest.raises(ModelError, match=r"^model.name=org/name: .* cannot be loaded \("):
        fingerprint("org/name")


def test_a_model_in_memory_is_identified_by_its_current_weights():
    one, other = (LanguageModel.wrap(random_hf("gpt2")) for _ in range(2))
    before = one.fingerprint
    assert other.fingerprint == before
    next(one.hf.parameters())[0, 0] += 1
    assert one.fingerprint != before
    assert LanguageModel.wrap(random_hf("gpt2", seed=1)).fingerprint != before


def test_the_tokenizer_has_one_of_its_own(folder):
    model, one = LanguageModel(ModelConfig(name=str(folder), device="cpu")), tokenizer()
    assert model.tokenizer_fingerprint == LanguageModel.wrap(model.hf, one).tokenizer_fingerprint
    more = type(one)(tokenizer_object=one._tokenizer, bos_token="<bos>", eos_token="<pad>")
    changed = LanguageModel.wrap(model.hf, more).tokenizer_fingerprint
    assert changed != model.tokenizer_fingerprint


@pytest.mark.parametrize("trusted", [True, False])
def test_a_repository_s_own_code_counts_where_it_may_run(folder, trusted):
    about = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "config_mine.Mine", "AutoModelForCausalLM": "other--model_mine.Mine"}
    (folder / "config.json").write_text(json.dumps({**about, "auto_map": auto_map}))

    def own() -> str:
        model = LanguageModel.__new__(LanguageModel)
        model.cfg = ModelConfig(name=str(folder), device="cpu", trust_remote_code=trusted)
        model.name = model.source = str(folder)
        model.in_memory = False
        model.config = transformers.LlamaConfig(auto_map=auto_map)
        return model.fingerprint

    before = own()
    (folder / "model_mine.py").write_text("class Mine: pass")
    assert (own() != before) == trusted
