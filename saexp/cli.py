"""The command line: compose a config with Hydra, run it, print the result in a few lines."""

import contextlib
import dataclasses
import gc
import logging
import os
import re
import shlex
import sys
import traceback
from collections.abc import Sequence
from glob import escape, glob
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn, cast

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

from saexp.config import (
    environment,
    is_composition_error,
    key_of,
    one_line,
    register_schema,
    to_run_config,
)
from saexp.config.run import conf_folder, for_hydra, plugins_in
from saexp.context import Stopping, exit_code, message, raise_if_stopped, stoppable, stoppable_cell
from saexp.distributed import check_command, launched, prints_error, quiet_folder
from saexp.errors import ConfigError, SaexpError, StoreError, counted
from saexp.files import SWEEP_FOLDER, cannot_write_run, write_error, write_text
from saexp.registry import FULL_ERROR, explained, load_plugins, wants_traceback


def report_once(logger: logging.Logger | None = None) -> None:
    """Report once on stderr that the log files of a logger (by default the root) lose lines.

    Python would print a traceback for each line. Later lines are written if that is possible again.
    """
    for handler in (logger or logging.getLogger()).handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handleError = _OneReport(handler)  # pyright: ignore[reportAttributeAccessIssue]


class _OneReport:
    """Replaces a handler's `handleError`, which is called while the error is being handled."""

    def __init__(self, handler: logging.FileHandler) -> None:
        self._handler, self._has_reported = handler, False

    def __call__(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            logging.FileHandler.handleError(self._handler, record)
        elif not self._has_reported:
            self._has_reported = True
            sys.stderr.write(f"{self._handler.baseFilename} is incomplete: {error.strerror}\n")


def cell_folder(number: int, overrides: Sequence[str], sweep: str | None = None) -> str:
    """Folder name of a sweep's cell: its number and overrides, safe as a path component.

    Only the overrides that differ between the cells of the sweep (in the folder `sweep`) are named;
    of a sweep without such, or without a plan, all are. Overrides beyond 120 bytes are left out as
    a whole.
    """
    from saexp.sweeps import swept_keys

    swept = swept_keys(Path(sweep)) if sweep else set()
    typed = sorted(_as_typed(overrides))
    varied = [word for word in typed if key_of(word) in swept] or typed
    name = str(number)
    for i, word in enumerate(varied):
        safe = re.sub(r"[^\w.,=+-]+", "_", word)
        longer = f"{name}{',' if i else '_'}{safe}"
        # File systems allow 255 bytes.
        if len(longer.encode()) > 120 and i:
            break
        name = longer.encode()[:120].decode(errors="ignore")
    return name


def _as_typed(overrides: Sequence[str]) -> list[str]:
    """Overrides with their interpolations; OmegaConf resolves them when its lists are iterated."""
    if isinstance(overrides, ListConfig):
        overrides = cast(list[str], OmegaConf.to_container(overrides, resolve=False))
    return [str(word) for word in overrides]


_GARBAGE = (50_000, 20, 50)
"""Thresholds of Python's garbage collector. A run creates millions of small objects that live until
its end (tables, prompts, imported code); with the default thresholds a fully cached run spends a
fifth of its time searching them for cycles."""

_LAUNCHERS = ("submitit", "ray", "joblib")
"""Packages whose errors mean that a process of a sweep was lost."""


_traceback_wanted = False
"""Whether the user asked for tracebacks by Hydra's environment variable, which `main` then changes.
Set once, at the start of the process; Hydra calls `_job`, so that it cannot be an argument."""


@hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")
def _job(raw: DictConfig) -> float | None:
    job = HydraConfig.get()
    if job.mode == RunMode.MULTIRUN:
        from saexp.pipeline.run_folder import reserved_cell

        with stoppable_cell(), reserved_cell(Path(job.runtime.output_dir)):
            return _run(raw, job)
    # If the error left this function, Hydra would print a line of its own.
    try:
        return _run(raw, job)
    except SaexpError as error:
        _fail(error)


def _run(raw: DictConfig, job: HydraConf) -> float | None:
    """Run the job; returns the metric `objective`, NaN where it could not be computed."""
    sweep = Path(job.sweep.dir) if job.mode == RunMode.MULTIRUN else None
    folder = Path(job.runtime.output_dir)
    report_once()
    # Hydra may drop the exception of a signal that arrives while it composes the config.
    raise_if_stopped()
    (folder / "error.txt").unlink(missing_ok=True)
    try:
        cfg = to_run_config(raw, words=_as_typed(job.overrides.task))
        environment.mask_logs()
        if cfg.resume is None:
            cfg = dataclasses.replace(cfg, resume=sweep is not None)
        from saexp import api
        from saexp.sweeps.planning import PROCESS

        result = api.run(cfg, folder, command=_command(sweep), sweep=sweep, objects=PROCESS.objects)
        objective = None if cfg.objective is None else result.objective(cfg.objective)
    except Exception as error:
        failure = _in_one_line(error) or cannot_write_run(error, folder)
        if failure is None:
            raise
        if sweep:
            overrides = ",".join(_as_typed(job.overrides.task))
            if not (folder / "error.txt").is_file():
                _track_failure(raw, folder, sweep)
            line = environment.masked(str(failure))
            print(f"cell {job.job.num} ({overrides}) failed: {line}", file=sys.stderr)
            write_error(folder, f"{type(failure).__name__}: {line}\n")
        if failure is error:
            raise
        raise failure from error
    if launched().is_first:
        _summary(result, folder)
    return objective


def _command(sweep: Path | None) -> str:
    """The command as typed; the process of a sweep's job may have other arguments (submitit)."""
    from saexp.reports.saved_run import read_plan

    typed = read_plan(sweep).get("command") if sweep else None
    return typed or f"python -m saexp {shlex.join(sys.argv[1:])}".strip()


def _in_one_line(error: Exception) -> SaexpError | None:
    """An error that the user can fix, as one line; None for an error in saexp."""
    if isinstance(error, SaexpError):
        return error
    return one_line(error) if is_composition_error(error) else explained(error)


def _track_failure(raw: DictConfig, folder: Path, sweep: Path) -> None:
    """Record a failed run in the sweep's group for a cell that ended before its tracker started."""
    from saexp import api

    # The cell's error is reported anyway, and may be caused by the tracker itself.
    with contextlib.suppress(Exception):
        config: Any = OmegaConf.to_container(raw, resolve=True)
        api.track_failure(config, folder, sweep)


def _summary(result: Any, folder: Path) -> None:
    """Print the finding, then the path of the report."""
    pages = ("report.html", "dashboard.html")
    page = next((name for name in pages if (folder / name).is_file()), None)
    if page is not None:
        from saexp.reports.analysis import headline

        print(headline(folder))
    elif "pages" in result.tables:
        *cells, path = map(Path, result.tables["pages"]["page"])
        if cells:
            print(f"pages of {counted(len(cells), 'cell')} written again")
        folder, page = path.parent, path.name
    elif "workspace" in result.tables:
        for row in result.tables["workspace"].to_dict("records"):
            axes = "".join(
                f" {word} {row[key]}" for word, key in (("over", "x"), ("by", "by")) if row[key]
            )
            print(f"{row['section']}: {row['panel']} of {row['y']}{axes}")
    elif "stores" in result.tables:
        if len(result.tables["stores"]) and "compared" not in result.tables:
            from saexp.tasks.collect import format_listing

            print(format_listing(result.tables["stores"]))
    else:
        rows = result.metrics.get("collection/n_rows")
        forwarded = result.metrics.get("collection/tokens_forwarded")
        print(f"{rows} rows; {forwarded} tokens forwarded")
    for note in result.notes:
        print(f"note: {environment.masked(note)}")
    shown = os.path.relpath(folder)
    print(f"report: {shown}/{page}" if page else f"folder: {shown}")


def program() -> None:
    """Entry point of the process `python -m saexp`, which runs nothing but `main`."""
    gc.set_threshold(*_GARBAGE)
    try:
        main()
    finally:
        # Searching imported code for cycles at exit would take a second.
        gc.freeze()


_WITH_VALUE = ("--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir")
_WITH_VALUE += ("-cd", "--cfg", "-c", "--experimental-rerun")
"""Options of Hydra that are followed by their value."""


def options_first(words: Sequence[str]) -> list[str]:
    """The words with options such as -m before all settings, if some are between settings.

    Hydra's parser takes settings only where they are next to each other.

    >>> options_first(["layer=1,2", "-m", "width=256"])
    ['-m', 'layer=1,2', 'width=256']
    """
    before = ["", *words][: len(words)]
    is_setting = [
        not word.startswith("-") and last not in _WITH_VALUE and (last != "--info" or "=" in word)
        for word, last in zip(words, before, strict=True)
    ]
    if [of_settings for of_settings, _ in groupby(is_setting)].count(True) < 2:
        return list(words)
    pairs = list(zip(words, is_setting, strict=True))
    return [w for w, setting in pairs if not setting] + [w for w, setting in pairs if setting]


def main() -> None:
    """The command line; an error that the user can fix is one line on stderr and exit code 1."""
    global _traceback_wanted
    before = os.environ.get(FULL_ERROR)
    _traceback_wanted = wants_traceback()
    words, lists_options = sys.argv[1:], not {"--help", "-h"}.isdisjoint(sys.argv[1:])
    # The list of options does not depend on settings.
    flags = [w for w in words if w.startswith("-") or "=" not in w]
    try:
        if not {"--shell-completion", "-sc"}.isdisjoint(words) and _completes_path(words):
            return
        check_command(words)
        load_plugins(plugins_in(words))
        register_schema(only_names=lists_options)
        sys.argv[1:] = flags if lists_options else for_hydra(options_first(words))
    except SaexpError as error:
        _fail(error)
    OmegaConf.register_new_resolver("saexp_cell", cell_folder, replace=True)
    # Without this variable Hydra would print a shortened traceback instead of raising the error.
    os.environ[FULL_ERROR] = "1"
    try:
        with quiet_folder() as overrides, stoppable(_cells_running) as stopping:
            sys.argv += overrides
            _until_stopped(stopping)
    finally:
        # Only what was imported can hold a folder; importing it takes longer than --help.
        if "saexp.pipeline.run_folder" in sys.modules:
            from saexp.pipeline.run_folder import release_all

            release_all()
        if before is None:
            os.environ.pop(FULL_ERROR, None)
        else:
            os.environ[FULL_ERROR] = before


_PATH = re.compile(r"(?:.*\s)?(\+{0,2}(?:[\w.]+\.)?(?:path|cache_dir|dir)=)(\S*)", re.DOTALL)
"""The end of a command line at which the shell completes a path."""
_OF_FILES = re.compile(r"\+{0,2}(?!task\.)\w+\.path=")
"""Keys that name a file or a folder; the others name a folder."""


def _completes_path(words: Sequence[str]) -> bool:
    """Whether a shell asks for the paths that complete its line, which are printed then.

    Hydra completes those that begin with `.` or `/`. Raises ConfigError where no shell asks.
    """
    # The completion belongs to the program, also where python -m saexp prints it.
    sys.argv[0] = "saexp"
    if not any(word.startswith("query=") for word in words):
        return False
    if "COMP_LINE" not in os.environ:
        raise ConfigError(
            "-sc query= is for a shell, which sets COMP_LINE; type eval "
            '"$(saexp -sc install=bash)" to complete groups, options and keys'
        )
    match = _PATH.fullmatch(os.environ["COMP_LINE"])
    if match is None:
        return False
    key, typed = match.groups()
    paths = [Path(path) for path in glob(f"{escape(os.path.expanduser(typed))}*")]
    folders = [f"{path}/" for path in paths if path.is_dir()]
    files = [str(path) for path in paths if path.is_file() and _OF_FILES.fullmatch(key)]
    # The shell splits the answer at blanks.
    print(*(f"{key}{path}" for path in sorted([*folders, *files]) if not re.search(r"\s", path)))
    return True


def _until_stopped(stopping: Stopping) -> None:
    """Run the command, and print one line if a signal ended it, even if its exception was lost."""
    try:
        _guarded()
        raise_if_stopped()
    except KeyboardInterrupt as error:
        stopping.cleaning = True
        _fail(message(error), error, exit_code(error))


def _guarded() -> None:
    try:
        _job()
        _end_of_sweep()
    except Exception as error:
        raise_if_stopped()
        if (failure := _in_one_line(error)) is not None:
            _fail(failure, error)
        if (failure := _folder_error(error)) is not None:
            _fail(failure, error)
        if type(error).__module__.partition(".")[0] not in _LAUNCHERS:
            _end_of_sweep()
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        shown = " … ".join(dict.fromkeys([*lines[:1], *lines[-1:]]))
        file = _write_launcher_error(error)
        _fail(
            f"a process of the sweep ended without a result ({type(error).__name__}: {shown}"
            f"{f'; full error in {file}' if file else ''}); what was finished is kept, and the "
            "same command computes the rest",
            error,
        )


def _running_sweep() -> Path | None:
    """Folder of the sweep that this process runs and has not finished."""
    # Only what was imported can run one; importing it would take seconds before an error is shown.
    running = getattr(sys.modules.get("saexp.sweeps.planning"), "running", None)
    return None if running is None else running()


def _write_launcher_error(error: Exception) -> Path | None:
    """Write a launcher's error with its traceback to the sweep's folder; returns the file."""
    folder = _running_sweep()
    if folder is None:
        return None
    path = Path(os.path.relpath(folder)) / "launcher_error.txt"
    text = environment.masked("".join(traceback.format_exception(error)))
    try:
        write_text(path, text, option=SWEEP_FOLDER)
    except StoreError:
        return None
    return path


def _folder_error(error: Exception) -> StoreError | None:
    """The error if Hydra could not write to the folder of this process's run or sweep."""
    from saexp.pipeline.run_folder import reserved

    if isinstance(error, ValueError) and isinstance(error.__cause__, OSError):
        # Raised by logging, which could not open the log file.
        error = error.__cause__
    if folder := _running_sweep():
        return cannot_write_run(error, folder, option=SWEEP_FOLDER)
    return cannot_write_run(error, reserved() or Path.cwd())


def _cells_running() -> bool:
    """Whether cells of this process's sweep run in other processes."""
    folder = _running_sweep()
    if folder is None:
        return False
    from saexp.pipeline.run_folder import LOCK

    return any(folder.glob(f"*/{LOCK}"))


def _end_of_sweep() -> None:
    """After a sweep: write its table and report, from whatever cells there are."""
    if _running_sweep() is None:
        return
    from saexp.sweeps import planning

    planning.finish(lambda summary: print(summary, flush=True))


def _fail(message: str | SaexpError, cause: BaseException | None = None, code: int = 1) -> NoReturn:
    """Print one line on stderr, after the report of a sweep's other cells, and exit."""
    raise_if_stopped()
    try:
        _end_of_sweep()
    except StoreError as other:
        print(f"no report of the sweep: {other}", file=sys.stderr)
    error = cause or (message if isinstance(message, SaexpError) else None)
    if _traceback_wanted and error is not None:
        traceback.print_exception(error)
    if prints_error():
        print(f"saexp: {environment.masked(str(message))}", file=sys.stderr)
    sys.exit(code)
