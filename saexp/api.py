"""saexp from Python: compose a config, run it, build one object, open a store."""

import datetime
import logging
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir

from saexp import registry, tracking
from saexp.config import RunConfig, TrackerConfig, register_schema, to_run_config
from saexp.config.environment import as_typed, masked, one_of
from saexp.config.interventions import PLACES
from saexp.config.messages import of_composition, one_line
from saexp.config.run import conf_folder, with_free_keys, without_plus
from saexp.context import ObjectCache, RunContext
from saexp.digests import remember_in
from saexp.errors import StoreError
from saexp.files import cannot_write_run, write_error
from saexp.pipeline import finished
from saexp.pipeline.run_folder import holding, note_pages, page_states
from saexp.registry import load_plugins
from saexp.results import TaskResult, check_result
from saexp.sweeps.planning import hookpoints_to_prefetch
from saexp.tracking import Recorder

log = logging.getLogger(__name__)

_composing = threading.Lock()
"""Hydra composes one config at a time in a process."""

_ALWAYS_RUN = ("collect", "cache")
"""Tasks whose product is the cache: whether there is anything to do, the cache itself tells."""

_PLACES_ROWS = ("analyze", "collect", "dashboard", "train")
"""Tasks that use the positions group."""

_READS_DATA = (*_PLACES_ROWS, "evaluate", "label")
"""Tasks that use the dataset group; one of the user's own is not known well enough."""


def compose(overrides: Sequence[str] = ()) -> RunConfig:
    """A typed config from the same words as on the command line. Raises ConfigError."""
    register_schema()
    words = list(map(without_plus, overrides))
    try:
        with _composing, initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
            words = with_free_keys(words)
            return to_run_config(hydra_compose("config", overrides=words))
    except Exception as error:
        if not of_composition(error):
            raise
        raise one_line(error) from error


def build(kind: str, cfg: Any, **runtime: Any) -> Any:
    """One object: model, sae, dataset, positions, analyzer, intervention, tracker."""
    return registry.build(kind, cfg, **runtime)


def neuronpedia_url(sae: Any, latent: int) -> str | None:
    """Neuronpedia's page of a latent, by the catalogue's id; None where it has none."""
    from saexp.saes import catalogue

    return catalogue.neuronpedia_url(sae, latent)


def neuronpedia_list(sae: Any, latents: Sequence[int]) -> str | None:
    """Neuronpedia's list of several latents; None where the catalogue has no id for the SAE."""
    from saexp.saes import catalogue

    return catalogue.neuronpedia_list(sae, latents)


def open_store(path: str | Path) -> Any:
    """An existing activation store: `.rows`, `.hookpoints`, `.acts(layer, stream)`."""
    from saexp.activations.store import ActivationStore

    return ActivationStore.open(path)


def run(
    cfg: RunConfig,
    folder: str | Path | None = None,
    *,
    command: str | None = None,
    sweep: Path | None = None,
    objects: ObjectCache | None = None,
) -> TaskResult:
    """One run; its files go to `folder` (outputs/<date>/<time> where not given).

    `sweep` is the folder of the sweep that the run is a cell of. Runs that are given the same
    `objects` share the model, SAEs, and latents that they have in common.
    Raises SaexpError for anything the user can fix; what was computed before stays on disk.
    """
    now = datetime.datetime.now()
    place = Path(folder) if folder else Path("outputs") / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S-%f}"
    with holding(place):
        load_plugins(cfg.plugins)
        return _run(cfg, place, now, command, sweep, objects or ObjectCache())


def _run(
    cfg: RunConfig,
    place: Path,
    now: datetime.datetime,
    command: str | None,
    sweep: Path | None,
    objects: ObjectCache,
) -> TaskResult:
    """A run in its folder, which it holds."""
    (place / "error.txt").unlink(missing_ok=True)
    remember_in(cfg.cache_dir)
    key = finished.fingerprint(cfg)
    # What is to be verified is read again, not taken from a run that read it before.
    if cfg.resume and not cfg.verify and cfg.task.name not in _ALWAYS_RUN:
        earlier = finished.find_finished(cfg, key, place)
        if earlier is not None and finished.reuse(cfg, earlier, place, finished.inputs(cfg)):
            return _reused(cfg, earlier.folder, place, sweep)
    _require_components(cfg)
    # Before the task's imports: W&B inspects every module that is loaded by then.
    tracker = _start(cfg, place, sweep)
    context = RunContext(
        folder=place,
        tracker=tracker,
        command=command or " ".join(sys.argv),
        started=now.isoformat(timespec="seconds"),
        prefetch=hookpoints_to_prefetch(cfg, sweep),
        objects=objects,
        inputs=finished.inputs(cfg),
    )
    pages = page_states(place)
    try:
        result = registry.resolve("task", cfg.task.name)(cfg, context)
        check_result(result, f"task '{cfg.task.name}'")
        _track(tracker, result)
        note_pages(context, pages)
        finished.record(cfg, context, key)
    except BaseException as error:
        shown = cannot_write_run(error, place) or error
        write_error(place, masked(f"{type(shown).__name__}: {shown}\n"))
        # What cannot be written now must not stand in front of the run's own error.
        with suppress(StoreError):
            note_pages(context, pages)
        tracker.finish(1)
        if shown is error:
            raise
        raise shown from error
    tracker.finish(0)
    result.path = place
    return result


def _require_components(cfg: RunConfig) -> None:
    """Raise ConfigError for a component that the task uses and nothing is registered as."""
    task = cfg.task.name
    registry.require("task", task)
    if task in _READS_DATA:
        registry.require("dataset", cfg.dataset.name)
    if task in _PLACES_ROWS:
        registry.require("positions", cfg.positions.name)
    if task != "analyze":
        return
    registry.require("analyzer", cfg.analyzer.name)
    if cfg.intervention.name == "none":
        return
    registry.require("intervention", cfg.intervention.name)
    for outcome in cfg.intervention.outcomes:
        registry.require("outcome", outcome)
    places = (*PLACES, *(n for n in registry.names("positions") if n not in PLACES))
    one_of("intervention.where", cfg.intervention.where, places)


def _reused(cfg: RunConfig, earlier: Path, place: Path, sweep: Path | None) -> TaskResult:
    """The results of a finished run; copied, they get a tracked run of their own."""
    log.info("reusing the finished run in %s", earlier)
    result = read_result(place)
    if earlier.resolve() != place.resolve():
        tracker = _start(cfg, place, sweep)
        try:
            _track(tracker, result)
        except BaseException:
            tracker.finish(1)
            raise
        tracker.finish(0)
    return result


def _start(cfg: RunConfig, place: Path, sweep: Path | None) -> Recorder:
    return tracking.start(
        cfg.tracker,
        folder=place,
        config=as_typed(asdict(cfg)),
        name=run_name(cfg.model.name, cfg.sae.name, cfg.sae.loader, cfg.layer),
        job_type=cfg.task.name,
        group=sweep.name if sweep else None,
    )


def run_name(model: str, sae: str, loader: str, layer: Any) -> str:
    """A tracked run's name; of a control SAE it says so."""
    control = "_control" if loader == "random" else ""
    return masked(f"{model}-{sae}{control}-layer{layer}")


def track_failure(config: dict[str, Any], place: Path, name: str, sweep: Path) -> None:
    """A tracked run, marked failed, of a cell that could not begin; `config` is as composed."""
    tracker = tracking.start(
        TrackerConfig(**config["tracker"]),
        folder=place,
        config=as_typed(config),
        name=name,
        job_type=config["task"]["name"],
        group=sweep.name,
    )
    tracker.finish(1)


def _track(tracker: Recorder, result: TaskResult) -> None:
    tracker.metrics(result.metrics)
    for name in ("latents", "effects_summary"):
        if name in result.tables:
            tracker.table(name, result.tables[name])
    for name, figure in result.figures.items():
        tracker.figure(name, figure)


def read_result(folder: str | Path) -> TaskResult:
    """The result of an earlier run, from its files.

    Raises StoreError where a file is missing, damaged, or was changed since the run wrote it.
    """
    from saexp.reports.saved import SavedRun

    place = Path(folder)
    saved = SavedRun(place)
    metrics, provenance, tables = dict(saved.metrics), saved.provenance, saved.tables()
    figures = {}
    if "evaluation" in tables:
        from saexp.reports.evaluation import evaluation_figures

        figures = evaluation_figures(place)
    elif provenance["config"]["task"]["name"] != "analyze":
        pass
    elif provenance["config"]["analyzer"]["name"] != "contrast":
        from saexp.reports.analyses import analysis_figures

        figures = analysis_figures(place)
    elif "latents" in tables:
        from saexp.reports.figures import run_figures

        figures = run_figures(place)
    return TaskResult(metrics, tables, figures, list(provenance["notes"]), place)
