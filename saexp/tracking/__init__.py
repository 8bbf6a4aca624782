"""Trackers: where a run's metrics, tables and figures are recorded."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from saexp import registry
from saexp.config import TrackerConfig
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
        for tracker in self._trackers:
            tracker.metrics(values)

    def series(self, axis: str, values: Metrics) -> None:
        """Record a point of a series."""
        for tracker in self._trackers:
            tracker.series(axis, values)

    def table(self, name: str, table: Any) -> None:
        """Record a DataFrame."""
        for tracker in self._trackers:
            tracker.table(name, table)

    def figure(self, name: str, figure: Any) -> None:
        """Record a plotly figure."""
        for tracker in self._trackers:
            tracker.figure(name, figure)

    def artifact(self, artifact: Artifact) -> None:
        """Record files that the run read or wrote."""
        for tracker in self._trackers:
            tracker.artifact(artifact)

    def finish(self, exit_code: int) -> None:
        """Close the run; 0 is success."""
        for tracker in self._trackers:
            tracker.finish(exit_code)


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
