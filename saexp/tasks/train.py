"""task=train: SAEs or transcoders, trained in one pass, evaluated on held-out texts."""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from saexp.config import RunConfig, SAETrainerConfig, TrainConfig
from saexp.config.groups import CorpusConfig
from saexp.config.tasks import OF_ONE_SAE
from saexp.context import RunContext
from saexp.distributed import Processes, connected
from saexp.errors import ConfigError, ModelError, SaexpError, counted
from saexp.files import RUN_FOLDER, is_writable, locked, try_lock, write_folder
from saexp.latents import Latents, encode_rows
from saexp.latents.statistics import moments
from saexp.models import Hookpoint
from saexp.models.loading import LanguageModel
from saexp.models.resolution import native_dtypes, pick_device
from saexp.pipeline.collect import begins_with_bos
from saexp.pipeline.objects import describe_model, language_model
from saexp.pipeline.run_folder import save_run, skips_table
from saexp.pipeline.training_data import (
    N_MEASURED,
    HeldOutEvaluation,
    StoredData,
    TrainingData,
    off_curve,
    off_target,
)
from saexp.pipeline.training_stream import StreamBatches, StreamedData
from saexp.reports.training import (
    SAES,
    several_sentence,
    training_figures,
    transcoder_sentence,
    write_training_report,
)
from saexp.results import Result, model_words
from saexp.saes.loading import load_sae
from saexp.saes.training import Checkpoints, Record, Training, TrainingSource, labelled
from saexp.saes.training_pass import Evaluate, Target, targets, train_together

log = logging.getLogger(__name__)

PASS_BYTES = {"cuda": 24 * 2**30, "cpu": 4 * 2**30}
"""Limit on the SAEs of one pass that are of other cells of a sweep, by device type."""
_NO_SCORE = (
    "no CE score: zeros in place of the activation do not raise the model's loss on held-out text"
)


@dataclass(frozen=True)
class _Part:
    """One trained SAE with what was measured of it."""

    target: Target
    training: Training
    about: dict[str, Any]
    """Its entry in provenance.json."""
    result: Result
    """Its metrics and tables, without a label."""
    n_trained_on: int
    n_measured: int


def train(cfg: RunConfig, context: RunContext) -> Result:
    """Collect (or find) the activations, train, save in SAELens format, measure, report.

    Of the processes that torchrun started, the first one measures and reports.
    """
    with connected(cfg.device) as processes:
        return _train(cfg, context, processes)


def _train(cfg: RunConfig, context: RunContext, processes: Processes) -> Result:
    assert isinstance(cfg.task, TrainConfig)
    if processes.are_several and cfg.sae_trainer.device:
        raise ConfigError(
            f"sae_trainer.device={cfg.sae_trainer.device}: each process of torchrun trains on its "
            "own device; leave it out"
        )
    model = language_model(cfg, context.objects)
    trainer = _resolved(cfg.sae_trainer, model)
    own = targets(cfg.layer, cfg.width, cfg.task.streams, trainer)
    hookpoints = list(dict.fromkeys(h for target in own for h in target.hookpoints))
    for hookpoint in hookpoints:
        model.check_layer(hookpoint.layer)
    others = _companions(context, model, own)
    with context.stage("collect"):
        data = _opened(cfg, context, model, hookpoints, processes)
    began = time.perf_counter()
    with context.stage("train"):
        trainings = _trained(cfg, context, model, data, own, others, processes)
    if not processes.is_first:
        return Result()
    seconds = time.perf_counter() - began
    with context.stage("measure"):
        others_read = [h for target in others for h in target.hookpoints]
        data.prepare_held_out([*hookpoints, *others_read])
        parts = [
            _measured(cfg, context, model, data, target, training)
            for target, training in zip(own, trainings, strict=True)
        ]
    result = _result(data, parts)
    result.notes[:0] = model.notes
    result.metrics["train/seconds"] = seconds
    about = _provenance(model, data, parts, result)
    result = save_run(context, cfg, result, data.skips, about)
    with context.stage("report"):
        result.figures = training_figures(context.folder)
        write_training_report(context.folder, result.figures)
    if is_writable(cfg.cache_dir):
        for training in trainings:
            _remove_checkpoints(training.checkpoints)
    return result


def _device(trainer: SAETrainerConfig, model: LanguageModel) -> torch.device:
    """Where SAEs are trained."""
    if not trainer.device:
        return model.device
    try:
        return pick_device(trainer.device)
    except ModelError as error:
        raise ConfigError(
            f"sae_trainer.device={trainer.device} is not on this machine; leave it out to train on "
            "the model's device"
        ) from error


def _resolved(trainer: SAETrainerConfig, model: LanguageModel) -> SAETrainerConfig:
    """The settings with `autocast` decided."""
    if trainer.autocast is not None:
        return trainer
    is_native = torch.bfloat16 in native_dtypes(_device(trainer, model))
    return replace(trainer, autocast=is_native and model.dtype == torch.bfloat16)


def _opened(
    cfg: RunConfig,
    context: RunContext,
    model: LanguageModel,
    hookpoints: Sequence[Hookpoint],
    processes: Processes,
) -> TrainingData:
    """Stored activations, or those of a corpus, as `sae_trainer.source` says."""
    is_corpus = isinstance(cfg.dataset, CorpusConfig)
    source = cfg.sae_trainer.source or ("stream" if is_corpus else "store")
    if source == "stream":
        return StreamedData(cfg, model, context.objects, processes)
    return StoredData(cfg, context, model, hookpoints, processes)


def _evaluation(
    cfg: RunConfig, model: LanguageModel, data: TrainingData, processes: Processes
) -> Evaluate | None:
    """How SAEs are evaluated while they are trained, by the first process; None where not."""
    if not cfg.sae_trainer.evaluate_every and isinstance(data, StoredData):
        return None
    evaluation = HeldOutEvaluation(cfg, model, data)
    if not evaluation.is_possible:
        return None
    return lambda trainings: processes.of_first(evaluation(trainings) if processes.is_first else [])


def _folder(context: RunContext, target: Target) -> Path:
    """Where the trained SAE is: `sae`, of several a folder in it."""
    return context.folder / "sae" / target.label


def _trained(
    cfg: RunConfig,
    context: RunContext,
    model: LanguageModel,
    data: TrainingData,
    own: Sequence[Target],
    others: Sequence[Target],
    processes: Processes,
) -> list[Training]:
    """The finished trainings of the run's own SAEs, which are saved.

    `others` are trained in the same pass; their cells find their checkpoints. One process trains at
    a time; another one with the same settings waits, then finds the finished checkpoints.
    """
    folder, writable = Path(cfg.cache_dir) / "training", is_writable(cfg.cache_dir)
    keys = [folder / _key(cfg, data, target) for target in (*own, *others)]

    def begin(target: Target, key: Path) -> Training:
        source = _source(model, data, target)
        training = Training(
            target.trainer,
            target.d_sae,
            source,
            key,
            _device(target.trainer, model),
            writable=writable,
            label=target.label,
            processes=processes,
        )
        training.resume()
        return training

    with _locked([_lock(key) for key in keys] if writable and processes.is_first else []):
        processes.require_same("what they train on", [key.name for key in keys])
        trainings = [begin(*one) for one in zip(own, keys[: len(own)], strict=True)]
        for training in trainings:
            if training.is_finished:
                # By another cell, or before this run ended.
                for record in training.records:
                    _track(context, training, record)
        every = list(trainings)
        if not all(training.is_finished for training in trainings):
            for target, key in zip(others, keys[len(own) :], strict=True):
                # Where it cannot be trained, its own cell reports why.
                with suppress(SaexpError):
                    every.append(begin(target, key))
        if len(every) > len(trainings):
            n = counted(len(every) - len(trainings), "SAE")
            log.info("in the same pass: %s of later cells", n)
        batches, evaluate = data.batches(every, folder), _evaluation(cfg, model, data, processes)
        for training, record in train_together(every, batches, evaluate):
            if training in trainings:
                _track(context, training, record)
        for training in trainings:
            if training.error is not None:
                raise training.error
        data.n_elsewhere = processes.totals([data.tokens_forwarded])[0] - data.tokens_forwarded
        if processes.is_first:
            _save(context, trainings)
            if isinstance(batches, StreamBatches):
                batches.remove()
    return trainings


def _companions(context: RunContext, model: LanguageModel, own: Sequence[Target]) -> list[Target]:
    """SAEs of later cells that are trained in the same pass, as many as fit into memory."""
    left = PASS_BYTES.get(model.device.type, PASS_BYTES["cpu"]) - sum(
        _n_bytes(t, model) for t in own
    )
    result: list[Target] = []
    for entry in context.trainings:
        try:
            trainer = _resolved(entry["sae_trainer"], model)
            layer_targets = targets(entry["layer"], entry["width"], entry["streams"], trainer)
            for hookpoint in (h for target in layer_targets for h in target.hookpoints):
                model.check_layer(hookpoint.layer)
        except SaexpError:
            # Its own cell reports it.
            continue
        known = [_identity(target) for target in (*own, *result)]
        new = [target for target in layer_targets if _identity(target) not in known]
        left -= sum(_n_bytes(target, model) for target in new)
        if left < 0:
            break
        result += [replace(target, label=_identity(target)) for target in new]
    return result


def _identity(target: Target) -> str:
    """Hookpoints, width and settings in one line."""
    names = ">".join(h.name for h in target.hookpoints)
    trainer = target.trainer
    options = ", ".join(f"{k} {v}" for k, v in sorted(trainer.options.items()))
    settings = {key: getattr(trainer, key) for key in OF_ONE_SAE if key != "name"}
    return f"{trainer.name} SAE of {target.d_sae} latents at {names} ({options}; {settings})"


def _n_bytes(target: Target, model: LanguageModel) -> int:
    """Memory of weights, gradients and Adam's moving averages, about."""
    return 4 * 4 * 2 * target.d_sae * model.d_model


def _source(model: LanguageModel, data: TrainingData, target: Target) -> TrainingSource:
    first, *others = target.hookpoints
    source = TrainingSource(
        model_name=model.name,
        hookpoint=first,
        d_in=data.width(first),
        context_size=data.context_size,
        prepend_bos=begins_with_bos(model),
    )
    if others:
        source = replace(source, hookpoint_out=others[0], d_out=data.width(others[0]))
    return source


def _save(context: RunContext, trainings: Sequence[Training]) -> None:
    """Write the SAEs to the run's folder."""
    folder = context.folder / "sae"

    def write(temporary: Path) -> None:
        for training in trainings:
            (temporary / training.label).mkdir()
            training.snapshot(temporary / training.label)

    if len(trainings) == 1:
        trainings[0].save(folder)
    else:
        write_folder(folder, write, option=RUN_FOLDER)
    context.results.update(
        f.relative_to(context.folder).as_posix() for f in folder.rglob("*") if f.is_file()
    )


def _track(context: RunContext, training: Training, record: Record) -> None:
    """Record a point of the training's series over the activation vectors (tokens) it has read."""
    # Older checkpoints have records without the number of vectors.
    n = int(record["train/step"]) * training.cfg.batch_size
    context.tracker.series("train/tokens", {"train/tokens": n, **labelled(record, training.label)})


def _measured(
    cfg: RunConfig,
    context: RunContext,
    model: LanguageModel,
    data: TrainingData,
    target: Target,
    training: Training,
) -> _Part:
    """Encode ordinary held-out positions with the trained SAE."""
    folder = _folder(context, target)
    sae = load_sae(folder).to(model.device)
    held_out = data.held_out(training)
    latents, measured = encode_rows(
        held_out.acts, held_out.chosen, sae, held_out.rows, held_out.target, held_out.ordinary
    )
    latents = latents.where(held_out.ordinary)
    axes = ("train/step", "train/tokens", "train/epoch")
    last = {k: v for k, v in training.records[-1].items() if k not in axes}
    off_k = off_target(target.trainer, measured["sparsity/l0"])
    steps = training.n_steps, target.trainer.dead_feature_window
    about: dict[str, Any] = {
        "name": target.label or folder.name,
        "path": str(folder),
        "hookpoint": target.hookpoints[0].name,
        "architecture": sae.architecture,
        "d_sae": target.d_sae,
        "fingerprint": sae.metadata["fingerprint"],
    }
    if len(target.hookpoints) > 1:
        about["hookpoint_out"] = target.hookpoints[1].name
    tables = {
        "training": pd.DataFrame(training.records).rename(columns=lambda c: c.split("/")[-1]),
        "density": _density(latents),
        "active": pd.DataFrame({"n_active": np.diff(latents.csr.indptr)}),
        "values": _values(latents, cfg.seed),
    }
    notes = [] if "train/ce_loss_score" in last or "train/held_out_l0" not in last else [_NO_SCORE]
    notes += [*off_k, *off_curve(last, measured, *steps, l0_reported=bool(off_k))]
    result = Result({**measured, **last}, tables, notes=notes)
    return _Part(target, training, about, result, data.n_trained_on(training), len(latents))


def _result(data: TrainingData, parts: Sequence[_Part]) -> Result:
    """Metrics, tables and notes of all SAEs; of several, those of each have its label."""
    first = parts[0]
    result = Result(metrics=dict(data.metrics(first.training)))
    notes = [note for part in parts for note in data.notes(part.training)]
    if len(parts) == 1:
        result.metrics |= first.result.metrics
        result.tables |= first.result.tables
        notes += first.result.notes
        notes.append(f"""use it with: sae=local 'sae.path="{first.about["path"]}"'""")
    else:
        of_all = set.intersection(*(set(part.result.notes) for part in parts))
        notes += [f"all SAEs: {note}" for note in sorted(of_all)]
        for part in parts:
            label = part.target.label
            result.metrics |= {f"{k}_{label}": v for k, v in part.result.metrics.items()}
            notes += [f"{label}: {note}" for note in part.result.notes if note not in of_all]
        for name in first.result.tables:
            tables = [p.result.tables[name].assign(sae=p.target.label) for p in parts]
            result.tables[name] = pd.concat(tables, ignore_index=True)
        result.tables[SAES] = _table(parts)
        path = Path(first.about["path"]).parent / "<name>"
        notes.append(f"""use one with: sae=local 'sae.path="{path}"'""")
    result.metrics["train/n_steps"] = first.training.n_steps
    result.tables["skips"] = skips_table(data.skips)
    result.notes = list(dict.fromkeys(notes))
    return result


def _table(parts: Sequence[_Part]) -> pd.DataFrame:
    """A row per SAE: what it is, and its metrics; those on held-out positions by their name."""
    rows = []
    for part in parts:
        numbers = dict(part.result.metrics)
        row: dict[str, Any] = {
            "sae": part.target.label,
            "trainer": part.target.trainer.name,
            "options": json.dumps(part.target.trainer.options, sort_keys=True),
            "seed": part.target.trainer.seed,
            "layer": part.target.hookpoints[0].layer,
            **{k: v for k, v in part.about.items() if k != "name"},
            "n_trained_on": part.n_trained_on,
            "n_measured": part.n_measured,
        }
        for name, value in numbers.items():
            group, _, short = name.partition("/")
            column = short if group != "train" or short == "ce_loss_score" else f"train_{short}"
            row[column] = value
        rows.append(row)
    return pd.DataFrame(rows)


def _provenance(
    model: LanguageModel, data: TrainingData, parts: Sequence[_Part], result: Result
) -> dict[str, Any]:
    """Model, SAEs and data for provenance.json."""
    first = parts[0]
    about: dict[str, Any] = {
        "device": str(model.device),
        "model": describe_model(model),
        "sae": first.about,
        **data.provenance,
        "n_trained_on": first.n_trained_on,
        "n_measured": first.n_measured,
        "autocast": first.target.trainer.autocast,
    }
    if len(parts) > 1:
        saes = [part.about for part in parts]
        joined = {k: ", ".join(dict.fromkeys(str(s[k]) for s in saes if k in s)) for k in saes[0]}
        about |= {"sae": joined, "saes": saes}
        about["finding"] = [several_sentence(model_words(model.name), result.tables[SAES])]
    elif "hookpoint_out" in first.about:
        about["finding"] = [transcoder_sentence(first.target.trainer, about, result.metrics)]
    return about


@contextmanager
def _locked(locks: Sequence[Path]) -> Iterator[None]:
    """Hold several locks; all processes take them in the same order."""
    with ExitStack() as stack:
        for lock in sorted(set(locks)):
            stack.enter_context(locked(lock))
        yield


def _lock(checkpoints: Path) -> Path:
    return checkpoints.with_suffix(".lock")


def _remove_checkpoints(checkpoints: Checkpoints) -> None:
    """Remove the checkpoints of a finished training, unless a process has begun the same one."""
    lock = try_lock(_lock(checkpoints.folder))
    if lock is not None:
        checkpoints.remove()
        lock.release()


def _key(cfg: RunConfig, data: TrainingData, target: Target) -> str:
    """Hash of what determines the result, by which checkpoints of a killed run are found."""
    parts = [
        data.key(target.hookpoints),
        ">".join(h.name for h in target.hookpoints),
        target.d_sae,
        {k: v for k, v in asdict(target.trainer).items() if k != "device"},
        [cfg.sae_trainer.seed, cfg.seed],
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
