"""The command line in this process, and reading what it left: tables, pages, offline W&B runs."""

import io
import json
import re
import runpy
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import pandas as pd
import pytest


class CommandResult(NamedTuple):
    """What a command said, and where a sweep with hydra.sweep.dir=sweep is."""

    code: int
    out: str
    err: str
    sweep: Path


def command(folder: Path, *words: str) -> CommandResult:
    """`python -m saexp` with `folder` as the current one."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["saexp", *words])
        try:
            runpy.run_module("saexp", run_name="__main__")
        except SystemExit as stop:
            code = int(stop.code or 0)
    return CommandResult(code, out.getvalue(), err.getvalue(), folder / "sweep")


def table_of(sweep: Path) -> pd.DataFrame:
    return pd.read_parquet(sweep / "sweep.parquet")


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text("utf-8"))


def body_of(page: Path) -> str:
    """A whole page without its scripts."""
    text = page.read_text("utf-8")
    assert text.rstrip().endswith("</html>")
    return re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)


def page_of(sweep: Path) -> str:
    return body_of(sweep / "sweep.html")


def assert_links_lead_to_reports(sweep: Path, n: int) -> None:
    links = re.findall(r'<a href="([^"]+)"', page_of(sweep))
    assert len(set(links)) == n
    assert all((sweep / unquote(link)).is_file() for link in links)
    assert all(unquote(link).endswith("/report.html") for link in links)


def _records(file: Path) -> Iterator[Any]:
    """Records of an offline W&B run: LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        if kind in (1, 4):
            yield Record.FromString(whole)
            whole = b""
        at += 7 + length
        # No record begins in the last 6 bytes of a block.
        at += 32768 - at % 32768 if at % 32768 > 32768 - 7 else 0


def wandb_runs(folder: Path) -> list[dict[str, Any]]:
    """Offline W&B runs anywhere below, oldest first: group, job_type, exit_code, logged keys."""
    # Not by the folders' names: they hold whole seconds, and then random letters.
    runs = [wandb_run(file) for file in folder.rglob("offline-run-*/*.wandb")]
    return sorted(runs, key=lambda run: run["started"])


def wandb_run(file: Path) -> dict[str, Any]:
    """What a run's file holds, as of `_wandb_run`, once it is whole; or what there is after 20 s.

    W&B's own process writes it, and may end that after the run's process has ended.
    """
    from google.protobuf.message import DecodeError

    began = time.monotonic()
    while True:
        try:
            logged = _wandb_run(file)
        except DecodeError:
            logged = {}
        if "exit_code" in logged or time.monotonic() - began > 20:
            return logged
        time.sleep(0.05)


def _wandb_run(file: Path) -> dict[str, Any]:
    """What a run's file holds: `keys` of all numbers, `history` (a row per point), `summary`,
    `config`, `axes` (metric or group -> its step metric), `artifacts`, and how the run is called.
    """
    logged: dict[str, Any] = {"keys": set(), "history": [], "summary": {}, "config": {}}
    logged |= {"axes": {}, "artifacts": [], "used": []}
    for record in _records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            logged |= {"group": run.run_group, "job_type": run.job_type, "name": run.display_name}
            logged |= {"id": run.run_id, "project": run.project, "tags": list(run.tags)}
            logged |= {"notes": run.notes, "started": run.start_time.ToNanoseconds()}
            logged["config"] |= {i.key: json.loads(i.value_json) for i in run.config.update}
        elif kind == "config":
            logged["config"] |= {i.key: json.loads(i.value_json) for i in record.config.update}
        elif kind == "exit":
            logged["exit_code"] = record.exit.exit_code
        elif kind == "metric" and record.metric.step_metric:
            name = record.metric.glob_name or record.metric.name
            logged["axes"][name] = record.metric.step_metric
        elif kind == "artifact":
            logged["artifacts"].append(record.artifact)
        elif kind == "use_artifact":
            logged["used"].append(record.use_artifact)
        elif kind == "history":
            logged["history"].append(
                {_key(item): json.loads(item.value_json) for item in record.history.item}
            )
        for item in record.summary.update:
            logged["summary"][_key(item)] = json.loads(item.value_json)
    logged["keys"] = {key for row in logged["history"] for key in row} | {*logged["summary"]}
    return logged


def _key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)
