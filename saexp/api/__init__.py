"""Runs from Python: compose a config (also of texts in memory), run it, build one component."""

import datetime
import json
import logging
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir

from saexp import registry, tracking
from saexp.config import (
    RunConfig,
    SAEConfig,
    TrackerConfig,
    is_composition_error,
    one_line,
    register_schema,
    to_run_config,
    to_tracker_config,
)
from saexp.config.environment import as_typed, masked
from saexp.config.run import conf_folder, for_hydra, plugins_in
from saexp.context import ObjectCache, RunContext
from saexp.digests import remember_in
from saexp.distributed import check_task, launched
from saexp.errors import ConfigError, StoreError
from saexp.files import RUN_FOLDER, cannot_write_run, write_error, write_text
from saexp.pipeline import finished
from saexp.pipeline.run_folder import (
    TRACKED_TABLES,
    effect_series,
    holding,
    note_pages,
    page_states,
    tracked_artifacts,
)
from saexp.registry import load_plugins
from saexp.results import Result, check_result
from saexp.saes.training_pass import trainings_to_share
from saexp.sweeps import check_before, group_of, run_name, tracked_config
from saexp.sweeps.passes import hookpoints_to_prefetch, record_rates
from saexp.tracking import Recorder

log = logging.getLogger(__name__)

_composing = threading.Lock()
"""Hydra composes one config at a time per process."""

N_TRACKED_ROWS = 10_000
"""Rows of a tracked table; the file in the run's folder has all."""


def compose(overrides: Sequence[str] = ()) -> RunConfig:
    """A typed config from the same words as on the command line.

    Imports the modules that the words list under `plugins`. Raises ConfigError.
    """
    load_plugins(plugins_in(overrides))
    register_schema()
    try:
        with _composing, initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
            words = for_hydra(overrides)
            return to_run_config(hydra_compose("config", overrides=words), words=words)
    except Exception as error:
        if not is_composition_error(error):
            raise
        raise one_line(error) from error


def build(kind: str, cfg: Any, **runtime: Any) -> Any:
    """Build one component: model, sae, dataset, positions, analyzer, intervention, tracker."""
    return registry.build(kind, cfg, **runtime)


def neuronpedia_url(sae: Any, latent: int) -> str | None:
    """URL of a latent's page on Neuronpedia; None if the catalogue has no id for the SAE."""
    from saexp.saes import catalogue

    return catalogue.neuronpedia_url(sae, latent)


def neuronpedia_list(sae: Any, latents: Sequence[int]) -> str | None:
    """URL of a list of latents on Neuronpedia; None if the catalogue has no id for the SAE."""
    from saexp.saes import catalogue

    return catalogue.neuronpedia_list(sae, latents)


def open_store(path: str | PathLike[str]) -> Any:
    """Open an activation store: `.rows`, `.hookpoints`, `.acts(layer, stream)`."""
    from saexp.activations import ActivationStore

    return ActivationStore.open(path)


def run(
    cfg: RunConfig,
    folder: str | Path | None = None,
    *,
    command: str | None = None,
    sweep: Path | None = None,
    objects: ObjectCache | None = None,
) -> Result:
    """Run a config and return its result; files go to `folder`, by default outputs/<date>/<time>.

    `command` is recorded as the command that started the run, `sweep` is the folder of the sweep
    that the run is a cell of. Runs that are given the same `objects` share the model, SAEs and
    latents that they have in common. Raises SaexpError for anything the user can fix; what was
    computed until then stays on disk.
    """
    now = datetime.datetime.now()
    default = Path("outputs") / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S-%f}"
    run_folder = Path(folder) if folder else default
    with holding(run_folder):
        load_plugins(cfg.plugins)
        return _run(cfg, run_folder, now, command, sweep, objects or ObjectCache())


def _run(
    cfg: RunConfig,
    folder: Path,
    now: datetime.datetime,
    command: str | None,
    sweep: Path | None,
    objects: ObjectCache,
) -> Result:
    """Run in a folder that this process holds."""
    if cfg.sweep.dry_run:
        raise ConfigError(
            "nothing is run: a dry run is printed only where sweep.dry_run=true is typed by itself "
            "on the command line"
        )
    check_task(cfg.task.name, resume=bool(cfg.resume))
    (folder / "error.txt").unlink(missing_ok=True)
    remember_in(cfg.cache_dir)
    key = finished.fingerprint(cfg)
    # With `verify`, stored activations are read again rather than reusing an earlier result.
    if cfg.resume and not cfg.verify and cfg.task.name not in finished.ALWAYS_RUN:
        earlier = finished.find_finished(cfg, key, folder)
        if earlier is not None and finished.reuse(cfg, earlier, folder, finished.inputs(cfg)):
            return _reused(cfg, earlier.folder, folder, sweep)
    check_before(cfg)
    # Before the imports of the task, because W&B inspects every module that is loaded.
    tracker = _start(cfg, folder, sweep)
    context = RunContext(
        folder=folder,
        tracker=tracker,
        command=command or " ".join(sys.argv),
        started=now.isoformat(timespec="seconds"),
        prefetch=hookpoints_to_prefetch(cfg, sweep),
        trainings=trainings_to_share(cfg, sweep),
        objects=objects,
        inputs=finished.inputs(cfg),
    )
    pages = page_states(folder)
    try:
        result = registry.resolve("task", cfg.task.name)(cfg, context)
        check_result(result, f"task '{cfg.task.name}'")
        _track(cfg, tracker, result, folder)
        note_pages(context, pages)
        finished.record(cfg, context, key)
        record_rates(cfg, result, context)
    except BaseException as error:
        shown = cannot_write_run(error, folder) or error
        write_error(folder, masked(f"{type(shown).__name__}: {shown}\n"))
        # A failure to write now must not hide the error of the run.
        with suppress(StoreError):
            note_pages(context, pages)
        tracker.finish(1)
        if shown is error:
            raise
        raise shown from error
    tracker.finish(0)
    result.path = folder
    return result


def _reused(cfg: RunConfig, earlier: Path, folder: Path, sweep: Path | None) -> Result:
    """The result of a finished run; a copy in another folder gets a tracked run of its own."""
    log.info("reusing the finished run in %s", earlier)
    result = read_result(folder)
    if earlier.resolve() != folder.resolve():
        tracker = _start(cfg, folder, sweep)
        try:
            _track(cfg, tracker, result, folder)
        except BaseException:
            tracker.finish(1)
            raise
        tracker.finish(0)
    return result


def _start(cfg: RunConfig, folder: Path, sweep: Path | None) -> Recorder:
    tracker = cfg.tracker if launched().is_first else TrackerConfig(kind="none")
    return _opened(tracker, asdict(cfg), folder, sweep)


def _opened(
    tracker: TrackerConfig, config: dict[str, Any], folder: Path, sweep: Path | None
) -> Recorder:
    # W&B's own process may run in another working directory.
    return tracking.start(
        tracker,
        folder=folder.resolve(),
        config=as_typed(tracked_config(config)),
        name=run_name(config, folder, sweep),
        job_type=config["task"]["name"],
        group=group_of(sweep),
        sweep=None if sweep is None else sweep.resolve(),
    )


def track_failure(config: dict[str, Any], folder: Path, sweep: Path) -> None:
    """Record a cell that could not start as a failed tracked run; `config` is the composed one."""
    _opened(to_tracker_config(config["tracker"]), config, folder, sweep).finish(1)


def _track(cfg: RunConfig, tracker: Recorder, result: Result, folder: Path) -> None:
    """Record a result; the final numbers last, since a series must not replace them."""
    if {cfg.tracker.kind, *cfg.tracker.kinds} == {"none"}:
        return
    for point in effect_series(result.tables):
        tracker.series("coefficient", point)
    for name in (name for name in TRACKED_TABLES if name in result.tables):
        table = result.tables[name]
        if len(table) > N_TRACKED_ROWS:
            log.info("%s: %d of %d rows are tracked", name, N_TRACKED_ROWS, len(table))
        tracker.table(name, table.head(N_TRACKED_ROWS))
    if cfg.tracker.artifacts:
        for artifact in tracked_artifacts(folder):
            tracker.artifact(artifact)
    for name, figure in result.figures.items():
        tracker.figure(name, figure)
    tracker.metrics(result.metrics)


def read_result(folder: str | Path) -> Result:
    """The result of an earlier run, read from its files.

    Raises StoreError if a file is missing, damaged, or was changed since the run wrote it.
    """
    from saexp.reports.saved_run import SavedRun

    path = Path(folder)
    saved = SavedRun(path)
    metrics, provenance, tables = dict(saved.metrics), saved.provenance, saved.tables()
    figures = {}
    if "evaluation" in tables:
        from saexp.reports.sae_quality import evaluation_figures

        figures = evaluation_figures(path)
    elif provenance["config"]["task"]["name"] != "analyze":
        pass
    else:
        from saexp.reports.analysis import report_figures

        figures = report_figures(path)
    return Result(metrics, tables, figures, list(provenance["notes"]), path)


def positions_overrides(positions: str | Sequence[int]) -> list[str]:
    """Settings of a run for an option of the group `positions`, or for token indices."""
    if isinstance(positions, str):
        return [f"positions={positions}"]
    indices = ",".join(str(int(i)) for i in positions)
    return ["positions=indices", f"positions.indices=[{indices}]", "positions.include_special=true"]


def config_of_texts(
    model: Any,
    sae: Any,
    file: Path,
    names: tuple[str, str],
    overrides: Sequence[str],
) -> RunConfig:
    """The config of the run; for provenance it describes the objects that are in memory."""
    layer = sae.hookpoint.layer
    fixed = ["dataset=jsonl", "dataset.path=file", "intervention=none", "tracker=none"]
    cfg = compose([*fixed, f"layer={layer}", *overrides])
    sae_config = SAEConfig(
        name=str(sae.metadata.get("name", "in-memory")),
        loader="path",
        path=sae.metadata.get("path"),
        layer=layer,
        model_name=model.name,
    )
    data = replace(cfg.dataset, path=str(file), groups=list(names), model_name=model.name)
    return replace(cfg, model=model.cfg, sae=sae_config, dataset=data, width=None)


def write_texts(file: Path, groups: dict[str, Sequence[str]]) -> None:
    """Write the texts of the groups as JSONL, as `dataset=jsonl` reads it."""
    lines = [
        json.dumps({"text": text, "group": name, "id": f"{name}_{i}"}, ensure_ascii=False)
        for name, texts in groups.items()
        for i, text in enumerate(texts)
    ]
    write_text(file, "\n".join(lines) + "\n", option=RUN_FOLDER)
