"""Where a run's metrics, tables and figures are sent. The only room that knows W&B."""

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from saexp.config import TrackerConfig
from saexp.errors import ConfigError
from saexp.files import RUN_FOLDER, cannot_write

log = logging.getLogger(__name__)

Metrics = Mapping[str, float | int | None]


class Tracker(Protocol):
    """A sink for one run."""

    def start(
        self,
        *,
        folder: Path,
        config: Mapping[str, Any],
        name: str,
        job_type: str,
        group: str | None,
    ) -> None:
        """Open the run."""
        ...

    def metrics(self, values: Metrics) -> None:
        """Record numbers."""
        ...

    def table(self, name: str, table: Any) -> None:
        """Record a DataFrame."""
        ...

    def figure(self, name: str, figure: Any) -> None:
        """Record a plotly figure."""
        ...

    def finish(self, exit_code: int) -> None:
        """Close the run; 0 is success."""
        ...


class NullTracker:
    """Sends nothing anywhere."""

    def __init__(self, cfg: TrackerConfig) -> None:
        self.cfg = cfg

    def start(self, **_: Any) -> None:
        """Nothing to open."""

    def metrics(self, values: Metrics) -> None:
        """Nothing recorded."""

    def table(self, name: str, table: Any) -> None:
        """Nothing recorded."""

    def figure(self, name: str, figure: Any) -> None:
        """Nothing recorded."""

    def finish(self, exit_code: int) -> None:
        """Nothing to close."""


class JsonlTracker(NullTracker):
    """Appends one JSON object per event to `tracker.jsonl` in the run's folder."""

    def start(self, *, folder: Path, **about: Any) -> None:
        """Open the file and write config, name, group and job type."""
        self.path = folder / "tracker.jsonl"
        self._write("start", about)

    def metrics(self, values: Metrics) -> None:
        """One line with all numbers."""
        self._write("metrics", dict(values))

    def table(self, name: str, table: Any) -> None:
        """One line with the table's name, columns and row count."""
        self._write("table", {"name": name, "columns": list(table.columns), "n_rows": len(table)})

    def figure(self, name: str, figure: Any) -> None:
        """One line with the figure as plotly JSON."""
        self._write("figure", {"name": name, "figure": json.loads(figure.to_json())})

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


def has_key() -> bool:
    """Whether W&B could log in without asking: a key in the environment or in netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    files = [os.environ.get("NETRC"), Path.home() / ".netrc", Path.home() / "_netrc"]
    return any(f and Path(f).is_file() and host in Path(f).read_text("utf-8") for f in files)


class WandbTracker(NullTracker):
    """Weights & Biases; offline by itself where no key is set, never a prompt."""

    def __init__(self, cfg: TrackerConfig) -> None:
        super().__init__(cfg)
        if cfg.mode not in (None, "online", "offline", "disabled"):
            raise ConfigError(f"tracker.mode={cfg.mode}: choose online, offline or disabled")
        import wandb

        self.wandb: Any = wandb

    def start(
        self,
        *,
        folder: Path,
        config: Mapping[str, Any],
        name: str,
        job_type: str,
        group: str | None,
    ) -> None:
        """Open a W&B run in the run's folder."""
        asked = self.cfg.mode or os.environ.get("WANDB_MODE")
        if asked == "online" and not has_key():
            typed = "tracker.mode" if self.cfg.mode else "WANDB_MODE"
            raise ConfigError(
                f"{typed}=online, but no W&B key is set; set WANDB_API_KEY or type wandb login "
                "first, or type tracker.mode=offline"
            )
        mode = asked or ("online" if has_key() else "offline")
        try:
            self.run: Any = self.wandb.init(
                project=self.cfg.project,
                entity=self.cfg.entity,
                group=self.cfg.group or group,
                job_type=job_type,
                name=name,
                config=dict(config),
                dir=str(folder),
                mode=mode,
                reinit="create_new",
                settings=self.wandb.Settings(silent=True, console="off", x_disable_stats=True),
            )
        except (self.wandb.Error, ValueError) as error:
            told = " ".join(str(error).split())[:240]
            raise ConfigError(
                f"tracker=wandb: W&B begins no run ({told}); fix that, or type "
                "tracker.mode=offline or tracker=none"
            ) from error

    def metrics(self, values: Metrics) -> None:
        """Numbers go to the run's summary and history."""
        sent = {k: v for k, v in values.items() if v is not None and not math.isnan(v)}
        self.run.log(sent)

    def table(self, name: str, table: Any) -> None:
        """A W&B table."""
        # W&B takes pandas' own missing value for a type of its own; None it knows.
        plain = table.astype(object).where(table.notna(), None)
        # Rows as lists: from a DataFrame W&B looks every value up by itself, ten times slower.
        made = self.wandb.Table(
            columns=list(plain.columns),
            data=plain.to_numpy().tolist(),
            optional=table.isna().any().tolist(),
            allow_mixed_types=True,
        )
        self.run.log({f"tables/{name}": made})

    def figure(self, name: str, figure: Any) -> None:
        """An interactive W&B figure."""
        self.run.log({f"figures/{name}": self.wandb.Plotly(figure)})

    def finish(self, exit_code: int) -> None:
        """Finish the run with its exit code."""
        self.run.finish(exit_code=exit_code)
