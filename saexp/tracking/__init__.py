"""Trackers: where a run's metrics, tables and figures are recorded."""

import importlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from saexp import registry
from saexp.config import TrackerConfig
from saexp.errors import ConfigError
from saexp.files import RUN_FOLDER, cannot_write

log = logging.getLogger(__name__)


Metrics = Mapping[str, float | int | None]


@dataclass(frozen=True)
class Artifact:
    """Files that a run read or wrote, for trackers that record which run used what."""

    name: str
    type: str
    """store, sae, results or sweep."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Name in the artifact -> file; these are uploaded."""
    reference: Path | None = None
    """A folder or file that is recorded by its path alone, however large it is."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    is_input: bool = False
    """Whether the run read it rather than wrote it."""


class Recorder(Protocol):
    """Records one open run."""

    def metrics(self, values: Metrics) -> None:
        """Record the run's final numbers."""
        ...

    def series(self, axis: str, values: Metrics) -> None:
        """Record a point of a series; `values[axis]` is where on the x-axis it is."""
        ...

    def table(self, name: str, table: Any) -> None:
        """Record a DataFrame."""
        ...

    def figure(self, name: str, figure: Any) -> None:
        """Record a plotly figure."""
        ...

    def artifact(self, artifact: Artifact) -> None:
        """Record files that the run read or wrote."""
        ...

    def finish(self, exit_code: int) -> None:
        """Close the run; 0 is success."""
        ...


class Tracker(Recorder, Protocol):
    """Records one run, after `start`."""

    def start(
        self,
        *,
        folder: Path,
        config: Mapping[str, Any],
        name: str,
        job_type: str,
        group: str | None,
        sweep: Path | None,
    ) -> None:
        """Open the run; `sweep` is the folder of the sweep that it belongs to."""
        ...


class NullTracker:
    """Records nothing."""

    def __init__(self, cfg: TrackerConfig) -> None:
        self.cfg = cfg

    def start(self, **_: Any) -> None:
        """Do nothing."""

    def metrics(self, values: Metrics) -> None:
        """Do nothing."""

    def series(self, axis: str, values: Metrics) -> None:
        """Do nothing."""

    def table(self, name: str, table: Any) -> None:
        """Do nothing."""

    def figure(self, name: str, figure: Any) -> None:
        """Do nothing."""

    def artifact(self, artifact: Artifact) -> None:
        """Do nothing."""

    def finish(self, exit_code: int) -> None:
        """Do nothing."""


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
        """Write name, group, job type, notes, tags and the config. Raises ConfigError."""
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard", error) from error
        place = folder / "tensorboard"
        try:
            self.writer = SummaryWriter(str(place))
        except OSError as error:
            raise cannot_write(place, error, option=RUN_FOLDER) from error
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

    After its first error it records nothing more, so that a server that does not answer delays a
    run once.
    """

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

        Raises ConfigError without the package or a server that takes the run."""
        for variable, value in _MLFLOW_VARIABLES.items():
            os.environ.setdefault(variable, value)
        try:
            self.mlflow = importlib.import_module("mlflow")
        except ImportError as error:
            raise _missing("mlflow", error) from error
        self.failed = False
        uri = os.environ.get("MLFLOW_TRACKING_URI") or str((sweep or folder).resolve() / "mlruns")
        experiment = self.cfg.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "saexp"
        tags = dict.fromkeys(self.cfg.tags, "true") | {"job_type": job_type}
        tags |= {
            "group": self.cfg.group or group or "",
            "mlflow.note.content": self.cfg.notes or "",
        }
        try:
            self.client: Any = self.mlflow.MlflowClient(tracking_uri=uri)
            self.run = self.client.create_run(
                self._experiment(experiment), run_name=self.cfg.name or name, tags=tags
            ).info.run_id
            entities = self.mlflow.entities
            params = [entities.Param(k, str(v)[:_N_CHARACTERS]) for k, v in _flat(config).items()]
            for at in range(0, len(params), _N_PARAMS):
                self.client.log_batch(self.run, params=params[at : at + _N_PARAMS])
        except (self.mlflow.MlflowException, OSError) as error:
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

    def metrics(self, values: Metrics) -> None:
        """Record numbers at step 0."""
        self._numbers(finite(values), 0)

    def series(self, axis: str, values: Metrics) -> None:
        """Record a point; see `whole_steps`."""
        step, numbers = whole_steps(axis, values)
        self._numbers(numbers, step)

    def _numbers(self, values: Mapping[str, float | int], step: int) -> None:
        metric, now = self.mlflow.entities.Metric, int(time.time() * 1000)
        records = [metric(name, float(value), now, step) for name, value in values.items()]
        for at in range(0, len(records), _N_METRICS):
            part = records[at : at + _N_METRICS]
            self._once(lambda part=part: self.client.log_batch(self.run, metrics=part))

    def table(self, name: str, table: Any) -> None:
        """Record a DataFrame as an artifact that MLflow shows as a table."""
        self._once(lambda: self.client.log_table(self.run, table, f"tables/{name}.json"))

    def figure(self, name: str, figure: Any) -> None:
        """Record a plotly figure as a page."""
        text = figure.to_html(include_plotlyjs="cdn")
        self._once(lambda: self.client.log_text(self.run, text, f"figures/{name}.html"))

    def artifact(self, artifact: Artifact) -> None:
        """Record files; what is recorded by its path alone becomes a tag."""
        place = f"artifacts/{artifact.name.replace('/', '-')}"
        for file in artifact.files.values():
            self._once(lambda file=file: self.client.log_artifact(self.run, str(file), place))
        if artifact.reference is not None:
            tag = f"{'input' if artifact.is_input else 'output'}.{artifact.type}"
            self._once(lambda: self.client.set_tag(self.run, tag, str(artifact.reference)))

    def finish(self, exit_code: int) -> None:
        """Close the run as finished or failed."""
        status = "FAILED" if exit_code else "FINISHED"
        self._once(lambda: self.client.set_terminated(self.run, status))

    def _once(self, call: Callable[[], Any]) -> None:
        if self.failed:
            return
        try:
            call()
        except Exception:
            self.failed = True
            raise


_N_TEXT_ROWS = 50
"""Rows of a table that TensorBoard shows."""
_N_METRICS, _N_PARAMS, _N_CHARACTERS = 1000, 100, 6000
"""Limits of MLflow: numbers and parameters in one call, characters of a parameter."""
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


def _missing(kind: str, error: ImportError) -> ConfigError:
    return ConfigError(
        f"tracker={kind} needs a package that is not installed ({error}); type pip install "
        f"'saexp[{kind}]'"
    )


class Guarded:
    """A started tracker whose errors become one warning, so that they never end the run."""

    def __init__(self, tracker: Tracker, name: str) -> None:
        self._tracker, self._name = tracker, name
        self._warned = False

    def metrics(self, values: Metrics) -> None:
        """Record numbers."""
        self._attempt("metrics", lambda: self._tracker.metrics(values))

    def series(self, axis: str, values: Metrics) -> None:
        """Record a point of a series."""
        self._attempt(f"a series over {axis}", lambda: self._tracker.series(axis, values))

    def table(self, name: str, table: Any) -> None:
        """Record a DataFrame."""
        self._attempt(f"the table '{name}'", lambda: self._tracker.table(name, table))

    def figure(self, name: str, figure: Any) -> None:
        """Record a plotly figure."""
        self._attempt(f"the figure '{name}'", lambda: self._tracker.figure(name, figure))

    def artifact(self, artifact: Artifact) -> None:
        """Record files that the run read or wrote."""
        self._attempt(f"the artifact '{artifact.name}'", lambda: self._tracker.artifact(artifact))

    def finish(self, exit_code: int) -> None:
        """Close the run; 0 is success."""
        self._attempt("the end of the run", lambda: self._tracker.finish(exit_code))

    def _attempt(self, what: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            if not self._warned:
                log.warning(
                    "tracker=%s did not record %s (%s); the run and its files are complete "
                    "without it",
                    *(self._name, what, brief(error)),
                )
            self._warned = True


class Several:
    """Several started trackers, each of which records everything."""

    def __init__(self, trackers: Sequence[Recorder]) -> None:
        self._trackers = trackers

    def metrics(self, values: Metrics) -> None:
        """Record the run's final numbers."""
        self._each(lambda tracker: tracker.metrics(values))

    def series(self, axis: str, values: Metrics) -> None:
        """Record a point of a series."""
        self._each(lambda tracker: tracker.series(axis, values))

    def table(self, name: str, table: Any) -> None:
        """Record a DataFrame."""
        self._each(lambda tracker: tracker.table(name, table))

    def figure(self, name: str, figure: Any) -> None:
        """Record a plotly figure."""
        self._each(lambda tracker: tracker.figure(name, figure))

    def artifact(self, artifact: Artifact) -> None:
        """Record files that the run read or wrote."""
        self._each(lambda tracker: tracker.artifact(artifact))

    def finish(self, exit_code: int) -> None:
        """Close the run; 0 is success."""
        self._each(lambda tracker: tracker.finish(exit_code))

    def _each(self, call: Callable[[Recorder], None]) -> None:
        for tracker in self._trackers:
            call(tracker)


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
    # A kind that was typed by itself replaces those of the options.
    kinds = [k for k, is_on in cfg.kinds.items() if is_on] if cfg.kind in cfg.kinds else [cfg.kind]
    guarded = []
    for kind in kinds:
        tracker: Tracker = registry.build("tracker", replace(cfg, kind=kind))
        tracker.start(
            folder=folder, config=config, name=name, job_type=job_type, group=group, sweep=sweep
        )
        guarded.append(Guarded(tracker, kind))
    return guarded[0] if len(guarded) == 1 else Several(guarded)
