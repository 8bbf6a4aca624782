"""task=train in two processes of torchrun: the result of one process, kills, and errors."""

import json
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd
import pytest
import torch

import saexp
from saexp.activations.stream import PROCESS
from saexp.distributed import check_command, check_task
from saexp.errors import ConfigError
from saexp.models.resolution import ASSETS
from tests import interpreters, shipped_texts, torchrun

CORPUS = [
    "task=train",
    "dataset=corpus",
    "dataset.context_size=32",
    "layer=1",
    "width=64",
    "sae_trainer.n_samples=3840",
    "sae_trainer.batch_size=128",
    "sae_trainer.buffer_rows=2048",
    "sae_trainer.checkpoint_every=10",
    "sae_trainer.log_every=10",
    "tracker=none",
]
VARIANTS = (
    "sae_trainer.variants=[{name:topk,k:2,dead_feature_window:3},{name:standard},"
    "{name:matryoshka_batchtopk}]"
)
TEXTS = [
    "task=train",
    "dataset=text",
    f"dataset.path={Path(shipped_texts.__file__).with_name('neutral_texts.txt')}",
    "layer=1",
    "width=64",
    "sae_trainer=standard_transcoder",
    "task.streams=[mlp_in,mlp_out]",
    "sae_trainer.n_samples=2560",
    "sae_trainer.batch_size=128",
    "tracker=none",
]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    lines = (ASSETS / "tiny/background.txt").read_text("utf-8").splitlines()
    texts = (" ".join(rng.choices(lines, k=rng.randint(1, 4))) for _ in range(200))
    file = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return file


def settings_of(folder: Path) -> list[str]:
    """A run in `folder/run`, with a cache of its own."""
    return [f"cache_dir={folder}/cache", f"hydra.run.dir={folder}/run"]


def in_processes(words: list[str], folder: Path, **fails: str) -> subprocess.CompletedProcess[str]:
    """A run of two processes that torchrun's launcher forks."""
    return torchrun.run([*words, *settings_of(folder)], env=fails)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(saexp.load_sae(folder).named_buffers())


def assert_close(
    one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], *, selects: bool = False
) -> None:
    """Equal up to rounding; where latents are selected, rounding may select another one."""
    assert one.keys() == other.keys()
    tolerance = 1e-2 if selects else 2e-5
    for name, w in one.items():
        torch.testing.assert_close(other[name], w, rtol=0, atol=tolerance * float(w.abs().max()))


@pytest.fixture(scope="module")
def words(corpus: Path) -> list[str]:
    settings = ["positions.max_norm_ratio=1.3", "sae_trainer.evaluate_every=20", "width=256"]
    return [*CORPUS, f"dataset.path={corpus}", VARIANTS, *settings]


@pytest.fixture(scope="module")
def two(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in two processes that was not disturbed."""
    folder = tmp_path_factory.mktemp("two")
    before = set(Path(tempfile.gettempdir()).glob("saexp-process-*"))
    done = in_processes(words, folder)
    assert done.returncode == 0, done.stderr[-2000:]
    # Logged and printed once.
    assert done.stderr.count("] train: ") == done.stdout.count("report: ") == 1
    assert set(Path(tempfile.gettempdir()).glob("saexp-process-*")) <= before
    return folder / "run"


def in_one_process(words: list[str], folder: Path) -> Path:
    """The same run in the test's process."""
    run = folder / "run"
    saexp.run(saexp.compose([*words, f"cache_dir={folder}/cache"]), run)
    return run


def labels_of(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "sae").iterdir())


def test_two_processes_train_the_saes_of_one(words: list[str], two: Path, tmp_path: Path) -> None:
    one = in_one_process(words, tmp_path)
    assert len(labels_of(one)) == 3
    for label in labels_of(one):
        saes = weights(one / "sae" / label), weights(two / "sae" / label)
        assert_close(*saes, selects=not label.startswith("standard"))
    curves = [pd.read_parquet(run / "training.parquet") for run in (one, two)]
    pd.testing.assert_frame_equal(*curves, rtol=1e-3, atol=1e-4)
    pd.testing.assert_frame_equal(*(c[c["step"] <= 20] for c in curves), rtol=1e-5, atol=1e-6)
    assert curves[0]["dead_fraction"].max() > 0
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (one, two)]
    for name in ("collection/tokens_forwarded", "train/n_tokens", "train/n_steps"):
        assert metrics[0][name] == metrics[1][name]
    notes = [json.loads((run / "provenance.json").read_text())["notes"] for run in (one, two)]
    high = [[note for note in listed if "times the median" in note] for listed in notes]
    assert high[0] and high[0] == high[1]
    assert {f.name for f in two.iterdir()} >= {f.name for f in one.iterdir()}


def test_two_processes_read_a_store_as_one_does(tmp_path: Path) -> None:
    done = in_processes(TEXTS, tmp_path / "2")
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = in_one_process(TEXTS, tmp_path / "1"), tmp_path / "2/run"
    assert_close(weights(one / "sae"), weights(two / "sae"))
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (one, two)]
    forwarded = "collection/tokens_forwarded"
    assert metrics[0][forwarded] == metrics[1][forwarded]


def interrupted(
    words: list[str], folder: Path, by: str, step: int
) -> subprocess.CompletedProcess[str]:
    """The second process fails in this step."""
    return in_processes(words, folder, FAILS_IN="1", FAILS_AT=str(step), FAILS_BY=by)


def test_a_killed_process_ends_all_and_the_training_goes_on_exactly(
    words: list[str], two: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    assert interrupted(words, tmp_path, "kill", 25).returncode == 1
    (last,) = (tmp_path / "cache/training").glob("*/step_000000020/buffer.safetensors")
    # Each process held about half of the rows.
    assert load_file(last)[PROCESS].double().mean() == pytest.approx(0.5, abs=0.1)
    alone = tmp_path / "alone"
    shutil.copytree(tmp_path / "cache", alone / "cache")
    again = in_processes(words, tmp_path)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "continuing from step 20 of 30" in again.stderr
    in_one_process(words, alone)
    for label in labels_of(two):
        expected, result = weights(two / "sae" / label), weights(tmp_path / "run/sae" / label)
        assert all(torch.equal(w, result[name]) for name, w in expected.items())
        assert_close(expected, weights(alone / "run/sae" / label), selects=True)


def test_an_error_of_one_process_is_one_line_and_ends_all(corpus: Path, tmp_path: Path) -> None:
    done = interrupted([*CORPUS, f"dataset.path={corpus}"], tmp_path, "error", 2)
    lines = [line for line in done.stderr.splitlines() if line.startswith("saexp: ")]
    assert lines == ["saexp: the disk of this process is on fire"], done.stderr[-3000:]
    assert done.returncode == 1


def test_the_command_that_a_user_types_reaches_both_processes(tmp_path: Path) -> None:
    """Refused in either one, in new interpreters, before they import what a run needs."""
    launcher = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node=2", "-m", "saexp", "-m", "width=32,64"]
    done = interpreters.run(launcher, tmp_path)
    lines = [line for line in done.stderr.splitlines() if line.startswith("saexp: ")]
    assert len(lines) == 1 and "torchrun started 2" in lines[0], done.stderr[-3000:]
    assert "type a run without -m" in lines[0]
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("check", "part"),
    [
        (lambda: check_command(["-m", "width=32,64"]), "type a run without -m"),
        (lambda: check_task("collect", resume=False), "task=collect runs in one"),
        (lambda: check_task("train", resume=True), "resume=true is for runs of one process"),
    ],
)
def test_what_torchrun_cannot_run_is_one_line(
    monkeypatch: pytest.MonkeyPatch, check: Callable[[], None], part: str
) -> None:
    check()
    for name, value in (("TORCHELASTIC_RUN_ID", "none"), ("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="torchrun started 2|for runs of one") as caught:
        check()
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
