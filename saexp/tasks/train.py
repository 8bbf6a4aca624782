"""task=train: an SAE or transcoder from stored activations, evaluated on held-out texts."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saexp.activations.reader import OrdinaryRows, ShuffledReader
from saexp.activations.shards import StoredValues
from saexp.config import RunConfig, SAETrainerConfig, TrainConfig, parse_layers, parse_width
from saexp.context import RunContext
from saexp.errors import ConfigError
from saexp.files import is_writable, locked, try_lock
from saexp.latents.encode import Latents, encode_rows
from saexp.latents.statistics import moments
from saexp.models.hookpoints import STREAM_ORDER, Hookpoint
from saexp.models.loading import LanguageModel
from saexp.pipeline.collect import Collected, begins_with_bos, collect_examples
from saexp.pipeline.objects import describe_model, language_model
from saexp.pipeline.run_folder import save_run, skips_table
from saexp.reports.sae_quality import training_figures, transcoder_sentence, write_training_report
from saexp.results import Result
from saexp.saes.loading import load_sae
from saexp.saes.sae import SparseAutoencoder
from saexp.saes.training import Checkpoints, Reader, Training, TrainingSource
from saexp.saes.training_architectures import TRANSCODERS, check_name

N_MEASURED = 65_536
"""Largest number of held-out positions that are measured."""


@dataclass(frozen=True)
class _TrainingData:
    """Stored activations, and the rows to train and to measure on."""

    collected: Collected
    hookpoints: list[Hookpoint]
    """The stream that is read, and the one that a transcoder predicts."""
    streams: list[StoredValues]
    """`[n_rows, d]`, one per hookpoint."""
    ordinary: OrdinaryRows
    train_rows: np.ndarray
    held_out_rows: np.ndarray


def train(cfg: RunConfig, context: RunContext) -> Result:
    """Collect (or find) the activations, train, save in SAELens format, measure, report."""
    hookpoints, width = _targets(cfg)
    model = language_model(cfg, context.objects)
    model.check_layer(hookpoints[0].layer)
    with context.stage("collect"):
        data = _collect(cfg, context, model, hookpoints)
    training, folder, seconds = _trained(cfg, context, model, data, width)
    with context.stage("measure"):
        sae, latents, measured = _measured(cfg, model, data, folder)
    result = _result(cfg, data, training, latents, measured)
    result.notes[:0] = model.notes
    result.metrics["train/seconds"] = seconds
    result.notes.append(f"""use it with: sae=local 'sae.path="{folder}"'""")
    about: dict[str, Any] = {
        "device": str(model.device),
        "model": describe_model(model),
        "sae": {
            "name": folder.name,
            "path": str(folder),
            "hookpoint": hookpoints[0].name,
            "architecture": sae.architecture,
            "d_sae": width,
            "fingerprint": sae.metadata["fingerprint"],
        },
        **data.collected.provenance,
        "n_trained_on": len(data.train_rows),
        "n_measured": len(latents),
    }
    if len(hookpoints) > 1:
        about["sae"]["hookpoint_out"] = hookpoints[1].name
        about["finding"] = [transcoder_sentence(cfg.sae_trainer, about, result.metrics)]
    result = save_run(context, cfg, result, data.collected.placement.skips, about)
    with context.stage("report"):
        result.figures = training_figures(context.folder)
        write_training_report(context.folder, result.figures)
    if is_writable(cfg.cache_dir):
        _remove_checkpoints(training.checkpoints)
    return result


def _collect(
    cfg: RunConfig, context: RunContext, model: LanguageModel, hookpoints: list[Hookpoint]
) -> _TrainingData:
    collected = collect_examples(cfg, model, hookpoints, context.prefetch)
    rows, held_out = _split(collected.placement.rows, cfg.sae_trainer.held_out, cfg.seed)
    ordinary = collected.ordinary(hookpoints)
    return _TrainingData(
        collected=collected,
        hookpoints=hookpoints,
        streams=[collected.store.values(h.layer, h.stream) for h in hookpoints],
        ordinary=ordinary,
        train_rows=rows[ordinary.mask[rows]],
        held_out_rows=held_out,
    )


def _trained(
    cfg: RunConfig, context: RunContext, model: LanguageModel, data: _TrainingData, width: int
) -> tuple[Training, Path, float]:
    """(the finished training, the folder with the SAE, seconds).

    One process trains at a time; another one with the same settings waits, then finds the finished
    checkpoint.
    """
    acts, *targets = data.streams
    source = TrainingSource(
        model_name=model.name,
        hookpoint=data.hookpoints[0],
        d_in=acts.shape[1],
        context_size=cfg.dataset.max_length,
        prepend_bos=begins_with_bos(model),
    )
    if targets:
        source = replace(source, hookpoint_out=data.hookpoints[1], d_out=targets[0].shape[1])
    checkpoints = Path(cfg.cache_dir) / "training" / _key(cfg, data, width)
    writable = is_writable(cfg.cache_dir)
    began = time.perf_counter()
    with context.stage("train"), locked(_lock(checkpoints)) if writable else nullcontext():
        training = Training(
            cfg.sae_trainer, width, source, checkpoints, model.device, writable=writable
        )
        for record in training.run(_reader(data.streams, data.train_rows, cfg)):
            context.tracker.metrics(record)
        folder = training.save(context.folder / "sae")
    context.results.update(
        f.relative_to(context.folder).as_posix() for f in folder.rglob("*") if f.is_file()
    )
    return training, folder, time.perf_counter() - began


def _measured(
    cfg: RunConfig, model: LanguageModel, data: _TrainingData, folder: Path
) -> tuple[SparseAutoencoder, Latents, dict[str, float | None]]:
    """(the trained SAE, its latents at ordinary held-out positions, metrics of those)."""
    sae = load_sae(folder).to(model.device)
    acts, *targets = data.streams
    sample = _sample(data.held_out_rows, N_MEASURED, cfg.seed)
    rows = data.collected.placement.rows.iloc[sample].reset_index(drop=True)
    ordinary = data.ordinary.mask[sample]
    target = targets[0] if targets else None
    latents, metrics = encode_rows(acts, sample, sae, rows, target, ordinary)
    return sae, latents.where(ordinary), metrics


def _result(
    cfg: RunConfig,
    data: _TrainingData,
    training: Training,
    latents: Latents,
    measured: Mapping[str, float | None],
) -> Result:
    """Metrics, tables and notes of a finished training."""
    last = {k: v for k, v in training.records[-1].items() if k != "train/step"}
    collected, trainer = data.collected, cfg.sae_trainer
    result = Result(metrics={**collected.metrics, **measured, **last})
    result.metrics["train/n_steps"] = training.n_steps
    result.tables = {
        "training": pd.DataFrame(training.records).rename(columns=lambda c: c.split("/")[-1]),
        "density": _density(latents),
        "active": pd.DataFrame({"n_active": np.diff(latents.csr.indptr)}),
        "values": _values(latents, cfg.seed),
        "skips": skips_table(collected.placement.skips),
    }
    off_k = off_target(trainer, measured["sparsity/l0"])
    steps = training.n_steps, trainer.dead_feature_window
    result.notes = [
        *collected.examples.notes,
        *data.ordinary.notes("training and the measured numbers leave them out"),
        *off_k,
        *off_curve(last, measured, *steps, l0_reported=bool(off_k)),
    ]
    return result


def _lock(checkpoints: Path) -> Path:
    return checkpoints.with_suffix(".lock")


def _remove_checkpoints(checkpoints: Checkpoints) -> None:
    """Remove the checkpoints of a finished training, unless a process has begun the same one."""
    lock = try_lock(_lock(checkpoints.folder))
    if lock is not None:
        checkpoints.remove()
        lock.release()


def off_target(trainer: SAETrainerConfig, l0: float | int | None) -> list[str]:
    """A note where a BatchTopK SAE has a held-out L0 far from its k."""
    k = trainer.options.get("k")
    if not k or not l0 or "batchtopk" not in trainer.name or k / _FAR <= l0 <= k * _FAR:
        return []
    return [
        f"L0 is {l0:.1f} on held-out positions, where k is {k:g}: the threshold that stands in for "
        "the k largest of a batch is an average over the training and has not converged; train "
        "longer (sae_trainer.n_samples)"
    ]


def off_curve(
    last: Mapping[str, float | int],
    measured: Mapping[str, float | None],
    n_steps: int,
    dead_window: int,
    *,
    l0_reported: bool = False,
) -> list[str]:
    """A note where held-out numbers differ from the end of the training curve.

    `last` is the curve's last record; L0 is left out where another note reports it
    (`l0_reported`). The curve's dead fraction is 0 during the first `dead_window` steps.
    """
    differences = []
    for name, key in _CURVE.items():
        here, there = measured[key], last[f"train/{name}"]
        if here is None:
            continue
        if name == "l0":
            differs = not l0_reported and not there / _FAR <= here <= there * _FAR
        else:
            differs = abs(here - there) > _DIFFERENT
        if differs:
            differences.append(
                f"{name.replace('_', ' ')} {here:.3g}, the curve ends at {there:.3g}"
            )
    if not differences:
        return []
    short = f", more than the {n_steps} of this training" if n_steps <= dead_window else ""
    return [
        f"{measured['sparsity/n_positions']:,} held-out positions disagree with the training "
        f"curve: {'; '.join(differences)} (of the last batch; there a latent is dead after "
        f"sae_trainer.dead_feature_window={dead_window} inactive steps{short}); the held-out "
        "numbers count, and more or more varied texts bring them closer"
    ]


_FAR = 1.5
"""A note reports a held-out L0 that differs from k, or from the curve's L0, by this factor."""
_DIFFERENT = 0.15
"""A note reports a difference of explained variances or dead fractions above this."""
_CURVE = {
    "l0": "sparsity/l0",
    "explained_variance": "reconstruction/explained_variance",
    "dead_fraction": "sparsity/dead_fraction",
}
"""Name of a training curve -> metric of the same quantity on held-out positions."""


def _targets(cfg: RunConfig) -> tuple[list[Hookpoint], int]:
    """(hookpoint that is read, and the one that a transcoder predicts; width).

    Raises ConfigError for an unusable combination of trainer, layer, streams and width.
    """
    check_name(cfg.sae_trainer.name)
    layers = [] if cfg.layer is None else parse_layers(cfg.layer)
    assert isinstance(cfg.task, TrainConfig)
    name, streams = cfg.sae_trainer.name, cfg.task.streams
    transcoder = name in TRANSCODERS
    if transcoder and len(streams) != 2:
        raise ConfigError(
            f"task.streams={streams}: {name} reads one stream and predicts another of the block; "
            "type 'task.streams=[mlp_in,mlp_out]'"
        )
    if len(layers) != 1 or len(streams) != (2 if transcoder else 1):
        raise ConfigError(
            f"layer={cfg.layer}, task.streams={streams}: task=train takes one of each; sweep with "
            "-m layer=0,1,2 (a transcoder, such as sae_trainer=batchtopk_transcoder, takes two "
            "streams)"
        )
    hookpoints = [Hookpoint(layers[0], stream) for stream in streams]
    forwards = STREAM_ORDER.index(streams[0]) < STREAM_ORDER.index(streams[-1])
    if transcoder and (not forwards or hookpoints[0].stored == hookpoints[1].stored):
        raise ConfigError(
            f"task.streams={streams}: a transcoder predicts a stream that comes after the one it "
            "reads; type 'task.streams=[mlp_in,mlp_out]'"
        )
    width = parse_width(cfg.width)
    if width is None:
        raise ConfigError("width is not set; type width=<number of latents>, such as width=2k")
    return hookpoints, width


def _split(rows: pd.DataFrame, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows to train on, rows held out): a seeded choice of whole texts."""
    texts = np.unique(rows["text_id"])
    n = max(1, round(fraction * len(texts)))
    if n >= len(texts):
        raise ConfigError(
            f"{len(texts)} texts are too few to train on some and hold {fraction:g} of them out"
        )
    held_out_texts = np.random.default_rng(seed).permutation(texts)[:n]
    held_out = rows["text_id"].isin(held_out_texts).to_numpy()
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _sample(rows: np.ndarray, n: int, seed: int) -> np.ndarray:
    if len(rows) <= n:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, n, replace=False))


def _reader(streams: list[StoredValues], rows: np.ndarray, cfg: RunConfig) -> Reader:
    """Batches of the stream, or of both streams concatenated along the last axis."""
    trainer = cfg.sae_trainer

    def start(step: int) -> Iterator[Tensor]:
        readers = [
            ShuffledReader(acts, rows, trainer.batch_size, trainer.seed, step) for acts in streams
        ]
        if len(readers) == 1:
            return readers[0]
        return (torch.cat(parts, dim=-1) for parts in zip(*readers, strict=True))

    return start


def _key(cfg: RunConfig, data: _TrainingData, width: int) -> str:
    """Hash of what determines the result, by which checkpoints of a killed run are found."""
    parts = [
        data.collected.store.path.name,
        hashlib.sha256(data.train_rows.astype("<i8").tobytes()).hexdigest(),
        ">".join(h.name for h in data.hookpoints),
        width,
        asdict(cfg.sae_trainer),
        cfg.seed,
        [metadata.version(name) for name in ("saexp", "sae-lens", "torch")],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _density(latents: Latents) -> pd.DataFrame:
    """Per latent: frequency on held-out positions, mean where active, maximum."""
    statistics = moments(latents.csr, np.ones(len(latents), dtype=bool), 0.0)
    return pd.DataFrame(
        {
            "latent": np.arange(latents.d_sae),
            "frequency": statistics.frequency,
            "mean_active": statistics.total / np.maximum(statistics.active, 1),
            "max": statistics.maximum,
        }
    )


def _values(latents: Latents, seed: int) -> pd.DataFrame:
    """A seeded sample of nonzero activations, for the histogram."""
    values = latents.csr.data
    if len(values) > N_MEASURED:
        values = np.random.default_rng(seed).choice(values, N_MEASURED, replace=False)
    return pd.DataFrame({"value": values})
