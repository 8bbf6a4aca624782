"""task=train: an SAE or a transcoder from stored activations, measured on texts it never saw."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saexp.activations.reader import ShuffledReader
from saexp.config import RunConfig, SAETrainerConfig, TrainConfig, parse_layers, parse_width
from saexp.context import RunContext
from saexp.errors import ConfigError
from saexp.files import is_writable, locked, try_lock
from saexp.latents.encode import Latents, encode_rows
from saexp.latents.statistics import moments
from saexp.models.hookpoints import Hookpoint
from saexp.pipeline.collect import Gathered, begins_with_bos, gather
from saexp.pipeline.objects import language_model
from saexp.pipeline.run_folder import clean_metrics, skips_table, write_provenance, write_result
from saexp.reports.training import training_figures, transcoder_sentence, write_training_report
from saexp.results import TaskResult
from saexp.saes.loading import load_sae
from saexp.saes.training.architectures import TRANSCODERS, check_name
from saexp.saes.training.training import Checkpoints, Place, Reader, Training

N_MEASURED = 65_536
"""Held-out positions that are measured, at most."""


def train(cfg: RunConfig, context: RunContext) -> TaskResult:
    """Collect (or find) the activations, train, save in SAELens format, measure, report."""
    hookpoints, width = _what(cfg)
    model = language_model(cfg)
    model.check_layer(hookpoints[0].layer)
    with context.stage("collect"):
        gathered = gather(cfg, model, hookpoints, context.ahead)
    acts, *targets = [gathered.store.acts(h.layer, h.stream) for h in hookpoints]
    trained, held_out = _split(gathered.placement.rows, cfg.sae_trainer.held_out, cfg.seed)
    ordinary = gathered.ordinary(hookpoints)
    trained = trained[ordinary.mask[trained]]
    place = Place(
        model_name=model.name,
        hookpoint=hookpoints[0],
        d_in=acts.shape[1],
        context_size=cfg.dataset.max_length,
        prepend_bos=begins_with_bos(model),
    )
    if targets:
        place = replace(place, hookpoint_out=hookpoints[1], d_out=targets[0].shape[1])
    checkpoints = Path(cfg.cache_dir) / "training" / _key(cfg, gathered, hookpoints, width, trained)
    writable = is_writable(cfg.cache_dir)
    lock = checkpoints.with_suffix(".lock")
    began = time.perf_counter()
    with context.stage("train"), locked(lock) if writable else nullcontext():
        training = Training(
            cfg.sae_trainer, width, place, checkpoints, model.device, writable=writable
        )
        for record in training.run(_reader([acts, *targets], trained, cfg)):
            context.tracker.metrics(record)
        folder = training.save(context.folder / "sae")
    context.results.update(
        f.relative_to(context.folder).as_posix() for f in folder.rglob("*") if f.is_file()
    )
    seconds = time.perf_counter() - began
    with context.stage("measure"):
        sae = load_sae(folder).to(model.device)
        chosen = _some(held_out, N_MEASURED, cfg.seed)
        rows = gathered.placement.rows.iloc[chosen].reset_index(drop=True)
        target = targets[0] if targets else None
        latents, measured = encode_rows(acts, chosen, sae, rows, target, ordinary.mask[chosen])
        latents = latents.where(ordinary.mask[chosen])
    last = {k: v for k, v in training.records[-1].items() if k != "train/step"}
    result = TaskResult(metrics={**gathered.metrics, **measured, **last})
    result.metrics["train/seconds"] = seconds
    result.metrics["train/n_steps"] = training.n_steps
    result.tables = {
        "training": pd.DataFrame(training.records).rename(columns=lambda c: c.split("/")[-1]),
        "density": _density(latents),
        "active": pd.DataFrame({"n_active": np.diff(latents.csr.indptr)}),
        "values": _values(latents, cfg.seed),
        "skips": skips_table(gathered.placement.skips),
    }
    result.notes += gathered.examples.notes
    result.notes += ordinary.notes("training and the measured numbers leave them out")
    off = off_target(cfg.sae_trainer, measured["sparsity/l0"])
    steps = (training.n_steps, cfg.sae_trainer.dead_feature_window)
    result.notes += [*off, *off_curve(last, measured, *steps, l0_reported=bool(off))]
    result.notes.append(f"""use it with: sae=local 'sae.path="{folder}"'""")
    result.metrics = clean_metrics(result.metrics, result.notes)
    write_result(context, result)
    about: dict[str, Any] = {
        "device": str(model.device),
        "model": {"name": model.name, "fingerprint": model.fingerprint},
        "sae": {
            "name": folder.name,
            "path": str(folder),
            "hookpoint": hookpoints[0].name,
            "architecture": sae.architecture,
            "d_sae": width,
            "fingerprint": sae.metadata["fingerprint"],
        },
        "store": {"key": gathered.store.path.name, "path": str(gathered.store.path)},
        "tokens_forwarded": gathered.stats.tokens_forwarded,
        "n_trained_on": len(trained),
        "n_measured": len(latents),
    }
    if targets:
        about["sae"]["hookpoint_out"] = hookpoints[1].name
        about["finding"] = [transcoder_sentence(cfg.sae_trainer, about, result.metrics)]
    write_provenance(context, cfg, result.notes, gathered.placement.skips, **about)
    with context.stage("report"):
        result.figures = training_figures(context.folder)
        write_training_report(context.folder, result.figures)
    if writable:
        _remove(training.checkpoints, lock)
    return result


def _remove(checkpoints: Checkpoints, lock: Path) -> None:
    """Remove the checkpoints of a finished training, unless a process has begun the same one."""
    held = try_lock(lock)
    if held is not None:
        checkpoints.remove()
        held.release()


def off_target(trainer: SAETrainerConfig, l0: float | int | None) -> list[str]:
    """A note where a BatchTopK kind ended far from the k it was given, off training batches."""
    k = trainer.options.get("k")
    if not k or not l0 or "batchtopk" not in trainer.name or k / _FAR <= l0 <= k * _FAR:
        return []
    return [
        f"L0 is {l0:.1f} on held-out positions, where k is {k:g}: the threshold that stands in for "
        "the k largest of a batch is an average over the training and has not settled; train "
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
    found = []
    for name, key in _CURVE.items():
        here, there = measured[key], last[f"train/{name}"]
        if here is None:
            continue
        if name == "l0":
            differs = not l0_reported and not there / _FAR <= here <= there * _FAR
        else:
            differs = abs(here - there) > _DIFFERENT
        if differs:
            found.append(f"{name.replace('_', ' ')} {here:.3g}, the curve ends at {there:.3g}")
    if not found:
        return []
    short = f", more than the {n_steps} of this training" if n_steps <= dead_window else ""
    return [
        f"{measured['sparsity/n_positions']:,} held-out positions disagree with the training "
        f"curve: {'; '.join(found)} (of the last batch; there a latent is dead after "
        f"sae_trainer.dead_feature_window={dead_window} inactive steps{short}); the held-out "
        "numbers count, and more or more varied texts bring them closer"
    ]


_FAR = 1.5
"""Factor between L0 and k, or held-out L0 and the curve's, from which on a note reports it."""
_DIFFERENT = 0.15
"""Difference of explained variances, or dead fractions, from which on a note reports it."""
_CURVE = {
    "l0": "sparsity/l0",
    "explained_variance": "reconstruction/explained_variance",
    "dead_fraction": "sparsity/dead_fraction",
}
"""Last name of a curve -> the same number, held out."""

_ORDER = (
    "embed",
    "resid_pre",
    "attn_z",
    "attn_out",
    "resid_mid",
    "mlp_in_normalized",
    "mlp_in",
    "mlp_out",
    "resid_post",
)
"""Streams of a block in the order in which they are computed."""


def _what(cfg: RunConfig) -> tuple[list[Hookpoint], int]:
    """([stream read, and a transcoder's output], width)."""
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
    forwards = _ORDER.index(streams[0]) < _ORDER.index(streams[-1])
    if transcoder and (not forwards or hookpoints[0].stored == hookpoints[1].stored):
        raise ConfigError(
            f"task.streams={streams}: a transcoder predicts a stream that comes after the one it "
            "reads; type 'task.streams=[mlp_in,mlp_out]'"
        )
    width = parse_width(cfg.width)
    if width is None:
        raise ConfigError("width is not set; type width=<number of latents>, such as width=2k")
    return hookpoints, width


def _split(rows: pd.DataFrame, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows to train on, rows held out), whole texts at a time, seeded."""
    texts = np.unique(rows["text_id"])
    n = max(1, round(share * len(texts)))
    if n >= len(texts):
        raise ConfigError(
            f"{len(texts)} texts are too few to train on some and hold {share:g} of them out"
        )
    held = np.random.default_rng(seed).permutation(texts)[:n]
    out = rows["text_id"].isin(held).to_numpy()
    return np.flatnonzero(~out), np.flatnonzero(out)


def _some(rows: np.ndarray, n: int, seed: int) -> np.ndarray:
    if len(rows) <= n:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, n, replace=False))


def _reader(streams: list[Tensor], rows: np.ndarray, cfg: RunConfig) -> Reader:
    """Batches of the stream, or of both beside each other: their rows are aligned."""
    about = cfg.sae_trainer

    def start(step: int) -> Iterator[Tensor]:
        readers = [
            ShuffledReader(acts, rows, about.batch_size, about.seed, step) for acts in streams
        ]
        if len(readers) == 1:
            return readers[0]
        return (torch.cat(parts, dim=-1) for parts in zip(*readers, strict=True))

    return start


def _key(
    cfg: RunConfig,
    gathered: Gathered,
    hookpoints: list[Hookpoint],
    width: int,
    trained: np.ndarray,
) -> str:
    """What determines the result; checkpoints of a killed run are found by it."""
    parts = [
        gathered.store.path.name,
        hashlib.sha256(trained.astype("<i8").tobytes()).hexdigest(),
        ">".join(h.name for h in hookpoints),
        width,
        asdict(cfg.sae_trainer),
        cfg.seed,
        [metadata.version(name) for name in ("saexp", "sae-lens", "torch")],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _density(latents: Latents) -> pd.DataFrame:
    """Per latent: share of held-out positions where it fires, mean where active, maximum."""
    about = moments(latents.csr, np.ones(len(latents), dtype=bool), 0.0)
    return pd.DataFrame(
        {
            "latent": np.arange(latents.d_sae),
            "frequency": about.frequency,
            "mean_active": about.total / np.maximum(about.active, 1),
            "max": about.maximum,
        }
    )


def _values(latents: Latents, seed: int) -> pd.DataFrame:
    """A seeded sample of activations that are not zero, for the histogram."""
    values = latents.csr.data
    if len(values) > N_MEASURED:
        values = np.random.default_rng(seed).choice(values, N_MEASURED, replace=False)
    return pd.DataFrame({"value": values})
