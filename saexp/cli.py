"""The command line: compose with Hydra, run, print the result in a few lines."""

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
from pathlib import Path
from typing import Any, NoReturn, cast

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

from saexp.config import environment, register_schema, to_run_config
from saexp.config.messages import key_of, of_composition, one_line
from saexp.config.run import conf_folder, with_free_keys, without_plus
from saexp.errors import SaexpError, StoreError
from saexp.files import SWEEP_FOLDER, cannot_write_run, write_error, write_text
from saexp.registry import FULL_ERROR, explained, wants_traceback
from saexp.stopping import (
    Stopping,
    exit_code,
    message,
    raise_if_stopped,
    stoppable,
    stoppable_cell,
)


def report_once(logger: logging.Logger | None = None) -> None:
    """For lines that the log files of a logger (the root) cannot take, have one line on stderr.

    Python prints a traceback for each. Lines after them are written if there is room again.
    """
    for handler in (logger or logging.getLogger()).handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handleError = _OneReport(handler)  # pyright: ignore[reportAttributeAccessIssue]


class _OneReport:
    """Stands in for a handler's `handleError`, which is called while the error is handled."""

    def __init__(self, handler: logging.FileHandler) -> None:
        self._handler, self._has_reported = handler, False

    def __call__(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            logging.FileHandler.handleError(self._handler, record)
        elif not self._has_reported:
            self._has_reported = True
            sys.stderr.write(f"{self._handler.baseFilename} lacks lines: {error.strerror}\n")


def cell_folder(number: int, overrides: Sequence[str], sweep: str | None = None) -> str:
    """Folder of a sweep's cell: its number and overrides, safe as one path component.

    What differs between the cells of the sweep (the folder `sweep`) comes first: it must not fall
    to the 120 bytes that a name may have.
    """
    from saexp.sweeps.planning import swept_keys

    swept = swept_keys(Path(sweep)) if sweep else set()
    ordered = sorted(_as_typed(overrides), key=lambda w: (key_of(w) not in swept, w))
    safe = re.sub(r"[^\w.,=+-]+", "_", ",".join(ordered))
    # 255 bytes is what file systems take.
    return f"{number}_{safe}".encode()[:120].decode(errors="ignore")


def _as_typed(overrides: Sequence[str]) -> list[str]:
    """Overrides with their interpolations, which the items of a list of OmegaConf resolve."""
    if isinstance(overrides, ListConfig):
        overrides = cast(list[str], OmegaConf.to_container(overrides, resolve=False))
    return [str(word) for word in overrides]


_GARBAGE = (50_000, 20, 50)
"""When Python searches for cyclic garbage. A run makes millions of small objects that live to its
end (tables, prompts, imported code), and the usual thresholds would have it search them for a fifth
of a run that finds everything cached."""

_LAUNCHERS = ("submitit", "ray", "joblib")
"""Packages whose errors say that a process of a sweep was lost."""


_traceback_wanted = False
"""Whether the user asked for tracebacks, by Hydra's own variable."""


@hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")
def _job(raw: DictConfig) -> None:
    about = HydraConfig.get()
    if about.mode == RunMode.MULTIRUN:
        from saexp.pipeline.run_folder import reserved_cell

        with stoppable_cell(), reserved_cell(Path(about.runtime.output_dir)):
            _run(raw, about)
        return
    # Raised here, Hydra would print a line of its own before ours.
    try:
        _run(raw, about)
    except SaexpError as error:
        _fail(error)


def _run(raw: DictConfig, about: HydraConf) -> None:
    sweep = Path(about.sweep.dir) if about.mode == RunMode.MULTIRUN else None
    folder = Path(about.runtime.output_dir)
    report_once()
    # Hydra may drop the exception of a signal that comes while it composes.
    raise_if_stopped()
    (folder / "error.txt").unlink(missing_ok=True)
    try:
        cfg = to_run_config(raw)
        environment.mask_logs()
        if cfg.resume is None:
            cfg = dataclasses.replace(cfg, resume=sweep is not None)
        from saexp import api
        from saexp.sweeps.planning import PROCESS

        result = api.run(cfg, folder, command=_command(sweep), sweep=sweep, objects=PROCESS.objects)
    except Exception as error:
        failure = _in_one_line(error) or cannot_write_run(error, folder)
        if failure is None:
            raise
        if sweep:
            overrides = ",".join(_as_typed(about.overrides.task))
            if not (folder / "error.txt").is_file():
                _track_failure(raw, folder, sweep)
            line = environment.masked(str(failure))
            print(f"cell {about.job.num} ({overrides}) failed: {line}", file=sys.stderr)
            write_error(folder, f"{type(failure).__name__}: {line}\n")
        if failure is error:
            raise
        raise failure from error
    _summary(result, folder)


def _command(sweep: Path | None) -> str:
    """What was typed; a job of a sweep may have other words in its process (submitit)."""
    from saexp.reports.saved import read_plan

    typed = read_plan(sweep).get("command") if sweep else None
    return typed or f"python -m saexp {shlex.join(sys.argv[1:])}".strip()


def _in_one_line(error: Exception) -> SaexpError | None:
    """What the user can fix, as one line; None for what is wrong in saexp."""
    if isinstance(error, SaexpError):
        return error
    return one_line(error) if of_composition(error) else explained(error)


def _track_failure(raw: DictConfig, folder: Path, sweep: Path) -> None:
    """A failed run in the sweep's group for a cell that ended before its tracker began."""
    from saexp import api

    # The cell's own error is what is reported; its tracker may be what is wrong with it.
    with contextlib.suppress(Exception):
        about: Any = OmegaConf.to_container(raw, resolve=True)
        sae = about["sae"]
        name = api.run_name(about["model"]["name"], sae["name"], sae["loader"], about["layer"])
        api.track_failure(about, folder, name, sweep)


def _summary(result: Any, folder: Path) -> None:
    """The finding, then where everything is."""
    pages = ("report.html", "dashboard.html")
    page = next((name for name in pages if (folder / name).is_file()), None)
    if page is not None:
        from saexp.reports.finding import headline

        print(headline(folder))
    elif "stores" in result.tables:
        if len(result.tables["stores"]) and "compared" not in result.tables:
            from saexp.activations.stores import for_reading

            print(for_reading(result.tables["stores"]))
    else:
        rows = result.metrics.get("collection/n_rows")
        forwarded = result.metrics.get("collection/tokens_forwarded")
        print(f"{rows} rows; {forwarded} tokens forwarded")
    for note in result.notes:
        print(f"note: {environment.masked(note)}")
    shown = os.path.relpath(folder)
    print(f"report: {shown}/{page}" if page else f"folder: {shown}")


def program() -> None:
    """The process of `python -m saexp`, which does nothing but `main`."""
    gc.set_threshold(*_GARBAGE)
    try:
        main()
    finally:
        # What is imported needs no search for cycles at exit, which takes a second.
        gc.freeze()


def main() -> None:
    """The command line; anything the user can fix is one line on stderr and exit code 1."""
    global _traceback_wanted
    before = os.environ.get(FULL_ERROR)
    _traceback_wanted = wants_traceback()
    sys.argv[1:] = map(without_plus, sys.argv[1:])
    register_schema()
    OmegaConf.register_new_resolver("saexp_cell", cell_folder, replace=True)
    # Hydra would print its own shortened traceback; with this it hands errors on.
    os.environ[FULL_ERROR] = "1"
    sys.argv[1:] = with_free_keys(sys.argv[1:])
    try:
        with stoppable(_cells_running) as stopping:
            _until_stopped(stopping)
    finally:
        from saexp.pipeline.run_folder import release_all

        release_all()
        if before is None:
            os.environ.pop(FULL_ERROR, None)
        else:
            os.environ[FULL_ERROR] = before


def _until_stopped(stopping: Stopping) -> None:
    """The command, and one line where a signal ended it, whatever became of its exception."""
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
        if (failure := _of_folder(error)) is not None:
            _fail(failure, error)
        if type(error).__module__.partition(".")[0] not in _LAUNCHERS:
            _end_of_sweep()
            raise
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        shown = " … ".join(dict.fromkeys([*said[:1], *said[-1:]]))
        kept = _keep(error)
        _fail(
            f"a process of the sweep ended without a result ({type(error).__name__}: {shown}"
            f"{f'; all of it in {kept}' if kept else ''}); what was finished is kept, and the same "
            "command computes the rest",
            error,
        )


def _keep(error: Exception) -> Path | None:
    """A launcher's error with its trace, as a file of the sweep's folder."""
    from saexp.sweeps import planning

    folder = planning.running()
    if folder is None:
        return None
    path = Path(os.path.relpath(folder)) / "launcher_error.txt"
    text = environment.masked("".join(traceback.format_exception(error)))
    try:
        write_text(path, text, option=SWEEP_FOLDER)
    except StoreError:
        return None
    return path


def _of_folder(error: Exception) -> StoreError | None:
    """One line for what Hydra could not write in the folder of this process' run or sweep."""
    from saexp.pipeline.run_folder import reserved
    from saexp.sweeps import planning

    if isinstance(error, ValueError) and isinstance(error.__cause__, OSError):
        # Of logging, which could not open the log file.
        error = error.__cause__
    if folder := planning.running():
        return cannot_write_run(error, folder, option=SWEEP_FOLDER)
    return cannot_write_run(error, reserved() or Path.cwd())


def _cells_running() -> bool:
    """Whether cells of this process's sweep are running in other processes."""
    from saexp.pipeline.run_folder import LOCK
    from saexp.sweeps import planning

    folder = planning.running()
    return folder is not None and any(folder.glob(f"*/{LOCK}"))


def _end_of_sweep() -> None:
    """Where this was a sweep: its table and report, from whatever cells there are."""
    from saexp.sweeps import planning

    summary = planning.finish()
    if summary:
        print(summary)


def _fail(message: str | SaexpError, cause: BaseException | None = None, code: int = 1) -> NoReturn:
    """One line on stderr, behind the report of a sweep's other cells."""
    raise_if_stopped()
    try:
        _end_of_sweep()
    except StoreError as other:
        print(f"no report of the sweep: {other}", file=sys.stderr)
    error = cause or (message if isinstance(message, SaexpError) else None)
    if _traceback_wanted and error is not None:
        traceback.print_exception(error)
    print(f"saexp: {environment.masked(str(message))}", file=sys.stderr)
    sys.exit(code)
