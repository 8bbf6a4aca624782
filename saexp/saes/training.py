"""The training of one SAE: its steps, the numbers of each, and checkpoints with exact resume.

It has its own weights, optimizer and dead-latent counters. Checkpoints are written whole, verified
when they are read, and two of them are kept.
"""

import copy
import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saexp.config import SAETrainerConfig
from saexp.digests import checksums, difference, is_checksums
from saexp.distributed import ALONE, Processes
from saexp.errors import ConfigError, SAEError, StoreError
from saexp.files import RUN_FOLDER, remove_temporary, write_folder
from saexp.models import Hookpoint
from saexp.registry import did_you_mean
from saexp.stats.significance import derived_seed

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

    def resume(self, load: Callable[[Path, int], None], latest: int | None = None) -> int:
        """Load the newest intact checkpoint, and return its step, or 0 where there is none.

        `load(folder, step)` loads a checkpoint. Where it raises an exception (DamagedCheckpoint, or
        any other that invalid files cause), the previous checkpoint is tried. With `latest`,
        checkpoints of later steps are left as they are.
        """
        damaged: list[tuple[Path, str]] = []
        step = 0
        for path, step_of_path in self._by_step():
            if latest is not None and step_of_path > latest:
                continue
            try:
                verify_checkpoint(path)
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


def verify_checkpoint(path: Path) -> None:
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


WEIGHTS, STATE, TRAINER_STATE = "weights.safetensors", "state.json", "trainer_state.pt"
"""Files of a checkpoint; sae-lens writes the last one, and a file with the input scaling."""
Record = dict[str, float | int]
Streams = tuple[Hookpoint, ...]
"""The stream that an SAE reads, and the one that a transcoder predicts."""
Widths = Mapping[Hookpoint, int]
"""The streams of one SAE with their widths, in the order of the columns of its batches."""

SAES = (
    "standard",
    "gated",
    "topk",
    "abstopk",
    "batchtopk",
    "jumprelu",
    "matryoshka_batchtopk",
    "matching_pursuit",
)
TRANSCODERS = tuple(
    f"{name}_transcoder" for name in ("standard", "batchtopk", "jumprelu", "matryoshka_batchtopk")
)
ARCHITECTURES = (*SAES, *TRANSCODERS)


def check_name(name: str) -> None:
    """Raise ConfigError unless `sae_trainer.name` is an architecture that can be trained."""
    if name in ARCHITECTURES:
        return
    if name.removesuffix("_transcoder") in SAES:
        raise ConfigError(
            f"sae_trainer.name={name}: sae-lens has no inference class for such a transcoder; "
            f"choose from {', '.join(TRANSCODERS)}"
        )
    raise ConfigError(f"sae_trainer.name={name}: {did_you_mean(name, ARCHITECTURES)}")


@dataclass(frozen=True)
class TrainingSource:
    """The model and streams that an SAE or transcoder is trained on."""

    model_name: str
    hookpoint: Hookpoint
    d_in: int
    context_size: int
    hookpoint_out: Hookpoint | None = None
    d_out: int | None = None
    prepend_bos: bool = True
    """Whether the texts begin with BOS."""


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

        from saexp.saes.training_architectures import PairScaler, training_sae
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

    def record(self, output: Any, others: Record | None = None) -> Record:
        """The numbers of the step just made, and `others`, which are also added to `records`."""
        self.records.append({**self._record(self.step, output), **(others or {})})
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
                pair: Any = scaler
                sae.fold_scaling(pair.scaling_factor, pair.factor_out)
        sae.save_inference_model(folder)


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


_SHOWN = {
    "epoch": "epoch {:.2f}",
    "overall_loss": "loss {:.3g}",
    "explained_variance": "explained variance {:.3f}",
    "l0": "L0 {:.1f}",
}
"""Numbers of a record that the progress bar shows."""


def summary(records: Sequence[Record]) -> str:
    """The last numbers; of several SAEs the smallest and the largest."""
    parts = []
    for name, words in _SHOWN.items():
        values = [r[f"train/{name}"] for r in records if f"train/{name}" in r]
        if not values:
            continue
        low, high = (words.format(f(values)) for f in (min, max))
        parts.append(low if low == high else f"{low} to {high.rpartition(' ')[2]}")
    return ", ".join(parts)


def labelled(record: Record, label: str) -> Record:
    """The record of one of several SAEs: `train/<label>/overall_loss`, with the common step."""
    if not label:
        return record
    common = ("train/step", "train/tokens", "train/epoch", "train/samples_per_second")
    return {
        k if k in common else f"train/{label}/{k.removeprefix('train/')}": v
        for k, v in record.items()
    }
