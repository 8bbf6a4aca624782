"""Trackers: where a run's metrics, tables and figures are recorded."""

import importlib
import importlib.util
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from saexp import registry
from saexp.config import TrackerConfig
from saexp.errors import ConfigError
from saexp.files import RUN_FOLDER, cannot_write
from saexp.results import Artifact
from saexp.tracking.outages import Call, within

log = logging.getLogger(__name__)


Metrics = Mapping[str, float | int | None]


class Recorder:
    """Records one open run; what a subclass does not define, it does not record."""

    def metrics(self, values: Metrics) -> None:
        """Record the run's final numbers."""

    def series(self, axis: str, values: Metrics) -> None:
        """Record a point of a series; `values[axis]` is where on the x-axis it is."""

    def table(self, name: str, table: Any) -> None:
        """Record a DataFrame."""

    def figure(self, name: str, figure: Any) -> None:
        """Record a plotly figure."""

    def artifact(self, artifact: Artifact) -> None:
        """Record files that the run read or wrote."""

    def finish(self, exit_code: int) -> None:
        """Close the run; 0 is success."""


class NullTracker(Recorder):
    """Records nothing; the base of the others, which record one run after their `start`."""

    def __init__(self, cfg: TrackerConfig) -> None:
        self.cfg = cfg

    @staticmethod
    def check(cfg: TrackerConfig) -> None:
        """Raise ConfigError for what would make every start fail: a package, a key, a mode."""

    def start(
        self,
        *,
        folder: Path,
        config: Mapping[str, Any],
        name: str,
        job_type: str,
        group: str | None,
        sweep: Path | None = None,
    ) -> None:
        """Open the run; `sweep` is the folder of the sweep that it belongs to."""


class JsonlTracker(NullTracker):
    """Appends one JSON object per event to `tracker.jsonl` in the run's folder."""

    def start(self, *, folder: Path, sweep: Path | None = None, **about: Any) -> None:  # noqa: ARG002
        """Write config, name, group and job type as the first line."""
        self.path = folder / "tracker.jsonl"
        self._write("start", about)

    def metrics(self, values: Metrics) -> None:
        """Write a line with all numbers."""
        self._write("metrics", dict(values))

    def series(self, axis: str, values: Metrics) -> None:
        """Write a line with the numbers of a point and the name of its x-axis."""
        self._write("series", {"axis": axis, **values})

    def table(self, name: str, table: Any) -> None:
        """Write a line with the table's name, columns and number of rows."""
        self._write("table", {"name": name, "columns": list(table.columns), "n_rows": len(table)})

    def figure(self, name: str, figure: Any) -> None:
        """Write a line with the figure as plotly JSON."""
        self._write("figure", {"name": name, "figure": json.loads(figure.to_json())})

    def artifact(self, artifact: Artifact) -> None:
        """Write a line with the artifact's name, type, files and whether the run read it."""
        names = {"name": artifact.name, "type": artifact.type, "files": list(artifact.files)}
        self._write("artifact", {**names, "is_input": artifact.is_input})

    def finish(self, exit_code: int) -> None:
        """Write the exit code."""
        self._write("finish", {"exit_code": exit_code})

    def _write(self, event: str, content: Mapping[str, Any]) -> None:
        line = json.dumps({"event": event, **content}, default=str) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise cannot_write(self.path, error, option=RUN_FOLDER) from error


class TensorboardTracker(NullTracker):
    """Event files for TensorBoard in the run's folder, under `tensorboard/`.

    TensorBoard shows no plotly figures; they are in the run's report.
    """

    @staticmethod
    def check(cfg: TrackerConfig) -> None:  # noqa: ARG004
        """Raise ConfigError without the package."""
        _require_package("tensorboard")

    def start(
        self,
        *,
        folder: Path,
        config: Mapping[str, Any],
        name: str,
        job_type: str,
        group: str | None,
        sweep: Path | None = None,  # noqa: ARG002
    ) -> None:
        """Write name, group, job type, notes, tags and the config."""
        from torch.utils.tensorboard.writer import SummaryWriter

        logdir = folder / "tensorboard"
        try:
            self.writer = SummaryWriter(str(logdir))
        except OSError as error:
            raise cannot_write(logdir, error, option=RUN_FOLDER) from error
        self.config, self.job_type = dict(config), job_type
        about = {"name": self.cfg.name or name, "group": self.cfg.group or group}
        about |= {"job_type": job_type, "tags": list(self.cfg.tags), "notes": self.cfg.notes}
        self._text("run", json.dumps(about, indent=2))
        self._text("config", json.dumps(self.config, indent=2, default=str))

    def metrics(self, values: Metrics) -> None:
        """Record scalars at step 0, and the plain config, by which TensorBoard compares runs."""
        from torch.utils.tensorboard.summary import hparams

        numbers = finite(values)
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, 0)
        plain = {k: str(v) if isinstance(v, list) else v for k, v in self.config.items()}
        plain = {k: v for k, v in plain.items() if isinstance(v, str | int | float)}
        # Not the first summary, which would limit TensorBoard to the metrics of one run.
        for summary in hparams(plain, {})[1:] if self.job_type != "sweep" else ():
            self.writer._get_file_writer().add_summary(summary)

    def series(self, axis: str, values: Metrics) -> None:
        """Record a point; see `whole_steps`."""
        step, numbers = whole_steps(axis, values)
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def table(self, name: str, table: Any) -> None:
        """Record the first rows as text: TensorBoard has no tables."""
        shown = table.head(_N_TEXT_ROWS).astype(object)
        rows = [list(table.columns), ["---"] * len(table.columns), *shown.to_numpy().tolist()]
        cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
        lines = ["| " + " | ".join(row) + " |" for row in cells]
        lines += ["", f"{len(shown)} of {len(table)} rows"]
        self.writer.add_text(f"tables/{name}", "\n".join(lines), 0)

    def artifact(self, artifact: Artifact) -> None:
        """Record the paths of the files as text; nothing is copied."""
        about = {"type": artifact.type, "is_input": artifact.is_input}
        about |= {"files": [*artifact.files.values()], "reference": artifact.reference}
        self._text(f"artifacts/{artifact.name}", json.dumps(about, indent=2, default=str))

    def finish(self, exit_code: int) -> None:
        """Write the exit code, and close the file."""
        self._text("exit_code", str(exit_code))
        self.writer.close()

    def _text(self, name: str, text: str) -> None:
        self.writer.add_text(name, "".join(f"    {line}\n" for line in text.splitlines()), 0)


class MlflowTracker(NullTracker):
    """MLflow: a server or database named by MLFLOW_TRACKING_URI, else the folder `mlruns` of the
    run or of its sweep.

    What the server refuses is left out. After errors that took `patience_seconds` together nothing
    more is recorded but the end of the run, so that a server that does not answer delays a run
    once.
    """

    patience_seconds = 3.0

    def __init__(self, cfg: TrackerConfig) -> None:
        super().__init__(cfg)
        self.client: Any = None
        self.run: Any = None
        self._lost_seconds = 0.0
        self._names: dict[str, str] = {}
        """Name of a metric or parameter -> the one that MLflow permits."""

    @staticmethod
    def check(cfg: TrackerConfig) -> None:  # noqa: ARG004
        """Raise ConfigError without the package."""
        _require_package("mlflow")

    def start(
        self,
        *,
        folder: Path,
        config: Mapping[str, Any],
        name: str,
        job_type: str,
        group: str | None,
        sweep: Path | None = None,
    ) -> None:
        """Open a run in the experiment `tracker.project`, else MLFLOW_EXPERIMENT_NAME, else saexp.

        Raises ConfigError without a server that takes the run."""
        for variable, value in _MLFLOW_VARIABLES.items():
            os.environ.setdefault(variable, value)
        self.mlflow = importlib.import_module("mlflow")
        uri = os.environ.get("MLFLOW_TRACKING_URI") or str((sweep or folder).resolve() / "mlruns")
        experiment = self.cfg.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "saexp"
        tags = dict.fromkeys(self.cfg.tags, "true") | {"job_type": job_type}
        tags |= {
            "group": self.cfg.group or group or "",
            "mlflow.note.content": self.cfg.notes or "",
        }
        try:
            self.client = self.mlflow.MlflowClient(tracking_uri=uri)
            self.run = self.client.create_run(
                self._experiment(experiment), run_name=self.cfg.name or name, tags=tags
            ).info.run_id
            param, flat = self.mlflow.entities.Param, _flat(config)
            params = [param(self._permitted(k), str(v)[:_N_CHARACTERS]) for k, v in flat.items()]
            for at in range(0, len(params), _N_PARAMS):
                self.client.log_batch(self.run, params=params[at : at + _N_PARAMS])
        except (self.mlflow.MlflowException, OSError) as error:
            if self.run is not None:
                within(self.patience_seconds, lambda: self._terminate("FAILED"))
            server, reason = uri.rpartition("@")[2], brief(error)  # Without a password.
            raise ConfigError(
                f"tracker=mlflow: {server} does not take the run ({reason.replace(uri, server)}); "
                "check MLFLOW_TRACKING_URI, or type tracker=none"
            ) from error

    def _experiment(self, name: str) -> str:
        """The id of an experiment, which is created where there is none."""
        existing = self.client.get_experiment_by_name(name)
        try:
            return existing.experiment_id if existing else self.client.create_experiment(name)
        except self.mlflow.MlflowException:
            # Another cell of the sweep may have created it in the meantime.
            if (existing := self.client.get_experiment_by_name(name)) is None:
                raise
            return existing.experiment_id

    def _permitted(self, name: str) -> str:
        """The name as MLflow permits it: the same for every point of a metric, and for no other."""
        if name not in self._names:
            parts = re.sub(r"[^/\w.\- ]", "_", name)[:_N_NAME].split("/")
            words = "/".join(p for p in parts if p not in ("", ".", "..")) or "_"
            while words in self._names.values():
                words += "_"
            self._names[name] = words
        return self._names[name]

    def metrics(self, values: Metrics) -> None:
        """Record numbers at step 0."""
        self._numbers(finite(values), 0)

    def series(self, axis: str, values: Metrics) -> None:
        """Record a point; see `whole_steps`."""
        step, numbers = whole_steps(axis, values)
        self._numbers(numbers, step)

    def _numbers(self, values: Mapping[str, float | int], step: int) -> None:
        metric, now = self.mlflow.entities.Metric, int(time.time() * 1000)
        records = [metric(self._permitted(k), float(v), now, step) for k, v in values.items()]
        for at in range(0, len(records), _N_METRICS):
            part = records[at : at + _N_METRICS]
            self._attempt(lambda part=part: self.client.log_batch(self.run, metrics=part))

    def table(self, name: str, table: Any) -> None:
        """Record a DataFrame as an artifact that MLflow shows as a table."""
        self._attempt(lambda: self.client.log_table(self.run, table, f"tables/{name}.json"))

    def figure(self, name: str, figure: Any) -> None:
        """Record a plotly figure as a page."""
        text = figure.to_html(include_plotlyjs="cdn")
        self._attempt(lambda: self.client.log_text(self.run, text, f"figures/{name}.html"))

    def artifact(self, artifact: Artifact) -> None:
        """Record files; what is recorded by its path alone becomes a tag."""
        remote_path = f"artifacts/{artifact.name.replace('/', '-')}"
        for file in artifact.files.values():
            self._attempt(
                lambda file=file: self.client.log_artifact(self.run, str(file), remote_path)
            )
        if artifact.reference is not None:
            tag = f"{'input' if artifact.is_input else 'output'}.{artifact.type}"
            self._attempt(lambda: self.client.set_tag(self.run, tag, str(artifact.reference)))

    def finish(self, exit_code: int) -> None:
        """Close the run as finished or failed."""
        end = Call(lambda: self._terminate("FAILED" if exit_code else "FINISHED"))
        end.join(self.patience_seconds if self._is_lost else None)
        if (error := end.result()[0]) is not None:
            raise error

    def _terminate(self, status: str) -> None:
        self.client.set_terminated(self.run, status)

    @property
    def _is_lost(self) -> bool:
        return self._lost_seconds >= self.patience_seconds

    def _attempt(self, call: Callable[[], Any]) -> None:
        if self._is_lost:
            return
        began = time.monotonic()
        try:
            call()
        except Exception:
            self._lost_seconds += time.monotonic() - began
            raise


_N_TEXT_ROWS = 50
"""Rows of a table that TensorBoard shows."""
_N_METRICS, _N_PARAMS, _N_CHARACTERS, _N_NAME = 1000, 100, 6000, 240
"""Limits of MLflow: numbers and parameters in one call, characters of a parameter and a name."""
_MLFLOW_VARIABLES = {
    # MLflow refuses to write to a folder without this, and its databases need more packages.
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # By default a server that does not answer delays each call for minutes.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}


def finite(values: Metrics) -> dict[str, float | int]:
    """The values that are numbers, not missing or infinite."""
    return {k: v for k, v in values.items() if v is not None and math.isfinite(v)}


def whole_steps(axis: str, values: Metrics) -> tuple[int, dict[str, float | int]]:
    """A point of a series as a whole step and its numbers.

    A fraction becomes a step in thousandths, in a series of its own name.
    """
    at, numbers = values[axis], finite(values)
    numbers.pop(axis, None)
    if at is None or isinstance(at, int):
        return at or 0, numbers
    return round(1000 * at), {f"{name} by {axis} in thousandths": v for name, v in numbers.items()}


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config as one level, `model.name`; an explicit plain value comes first."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat = {**_flat(value, f"{prefix}{key}."), **flat}
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _require_package(kind: str) -> None:
    if importlib.util.find_spec(kind) is None:
        raise ConfigError(
            f"tracker={kind} needs the package {kind}, which is not installed; type pip install "
            f"'saexp[{kind}]'"
        )


class Guarded(Recorder):
    """Started trackers, each of which records everything.

    The errors of a tracker become one warning, so that they never end the run.
    """

    def __init__(self, trackers: Mapping[str, Recorder]) -> None:
        self._trackers, self._warned = trackers, set[str]()

    def metrics(self, values: Metrics) -> None:
        """Record the run's final numbers."""
        self._each("metrics", lambda tracker: tracker.metrics(values))

    def series(self, axis: str, values: Metrics) -> None:
        """Record a point of a series."""
        self._each(f"a series over {axis}", lambda tracker: tracker.series(axis, values))

    def table(self, name: str, table: Any) -> None:
        """Record a DataFrame."""
        self._each(f"the table '{name}'", lambda tracker: tracker.table(name, table))

    def figure(self, name: str, figure: Any) -> None:
        """Record a plotly figure."""
        self._each(f"the figure '{name}'", lambda tracker: tracker.figure(name, figure))

    def artifact(self, artifact: Artifact) -> None:
        """Record files that the run read or wrote."""
        self._each(f"the artifact '{artifact.name}'", lambda tracker: tracker.artifact(artifact))

    def finish(self, exit_code: int) -> None:
        """Close the run; 0 is success."""
        self._each("the end of the run", lambda tracker: tracker.finish(exit_code))

    def _each(self, what: str, call: Callable[[Recorder], None]) -> None:
        for name, tracker in self._trackers.items():
            try:
                call(tracker)
            except Exception as error:
                if name not in self._warned:
                    log.warning(
                        "tracker=%s did not record %s (%s); the run and its files are complete "
                        "without it",
                        *(name, what, brief(error)),
                    )
                self._warned.add(name)


def brief(error: BaseException) -> str:
    """An error as one short line."""
    return " ".join(str(error).split())[:240] or type(error).__name__


def start(
    cfg: TrackerConfig,
    *,
    folder: Path,
    config: Mapping[str, Any],
    name: str,
    job_type: str,
    group: str | None,
    sweep: Path | None = None,
) -> Recorder:
    """Open a run with the configured tracker or trackers.

    `name` and `group` are used where the config has none; `sweep` is the folder of the sweep that
    the run belongs to. Errors of the tracker's `start` are raised, before any work: they concern
    settings that the user can fix. Later errors are not, see `Guarded`.
    """
    check(cfg)
    started: dict[str, Recorder] = {}
    try:
        for kind in _kinds(cfg):
            tracker = registry.build("tracker", replace(cfg, kind=kind))
            tracker.start(
                folder=folder, config=config, name=name, job_type=job_type, group=group, sweep=sweep
            )
            started[kind] = tracker
    except BaseException:
        Guarded(started).finish(1)
        raise
    return Guarded(started)


def check(cfg: TrackerConfig) -> None:
    """Raise ConfigError for what would make every start of the trackers fail."""
    for kind in _kinds(cfg):
        target = registry.resolve("tracker", kind)
        # A custom tracker need not have it.
        getattr(target, "check", NullTracker.check)(replace(cfg, kind=kind))


def _kinds(cfg: TrackerConfig) -> list[str]:
    # A kind that was typed by itself replaces those of the options.
    return [k for k, is_on in cfg.kinds.items() if is_on] if cfg.kind in cfg.kinds else [cfg.kind]
