"""task=train: an SAE from stored activations, measured on texts it was not trained on."""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from saexp.activations.files import locked
from saexp.activations.reader import ShuffledReader
from saexp.config import RunConfig, parse_layers, parse_width
from saexp.context import RunContext
from saexp.errors import ConfigError
from saexp.latents.encode import Latents, encode_rows
from saexp.latents.summary import moments
from saexp.models.hookpoints import Hookpoint
from saexp.reports.training import training_figures, write_training_report
from saexp.results import TaskResult
from saexp.saes.loading import load_sae
from saexp.saes.training import Place, Training
from saexp.tasks.gathering import Gathered, gather
from saexp.tasks.loaded import language_model
from saexp.tasks.saving import clean_metrics, skips_table, write_provenance, write_result

N_MEASURED = 65_536
"""Held-out positions that are measured, at most."""


def train(cfg: RunConfig, context: RunContext) -> TaskResult:
    """Collect (or find) the activations, train, save in SAELens format, measure, report."""
    hookpoint, width = _what(cfg)
    model = language_model(cfg)
    model.check_layer(hookpoint.layer)
    with context.stage("collect"):
        gathered = gather(cfg, model, [hookpoint], context.ahead)
    acts = gathered.store.acts(hookpoint.layer, hookpoint.stream)
    trained, held_out = _split(gathered.placement.rows, cfg.sae_trainer.held_out, cfg.seed)
    place = Place(model.name, hookpoint, acts.shape[1], cfg.dataset.max_length)
    checkpoints = Path(cfg.cache_dir) / "training" / _key(cfg, gathered, hookpoint, width)
    began = time.perf_counter()
    with context.stage("train"), locked(checkpoints.with_suffix(".lock")):
        training = Training(cfg.sae_trainer, width, place, checkpoints, model.device)
        for record in training.run(_reader(acts, trained, cfg)):
            context.tracker.metrics(record)
        folder = training.save(context.folder / "sae")
    seconds = time.perf_counter() - began
    with context.stage("measure"):
        sae = load_sae(folder).to(model.device)
        chosen = _some(held_out, N_MEASURED, cfg.seed)
        rows = gathered.placement.rows.iloc[chosen].reset_index(drop=True)
        latents, measured = encode_rows(acts, chosen, sae, rows)
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
    result.notes.append(f"""use it with: sae=local 'sae.path="{folder}"'""")
    result.metrics = clean_metrics(result.metrics, result.notes)
    write_result(context.folder, result)
    write_provenance(
        context,
        cfg,
        result.notes,
        gathered.placement.skips,
        device=str(model.device),
        model={"name": model.name, "fingerprint": model.fingerprint},
        sae={
            "name": folder.name,
            "path": str(folder),
            "hookpoint": hookpoint.name,
            "architecture": sae.architecture,
            "d_sae": width,
            "fingerprint": sae.metadata["fingerprint"],
        },
        store={"key": gathered.store.path.name, "path": str(gathered.store.path)},
        tokens_forwarded=gathered.stats.tokens_forwarded,
        n_trained_on=len(trained),
        n_measured=len(chosen),
    )
    with context.stage("report"):
        result.figures = training_figures(context.folder)
        write_training_report(context.folder, result.figures)
    return result


def _what(cfg: RunConfig) -> tuple[Hookpoint, int]:
    layers = [] if cfg.layer is None else parse_layers(cfg.layer)
    if len(layers) != 1 or len(cfg.task.streams) != 1:
        raise ConfigError(
            f"layer={cfg.layer}, task.streams={cfg.task.streams}: task=train takes one of each; "
            "sweep with -m layer=0,1,2"
        )
    width = parse_width(cfg.width)
    if width is None:
        raise ConfigError("width is not set; type width=<number of latents>, such as width=2k")
    return Hookpoint(layers[0], cfg.task.streams[0]), width


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


def _reader(acts: Tensor, rows: np.ndarray, cfg: RunConfig) -> Any:
    about = cfg.sae_trainer

    def start(step: int) -> Iterator[Tensor]:
        return ShuffledReader(acts, rows, about.batch_size, about.seed, step)

    return start


def _key(cfg: RunConfig, gathered: Gathered, hookpoint: Hookpoint, width: int) -> str:
    """What determines the result; checkpoints of a killed run are found by it."""
    parts = [
        gathered.store.path.name,
        hookpoint.name,
        width,
        asdict(cfg.sae_trainer),
        cfg.seed,
        metadata.version("sae-lens"),
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
