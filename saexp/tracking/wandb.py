"""Weights & Biases as a tracker. The only module that imports wandb.

An outage of the server never stops a run and delays it by at most 10 s: the start of an online run
waits a few seconds, and its end waits for the upload only as long as the server answers. Otherwise
the run is recorded offline in the run's folder, for a later `wandb sync`.
"""

import atexit
import base64
import logging
import math
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

from saexp.config import TrackerConfig
from saexp.errors import ConfigError
from saexp.tracking import Metrics, NullTracker, brief

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
_GRACE_SECONDS = 1.0
"""How much longer W&B's service process may take, and how long it may take to end."""
_EXIT_SECONDS = 5.0
"""How much longer the end of this process may take after an outage."""


@dataclass
class _Process:
    """What the runs of one process have in common."""

    unreachable: set[str] = field(default_factory=set)
    """Servers (base URLs) that did not answer; later runs do not wait for them again."""
    exit_codes: list[int] = field(default_factory=list)
    """How the runs ended."""
    limits_exit: bool = False
    """Whether `_limit_exit` was called."""


_PROCESS = _Process()
"""One per process, because W&B has one service per process, which can delay the process's exit."""


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

    def __init__(self, cfg: TrackerConfig) -> None:
        super().__init__(cfg)
        if cfg.mode not in (None, "online", "offline", "disabled"):
            raise ConfigError(f"tracker.mode={cfg.mode}: choose online, offline or disabled")
        # W&B's telemetry waits 20 s at exit for a server that hangs.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.wandb: Any = wandb
        self.run: Any = None
        self.online = False
        self.outage = False
        """Whether the run is offline only because the server did not answer."""
        self._about: dict[str, Any] = {}
        self._logged: list[_Content] = []
        """What an online run logged, to record it again offline."""
        self._failure: Exception | None = None

    def start(
        self, *, folder: Path, config: Mapping[str, Any], group: str | None, **about: str
    ) -> None:
        """Open a W&B run in the run's folder; offline if the server does not answer."""
        requested = self.cfg.mode or os.environ.get("WANDB_MODE")
        if requested == "online" and not has_key():
            source = "tracker.mode" if self.cfg.mode else "WANDB_MODE"
            raise ConfigError(
                f"{source}=online, but no W&B key is set; set WANDB_API_KEY or type wandb login "
                "first, or type tracker.mode=offline"
            )
        self._about = {
            "project": self.cfg.project,
            "entity": self.cfg.entity,
            "group": self.cfg.group or group,
            **about,
            "config": dict(config),
            "dir": str(folder),
            "reinit": "create_new",
        }
        mode = requested or ("online" if has_key() else "offline")
        if mode != "online":
            self._open(mode)
        elif self._server() in _PROCESS.unreachable or not self._open_online():
            self.outage = True
            self._open("offline")

    def _server(self) -> str:
        return os.environ.get("WANDB_BASE_URL", "")

    def _settings(self) -> Any:
        """Quiet, with short timeouts as far as this version of wandb supports them."""
        values = {
            "silent": True,
            "console": "off",
            "x_disable_stats": True,
            "init_timeout": _seconds("WANDB_INIT_TIMEOUT", _INIT_SECONDS),
            "finish_timeout": _seconds("WANDB_FINISH_TIMEOUT", _UPLOAD_SECONDS),
            "finish_timeout_raises": True,
        }
        known = self.wandb.Settings.model_fields
        return self.wandb.Settings(**{k: v for k, v in values.items() if k in known})

    def _init(self, mode: str) -> Any:
        run = self.wandb.init(**self._about, mode=mode, settings=self._settings())
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

        _within(seconds, ask)
        return answers[0] if answers else (None, b"")

    def metrics(self, values: Metrics) -> None:
        """Record numbers in the run's summary and history."""
        finite = {k: v for k, v in values.items() if v is not None and not math.isnan(v)}
        self._log(lambda: finite)

    def table(self, name: str, table: Any) -> None:
        """Record a W&B table."""

        def content() -> dict[str, Any]:
            # W&B treats pandas' missing value as a separate type, but knows None.
            plain = table.astype(object).where(table.notna(), None)
            # From a DataFrame W&B looks up every value, which is ten times slower than from lists.
            converted = self.wandb.Table(
                columns=list(plain.columns),
                data=plain.to_numpy().tolist(),
                optional=table.isna().any().tolist(),
                allow_mixed_types=True,
            )
            return {f"tables/{name}": converted}

        self._log(content)

    def figure(self, name: str, figure: Any) -> None:
        """Record an interactive W&B figure."""
        self._log(lambda: {f"figures/{name}": self.wandb.Plotly(figure)})

    def _log(self, content: "_Content") -> None:
        if self.run is None:
            return
        if self.online:
            self._logged.append(content)
        if self._failure is not None:
            return
        values = content()
        try:
            self.run.log(values)
        except Exception as error:
            if not (self.online and _service_ended()):
                raise
            self._failure = error

    def finish(self, exit_code: int) -> None:
        """Finish the run with its exit code; what was not uploaded remains for `wandb sync`."""
        _PROCESS.exit_codes.append(exit_code)
        if self.run is None:
            return
        folder = Path(self.run.dir).parent
        run = _Call(lambda: self.run.finish(exit_code=exit_code))
        if self.online:
            limit = _seconds("WANDB_FINISH_TIMEOUT", _UPLOAD_SECONDS) or math.inf
            # A run that was stopped has little time: SLURM kills it 30 s after its signal.
            self._wait_for_upload(run, min(limit, _CHECK_SECONDS) if exit_code else limit)
        else:
            run.join(None)
        error, ended_by_wandb = run.result()
        if error is None and not self.outage:
            return
        if error is None:
            log.warning("W&B: this run is recorded offline; %s", _sync(folder))
            return
        if not self.online:
            raise error
        self._give_up()
        if not (ended_by_wandb and self._failure is None):
            again = _Call(lambda: self._record_offline(exit_code))
            if not again.join(_RECORD_SECONDS) or self.run is None:
                log.warning("W&B records only a part of this run (%s)", brief(error))
                return
            folder = Path(self.run.dir).parent
        log.warning("W&B did not take all of this run (%s); %s", brief(error), _sync(folder))

    def _wait_for_upload(self, finish: "_Call", limit: float) -> None:
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
        if (process := _service()) is not None:
            # It may wait for the server forever, and the end of this run with it.
            process.kill()
        self._replace_service()
        self._open("offline")
        if self.run is None:
            return
        for content in self._logged:
            # An error was reported when this was logged for the first time.
            with suppress(Exception):
                self.run.log(content())
        self.run.finish(exit_code=exit_code)

    def _replace_service(self) -> None:
        """Let W&B start a new process if its old one is gone."""
        if _service_ended():
            _within(_GRACE_SECONDS, self.wandb.teardown)

    def _give_up(self) -> None:
        """Stop waiting for the server, in later runs of this process and at its exit."""
        _PROCESS.unreachable.add(self._server())
        _limit_exit()


_Content = Callable[[], Mapping[str, Any]]
"""Makes the values of one call of `log`; it is called again to log them a second time, because a
W&B table can be logged only once."""


def _sync(folder: Path) -> str:
    return f"to upload it type: wandb sync {os.path.relpath(folder)}"


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


class _Call:
    """A call in a separate thread, which can be abandoned if it takes too long."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._errors: list[Exception] = []
        self._began = time.monotonic()

        def attempt() -> None:
            try:
                call()
            except Exception as error:
                self._errors.append(error)

        self._thread = threading.Thread(target=attempt, daemon=True)
        self._thread.start()

    def join(self, seconds: float | None) -> bool:
        """Wait up to so many seconds; returns whether the call has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> tuple[Exception | None, bool]:
        """The call's error (TimeoutError if it is still running), and whether it has ended."""
        if self._thread.is_alive():
            seconds = time.monotonic() - self._began
            return TimeoutError(f"no answer within {seconds:.0f} s"), False
        return (self._errors[0] if self._errors else None), True


def _within(seconds: float, call: Callable[[], Any]) -> None:
    """Call a function, and return after at most so many seconds."""
    _Call(call).join(seconds)


def _service() -> Any:
    """The service process that W&B started, as a Popen object; None if there is none. W&B has no
    public way to get it."""
    from wandb.sdk import wandb_setup

    attribute: Any = wandb_setup
    for name in ("_singleton", "_connection", "_proc", "_process"):
        attribute = getattr(attribute, name, None)
    return attribute


def _service_ended() -> bool:
    """Whether W&B's process is gone: unexpected answers of a server can end it."""
    process = _service()
    try:
        return process is not None and process.wait(_GRACE_SECONDS) is not None
    except subprocess.TimeoutExpired:
        return False


def _limit_exit() -> None:
    """Make this process end soon after its work, whatever W&B still waits for."""
    if _PROCESS.limits_exit:
        return
    _PROCESS.limits_exit = True
    import wandb

    def watch() -> None:
        threading.main_thread().join()
        process, others = _service(), _threads_outside_wandb()
        for thread in others:
            thread.join()
        if process is not None:
            try:
                process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        # An abandoned call can still wait for the answer of a process that is gone.
        time.sleep(_EXIT_SECONDS)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(_status())

    # Started now, because no thread can be started once Python is exiting.
    threading.Thread(target=watch, daemon=True).start()

    @atexit.register
    def end() -> None:
        wandb.termsetup(wandb.Settings(silent=True), None)
        with suppress(BaseException):
            wandb.teardown()


def _threads_outside_wandb() -> list[threading.Thread]:
    """Threads, other than those of W&B, that Python waits for before it exits."""
    frames = sys._current_frames()

    def in_wandb(thread: threading.Thread) -> bool:
        frame = frames.get(thread.ident or 0)
        while frame is not None:
            if frame.f_globals.get("__name__", "").startswith("wandb."):
                return True
            frame = frame.f_back
        return False

    waited_for = [
        t for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()
    ]
    return [thread for thread in waited_for if not in_wandb(thread)]


def _status() -> int:
    """The exit status of this process: that of its runs, or 1 after an uncaught error."""
    return 1 if hasattr(sys, "last_value") else max(_PROCESS.exit_codes, default=0)
