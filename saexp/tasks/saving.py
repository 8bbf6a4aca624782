"""The files a run leaves: metrics, tables, provenance. The report renders from these alone."""

import dataclasses
import functools
import json
import math
import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from saexp.config import RunConfig
from saexp.config.environment import as_typed
from saexp.context import RunContext
from saexp.data.examples import Skip
from saexp.files import RUN_FOLDER, write_atomically, write_json
from saexp.results import TaskResult

_PACKAGES = ("saexp", "torch", "transformers", "sae-lens", "numpy", "scipy", "hydra-core")
Metrics = Mapping[str, float | int | None]


def clean_metrics(metrics: Metrics, notes: list[str]) -> dict[str, float | int | None]:
    """NaN and infinities become null and are named in a note, many in one."""
    cleaned: dict[str, float | int | None] = {}
    lost = []
    for name, value in metrics.items():
        bad = value is not None and not math.isfinite(value)
        if bad:
            lost.append(name)
        plain = value if value is None or isinstance(value, int) else float(value)
        cleaned[name] = None if bad else plain
    if lost:
        many = f"{len(lost)} numbers could not be computed: " if len(lost) > 1 else ""
        notes.append(many + ", ".join(lost) + ("" if many else " could not be computed"))
    return cleaned


_WRITTEN = ".written.json"
"""Names of the files that a run left in a folder; the next one there removes them."""
_PAGES = ("report.html", "dashboard.html", "dashboard.json", "figures.json")


def clear(folder: Path, keep: frozenset[Path] = frozenset()) -> None:
    """Remove what an earlier run left in this folder, lest it be taken for this one's.

    Only files that saexp wrote as a run's results go, and none of `keep`; labels, which later runs
    read, and a trained SAE stay until they are replaced.
    """
    for name in _written(folder) | {_WRITTEN}:
        if (folder / name).resolve() not in keep:
            (folder / name).unlink(missing_ok=True)


def note_written(context: RunContext, names: Iterable[str]) -> None:
    """Remember files of the folder as this run's results, before they are written.

    The first time, what an earlier run left there goes: not sooner, so that a run that cannot begin
    costs nobody theirs.
    """
    folder = context.folder
    if not context.began_writing:
        clear(folder, context.inputs)
        context.began_writing = True
    listed = sorted({*_written(folder), *names})
    write_json(folder / _WRITTEN, listed, option=RUN_FOLDER)


def note_pages(context: RunContext, since: float) -> None:
    """Remember the pages that this run wrote: those changed after `since` (seconds, epoch).

    A task that leaves no results by `write_result` keeps its own account of its files.
    """
    if not context.began_writing:
        return
    files = [context.folder / name for name in _PAGES]
    mine = [f.name for f in files if f.is_file() and f.stat().st_mtime >= since]
    if mine:
        note_written(context, mine)


def _written(folder: Path) -> set[str]:
    try:
        return set(json.loads((folder / _WRITTEN).read_text("utf-8")))
    except (OSError, ValueError):
        return set()


def write_result(context: RunContext, result: TaskResult) -> None:
    """metrics.json and a parquet file per table; may be called again as a run goes on."""
    folder = context.folder
    note_written(context, ["metrics.json", *(f"{name}.parquet" for name in result.tables)])
    write_json(folder / "metrics.json", result.metrics, option=RUN_FOLDER)
    for name, table in result.tables.items():
        write_atomically(
            folder / f"{name}.parquet",
            functools.partial(table.to_parquet, index=False),
            option=RUN_FOLDER,
        )


def skips_table(skips: list[Skip]) -> pd.DataFrame:
    """One row per example that could not be used."""
    return pd.DataFrame([dataclasses.asdict(s) for s in skips], columns=["example_id", "reason"])


def write_provenance(
    context: RunContext, cfg: RunConfig, notes: list[str], skips: list[Skip], **about: Any
) -> None:
    """provenance.json: how the run came about; values from the environment as they were typed."""
    note_written(context, ["provenance.json"])
    versions = {p: metadata.version(p) for p in _PACKAGES}
    write_json(
        context.folder / "provenance.json",
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
                "device": about.pop("device", None),
            },
            "seconds": {name: round(s, 3) for name, s in context.seconds.items()},
            "started": context.started,
            "notes": as_typed(notes),
            "skips": dict(Counter(s.reason for s in skips)),
            **as_typed(about),
        },
        option=RUN_FOLDER,
    )
