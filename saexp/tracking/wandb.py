"""Weights & Biases as a tracker.

An outage of the server never stops a run and delays it by at most 10 s: the start of an online run
waits a few seconds, and its end waits for the upload only as long as the server answers. Otherwise
the run is recorded offline in the run's folder, for a later `wandb sync`.
"""

import base64
import hashlib
import json
import logging
import math
import os
import re
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

from saexp.config import TrackerConfig
from saexp.errors import ConfigError
from saexp.tracking import Artifact, Metrics, NullTracker, brief, finite
from saexp.tracking.outages import (
    GRACE_SECONDS,
    PROCESS,
    Call,
    limit_exit,
    service,
    service_ended,
    within,
)

log = logging.getLogger(__name__)

_INIT_SECONDS = 4.0
"""How long the start of a run waits for the server; WANDB_INIT_TIMEOUT overrides it."""
_UPLOAD_SECONDS = 300.0
"""How long the end of a run waits for an upload to a server that answers; WANDB_FINISH_TIMEOUT
overrides it, and 0 means no limit."""
_CHECK_SECONDS, _ANSWER_SECONDS = 4.0, 2.0
"""How often the end of a run asks whether the server still answers, and how long that may take."""
_RECORD_SECONDS = 5.0
"""How long recording a run again offline may take."""


def has_key() -> bool:
    """Whether W&B can log in without a prompt: a key in the environment or in netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    files = [os.environ.get("NETRC"), Path.home() / ".netrc", Path.home() / "_netrc"]
    return any(f and host.encode() in _content(Path(f)) for f in files)


def _content(path: Path) -> bytes:
    """A file's bytes; empty if it is missing or cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _seconds(name: str, default: float) -> float:
    """A limit from the environment, in seconds."""
    value = os.environ.get(name) or default
    try:
        return float(value)
    except ValueError:
        raise ConfigError(
            f"{name}={value} is not a number of seconds; type one such as 60"
        ) from None


class WandbTracker(NullTracker):
    """Weights & Biases; offline where no key is set or no server answers, never with a prompt."""

    @staticmethod
    def check(cfg: TrackerConfig) -> None:
        """Raise ConfigError for an unknown mode, and for the mode online without a key."""
        if cfg.mode not in (None, "online", "offline", "disabled"):
            raise ConfigError(f"tracker.mode={cfg.mode}: choose online, offline or disabled")
        if (cfg.mode or os.environ.get("WANDB_MODE")) == "online" and not has_key():
            source = "tracker.mode" if cfg.mode else "WANDB_MODE"
            raise ConfigError(
                f"{source}=online, but no W&B key is set; set WANDB_API_KEY or type wandb login "
                "first, or type tracker.mode=offline"
            )

    def __init__(self, cfg: TrackerConfig) -> None:
        super().__init__(cfg)
        # W&B's telemetry waits 20 s at exit for a server that hangs.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.wandb: Any = wandb
        self.run: Any = None
        self.online = False
        self.outage = False
        """Whether the run is offline only because the server did not answer."""
        self._about: dict[str, Any] = {}
        self.in_sweep = False
        self._recorded: list[_Action] = []
        """What an online run recorded, to record it again offline."""
        self._groups: set[str] = set()
        """Groups of metrics (`effect/…`) that have an axis."""
        self._failure: Exception | None = None

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
        """Open a W&B run; offline if the server does not answer.

        Its files are in the folder of the run or of its sweep, unless WANDB_DIR names another. What
        the config leaves open, W&B's environment variables decide. A cell that is started again in
        its sweep's folder continues its W&B run.
        """
        requested = self.cfg.mode or os.environ.get("WANDB_MODE")
        # W&B itself reads its variables only once in a process.
        env, self.in_sweep = os.environ.get, sweep is not None
        tags = [tag for tag in env("WANDB_TAGS", "").split(",") if tag]
        self._about = {
            "project": self.cfg.project or env("WANDB_PROJECT") or "saexp",
            "entity": self.cfg.entity or env("WANDB_ENTITY"),
            "group": self.cfg.group or env("WANDB_RUN_GROUP") or group,
            "name": name,
            "notes": self.cfg.notes or env("WANDB_NOTES"),
            "tags": list(self.cfg.tags) or tags or None,
            "job_type": job_type if sweep else env("WANDB_JOB_TYPE") or job_type,
            "config": dict(config),
            "dir": env("WANDB_DIR") or str(sweep or folder),
            "id": _cell_id(folder, config) if sweep else env("WANDB_RUN_ID"),
            "resume": None if sweep else env("WANDB_RESUME"),
            "reinit": "create_new",
        }
        if sweep and any(Path(self._about["dir"]).glob(f"wandb/run-*-{self._about['id']}")):
            # Only where there is a run to resume: it costs a query.
            self._about["resume"] = "allow"
        mode = requested or ("online" if has_key() else "offline")
        if mode != "online":
            self._open(mode)
            return
        if self._server() not in PROCESS.unreachable:
            if self._open_online():
                return
            if self._about["id"]:
                # In W&B's process the attempt that failed still has the id.
                self._about["id"] += "-offline"
        self.outage = True
        self._open("offline")

    def _server(self) -> str:
        return os.environ.get("WANDB_BASE_URL", "")

    def _settings(self) -> Any:
        """Quiet, with short timeouts as far as this version of wandb supports them."""
        values = {
            "silent": True,
            "console": "off",
            # Cells that run at once share a folder, and would replace each other's links.
            "symlink": False,
            "x_disable_stats": True,
            "init_timeout": _seconds("WANDB_INIT_TIMEOUT", _INIT_SECONDS),
            "finish_timeout": _seconds("WANDB_FINISH_TIMEOUT", _UPLOAD_SECONDS),
            "finish_timeout_raises": True,
        }
        known = self.wandb.Settings.model_fields
        return self.wandb.Settings(**{k: v for k, v in values.items() if k in known})

    def _init(self, mode: str) -> Any:
        about = self._about if mode == "online" else {**self._about, "resume": None}
        run = self.wandb.init(**about, mode=mode, settings=self._settings())
        # W&B records later imports, which would fail once its process is gone. W&B has no public
        # method for this.
        run._unregister_telemetry_import_hooks(run.id)
        return run

    def _open(self, mode: str) -> None:
        """Open a run that needs no server."""
        try:
            self.run = self._init(mode)
        except (self.wandb.errors.UsageError, ValueError) as error:
            raise self._refusal(brief(error)) from error
        except Exception as error:
            log.warning("W&B records nothing of this run: %s", brief(error))

    def _open_online(self) -> bool:
        """Open a run on the server; False, after one warning, if it does not answer.

        Raises ConfigError if the server refuses the key, the entity or the project.
        """
        authentication = self.wandb.errors.AuthenticationError
        try:
            self.run = self._init("online")
        except (authentication, self.wandb.errors.UsageError, ValueError) as error:
            raise self._refusal(brief(error)) from error
        except Exception as error:
            answered = isinstance(error, self.wandb.errors.CommError)
            timed_out = not answered or "Timed out" in str(error)
            status = None if timed_out else self._answer(_INIT_SECONDS)[0]
            if status in (200, 401, 403):
                answer = f"HTTP {status}: " if status != 200 else ""
                raise self._refusal(f"{answer}{brief(error)}") from error
            reason = brief(error).partition(" Consider increasing")[0]
            log.warning(
                "W&B does not answer (%s): this run and later ones of this process are recorded "
                "offline",
                reason,
            )
            self._give_up()
            if not answered:
                self._replace_service()
            return False
        self.online = True
        _log_artifacts_without_asking(self.run)
        return True

    def _refusal(self, reason: str) -> ConfigError:
        return ConfigError(
            f"tracker=wandb: W&B refuses the run ({reason}); check the key (WANDB_API_KEY, wandb "
            "login), tracker.entity and tracker.project, or type tracker.mode=offline or "
            "tracker=none"
        )

    def _answer(self, seconds: float) -> tuple[int | None, bytes]:
        """Status and body of the server's answer to a query for the key's owner; status None if it
        does not answer."""
        settings = self.wandb.setup().settings
        key = base64.b64encode(f"api:{settings.api_key}".encode()).decode()
        request = urllib.request.Request(
            f"{settings.base_url}/graphql",
            data=b'{"query": "query Viewer {viewer {id}}"}',
            headers={"Authorization": f"Basic {key}", "Content-Type": "application/json"},
        )
        answers: list[tuple[int, bytes]] = []

        def ask() -> None:
            try:
                with urllib.request.urlopen(request, timeout=seconds) as answer:
                    answers.append((answer.status, answer.read()))
            except urllib.error.HTTPError as error:
                answers.append((error.code, b""))
                error.close()
            except (OSError, HTTPException, ValueError) as error:
                log.debug("no answer of %s: %s", settings.base_url, error)

        within(seconds, ask)
        return answers[0] if answers else (None, b"")

    def metrics(self, values: Metrics) -> None:
        """Record the run's final numbers, in its summary alone: one point makes no chart."""
        numbers = finite(values)
        self._record(lambda run: run.summary.update(numbers))

    def series(self, axis: str, values: Metrics) -> None:
        """Record a point of the history of the groups of `values`, whose x-axis is `axis`."""
        numbers = finite(values)
        for group in dict.fromkeys(name.partition("/")[0] for name in numbers if name != axis):
            if group not in self._groups:
                self._groups.add(group)
                self._record(lambda run, group=group: _define(run, axis, group))
        self._record(lambda run: run.log(numbers))

    def table(self, name: str, table: Any) -> None:
        """Record a W&B table."""

        def action(run: Any) -> None:
            # W&B treats pandas' missing value as a separate type, but knows None.
            plain = table.astype(object).where(table.notna(), None)
            # From a DataFrame W&B looks up every value, which is ten times slower than from lists.
            converted = self.wandb.Table(
                columns=list(plain.columns),
                data=plain.to_numpy().tolist(),
                optional=table.isna().any().tolist(),
                allow_mixed_types=True,
            )
            run.log({f"tables/{name}": converted})

        self._record(action)

    def figure(self, name: str, figure: Any) -> None:
        """Record an interactive W&B figure."""
        self._record(lambda run: run.log({f"figures/{name}": self.wandb.Plotly(figure)}))

    def artifact(self, artifact: Artifact) -> None:
        """Record an artifact as an input or output of the run; a reference is not uploaded."""

        def action(run: Any) -> None:
            # Of a run's results there is one artifact per run, whose versions are its attempts.
            name = f"{artifact.name}-{run.id}" if artifact.type == "results" else artifact.name
            wandb_artifact = self.wandb.Artifact(
                re.sub(r"[^\w.-]+", "-", name)[:128],
                artifact.type,
                metadata=dict(artifact.metadata),
            )
            for path, file in artifact.files.items():
                # Without a copy in W&B's cache: results do not change once they are written.
                wandb_artifact.add_file(str(file), name=path, policy="immutable", skip_cache=True)
            if artifact.reference is not None:
                path = artifact.reference.resolve()
                wandb_artifact.add_reference(path.as_uri(), name=path.name, checksum=False)
            _log_artifact(run, wandb_artifact, is_input=artifact.is_input)

        self._record(action)

    def _record(self, action: "_Action") -> None:
        if self.run is None:
            return
        if self.online:
            self._recorded.append(action)
        if self._failure is not None:
            return
        try:
            action(self.run)
        except Exception as error:
            if not (self.online and service_ended()):
                raise
            self._failure = error

    def finish(self, exit_code: int) -> None:
        """Finish the run with its exit code; what was not uploaded remains for `wandb sync`.

        The run of a whole sweep, which is the last one, logs the command for all of its runs.
        """
        self._finish(exit_code)
        command = None
        if self._about.get("job_type") == "sweep":
            command = sync_command(Path(self._about["dir"]))
        if command is not None:
            log.warning(
                "W&B: runs of this sweep are recorded offline; to upload all of them type: %s",
                command,
            )

    def _finish(self, exit_code: int) -> None:
        PROCESS.exit_codes.append(exit_code)
        if self.run is None:
            return
        folder = Path(self.run.dir).parent
        run = Call(lambda: self.run.finish(exit_code=exit_code))
        if self.online:
            limit = _seconds("WANDB_FINISH_TIMEOUT", _UPLOAD_SECONDS) or math.inf
            # A run that was stopped has little time: SLURM kills it 30 s after its signal.
            self._wait_for_upload(run, min(limit, _CHECK_SECONDS) if exit_code else limit)
        else:
            run.join(None)
        error, ended_by_wandb = run.result()
        if error is None:
            # The end of a sweep says it for all of its runs.
            if folder.name.startswith("offline-") and not self.in_sweep:
                level = logging.WARNING if self.outage else logging.INFO
                log.log(level, "W&B: this run is recorded offline; %s", self._sync(folder))
            return
        if not self.online:
            raise error
        self._give_up()
        # W&B's process may also have ended while it finished the run.
        if not ended_by_wandb or self._failure is not None or service_ended():
            again = Call(lambda: self._record_offline(exit_code))
            if not again.join(_RECORD_SECONDS) or self.run is None:
                log.warning("W&B records only a part of this run (%s)", brief(error))
                return
            folder = Path(self.run.dir).parent
        log.warning("W&B did not take all of this run (%s); %s", brief(error), self._sync(folder))

    def _sync(self, folder: Path) -> str:
        if self.in_sweep and folder.name.startswith("offline-"):
            return "it is recorded offline, and the end of the sweep says how to upload it"
        return f"to upload it type: wandb sync {os.path.relpath(folder)}"

    def _wait_for_upload(self, finish: "Call", limit: float) -> None:
        """Wait for the upload, at most `limit` seconds and only while the server answers."""
        end, reported = time.monotonic() + limit, False
        while not finish.join(min(_CHECK_SECONDS, max(0.0, end - time.monotonic()))):
            if time.monotonic() >= end:
                return
            status, body = self._answer(_ANSWER_SECONDS)
            if status != 200 or b'"viewer"' not in body:
                return
            if not reported:
                log.info("W&B is still uploading this run")
            reported = True

    def _record_offline(self, exit_code: int) -> None:
        """Record an online run again: its file may lack what W&B's process had not written yet."""
        self.run = None
        if (process := service()) is not None:
            # It may wait for the server forever, and the end of this run with it.
            process.kill()
        self._replace_service()
        self._open("offline")
        if self.run is None:
            return
        for action in self._recorded:
            # An error was reported when this was recorded for the first time.
            with suppress(Exception):
                action(self.run)
        self.run.finish(exit_code=exit_code)

    def _replace_service(self) -> None:
        """Let W&B start a new process if its old one is gone."""
        if service_ended():
            within(GRACE_SECONDS, self.wandb.teardown)

    def _give_up(self) -> None:
        """Stop waiting for the server, in later runs of this process and at its exit."""
        PROCESS.unreachable.add(self._server())
        limit_exit()


_Action = Callable[[Any], None]
"""Records something in a W&B run; it is called again to record it a second time."""


def _define(run: Any, axis: str, group: str) -> None:
    """Make `axis` the x-axis of a group; the summary keeps what `metrics` records, not the last."""
    run.define_metric(axis, hidden=True, summary="none")
    run.define_metric(f"{group}/*", step_metric=axis, summary="none")


def _cell_id(folder: Path, config: Mapping[str, Any]) -> str:
    """Id of the W&B run of a sweep's cell: equal when the same cell is started again."""
    content = json.dumps({**config, "tracker": None, "resume": None}, sort_keys=True, default=str)
    return hashlib.sha256(f"{folder.resolve()} {content}".encode()).hexdigest()[:16]


def sync_command(folder: Path) -> str | None:
    """The command that uploads all runs recorded offline in a folder; None where there is none."""
    pattern = "wandb/offline-run-*"
    if not any(folder.glob(pattern)):
        return None
    return f"wandb sync {shlex.quote(os.path.relpath(folder))}/{pattern}"


def _log_artifact(run: Any, artifact: Any, *, is_input: bool) -> None:
    """Record an artifact without waiting for the server, also as an input.

    `run.use_artifact` refuses offline runs and waits for the upload. W&B has no public way to have
    its process do this later.
    """
    settings = run._settings
    mode, settings.mode = settings.mode, "offline"
    try:
        run._log_artifact(artifact, is_user_created=True, use_after_commit=is_input)
    finally:
        settings.mode = mode


def _log_artifacts_without_asking(run: Any) -> None:
    """Leave the upload of a table to W&B's process.

    Online, W&B queries the server about each table in the thread that logs it, for up to 30 s.
    There is no public setting against this.
    """
    log_artifact, settings = run.log_artifact, run._settings

    def log_as_offline(*args: Any, **options: Any) -> Any:
        mode, settings.mode = settings.mode, "offline"
        try:
            return log_artifact(*args, **options)
        finally:
            settings.mode = mode

    run.log_artifact = log_as_offline
