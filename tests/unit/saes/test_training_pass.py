"""A pass: what it reports while it runs, also where it is continued, and how the data were seen."""

import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saexp import context
from saexp.config import SAETrainerConfig
from saexp.models import Hookpoint
from saexp.saes.training import Training, TrainingSource, summary
from saexp.saes.training_pass import N_TIMED_STEPS, ReaderBatches, train_together

D_IN, BATCH, N_STEPS = 8, 16, 30
AT = Hookpoint(0, "resid_post")
SECONDS = 0.002
"""Least duration of a step of `slow`."""
REFILL = 0.05
"""Seconds per step that refills take."""


def reader(step: int) -> Iterator[Tensor]:
    while True:
        yield torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(step))
        step += 1


def slow(step: int) -> Iterator[Tensor]:
    for batch in reader(step):
        time.sleep(SECONDS)
        yield batch


class LateRefill(ReaderBatches):
    """The time of its refills is known after 5 steps more than the timed ones."""

    n = 0

    def next(self) -> dict[tuple[Hookpoint, ...], Tensor]:
        self.n += 1
        return dict(super().next())

    @property
    def seconds_per_step(self) -> float | None:
        return REFILL if self.n >= N_TIMED_STEPS + 6 else None


def training(folder: Path, k: int = 4) -> Training:
    cfg = SAETrainerConfig(
        name="batchtopk",
        options={"k": k},
        batch_size=BATCH,
        n_samples=N_STEPS * BATCH,
        checkpoint_every=10,
        log_every=5,
    )
    return Training(cfg, 32, TrainingSource("random", AT, D_IN, 16), folder, torch.device("cpu"))


def batches(
    kind: type[ReaderBatches] = ReaderBatches, read: Callable[[int], Iterator[Tensor]] = reader
) -> ReaderBatches:
    return kind({(AT,): read}, batch_size=BATCH, n_rows={(AT,): 100})


def stopped(folder: Path, at: int) -> None:
    """A training that ends without a word after step `at`."""
    one = training(folder)
    for _, record in train_together([one], batches()):
        if record["train/step"] == at:
            break


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Off a terminal, with a line of progress for each step."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    monkeypatch.setattr(context, "_SECONDS_BETWEEN_LINES", 0.0)
    caplog.set_level(logging.INFO)


@pytest.mark.usefixtures("every_step")
def test_a_continued_training_reports_the_rate_of_its_own_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopped(tmp_path / "key", 25)
    caplog.clear()
    one = training(tmp_path / "key")
    assert one.resume() == 20
    records = [record for _, record in train_together([one], batches(read=slow))]
    lines = [m for m in caplog.messages if m.startswith("training: ")]
    assert lines[0].startswith("training: 21 of 30, ")
    rates = [float(re.search(r"([\d.]+) step/s", line)[1]) for line in lines]  # pyright: ignore
    assert 0 < max(rates) <= 1 / SECONDS
    left = [int(re.search(r"(\d+) s left", line)[1]) for line in lines]  # pyright: ignore
    assert left[-1] == 0
    assert all(0 < r["train/samples_per_second"] <= BATCH / SECONDS for r in records)


@pytest.mark.usefixtures("every_step")
def test_the_estimate_waits_for_the_first_refill_and_counts_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    list(train_together([training(tmp_path / "key")], batches(LateRefill)))
    (estimate,) = (m for m in caplog.messages if m.startswith("training 1 SAE: about"))
    remaining = N_STEPS - N_TIMED_STEPS - 6
    assert f"for the remaining {remaining} steps of {BATCH} activation vectors" in estimate
    rate = int(re.search(r"\((\d+) a second\)", estimate)[1])  # pyright: ignore
    assert 0 < rate <= BATCH / REFILL


@pytest.mark.usefixtures("every_step")
def test_data_that_are_read_again_are_no_progress(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A stream's own checkpoint may be older than those of the SAEs."""

    class Older(ReaderBatches):
        def seek(self, step: int, streams: object) -> int:  # noqa: ARG002
            return super().seek(step - 10, [(AT,)])

    stopped(tmp_path / "key", 25)
    whole, again = training(tmp_path / "other"), training(tmp_path / "key")
    list(train_together([whole], batches()))
    caplog.clear()
    again.resume()
    list(train_together([again], batches(Older)))
    lines = [m for m in caplog.messages if m.startswith("training: ")]
    assert lines[0].startswith("training: 21 of 30, ")
    assert len(lines) == 10
    for name, weights in whole.sae.state_dict().items():
        assert torch.equal(weights, again.sae.state_dict()[name]), name


@pytest.mark.usefixtures("every_step")
def test_the_progress_line_shows_epochs_loss_explained_variance_and_l0(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pair = [training(tmp_path / "4"), training(tmp_path / "8", k=8)]
    records = list(train_together(pair, batches()))
    last = [record for _, record in records[-2:]]
    assert [r["train/tokens"] for r in last] == [N_STEPS * BATCH] * 2
    # 480 vectors of 100.
    assert [r["train/epoch"] for r in last] == [4.8] * 2
    assert pair[0].records[-1]["train/epoch"] == 4.8
    line = [m for m in caplog.messages if m.startswith("training: ")][-1]
    assert line.endswith(summary([t.records[-1] for t in pair]))
    losses = sorted(r["train/overall_loss"] for r in last)
    assert f"epoch 4.80, loss {losses[0]:.3g} to {losses[1]:.3g}, explained variance " in line
    assert line.endswith(", L0 4.0 to 8.0")


@pytest.mark.parametrize(
    ("name", "options"),
    [("standard", {"l1_coefficient": 2.0}), ("jumprelu", {"l0_coefficient": 2.0})],
)
def test_learning_rate_and_sparsity_follow_their_schedules(
    tmp_path: Path, name: str, options: dict[str, float]
) -> None:
    """Linear from 0, constant, linear to 0; and linear from 0, constant."""
    n = 20
    cfg = SAETrainerConfig(
        name=name,
        options={**options, "decoder_init_norm": 0.5},
        batch_size=BATCH,
        n_samples=n * BATCH,
        lr=3e-3,
        lr_warm_up=0.25,
        lr_decay=0.5,
        sparsity_warm_up=0.5,
    )
    source = TrainingSource("random", AT, D_IN, 16)
    one = Training(cfg, 32, source, tmp_path / "key", torch.device("cpu"))
    norms = one.sae.W_dec.norm(dim=-1)
    torch.testing.assert_close(norms, torch.full_like(norms, 0.5))
    rates, coefficients = [], []
    for _ in range(n):
        rates.append(one.trainer.optimizer.param_groups[0]["lr"])
        (coefficient,) = one.trainer.get_coefficients().values()
        coefficients.append(coefficient)
        one.make_step(torch.randn(BATCH, D_IN))
    rising, falling = [(i + 1) / 5 for i in range(n)], [(n - i) / 10 for i in range(n)]
    expected = [3e-3 * min(1, a, b) for a, b in zip(rising, falling, strict=True)]
    assert rates == pytest.approx(expected)
    assert coefficients == pytest.approx([2 * min(1, i / 10) for i in range(n)])
    assert one.trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
