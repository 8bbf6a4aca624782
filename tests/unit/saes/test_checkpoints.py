"""Checkpoints: whatever happened to them, a training ends with the same weights."""

import io
import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saexp.config import SAETrainerConfig
from saexp.digests import read_sha256
from saexp.models import Hookpoint
from saexp.saes.training import CHECKSUMS, Training, TrainingSource
from tests.train_alone import train_alone

D_IN, D_SAE, BATCH = 8, 32, 16
SOURCE = TrainingSource("random", Hookpoint(0, "resid_post"), D_IN, 16)
OPTIONS: dict[str, dict[str, Any]] = {
    "batchtopk": {"k": 4},
    "standard": {"l1_coefficient": 0.1},
    "jumprelu": {},
}


def reader(step: int) -> Iterator[Tensor]:
    while True:
        yield torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(step))
        step += 1


def training(folder: Path, name: str = "batchtopk", **changed: Any) -> Training:
    options = {"n_samples": 9 * BATCH, "checkpoint_every": 3, "log_every": 2, **changed}
    cfg = SAETrainerConfig(name=name, options=OPTIONS[name], batch_size=BATCH, **options)
    return Training(cfg, D_SAE, SOURCE, folder, torch.device("cpu"))


def restarted(folder: Path, name: str = "batchtopk") -> Training:
    """The same training, which writes few checkpoints, so that the tests are quick."""
    return training(folder, name, checkpoint_every=1000)


def finish(one: Training) -> dict[str, Tensor]:
    for _ in train_alone(one, reader):
        pass
    return {k: v.clone() for k, v in one.sae.state_dict().items()}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any, Any]]:
    """Name -> (folder as a kill at step 8 leaves it, the undisturbed weights and records)."""
    known: dict[str, tuple[Path, Any, Any]] = {}

    def of(name: str) -> tuple[Path, Any, Any]:
        if name not in known:
            folder = tmp_path_factory.mktemp(name) / "key"
            for record in train_alone(training(folder, name), reader):
                if record["train/step"] == 8:
                    break
            whole = training(tmp_path_factory.mktemp(name) / "key", name)
            known[name] = folder, finish(whole), whole.records
        return known[name]

    return of


def rewritten(folder: Path, file: str, change: Callable[[Path], None]) -> None:
    """Change a file of a checkpoint and its checksum with it, as only an intruder would."""
    change(folder / file)
    about = {"bytes": (folder / file).stat().st_size, "sha256": read_sha256(folder / file)}
    sums = json.loads((folder / CHECKSUMS).read_text())
    (folder / CHECKSUMS).write_text(json.dumps({**sums, file: about}))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def with_state(**changed: Any) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))

    return change


def with_trainer_state(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda file: torch.save(change(torch.load(file, weights_only=True)), file)


class Payload:
    def __reduce__(self) -> Any:
        return os.mkdir, ("payload-ran",)


def hostile(file: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"optimizer": Payload()}, buffer)
    file.write_bytes(buffer.getvalue())


def folder_instead(file: Path) -> None:
    file.unlink()
    file.mkdir()


FILES = ("weights.safetensors", "trainer_state.pt", "state.json", "activation_scaler.json")
DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped": flip,
    "truncated": lambda f: os.truncate(f, f.stat().st_size // 2),
    "empty": lambda f: os.truncate(f, 0),
    "missing": Path.unlink,
    "garbage": lambda f: f.write_bytes(b"\xff\x00garbage"),
    "a folder": folder_instead,
}


def assert_same(one: Training, weights: dict[str, Tensor], records: Any) -> None:
    again = finish(one)
    assert {k: True for k in again} == {k: torch.equal(v, weights[k]) for k, v in again.items()}
    assert one.records == records


@pytest.mark.parametrize(
    ("name", "n_damaged"), [("batchtopk", 0), ("standard", 1), ("jumprelu", 1), ("batchtopk", 2)]
)
def test_it_goes_on_from_the_newest_intact_checkpoint(stopped, tmp_path, caplog, name, n_damaged):
    folder, weights, records = stopped(name)
    shutil.copytree(folder, tmp_path / "key")
    steps = sorted((tmp_path / "key").glob("step_*"), reverse=True)
    assert [p.name for p in steps] == ["step_000000006", "step_000000003"], "two are kept"
    for path in steps[:n_damaged]:
        flip(path / "weights.safetensors")
    with caplog.at_level(logging.INFO):
        assert_same(training(tmp_path / "key", name), weights, records)
    then = ("", "continuing from step 3", "starting from the beginning")[n_damaged]
    assert [m for m in caplog.messages if "damaged" in m] == [
        f"checkpoint {p} is damaged (weights.safetensors was changed since it was written); {then}"
        for p in steps[:n_damaged]
    ]
    left = sorted(p.name for p in (tmp_path / "key").iterdir())
    assert left == ["step_000000006", "step_000000009"]


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *((file, damage) for file in (*FILES, CHECKSUMS) for damage in ("flipped", "missing")),
        *zip(FILES, ("truncated", "garbage", "a folder", "empty"), strict=True),
        (CHECKSUMS, "garbage"),
    ],
)
def test_any_damage_is_one_warning_and_the_same_weights(stopped, tmp_path, caplog, file, damage):
    folder, weights, records = stopped("batchtopk")
    shutil.copytree(folder, tmp_path / "key")
    DAMAGES[damage](tmp_path / "key" / "step_000000006" / file)
    assert_same(restarted(tmp_path / "key"), weights, records)
    (warning,) = (r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)
    assert f"step_000000006 is damaged ({file}" in warning or damage == "flipped"
    assert warning.endswith("; continuing from step 3")


FORGED: dict[str, tuple[str, Callable[[Path], None]]] = {
    "state: step": ("state.json", with_state(step=-1)),
    "state: text as step": ("state.json", with_state(step="6")),
    "state: step of another": ("state.json", with_state(step=9)),
    "state: records": ("state.json", with_state(records={"a": 1})),
    "state: NaN": ("state.json", with_state(records=[{"train/step": float("nan")}])),
    "state: another training": ("state.json", with_state(training="other")),
    "state: list": ("state.json", lambda f: f.write_text("[]") and None),
    "weights: shape": (
        "weights.safetensors",
        lambda f: save_file(
            {k: v[:4].clone() if v.ndim else v for k, v in load_file(f).items()}, f
        ),
    ),
    "weights: NaN": (
        "weights.safetensors",
        lambda f: save_file({k: v * float("nan") for k, v in load_file(f).items()}, f),
    ),
    "trainer: hostile": ("trainer_state.pt", hostile),
    "trainer: pickle": ("trainer_state.pt", lambda f: f.write_bytes(pickle.dumps(Payload()))),
    "trainer: list": ("trainer_state.pt", with_trainer_state(list)),
    "trainer: step": (
        "trainer_state.pt",
        with_trainer_state(lambda s: {**s, "n_training_steps": 9}),
    ),
    "trainer: counters": (
        "trainer_state.pt",
        with_trainer_state(lambda s: {**s, "act_freq_scores": torch.zeros(3)}),
    ),
    "trainer: optimizer": (
        "trainer_state.pt",
        with_trainer_state(
            lambda s: {
                **s,
                "optimizer": {
                    **s["optimizer"],
                    "state": {
                        p: {**about, "exp_avg": torch.zeros(2)}
                        for p, about in s["optimizer"]["state"].items()
                    },
                },
            }
        ),
    ),
    "scaling: text": (
        "activation_scaler.json",
        lambda f: f.write_text('{"scaling_factor": "large", "has_whitening": false}') and None,
    ),
}


@pytest.mark.parametrize("forged", FORGED)
def test_what_has_a_checksum_and_not_the_trainings_values_is_not_used(
    stopped, tmp_path, monkeypatch, caplog, forged
):
    monkeypatch.chdir(tmp_path)
    folder, weights, records = stopped("batchtopk")
    shutil.copytree(folder, tmp_path / "key")
    rewritten(tmp_path / "key" / "step_000000006", *FORGED[forged])
    assert_same(restarted(tmp_path / "key"), weights, records)
    (warning,) = (r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)
    assert "step_000000006 is damaged (" in warning
    assert "\n" not in warning
    assert warning.endswith("; continuing from step 3")
    assert not (tmp_path / "payload-ran").exists(), "a checkpoint ran code"


def test_a_file_without_checksum_is_damage(stopped, tmp_path, caplog):
    folder, weights, records = stopped("batchtopk")
    shutil.copytree(folder, tmp_path / "key")
    (tmp_path / "key" / "step_000000006" / "activation_scaler_whitening.safetensors").touch()
    assert_same(restarted(tmp_path / "key"), weights, records)
    assert "not in checksums.json" in caplog.text


def test_a_finished_training_is_not_made_again(stopped, tmp_path):
    _, weights, records = stopped("batchtopk")
    finish(training(tmp_path / "key"))
    one = training(tmp_path / "key")
    assert not list(train_alone(one, reader)), "its last checkpoint is that of the last step"
    assert_same(one, weights, records)


def test_a_folder_that_is_not_writable_is_read_and_not_written(stopped, tmp_path):
    folder, weights, records = stopped("batchtopk")
    shutil.copytree(folder, tmp_path / "key")
    before = sorted(tmp_path.rglob("*"))
    one = training(tmp_path / "key")
    one.checkpoints.writable = False
    assert_same(one, weights, records)
    one.checkpoints.remove()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_that_cannot_be_written_costs_nothing_else(stopped, tmp_path, caplog):
    _, weights, records = stopped("batchtopk")
    (tmp_path / "key").touch()
    one = training(tmp_path / "key")
    assert_same(one, weights, records)
    (warning,) = (r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)
    assert warning.startswith("checkpoint at step 3 could not be written (cannot write ")
