"""Training SAEs: several in one pass over the same data, with checkpoints and exact resume.

Each SAE has its own weights, optimizer, dead-latent counters and checkpoints, so that it is trained
as if it were alone.
"""

import copy
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saexp.config import SAETrainerConfig
from saexp.context import progress
from saexp.distributed import ALONE, Processes
from saexp.errors import SAEError, counted
from saexp.files import RUN_FOLDER, write_folder
from saexp.models import Hookpoint
from saexp.saes.checkpoints import Checkpoints, DamagedCheckpoint, read_object
from saexp.saes.training_architectures import PairScaler, TrainingSource, training_sae
from saexp.saes.training_batches import Batches, Reader, ReaderBatches, Streams, Widths
from saexp.stats.significance import derived_seed

log = logging.getLogger(__name__)


WEIGHTS, STATE, TRAINER_STATE = "weights.safetensors", "state.json", "trainer_state.pt"
"""Files of a checkpoint; sae-lens writes the last one, and a file with the input scaling."""
N_TIMED_STEPS = 10
"""Steps after which the duration of a training is estimated."""
Record = dict[str, float | int]


class Training:
    """The training of one SAE. `train_together` makes its steps; `run` trains it alone."""

    def __init__(
        self,
        cfg: SAETrainerConfig,
        d_sae: int,
        source: TrainingSource,
        folder: Path,
        device: torch.device,
        *,
        writable: bool = True,
        label: str = "",
        processes: Processes = ALONE,
    ) -> None:
        """`label` distinguishes it from the others of its pass, in messages.

        The first of several `processes` writes the checkpoints.
        """
        self.cfg, self.d_sae, self.source, self.device = cfg, d_sae, source, device
        self.label, self.processes = label, processes
        self.checkpoints = Checkpoints(folder, writable=writable and processes.is_first)
        self.n_steps = max(1, cfg.n_samples // cfg.batch_size)
        self.error: SAEError | None = None
        """Why it could not go on to the end."""
        self._initialize()

    @property
    def streams(self) -> Streams:
        """The stream that is read, and the one that a transcoder predicts."""
        return tuple(self.widths)

    @property
    def widths(self) -> Widths:
        """`streams` with their widths."""
        widths = {self.source.hookpoint: self.source.d_in}
        if self.source.hookpoint_out is not None and self.source.d_out is not None:
            widths[self.source.hookpoint_out] = self.source.d_out
        return widths

    @property
    def step(self) -> int:
        """Number of steps made."""
        return self.trainer.n_training_steps

    @property
    def is_finished(self) -> bool:
        """Whether all steps were made."""
        return self.step == self.n_steps

    def _initialize(self) -> None:
        """Initialize the weights and the optimizer, at step 0."""
        from sae_lens.config import SAETrainerConfig as LensConfig

        from saexp.saes.training_step import Trainer

        cfg, source, device = self.cfg, self.source, self.device
        # With the seed alone, SAEs of two layers would start from the same directions.
        torch.manual_seed(derived_seed(cfg.seed, "training", source.hookpoint.name))
        self.sae: Any = training_sae(cfg, self.d_sae, source, device, self.n_steps)
        self.trainer = Trainer(
            LensConfig(
                total_training_samples=self.n_steps * cfg.batch_size,
                train_batch_size_samples=cfg.batch_size,
                lr=cfg.lr,
                lr_end=0.0,
                lr_warm_up_steps=int(cfg.lr_warm_up * self.n_steps),
                lr_decay_steps=int(cfg.lr_decay * self.n_steps),
                device=str(device),
                autocast=bool(cfg.autocast),
                dead_feature_window=cfg.dead_feature_window,
                feature_sampling_window=max(1, self.n_steps),
            ),
            self.sae,
            self.processes,
        )
        if source.hookpoint_out is not None:
            self.trainer.activation_scaler = PairScaler(d_in=source.d_in)
        self.sae.to(device)
        self.records: list[Record] = []
        self.data: dict[str, Any] = {}
        """What was read for it, as its last checkpoint has it (`Batches.describe`)."""

    def run(self, reader: Reader) -> Iterator[Record]:
        """Train it alone to the end, from the last checkpoint where there is one.

        Yields a record every `log_every` steps. Raises SAEError, naming the step, where the loss is
        not a number.
        """
        self.resume()
        for _, record in train_together([self], ReaderBatches({self.streams: reader})):
            yield record

    def resume(self) -> int:
        """Load the newest intact checkpoint; returns the number of steps made."""
        step = self.checkpoints.resume(self._load)
        self.processes.require_same("their checkpoint", step)
        if step:
            log.info("%scontinuing from step %d of %d", self._prefix, step, self.n_steps)
        return step

    @property
    def _prefix(self) -> str:
        return f"{self.label}: " if self.label else ""

    @property
    def needs_scale(self) -> bool:
        """Whether `set_scale` is to be called before the first step."""
        return self.step == 0 and self.cfg.normalize_activations == "expected_average_only_in"

    def set_scale(self, mean_norms: Mapping[Hookpoint, float]) -> None:
        """Set each stream's factor, which scales its mean norm to the square root of its width."""
        factors = []
        for hookpoint, width in self.widths.items():
            if not mean_norms[hookpoint]:
                raise SAEError(f"every activation of {hookpoint.name} is zero: nothing to train on")
            factors.append(width**0.5 / mean_norms[hookpoint])
        scaler: Any = self.trainer.activation_scaler
        scaler.scaling_factor = factors[0]
        if len(factors) > 1:
            scaler.factor_out = factors[1]

    def make_step(self, batch: Tensor) -> Any:
        """One step; returns sae-lens' output. Raises SAEError where the loss is not a number."""
        output = self.trainer.step(batch)
        loss = float(output.loss.detach())
        if not math.isfinite(loss):
            raise SAEError(
                f"{self._prefix}the loss is {loss} at step {self.step} of {self.n_steps}; the "
                "last checkpoint stays; try a smaller sae_trainer.lr"
            )
        self.trainer.n_training_steps += 1
        return output

    def record(self, output: Any, evaluated: Mapping[str, float] | None = None) -> Record:
        """The numbers of the step just made, which are also added to `records`."""
        self.records.append({**self._record(self.step, output), **(evaluated or {})})
        return self.records[-1]

    def checkpoint(self, data: dict[str, Any]) -> None:
        """Write a checkpoint of the current step."""
        self.data = data
        self.checkpoints.write(self.step, self._write)

    def _record(self, step: int, output: Any) -> Record:
        numbers = self.trainer.build_train_step_log_dict(output, self.trainer.n_training_samples)
        losses = {
            f"train/{k.removeprefix('losses/')}": v
            for k, v in numbers.items()
            if k.startswith("losses/")
        }
        return {
            "train/step": step,
            **losses,
            "train/l0": numbers["metrics/l0"],
            "train/explained_variance": numbers["metrics/explained_variance"],
            "train/dead_fraction": numbers["sparsity/dead_features"] / self.sae.cfg.d_sae,
            "train/lr": numbers["details/current_learning_rate"],
        }

    def _write(self, folder: Path) -> None:
        """Write the files of a checkpoint, without its checksums."""
        save_file(_copied(self.sae.state_dict()), folder / WEIGHTS)
        self.trainer.save_trainer_state(folder)
        state: dict[str, Any] = {"training": self.checkpoints.folder.name, "step": self.step}
        state |= {"data": self.data} if self.data else {}
        text = json.dumps({**state, "records": self.records})
        (folder / STATE).write_text(text + "\n", encoding="utf-8")

    def _load(self, folder: Path, step: int) -> None:
        """Continue from a checkpoint.

        Raises DamagedCheckpoint, or another exception, for files that this training did not write,
        and leaves the training at step 0.
        """
        try:
            state = _read_state(folder, self.checkpoints.folder.name, step, self.n_steps)
            self.records, self.data = state["records"], state.get("data", {})
            weights = load_file(folder / WEIGHTS)
            if _shapes(weights) != _shapes(self.sae.state_dict()):
                raise DamagedCheckpoint(f"{WEIGHTS}: other shapes")
            if not all(w.isfinite().all() for w in weights.values()):
                raise DamagedCheckpoint(f"{WEIGHTS}: NaN or Inf")
            # sae-lens loads the file again and may omit `weights_only`; a file that passes is safe.
            numbers = torch.load(folder / TRAINER_STATE, map_location="cpu", weights_only=True)
            if numbers["n_training_steps"] != step:
                raise DamagedCheckpoint(f"{TRAINER_STATE}: another step")
            self.sae.load_state_dict(weights)
            before = _shapes(_counters(self.trainer))
            self.trainer.load_trainer_state(folder)
            scaler: Any = self.trainer.activation_scaler
            factors = (scaler.scaling_factor, getattr(scaler, "factor_out", None))
            if not all(f is None or (_is_finite(f) and f > 0) for f in factors):
                raise DamagedCheckpoint(f"activation_scaler.json: {factors}")
            if _shapes(_counters(self.trainer)) != before or not _fits(self.trainer.optimizer):
                raise DamagedCheckpoint(f"{TRAINER_STATE}: other shapes")
        except Exception:
            self._initialize()
            raise

    def save(self, folder: Path) -> Path:
        """Write a SAELens folder for inference, with the input scaling folded into the weights.

        Raises StoreError where it cannot be written; the checkpoints stay.
        """
        write_folder(folder, self.snapshot, option=RUN_FOLDER)
        return folder

    def snapshot(self, folder: Path) -> None:
        """Write the SAE as it is now, as `save` does; the training can go on."""
        self.trainer.set_final_sae_metadata()
        sae, scaler = copy.deepcopy(self.sae), self.trainer.activation_scaler
        if scaler.scaling_factor is not None:
            if self.source.hookpoint_out is None:
                sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
            else:
                assert isinstance(scaler, PairScaler)
                sae.fold_scaling(scaler.scaling_factor, scaler.factor_out)
        sae.save_inference_model(folder)


Evaluate = Callable[[Sequence[Training]], Sequence[Mapping[str, float]]]
"""Trainings -> `train/…` numbers of each on held-out text."""


def train_together(
    trainings: Sequence[Training],
    batches: Batches,
    evaluate: Evaluate | None = None,
) -> Iterator[tuple[Training, Record]]:
    """Train SAEs of equally many steps on the same data, each from the step where it is.

    Yields (training, record) every `log_every` steps, and after each evaluation: every
    `evaluate_every` steps, and at the end. An SAE whose loss is not a number is left out from there
    on, with its `error` set; raises the SAEError where that leaves none.
    """
    active = [one for one in trainings if not one.is_finished]
    if not active:
        return
    n_steps, cfg = active[0].n_steps, active[0].cfg
    step = batches.seek(min(t.step for t in active), list(dict.fromkeys(t.streams for t in active)))
    for one in active:
        if one.needs_scale:
            one.set_scale(batches.mean_norms(one.widths))
    clock = _Clock(len(active), step, n_steps, cfg.batch_size)
    with progress(n_steps, "training", "step") as bar:
        bar.update(step)
        while step < n_steps:
            outputs = _steps(active, batches.next(), step)
            active = [t for t in active if t.error is None]
            step += 1
            clock.count(step, batches.seconds_per_step)
            for one, numbers in _evaluated(outputs, evaluate, step).items():
                if numbers or step % cfg.log_every == 0 or step == n_steps:
                    record = one.record(outputs[one], numbers)
                    yield one, {**record, "train/samples_per_second": clock.rate(step)}
            # The last step has one too, so that a failure to save the SAE loses no training.
            if step % cfg.checkpoint_every == 0 or step == n_steps:
                batches.checkpoint(step)
                for one in outputs:
                    one.checkpoint(batches.describe(one.streams))
            bar.update(1)


def _steps(
    active: Sequence[Training], batch: Mapping[Streams, Tensor], step: int
) -> dict[Training, Any]:
    """Make a step with each SAE that has made this many; SAE -> output.

    Those that have made more wait for the data to arrive where they are.
    """
    outputs = {}
    for one in active:
        if one.step != step:
            continue
        try:
            outputs[one] = one.make_step(batch[one.streams])
        except SAEError as error:
            one.error = error
            if all(t.error is not None for t in active):
                raise
            log.warning("%s; the others go on", error)
    return outputs


def _evaluated(
    outputs: Mapping[Training, Any], evaluate: Evaluate | None, step: int
) -> dict[Training, Mapping[str, float]]:
    """Training -> its numbers on held-out text, where it is evaluated at this step."""
    trainings = list(outputs)
    if evaluate is None or not trainings:
        return dict.fromkeys(trainings, {})
    every, n_steps = trainings[0].cfg.evaluate_every, trainings[0].n_steps
    if step != n_steps and not (every and step % every == 0):
        return dict.fromkeys(trainings, {})
    return dict(zip(trainings, evaluate(trainings), strict=True))


class _Clock:
    """The rate of a pass, and an estimate of its duration after the first steps."""

    def __init__(self, n_saes: int, first: int, n_steps: int, batch_size: int) -> None:
        self.n_saes, self.first, self.n_steps, self.batch_size = n_saes, first, n_steps, batch_size
        self.began = self.timed = time.perf_counter()

    def rate(self, step: int) -> float:
        """Activation vectors per second since the first step."""
        return (step - self.first) * self.batch_size / (time.perf_counter() - self.began)

    def count(self, step: int, seconds_per_step: float) -> None:
        """Log the estimate once, after `N_TIMED_STEPS` steps; the first one is not timed.

        `seconds_per_step` is what is not part of every step. Evaluations are not counted.
        """
        done = step - self.first
        if done == 1:
            self.timed = time.perf_counter()
        if done != N_TIMED_STEPS + 1 or step == self.n_steps:
            return
        seconds = (time.perf_counter() - self.timed) / N_TIMED_STEPS + seconds_per_step
        log.info(
            "training %s: about %s for the remaining %s of %d activation vectors (%d a second)",
            counted(self.n_saes, "SAE"),
            _duration(seconds * (self.n_steps - step)),
            counted(self.n_steps - step, "step"),
            self.batch_size,
            self.batch_size / seconds,
        )


def _duration(seconds: float) -> str:
    """ "40 s", "12 min", "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous().clone() for name, tensor in state.items()}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _counters(trainer: Any) -> dict[str, Tensor]:
    """The trainer's counters, one number per latent each."""
    return {
        "act_freq_scores": trainer.act_freq_scores,
        "n_forward_passes_since_fired": trainer.n_forward_passes_since_fired,
    }


def _fits(optimizer: torch.optim.Optimizer) -> bool:
    """Whether each parameter's moving averages have its shape."""
    averages = ("exp_avg", "exp_avg_sq")
    return all(
        optimizer.state[p][name].shape == p.shape
        for group in optimizer.param_groups
        for p in group["params"]
        for name in averages
        if p in optimizer.state
    )


def _read_state(folder: Path, training: str, step: int, n_steps: int) -> dict[str, Any]:
    """The state of a checkpoint; raises DamagedCheckpoint for that of another step."""
    state = read_object(folder / STATE)
    records: Any = state.get("records")
    if state.get("training") != training:
        raise DamagedCheckpoint(f"{STATE}: another training")
    if type(state.get("step")) is not int or state["step"] != step or not 0 < step <= n_steps:
        raise DamagedCheckpoint(f"{STATE}: another step")
    numbers = [v for r in records for v in r.values()] if _are_dicts(records) else [None]
    if not all(map(_is_finite, numbers)):
        raise DamagedCheckpoint(f"{STATE}: invalid records")
    if not isinstance(state.get("data", {}), dict):
        raise DamagedCheckpoint(f"{STATE}: invalid data")
    return state


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _are_dicts(records: Any) -> bool:
    return isinstance(records, list) and all(isinstance(r, dict) for r in records)
