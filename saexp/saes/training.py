"""Training an SAE with sae-lens' classes: our data order, checkpoints that a kill cannot harm."""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saexp.config.training import SAETrainerConfig
from saexp.context import progress
from saexp.directions import derived_seed
from saexp.errors import SAEError
from saexp.saes.training_classes import Place, training_sae

__all__ = ["Place", "Reader", "Training"]

log = logging.getLogger(__name__)

N_SCALE_BATCHES = 50
"""Batches that the input's mean norm is estimated from."""
Record = dict[str, float | int]
Reader = Callable[[int], Iterator[Tensor]]
"""Step -> batches from that step on: `[batch, d_in]`, a transcoder's `[batch, d_in + d_out]`."""


class Training:
    """One training; `run` yields a record every `log_every` steps and leaves checkpoints."""

    def __init__(
        self, cfg: SAETrainerConfig, d_sae: int, place: Place, folder: Path, device: torch.device
    ) -> None:
        from sae_lens.config import SAETrainerConfig as LensConfig
        from sae_lens.training.sae_trainer import SAETrainer

        self.cfg, self.place, self.folder = cfg, place, folder
        self.n_steps = max(1, cfg.n_samples // cfg.batch_size)
        # Not the seed alone: SAEs of two layers would start from the same directions.
        torch.manual_seed(derived_seed(cfg.seed, "training", place.hookpoint.name))
        self.sae: Any = training_sae(cfg, d_sae, place, device, self.n_steps)
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
        if place.hookpoint_out is not None:
            from saexp.saes.training_transcoders import PairScaler

            self.trainer.activation_scaler = PairScaler(d_in=place.d_in)
        self.sae.to(device)
        self.records: list[Record] = []

    def run(self, reader: Reader) -> Iterator[Record]:
        """Train to the end, from the last checkpoint where there is one.

        Raises SAEError, naming the step, where the loss is no number.
        """
        step = self._resume()
        if step == 0 and self.cfg.normalize_activations == "expected_average_only_in":
            self._estimate_scale(reader(0))
        batches = reader(step)
        began, first = time.perf_counter(), step
        with progress(self.n_steps, "training", "step") as bar:
            bar.update(step)
            while step < self.n_steps:
                output = self.trainer.step(next(batches))
                loss = float(output.loss.detach())
                if not math.isfinite(loss):
                    raise SAEError(
                        f"the loss is {loss} at step {step} of {self.n_steps}; the checkpoint "
                        "before it is kept; try a smaller sae_trainer.lr"
                    )
                step += 1
                self.trainer.n_training_steps = step
                if step % self.cfg.log_every == 0 or step == self.n_steps:
                    rate = (step - first) * self.cfg.batch_size / (time.perf_counter() - began)
                    self.records.append(self._record(step, output))
                    yield {**self.records[-1], "train/samples_per_second": rate}
                if step % self.cfg.checkpoint_every == 0 and step < self.n_steps:
                    self._checkpoint(step)
                bar.update(1)

    def _estimate_scale(self, batches: Iterator[Tensor]) -> None:
        """Each stream gets the factor that brings its mean norm to the root of its width."""
        streams = {self.place.hookpoint: self.place.d_in}
        if self.place.hookpoint_out is not None and self.place.d_out is not None:
            streams[self.place.hookpoint_out] = self.place.d_out
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

    def _checkpoint(self, step: int) -> None:
        """Written beside, renamed into place, the earlier one then removed."""
        temporary = self.folder / ".tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(_owned(self.sae.state_dict()), temporary / "weights.safetensors")
        self.trainer.save_trainer_state(temporary)
        (temporary / "state.json").write_text(
            json.dumps({"step": step, "records": self.records}) + "\n", encoding="utf-8"
        )
        earlier = self._checkpoints()
        temporary.replace(self.folder / f"step_{step:09d}")
        for old in earlier:
            shutil.rmtree(old, ignore_errors=True)

    def _checkpoints(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("step_*") if (p / "state.json").is_file())

    def _resume(self) -> int:
        there = self._checkpoints()
        if not there:
            return 0
        state = json.loads((there[-1] / "state.json").read_text("utf-8"))
        self.sae.load_state_dict(load_file(there[-1] / "weights.safetensors"))
        self.trainer.load_trainer_state(there[-1])
        self.records = state["records"]
        log.info("going on from step %d of %d", state["step"], self.n_steps)
        return int(state["step"])

    def save(self, folder: Path) -> Path:
        """Fold the input scaling into the weights; write a SAELens folder for inference."""
        scaler: Any = self.trainer.activation_scaler
        if scaler.scaling_factor is not None:
            if self.place.hookpoint_out is None:
                self.sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
            else:
                self.sae.fold_scaling(scaler.scaling_factor, scaler.factor_out)
            scaler.scaling_factor = None
        self.trainer.set_final_sae_metadata()
        self.sae.save_inference_model(folder)
        return folder


def _owned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous().clone() for name, tensor in state.items()}
