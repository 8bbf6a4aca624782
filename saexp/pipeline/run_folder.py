"""A run's folder, which one process holds at a time, and the files in it."""

import dataclasses
import json
import math
import os
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from saexp.config import RunConfig
from saexp.config.environment import as_typed, masked
from saexp.context import RunContext
from saexp.data import Skip
from saexp.digests import has_intact_seal
from saexp.errors import StoreError
from saexp.files import RUN_FOLDER, remove_temporary, try_lock, write_json, write_table
from saexp.results import Result
from saexp.tracking import Artifact

LOCK = ".running.lock"
_reserved: dict[Path, Any] = {}
"""Locks that the command line takes before Hydra writes anything; the run takes them over."""


def reserve(folder: Path) -> None:
    """Lock a folder for the run or sweep that is about to begin in this process.

    Raises StoreError where another run holds it, where it lies inside the folder of another sweep
    or contains that of another run, and where it cannot be created.
    """
    nested = [folder.resolve().parent, *(lock.parent for lock in folder.glob(f"*/{LOCK}"))]
    for other in nested:
        if other not in _reserved and _is_held(other):
            raise _busy(other)
    _reserved[folder.resolve()] = _take(folder)


@contextmanager
def reserved_cell(folder: Path) -> Iterator[None]:
    """Lock the folder of a sweep's cell before anything in it is changed.

    Raises StoreError where another run holds it, or where it cannot be created.
    """
    path = folder.resolve()
    _reserved[path] = _take(folder)
    try:
        yield
    finally:
        if path in _reserved:
            _release(path, _reserved.pop(path))


def reserved() -> Path | None:
    """A folder that is locked but not yet taken over by a run."""
    return next(iter(_reserved), None)


def release_all() -> None:
    """Release the folders that no run took over."""
    while _reserved:
        folder, lock = _reserved.popitem()
        _release(folder, lock)


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Lock a run's folder. Raises StoreError where another run holds it or it cannot be created.

    The operating system releases the lock when the process dies, so a crashed run blocks nothing.
    """
    path = folder.resolve()
    lock = _reserved.pop(path, None) or _take(folder)
    try:
        yield
    finally:
        _release(path, lock)


def _take(folder: Path) -> Any:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot create the run's folder {folder}: {error.strerror}") from error
    try:
        lock = try_lock(folder / LOCK)
    except StoreError as error:
        raise StoreError(f"cannot write the run's folder {folder}; choose another one") from error
    if lock is None:
        raise _busy(folder)
    remove_temporary(folder)
    return lock


def _busy(folder: Path) -> StoreError:
    return StoreError(
        f"another run is writing to {folder}; wait for it, or type another hydra.run.dir= "
        "(hydra.sweep.dir= of a sweep)"
    )


def _is_held(folder: Path) -> bool:
    if not (folder / LOCK).is_file():
        return False
    try:
        lock = try_lock(folder / LOCK)
    except StoreError:
        # The folder of another user, whose run ended without removing the file.
        return False
    if lock is not None:
        lock.release()
    return lock is None


def _release(folder: Path, lock: Any) -> None:
    # Removed while it is held: a process that waits for this file finds it gone and makes another.
    with suppress(OSError):
        (folder / LOCK).unlink(missing_ok=True)
    lock.release()


_PACKAGES = ("saexp", "torch", "transformers", "sae-lens", "numpy", "scipy", "hydra-core")
Metrics = Mapping[str, float | int | None]


RUN_TABLES = ("rows", "skips", "check")
"""Tables that the run itself writes; those of an analyzer need other names."""


def finite_metrics(metrics: Metrics) -> tuple[dict[str, float | int | None], list[str]]:
    """The metrics with None for NaN and infinities, and a note that names those."""
    finite: dict[str, float | int | None] = {}
    undefined = []
    for name, value in metrics.items():
        if value is not None and not math.isfinite(value):
            undefined.append(name)
            finite[name] = None
        else:
            finite[name] = value if value is None or isinstance(value, int) else float(value)
    if not undefined:
        return finite, []
    if len(undefined) == 1:
        return finite, [f"{undefined[0]} could not be computed"]
    return finite, [f"{len(undefined)} numbers could not be computed: {', '.join(undefined)}"]


def unexplained_notes(result: Result, explained: str = "") -> list[str]:
    """A note that names the metrics that are None and that no other note names.

    Metrics of the group `explained` (`explained/…`) are left out: other notes say why they are
    None, without naming each.
    """
    text, metrics = " ".join(result.notes), result.metrics
    if explained:
        metrics = {k: v for k, v in metrics.items() if not k.startswith(f"{explained}/")}
    names = [k for k, v in metrics.items() if v is None and k not in text]
    limits = [n for n in names if "_ci_" in n]
    listed = [n for n in names if n not in limits]
    if limits:
        listed.append(f"{len(limits)} bounds of intervals (…_ci_low, …_ci_high)")
    if not listed:
        return []
    return [f"not defined with so few positions, units or resamples: {', '.join(listed)}"]


METRICS, PROVENANCE = "metrics.json", "provenance.json"
WRITTEN = ".written.json"
"""List of the files that a run wrote to a folder; the next run there removes them."""
_PAGES = ("report.html", "dashboard.html", "dashboard.json", "figures.json")


def clear(folder: Path, keep: frozenset[Path] = frozenset()) -> None:
    """Remove an earlier run's results from this folder, so that they are not taken for this run's.

    Only files that saexp wrote as a run's results are removed, and none of `keep`; labels, which
    later runs read, and a trained SAE stay until they are replaced.
    """
    for name in [*_written(folder), WRITTEN]:
        file = folder / name
        if file.resolve() not in keep and (file.is_file() or file.is_symlink()):
            file.unlink()


def note_written(context: RunContext, names: Iterable[str]) -> None:
    """List files of the folder as this run's results, before they are written.

    The first call removes an earlier run's results: no sooner, so that a run that fails at the
    start destroys nothing.
    """
    folder = context.folder
    if not context.began_writing:
        clear(folder, context.inputs)
        context.began_writing = True
    listed = sorted({*_written(folder), *names})
    write_json(folder / WRITTEN, listed, option=RUN_FOLDER)
    context.results |= {WRITTEN, *listed}


PageStates = dict[str, tuple[int, int, int]]
"""Name of a page -> modification time in ns, size and inode."""


def page_states(folder: Path) -> PageStates:
    """The current state of the pages in a folder."""
    states = {name: (folder / name).stat() for name in _PAGES if (folder / name).is_file()}
    return {name: (s.st_mtime_ns, s.st_size, s.st_ino) for name, s in states.items()}


def note_pages(context: RunContext, before: PageStates) -> None:
    """List the pages that this run wrote: those that differ from their state `before` it.

    Nothing is listed for a task that writes no results by `write_result`.
    """
    if not context.began_writing:
        return
    now = page_states(context.folder)
    if changed := [name for name, state in now.items() if before.get(name) != state]:
        note_written(context, changed)


def _written(folder: Path) -> set[str]:
    """The files that the list in a folder names.

    Where the list is damaged: those of provenance.json without labels and weights.
    """
    try:
        names = json.loads((folder / WRITTEN).read_text("utf-8"))
        if isinstance(names, list) and all(map(_is_plain, names)):
            return set(names)
    except (OSError, ValueError, RecursionError):
        pass
    try:
        about = json.loads((folder / PROVENANCE).read_text("utf-8"))
        names = [PROVENANCE, *about["files"]] if has_intact_seal(about) else []
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()
    return {n for n in names if _is_plain(n) and Path(n).suffix in (".parquet", ".json", ".html")}


def _is_plain(name: object) -> bool:
    """Whether this is a plain file name, so that nothing in another folder is ever removed."""
    return isinstance(name, str) and Path(name).name == name


def save_run(
    context: RunContext,
    cfg: RunConfig,
    result: Result,
    skips: Sequence[Skip],
    about: Mapping[str, Any],
) -> Result:
    """Write metrics, tables and provenance.json; may be called again as a run goes on.

    Returns the result as it was written: NaN and infinities are None, and a note names them.
    """
    metrics, notes = finite_metrics(result.metrics)
    saved = replace(result, metrics=metrics, notes=[*result.notes, *notes])
    write_result(context, saved)
    write_provenance(context, cfg, saved, skips, about)
    return saved


def write_result(context: RunContext, result: Result) -> None:
    """Write metrics.json and a parquet file per table."""
    folder = context.folder
    note_written(context, [METRICS, *(f"{name}.parquet" for name in result.tables)])
    write_json(folder / METRICS, result.metrics, option=RUN_FOLDER)
    for name, table in result.tables.items():
        write_table(folder / f"{name}.parquet", table, option=RUN_FOLDER)


def skips_table(skips: Sequence[Skip]) -> pd.DataFrame:
    """One row per example that could not be used."""
    return pd.DataFrame([dataclasses.asdict(s) for s in skips], columns=["example_id", "reason"])


def write_provenance(
    context: RunContext,
    cfg: RunConfig,
    result: Result,
    skips: Sequence[Skip],
    about: Mapping[str, Any],
) -> None:
    """Write provenance.json: what the run was computed from and with.

    Values that come from environment variables are written as they were typed. `about` has further
    entries; `device` goes to those of the machine.
    """
    note_written(context, [PROVENANCE])
    versions = {p: metadata.version(p) for p in _PACKAGES}
    write_json(
        context.folder / PROVENANCE,
        {
            "saexp_version": versions["saexp"],
            "command": context.command,
            "config": as_typed(dataclasses.asdict(cfg)),
            "versions": {"python": platform.python_version(), **versions},
            "seed": cfg.seed,
            "machine": {
                "system": platform.platform(),
                "processor": platform.machine(),
                "cores": os.cpu_count(),
                "device": about.get("device"),
            },
            "seconds": {name: round(s, 3) for name, s in context.seconds.items()},
            "started": context.started,
            "notes": as_typed(result.notes),
            "skips": dict(Counter(s.reason for s in skips)),
            "tables": [name for name in result.tables if name not in RUN_TABLES],
            **as_typed({key: value for key, value in about.items() if key != "device"}),
        },
        option=RUN_FOLDER,
    )


TRACKED_TABLES = ("latents", "rows", "effects", "effects_summary", "baselines")
"""Tables that trackers get: of latents, analysed positions, and generations with their outcomes."""
_TRACKED = ("latents.parquet", "effects.parquet", "effects_summary.parquet", METRICS, *_PAGES[:2])
"""Results that are uploaded where a tracker keeps files."""


def tracked_artifacts(folder: Path) -> list[Artifact]:
    """What a finished run read and wrote: its activation store, its SAE and its results.

    Empty for a task that writes no provenance.json.
    """
    if not (folder / PROVENANCE).is_file():
        return []
    about = json.loads((folder / PROVENANCE).read_text("utf-8"))
    store, sae, trained = about.get("store"), about.get("sae"), folder / "sae"
    artifacts = []
    if store:
        path = Path(store["path"])
        manifests = {f.relative_to(path).as_posix(): f for f in path.rglob("manifest.json")}
        # Activations that the run computed are its output.
        is_input = not about.get("tokens_forwarded")
        artifacts.append(
            _referenced(Artifact(f"activations-{store['key']}", "store", is_input=is_input), path)
        )
        artifacts[-1] = replace(artifacts[-1], files=manifests)
    if trained.is_dir() and about["config"]["task"]["name"] == "train":
        files = {f.relative_to(trained).as_posix(): f for f in trained.rglob("*") if f.is_file()}
        artifacts.append(Artifact(f"sae-{folder.name}", "sae", files, metadata=_plain(sae or {})))
    elif sae and sae.get("name"):
        name = f"sae-{sae['name']}-{sae.get('hookpoint')}-{sae.get('d_sae')}"
        used = Artifact(name, "sae", metadata=_plain(sae), is_input=True)
        artifacts.append(_referenced(used, Path(str(sae.get("path")))))
    results = {name: folder / name for name in _TRACKED if (folder / name).is_file()}
    if results:
        artifacts.append(Artifact("results", "results", results))
    return artifacts


def _referenced(artifact: Artifact, path: Path) -> Artifact:
    """The artifact with its path, unless part of it comes from the environment or it is gone."""
    shown = masked(str(path))
    metadata = {**artifact.metadata, "path": shown}
    reference = path if shown == str(path) and path.exists() else None
    return replace(artifact, reference=reference, metadata=metadata)


def _plain(about: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are numbers or texts."""
    return {k: v for k, v in about.items() if isinstance(v, str | int | float)}


def effect_series(tables: Mapping[str, Any]) -> list[dict[str, float | int | None]]:
    """Metrics of the causal test per coefficient; empty where it has one coefficient or none."""
    summary = tables.get("effects_summary")
    if summary is None or not {"split", "role", "of", "direction"} <= set(summary):
        return []
    # Not at the top of the file: importing it takes seconds.
    from saexp.interventions.effects import effect_curve

    curve = effect_curve(summary)
    return curve if len(curve) > 1 else []
