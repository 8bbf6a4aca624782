"""task=train on a corpus that is streamed: single and several SAEs, kills, sweeps, bad input."""

import json
import logging
import random
import re
import shutil
import signal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch

import saexp
from saexp.activations.stream import ActivationStream, ContextActivations
from saexp.errors import ConfigError
from saexp.models import Hookpoint
from saexp.models.resolution import ASSETS
from saexp.pipeline.training_stream import StreamedData, split
from saexp.results import Result
from tests import interpreters
from tests.unit.reports.run_outputs import command

WORDS = [
    "task=train",
    "dataset=corpus",
    "dataset.context_size=32",
    "layer=1",
    "width=64",
    "sae_trainer.n_samples=5120",
    "sae_trainer.batch_size=128",
    "sae_trainer.buffer_rows=2048",
    "sae_trainer.checkpoint_every=10",
    "sae_trainer.log_every=10",
    "tracker=none",
]
SEVERAL = ["layer=[1,2]", "sae_trainer.variants=[{k:8},{k:16}]"]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 documents of 1 to 4 lines."""
    rng = random.Random(0)
    lines = (ASSETS / "tiny/background.txt").read_text("utf-8").splitlines()
    texts = (" ".join(rng.choices(lines, k=rng.randint(1, 4))) for _ in range(300))
    file = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def trained(corpus: Path, cache: Path, folder: Path, *words: str) -> Result:
    cfg = saexp.compose([*WORDS, f"dataset.path={corpus}", f"cache_dir={cache}", *words])
    return saexp.run(cfg, folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(saexp.load_sae(folder).named_buffers())


def assert_same_sae(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert {n: True for n in first} == {n: torch.equal(w, second[n]) for n, w in first.items()}


class Alone(NamedTuple):
    """A run of one SAE and what it logged."""

    result: Result
    messages: list[str]


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    folder, messages = tmp_path_factory.mktemp("alone"), []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("saexp")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    words = ["layer=2", "sae_trainer.options.k=8"]
    try:
        result = trained(corpus, folder / "cache", folder / "run", *words)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    return Alone(result, messages)


@pytest.fixture(scope="module")
def together(corpus: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return trained(corpus, cache, tmp_path_factory.mktemp("together"), *SEVERAL)


def data_of(corpus: Path, cache: Path, *words: str) -> StreamedData:
    cfg = saexp.compose([*WORDS, f"dataset.path={corpus}", f"cache_dir={cache}", *words])
    return StreamedData(cfg, saexp.build("model", cfg.model), saexp.context.ObjectCache())


def test_each_sae_is_the_one_that_is_trained_alone(together: Result, alone: Alone) -> None:
    one = alone.result
    assert together.path is not None and one.path is not None
    label = "layer_2_k_8"
    assert_same_sae(together.path / "sae" / label, one.path / "sae")
    for metric, value in one.metrics.items():
        if metric.startswith(("sparsity/", "reconstruction/", "train/ce", "train/held")):
            assert together.metrics[f"{metric}_{label}"] == value, metric
    # Four SAEs of two layers cost the model no more tokens than one.
    forwarded = "collection/tokens_forwarded"
    assert together.metrics[forwarded] == one.metrics[forwarded]


def test_the_first_batch_and_the_scale_are_of_the_models_own_activations(
    corpus: Path, cache: Path
) -> None:
    """The whole stream of one epoch, sorted, against transformers' hidden states."""
    data = data_of(corpus, cache, "positions.max_norm_ratio=null", "sae_trainer.mix_fraction=0")
    at = Hookpoint(1, "resid_post")
    source = ContextActivations(data.model, data.corpus, data._train, [at], data.settings)
    stream = ActivationStream(source, data.settings)
    batch = next(stream)[at]
    hf = data.model.hf
    ids = torch.from_numpy(data.corpus.ids(source._order))
    with torch.no_grad():
        hidden = hf(input_ids=ids[:256], output_hidden_states=True).hidden_states[2]
    special = torch.tensor(data.model.tokenizer.all_special_ids)
    rows = hidden[~torch.isin(ids[:256], special)]
    distance = torch.cdist(batch, rows).min(dim=1).values
    assert bool((distance < 1e-3 * batch.norm(dim=-1)).all())
    n = min(len(rows), 16_384)
    assert stream.mean_norms[at] == pytest.approx(float(rows[:n].norm(dim=-1).mean()), rel=0.05)


def test_held_out_contexts_share_no_document_with_those_trained_on(
    corpus: Path, cache: Path
) -> None:
    data = data_of(corpus, cache)
    contexts = data.corpus
    documents = np.asarray(contexts.documents)
    # From the text itself: a separator begins a document, as does a new context's first document.
    last = np.append(documents[1:], documents[-1])
    of = [set(range(a, b + 1)) for a, b in zip(documents, last, strict=True)]
    held_out = set().union(*(of[i] for i in data._held_out))
    assert not held_out & set().union(*(of[i] for i in data._train))
    assert len(data._held_out) == round(0.1 * len(contexts))
    assert set(data._train).isdisjoint(data._held_out)
    again = split(contexts, 0.1, 0)
    assert all(map(np.array_equal, again, (data._train, data._held_out)))
    assert not np.array_equal(split(contexts, 0.1, 1)[1], data._held_out)
    # No more than measuring needs.
    assert len(split(contexts, 0.5, 0)[1]) == min(round(0.5 * len(contexts)), 65536 // 32)


def test_positions_of_high_norm_are_left_out_of_training_and_counted(
    corpus: Path, cache: Path, tmp_path: Path
) -> None:
    run = trained(corpus, cache, tmp_path / "run", "positions.max_norm_ratio=1.2")
    (note,) = (n for n in run.notes if "times the median" in n)
    n_high = int(note.split(" of ")[0].replace(",", ""))
    assert 0 < n_high < 5_120
    assert f"{n_high:,} of 5,120 activations" in note
    assert run.metrics["sparsity/n_positions"] + run.metrics["reconstruction/n_high_norm"] > 0
    assert run.metrics["reconstruction/n_high_norm"] > 0


def test_a_corpus_that_is_too_short_is_repeated_and_counted(
    corpus: Path, cache: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text("".join(corpus.read_text("utf-8").splitlines(True)[:60]), encoding="utf-8")
    run = trained(short, cache, tmp_path / "run", "sae_trainer.buffer_rows=512")
    assert run.metrics["train/epochs"] > 2
    (note,) = (n for n in run.notes if "tokens were read" in n)
    assert "and was read again from its beginning in another order" in note
    assert f"{run.metrics['train/epochs']:.2f} times" in note
    history = run.tables["training"]
    assert list(history["tokens"]) == list(128 * history["step"])
    # Vectors are read before they are consumed; both are counted in tokens of the corpus.
    last = history["epoch"].iloc[-1]
    assert run.metrics["train/epochs"] - 1024 / 2_000 <= last < run.metrics["train/epochs"]
    title = run.figures["losses"].layout.xaxis.title.text
    assert title == f"training step ({last:.2f} epochs)"


def test_a_forecast_comes_before_the_first_step(alone: Alone) -> None:
    (number, forecast), *others = [
        (i, m) for i, m in enumerate(alone.messages) if m.startswith("collecting: the first step")
    ]
    assert not others
    steps = [i for i, m in enumerate(alone.messages) if m.startswith(("train:", "training 1"))]
    assert number < min(steps)
    pattern = (
        r".* after 2,048 positions \(sae_trainer.buffer_rows\), in about \d+ s at (\d+) tokens/s; "
        r"all 5,120 of the training take at least about \d+ s, and the ([\d,]+) held-out tokens .*"
    )
    match = re.fullmatch(pattern, forecast)
    assert match is not None, forecast
    assert int(match[1]) > 0
    # Special tokens are sent through the model and not measured.
    n_measured = alone.result.metrics["sparsity/n_positions"]
    assert n_measured is not None
    assert n_measured <= int(match[2].replace(",", "")) <= 1.1 * n_measured


def test_the_loss_of_the_model_is_measured_at_the_chosen_steps(
    corpus: Path, cache: Path, tmp_path: Path
) -> None:
    run = trained(corpus, cache, tmp_path / "run", "sae_trainer.evaluate_every=16")
    history = run.tables["training"]
    known = history[history["ce_loss_score"].notna()]
    assert list(known["step"]) == [16, 32, 40]
    assert run.metrics["train/ce_loss_score"] == known["ce_loss_score"].iloc[-1]
    assert known["held_out_l0"].iloc[-1] == pytest.approx(run.metrics["sparsity/l0"], rel=0.05)
    figure = run.figures["progress"]
    assert [t for t in figure.data if t.name == "CE score"][0].x.tolist() == [16, 32, 40]
    # The same as task=evaluate of the SAE on the held-out contexts.
    data = data_of(corpus, cache)
    from saexp.analysis.evaluation import EvaluationSettings, evaluate_saes, numbers

    settings = EvaluationSettings(max_norm_ratio=5.0)
    sae = saexp.load_sae(tmp_path / "run" / "sae")
    (one,) = evaluate_saes(data.model, [sae], data.evaluation_texts(), settings)
    score = numbers(one, 0, 0)["reconstruction/ce_loss_score"]
    assert run.metrics["train/ce_loss_score"] == pytest.approx(score, abs=1e-4)


KILLED = """
import os, signal, sys, threading
import saexp
from saexp.saes.training import Training

def step(self, batch):
    made.append(1)
    if len(made) == int(sys.argv[1]):
        # At a random moment of what follows: a step, a refill, a checkpoint.
        threading.Timer(float(sys.argv[2]), os.kill, (os.getpid(), signal.SIGKILL)).start()
    return real(self, batch)

made = []
real, Training.make_step = Training.make_step, step
saexp.run(saexp.compose(sys.argv[4:]), sys.argv[3])
"""


class Killed(NamedTuple):
    """A run that nothing happened to, and the cache of the same run, killed at a random moment."""

    words: list[str]
    whole: Result
    cache: Path


@pytest.fixture(scope="module")
def killed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    folder, rng = tmp_path_factory.mktemp("killed"), random.Random(1)
    words = ["layer=[1,2]", "sae_trainer.lr=0.002"]
    whole = trained(corpus, folder / "cache", folder / "whole", *words)
    arguments = [*WORDS, *words, f"cache_dir={folder}/cache", f"dataset.path={corpus}"]
    moment = [str(rng.randrange(42, 76)), f"{rng.uniform(0, 0.2):.3f}"]
    code = ["-W", "ignore", "-c", KILLED, *moment, str(folder / "killed")]
    done = interpreters.run([*code, *arguments])
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    return Killed(words, whole, folder / "cache")


def test_a_pass_that_is_killed_at_any_moment_goes_on_to_the_same_weights(
    killed: Killed, corpus: Path, tmp_path: Path
) -> None:
    cache = shutil.copytree(killed.cache, tmp_path / "cache")
    again = trained(corpus, cache, tmp_path / "again", *killed.words)
    whole = killed.whole
    assert whole.path is not None
    for label in ("layer_1", "layer_2"):
        assert_same_sae(whole.path / "sae" / label, tmp_path / "again" / "sae" / label)
    pd.testing.assert_frame_equal(whole.tables["training"], again.tables["training"])
    assert (
        again.metrics["collection/tokens_forwarded"]
        < (whole.metrics["collection/tokens_forwarded"])
    )
    assert again.metrics["train/n_tokens"] == whole.metrics["train/n_tokens"]
    assert not list((cache / "training").glob("*/*"))


def test_a_damaged_checkpoint_of_the_stream_only_costs_time(
    killed: Killed, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = shutil.copytree(killed.cache, tmp_path / "cache")
    files = list((cache / "training").glob("*/step_*/buffer.safetensors"))
    assert len(files) == 2
    for file in files:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    trained(corpus, cache, tmp_path / "again", *killed.words)
    assert caplog.text.count("buffer.safetensors was changed since it was written") == 2
    assert killed.whole.path is not None
    for label in killed.whole.tables["saes"]["sae"]:
        assert_same_sae(killed.whole.path / "sae" / label, tmp_path / "again" / "sae" / label)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["dataset=entities", "sae_trainer.source=stream"], "type dataset=corpus"),
        (["sae_trainer.buffer_rows=64"], "is less than a batch; type sae_trainer.buffer_rows=2048"),
        (["dataset.context_size=4096"], "takes at most 512 tokens"),
        (["sae_trainer.source=disk"], "sae_trainer.source=disk is not known"),
        (["sae_trainer.device=xpu:7"], "sae_trainer.device=xpu:7 is not on this machine; leave"),
        (["sae_trainer.mix_fraction=1"], "must be at least 0 and below 1"),
    ],
)
def test_what_cannot_be_streamed_is_one_line(
    corpus: Path, cache: Path, tmp_path: Path, words: list[str], part: str
) -> None:
    if "dataset=entities" in words:
        cfg_words = [w for w in WORDS if not w.startswith("dataset")] + words
        with pytest.raises(ConfigError) as caught:
            saexp.run(saexp.compose([*cfg_words, f"cache_dir={cache}"]), tmp_path)
    else:
        with pytest.raises(ConfigError) as caught:
            trained(corpus, cache, tmp_path, *words)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_long_document_is_no_corpus_to_hold_a_part_out_of(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text((ASSETS / "tiny/background.txt").read_text("utf-8"), encoding="utf-8")
    with pytest.raises(ConfigError, match="dataset.document=paragraph"):
        trained(file, cache, tmp_path / "run")


def test_a_sweep_trains_all_its_saes_in_the_first_cells_pass(
    together: Result, corpus: Path, tmp_path: Path
) -> None:
    words = [w for w in WORDS if not w.startswith("layer")]
    words += [f"dataset.path={corpus}", f"cache_dir={tmp_path}/cache"]
    sweep = ["-m", "layer=1,2", "sae_trainer.options.k=8,500"]
    done = command(tmp_path, *sweep, *words, "hydra.sweep.dir=sweep")
    assert "sae_trainer.options.k=500 is above width=64" in done.err, done.err[-2000:]
    cells = sorted((tmp_path / "sweep").glob("[0-9]_*"))
    metrics = [
        json.loads((c / "metrics.json").read_text()) for c in cells if (c / "metrics.json").exists()
    ]
    assert len(metrics) == 2
    forwarded = [m["collection/tokens_forwarded"] for m in metrics]
    assert forwarded == [together.metrics["collection/tokens_forwarded"], 0]
    labels = ["layer_1_k_8", "layer_2_k_8"]
    finished = [c for c in cells if (c / "metrics.json").exists()]
    assert together.path is not None
    for label, cell, numbers in zip(labels, finished, metrics, strict=True):
        assert_same_sae(together.path / "sae" / label, cell / "sae")
        for metric in ("reconstruction/explained_variance", "train/ce_loss_score", "sparsity/l0"):
            assert numbers[metric] == together.metrics[f"{metric}_{label}"]
    assert not list((tmp_path / "cache" / "training").glob("*/*"))
