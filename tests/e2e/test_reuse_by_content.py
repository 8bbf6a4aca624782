"""A finished run is reused where all that it reads holds the same content, and not otherwise."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import saexp
from saexp.config import RunConfig
from saexp.context import ObjectCache
from saexp.pipeline import finished
from tests.random_models import random_hf, saved_lm
from tests.shipped_texts import FEW_NEUTRAL
from tests.unit.reports.run_outputs import command

ASSETS = Path(saexp.__file__).parent / "assets"
SMALL = ["tracker=none", "intervention=none", "dataset.n_examples=20", "analyzer.n_bootstrap=0"]
SMALL += ["analyzer.n_background=200", FEW_NEUTRAL, "sae.check=off", "analyzer.scores=false"]


def change(file: Path) -> None:
    """Other weights of the same size, under the same name."""
    tensors = {n: t.clone() for n, t in load_file(file).items()}
    name = min(n for n, t in tensors.items() if t.is_floating_point())
    tensors[name].view(-1)[0] += 1
    save_file(tensors, file, {"format": "pt"})


@pytest.fixture
def saes(tmp_path: Path) -> Path:
    """Folders mysae1, mysae2 and mysae3."""
    for layer in (1, 2, 3):
        sae_folder = ASSETS / "tiny" / "sae" / f"layer_{layer}" / "width_256"
        shutil.copytree(sae_folder, tmp_path / f"mysae{layer}")
    return tmp_path


def reused(folder: Path, sweep: str, *words: str) -> list[bool]:
    """Of a sweep's cells, in their order."""
    result = command(folder, "-m", *words, *SMALL, f"hydra.sweep.dir={sweep}")
    assert result.code == 0, result.err[-2000:]
    cells = sorted((folder / sweep).glob("[0-9]*_*/provenance.json"))
    return ["reused_from" in json.loads(cell.read_text("utf-8")) for cell in cells]


def test_the_cell_whose_sae_was_replaced_is_run_again_and_the_others_are_reused(saes: Path) -> None:
    words = ["layer=1,2", "sae=local", "sae.path='mysae{layer}'", "width=null"]
    assert reused(saes, "first", *words) == [False, False]
    change(saes / "mysae2" / "sae_weights.safetensors")
    assert reused(saes, "second", *words) == [True, False]


def local(saes: Path, *words: str) -> RunConfig:
    return saexp.compose(
        ["sae=local", f"sae.path='{saes}/mysae{{layer}}'", "width=null", "layer=1"]
        + [f"dataset.path={saes}/data.jsonl", f"dataset.background={saes}/background.txt", *words]
    )


def write(file: Path, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(text, encoding="utf-8") and None


def touch(folder: Path) -> None:
    """A copy of everything in place: other times, the same content."""
    for file in [f for f in folder.rglob("*") if f.is_file()]:
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content)


CHANGES = [
    ("weights of the SAE", lambda f: change(f / "mysae1" / "sae_weights.safetensors"), True),
    ("config of the SAE", lambda f: _config(f / "mysae1" / "cfg.json"), True),
    (
        "weights of another layer's SAE",
        lambda f: change(f / "mysae2/sae_weights.safetensors"),
        False,
    ),
    ("data of the same size", write(Path("data.jsonl"), '{"text": "b"}\n'), True),
    ("neutral text of the same size", write(Path("background.txt"), "An other one.\n"), True),
    ("a file that nothing names", write(Path("notes.txt"), "x"), False),
    ("times of all files", touch, False),
]


def _config(file: Path) -> None:
    about = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**about, "apply_b_dec_to_input": False}), encoding="utf-8")


@pytest.mark.parametrize(("what", "do", "matters"), CHANGES, ids=[c[0] for c in CHANGES])
def test_only_content_that_is_read_matters(
    saes: Path, what: str, do: Callable[[Path], None], matters: bool
) -> None:
    (saes / "data.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    (saes / "background.txt").write_text("An early one.\n", encoding="utf-8")
    before = finished.fingerprint(local(saes))
    assert before == finished.fingerprint(local(saes))
    do(saes)
    after = finished.fingerprint(local(saes))
    assert (after != before) == matters, what


def test_an_sae_out_of_reach_is_no_content(saes: Path) -> None:
    assert finished.fingerprint(local(saes)) is not None
    shutil.rmtree(saes / "mysae1")
    assert finished.fingerprint(local(saes)) is None
    assert finished.fingerprint(local(saes, "task=label")) is not None
    # Of a plugin's task it is not known whether it reads the SAE.
    assert finished.fingerprint(local(saes, "task.name=mine")) is None
    assert finished.find_finished(local(saes), None) is None


SETTINGS = [
    ("layer=2", True),
    ("seed=1", True),
    ("model.chat=true", True),
    ("analyzer.alpha=0.01", True),
    ("cache_dir=elsewhere", False),
    ("tracker=none", False),
    ("verify=true", False),
]


@pytest.mark.parametrize(("word", "matters"), SETTINGS)
def test_settings_matter_where_they_change_a_result(word: str, matters: bool) -> None:
    before, after = (finished.fingerprint(saexp.compose(w)) for w in (["layer=1"], [word]))
    if not word.startswith("layer"):
        after = finished.fingerprint(saexp.compose(["layer=1", word]))
    assert (before != after) == matters


def test_saes_of_all_layers_changed_matter(saes: Path) -> None:
    words = ["intervention.latents={1:[3],2:[4]}"]
    before = finished.fingerprint(local(saes, *words))
    change(saes / "mysae2" / "sae_weights.safetensors")
    changed = finished.fingerprint(local(saes, *words))
    assert None not in (before, changed)
    assert before != changed
    change(saes / "mysae3" / "sae_weights.safetensors")
    assert finished.fingerprint(local(saes, *words)) == changed


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    hub_cache = tmp_path / "home" / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub_cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return hub_cache


def commit(hub: Path, folder: Path, name: str) -> None:
    """A folder's files as a snapshot of org/name, to which main then points."""
    from saexp.digests import read_sha256

    repository = hub / "models--org--name"
    for subfolder in ("blobs", "refs", f"snapshots/{name * 40}"):
        (repository / subfolder).mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        digest = read_sha256(file)
        shutil.copy(file, repository / "blobs" / digest)
        (repository / "snapshots" / (name * 40) / file.name).symlink_to(f"../../blobs/{digest}")
    (repository / "refs" / "main").write_text(name * 40)


def test_a_hub_model_whose_main_moved_is_run_again(hub: Path, tmp_path: Path) -> None:
    words = ["model=hf", "model.name=org/name", "sae=random", "layer=1", *SMALL]
    words += ["dataset=text", "dataset.text=abcdefghi", "positions=all", "analyzer=stats"]
    words += ["dataset.max_length=60", "resume=true", f"cache_dir={tmp_path}/cache"]

    def tokens(folder: str) -> float:
        result = saexp.run(saexp.compose(words), tmp_path / folder)
        about = json.loads((tmp_path / folder / "provenance.json").read_text("utf-8"))
        assert ("reused_from" in about) == (result.metrics["collection/tokens_forwarded"] == 0)
        return result.metrics["collection/tokens_forwarded"] or 0

    assert finished.fingerprint(saexp.compose(words)) is None
    saved_lm("llama", tmp_path / "old")
    commit(hub, tmp_path / "old", "a")
    assert tokens("1") > 0
    assert tokens("2") == 0
    saved_lm("llama", tmp_path / "new")
    hf = random_hf("llama", seed=5)
    hf.save_pretrained(tmp_path / "new")
    commit(hub, tmp_path / "new", "b")
    assert tokens("3") > 0
    assert tokens("4") == 0
    (hub / "models--org--name" / "refs" / "main").write_text("a" * 40)
    assert tokens("5") == 0
    about = json.loads((tmp_path / "5" / "provenance.json").read_text("utf-8"))
    assert about["reused_from"] == str(tmp_path / "1")


def test_an_sae_replaced_between_two_runs_of_one_process_is_loaded_again(saes: Path) -> None:
    objects = ObjectCache()

    def bias() -> float:
        from saexp.pipeline.objects import language_model, sparse_autoencoder

        cfg = saexp.compose(["sae=local", f"sae.path={saes}/mysae1", "layer=1", "width=null"])
        model = language_model(cfg, objects)
        return float(sparse_autoencoder(cfg, model, objects).b_enc[0])

    before = bias()
    file = saes / "mysae1" / "sae_weights.safetensors"
    tensors = {n: t.clone() for n, t in load_file(file).items()}
    tensors["b_enc"][0] += 1
    save_file(tensors, file)
    assert bias() == pytest.approx(before + 1)
    assert torch.isfinite(tensors["b_enc"]).all()


def test_runs_that_differ_in_their_seed_share_an_sae_unless_it_is_random() -> None:
    from saexp.pipeline.objects import language_model, sparse_autoencoder

    objects = ObjectCache()
    configs = {
        (sae, seed): saexp.compose([f"sae={sae}", "layer=1", f"seed={seed}"])
        for sae in ("tiny", "random")
        for seed in (1, 2)
    }
    model = language_model(configs["tiny", 1], objects)
    saes = {key: sparse_autoencoder(cfg, model, objects) for key, cfg in configs.items()}
    assert saes["tiny", 1] is saes["tiny", 2]
    assert not torch.equal(saes["random", 1].W_dec, saes["random", 2].W_dec)


def test_hookpoints_of_a_replaced_file_are_read_again(saes: Path) -> None:
    from saexp.saes.loading import hookpoints_of

    assert hookpoints_of(str(saes / "mysae1"), None, None) == [(1, "resid_post")]
    shutil.rmtree(saes / "mysae1")
    shutil.copytree(saes / "mysae3", saes / "mysae1")
    assert hookpoints_of(str(saes / "mysae1"), None, None) == [(3, "resid_post")]
