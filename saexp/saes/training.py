"""Training an SAE with checkpoints and exact resume."""

import json
import logging
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saexp.config import SAETrainerConfig
from saexp.context import progress
from saexp.digests import checksums, difference, is_checksums
from saexp.errors import SAEError, StoreError
from saexp.files import RUN_FOLDER, remove_temporary, write_folder
from saexp.saes.training_architectures import PairScaler, TrainingSource, training_sae
from saexp.stats.permutation import derived_seed

log = logging.getLogger(__name__)


CHECKSUMS = "checksums.json"
N_KEPT = 2
_NAME = re.compile(r"step_(\d{9})")


class DamagedCheckpoint(Exception):
    """A checkpoint cannot be used; the message has the file and the reason."""


class Checkpoints:
    """The checkpoints of one training, in a folder that no other process writes to meanwhile.

    In a folder that is not `writable`, checkpoints are read but not written.
    """

    def __init__(self, folder: Path, *, writable: bool = True) -> None:
        self.folder, self.writable = folder, writable
        self._usable: list[Path] = []
        self._has_warned = False

    def resume(self, load: Callable[[Path, int], None]) -> int:
        """Load the newest intact checkpoint, and return its step, or 0 where there is none.

        `load(folder, step)` loads a checkpoint. Where it raises an exception (DamagedCheckpoint, or
        any other that invalid files cause), the previous checkpoint is tried.
        """
        damaged: list[tuple[Path, str]] = []
        step = 0
        for path, step_of_path in self._by_step():
            try:
                verify(path)
                load(path, step_of_path)
            except DamagedCheckpoint as error:
                damaged.append((path, str(error)))
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                damaged.append((path, reason))
            else:
                step, self._usable = step_of_path, [path]
                break
        consequence = f"continuing from step {step}" if step else "starting from the beginning"
        for path, reason in damaged:
            log.warning("checkpoint %s is damaged (%s); %s", path, reason, consequence)
        return step

    def _by_step(self) -> list[tuple[Path, int]]:
        """(folder, step) of each checkpoint, the newest first."""
        matches = [(p, _NAME.fullmatch(p.name)) for p in self.folder.glob("step_*")]
        checkpoints = [(p, int(match[1])) for p, match in matches if match]
        return sorted(checkpoints, key=lambda pair: -pair[1])

    def write(self, step: int, write: Callable[[Path], None]) -> None:
        """Write the checkpoint of a step with `write`, and remove all but the newest `N_KEPT`.

        Where it cannot be written (full disk), one warning per training is logged: training can
        continue, and the earlier checkpoints stay.
        """
        if not self.writable:
            return

        def fill(temporary: Path) -> None:
            write(temporary)
            sums = checksums(temporary, [file.name for file in temporary.iterdir()])
            (temporary / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")

        path = self.folder / f"step_{step:09d}"
        try:
            remove_temporary(self.folder)
            write_folder(path, fill)
        except (StoreError, RuntimeError) as error:
            if not self._has_warned:
                log.warning("checkpoint at step %d could not be written (%s)", step, error)
            self._has_warned = True
            return
        self._usable = [*self._usable, path][-N_KEPT:]
        for old, _ in self._by_step():
            if old not in self._usable:
                shutil.rmtree(old, ignore_errors=True)

    def remove(self) -> None:
        """Remove all checkpoints, once the training is finished."""
        if self.writable:
            shutil.rmtree(self.folder, ignore_errors=True)


def verify(path: Path) -> None:
    """Raise DamagedCheckpoint, with the first file that is missing or has changed."""
    sums = read_object(path / CHECKSUMS)
    if not sums or not is_checksums(sums):
        raise DamagedCheckpoint(f"{CHECKSUMS} is not a list of checksums")
    if changed := difference(path, sums):
        raise DamagedCheckpoint(changed)
    for file in path.iterdir():
        if file.name not in sums and file.name != CHECKSUMS:
            raise DamagedCheckpoint(f"{file.name}: not in {CHECKSUMS}")


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object from a file; raises DamagedCheckpoint."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{file.name}: missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{file.name}: cannot be read") from error
    if not isinstance(content, dict):
        raise DamagedCheckpoint(f"{file.name}: not a JSON object")
    return content


N_SCALE_BATCHES = 50
"""Number of batches from which the inputs' mean norm is estimated."""
WEIGHTS, STATE, TRAINER_STATE = "weights.safetensors", "state.json", "trainer_state.pt"
"""Files of a checkpoint; sae-lens writes the last one, and a file with the input scaling."""
Record = dict[str, float | int]
Reader = Callable[[int], Iterator[Tensor]]
"""Step -> batches from that step on: `[batch, d_in]`, a transcoder's `[batch, d_in + d_out]`."""


class Training:
    """One training; `run` yields a record every `log_every` steps and writes checkpoints."""

    def __init__(
        self,
        cfg: SAETrainerConfig,
        d_sae: int,
        source: TrainingSource,
        folder: Path,
        device: torch.device,
        *,
        writable: bool = True,
    ) -> None:
        self.cfg, self.d_sae, self.source, self.device = cfg, d_sae, source, device
        self.checkpoints = Checkpoints(folder, writable=writable)
        self.n_steps = max(1, cfg.n_samples // cfg.batch_size)
        self._initialize()

    def _initialize(self) -> None:
        """Initialize the weights and the optimizer, at step 0."""
        from sae_lens.config import SAETrainerConfig as LensConfig
        from sae_lens.training.sae_trainer import SAETrainer

        cfg, source, device = self.cfg, self.source, self.device
        # With the seed alone, SAEs of two layers would start from the same directions.
        torch.manual_seed(derived_seed(cfg.seed, "training", source.hookpoint.name))
        self.sae: Any = training_sae(cfg, self.d_sae, source, device, self.n_steps)
        self.trainer = SAETrainer(
            LensConfig(
                total_training_samples=self.n_steps * cfg.batch_size,
                train_batch_size_samples=cfg.batch_size,
                lr=cfg.lr,
                lr_end=0.0,
                lr_warm_up_steps=int(cfg.lr_warm_up * self.n_steps),
                lr_decay_steps=int(cfg.lr_decay * self.n_steps),
                device=str(device),
                dead_feature_window=cfg.dead_feature_window,
                feature_sampling_window=max(1, self.n_steps),
            ),
            self.sae,
            iter(()),
        )
        if source.hookpoint_out is not None:
            self.trainer.activation_scaler = PairScaler(d_in=source.d_in)
        self.sae.to(device)
        self.records: list[Record] = []

    def run(self, reader: Reader) -> Iterator[Record]:
        """Train to the end, from the last checkpoint where there is one.

        Raises SAEError, with the step, where the loss is not finite.
        """
        step = self.checkpoints.resume(self._load)
        if step:
            log.info("continuing from step %d of %d", step, self.n_steps)
        if step == 0 and self.cfg.normalize_activations == "expected_average_only_in":
            self._estimate_scale(reader(0))
        batches = reader(step)
        started, first = time.perf_counter(), step
        with progress(self.n_steps, "training", "step") as bar:
            bar.update(step)
            while step < self.n_steps:
                output = self.trainer.step(next(batches))
                loss = float(output.loss.detach())
                if not math.isfinite(loss):
                    raise SAEError(
                        f"the loss is {loss} at step {step} of {self.n_steps}; the last checkpoint "
                        "stays; try a smaller sae_trainer.lr"
                    )
                step += 1
                self.trainer.n_training_steps = step
                if step % self.cfg.log_every == 0 or step == self.n_steps:
                    rate = (step - first) * self.cfg.batch_size / (time.perf_counter() - started)
                    self.records.append(self._record(step, output))
                    yield {**self.records[-1], "train/samples_per_second": rate}
                # The last step has one too, so that a failure to save the SAE loses no training.
                if step % self.cfg.checkpoint_every == 0 or step == self.n_steps:
                    self.checkpoints.write(step, self._write)
                bar.update(1)

    def _estimate_scale(self, batches: Iterator[Tensor]) -> None:
        """Set each stream's factor, which scales its mean norm to the square root of its width."""
        streams = {self.source.hookpoint: self.source.d_in}
        if self.source.hookpoint_out is not None and self.source.d_out is not None:
            streams[self.source.hookpoint_out] = self.source.d_out
        widths = list(streams.values())
        norms = [
            [float(part.norm(dim=-1).mean()) for part in next(batches).split(widths, dim=-1)]
            for _ in range(N_SCALE_BATCHES)
        ]
        factors = []
        for (hookpoint, width), values in zip(
            streams.items(), zip(*norms, strict=True), strict=True
        ):
            mean = sum(values) / len(values)
            if not mean:
                raise SAEError(f"every activation of {hookpoint.name} is zero: nothing to train on")
            factors.append(width**0.5 / mean)
        scaler: Any = self.trainer.activation_scaler
        scaler.scaling_factor = factors[0]
        if len(factors) > 1:
            scaler.factor_out = factors[1]

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
        state = {"training": self.checkpoints.folder.name, "step": self.trainer.n_training_steps}
        text = json.dumps({**state, "records": self.records})
        (folder / STATE).write_text(text + "\n", encoding="utf-8")

    def _load(self, folder: Path, step: int) -> None:
        """Continue from a checkpoint.

        Raises DamagedCheckpoint, or another exception, for files that this training did not write,
        and leaves the training at step 0.
        """
        try:
            self.records = _read_state(folder, self.checkpoints.folder.name, step, self.n_steps)
            weights = load_file(folder / WEIGHTS)
            if _shapes(weights) != _shapes(self.sae.state_dict()):
                raise DamagedCheckpoint(f"{WEIGHTS}: other shapes")
            if not all(w.isfinite().all() for w in weights.values()):
                raise DamagedCheckpoint(f"{WEIGHTS}: NaN or Inf")
            # sae-lens loads the file again and may omit `weights_only`; a file that passes is safe.
            state = torch.load(folder / TRAINER_STATE, map_location="cpu", weights_only=True)
            if state["n_training_steps"] != step:
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
        """Fold the input scaling into the weights; write a SAELens folder for inference.

        Raises StoreError where it cannot be written; the checkpoints stay.
        """
        scaler: Any = self.trainer.activation_scaler
        if scaler.scaling_factor is not None:
            if self.source.hookpoint_out is None:
                self.sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
            else:
                self.sae.fold_scaling(scaler.scaling_factor, scaler.factor_out)
            scaler.scaling_factor = None
        self.trainer.set_final_sae_metadata()
        write_folder(folder, self.sae.save_inference_model, option=RUN_FOLDER)
        return folder


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


def _read_state(folder: Path, training: str, step: int, n_steps: int) -> list[Record]:
    """The records of a checkpoint; raises DamagedCheckpoint for the state of another step."""
    state = read_object(folder / STATE)
    records: Any = state.get("records")
    if state.get("training") != training:
        raise DamagedCheckpoint(f"{STATE}: another training")
    if type(state.get("step")) is not int or state["step"] != step or not 0 < step <= n_steps:
        raise DamagedCheckpoint(f"{STATE}: another step")
    numbers = [v for r in records for v in r.values()] if _are_dicts(records) else [None]
    if not all(map(_is_finite, numbers)):
        raise DamagedCheckpoint(f"{STATE}: invalid records")
    return records


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _are_dicts(records: Any) -> bool:
    return isinstance(records, list) and all(isinstance(r, dict) for r in records)
