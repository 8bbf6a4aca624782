"""Faults to inject: damaged files, small disks, killed processes; and what a run left after them.

A damage is `(path, seed) -> description`; the same seed does the same to the same file. Commands
run in this process (`command`), or in forks of a server that has everything imported (`start`).
"""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import interpreters
from tests.unit.reports import run_outputs

PATIENCE_SECONDS = 300
"""After which a process counts as one that hangs."""
_SPENT = ("seconds", "tokens_forwarded")
"""What a run took, which differs between equal runs."""


class CommandResult(NamedTuple):
    """Exit code (negative: the signal that ended it) and output of a command."""

    code: int
    out: str
    err: str


# Damages


def flip_byte(path: Path, seed: int = 0) -> str:
    """Another value for one byte."""
    content = bytearray(path.read_bytes())
    if not content:
        return garbage(path, seed)
    rng = random.Random(seed)
    at, mask = rng.randrange(len(content)), rng.randint(1, 255)
    content[at] ^= mask
    path.write_bytes(content)
    return f"byte {at} of {len(content)} xor {mask}"


def truncate(path: Path, seed: int = 0) -> str:
    """Only a part of the file, from its beginning."""
    content = path.read_bytes()
    n = random.Random(seed).randrange(max(len(content), 1))
    path.write_bytes(content[:n])
    return f"cut to {n} of {len(content)} bytes"


def empty(path: Path, seed: int = 0) -> str:  # noqa: ARG001
    path.write_bytes(b"")
    return "emptied"


def delete(path: Path, seed: int = 0) -> str:  # noqa: ARG001
    path.unlink()
    return "deleted"


def garbage(path: Path, seed: int = 0) -> str:
    """Random bytes, as many as there were."""
    n = max(path.stat().st_size, 64)
    path.write_bytes(random.Random(seed).randbytes(n))
    return f"{n} random bytes"


def edit_json_number(path: Path, seed: int = 0) -> str:
    """Another value for one number of a valid JSON file, which stays valid."""
    text = path.read_text("utf-8")
    numbers = list(re.finditer(r"(?<=[\s:\[,])-?\d+(\.\d+)?(?=[\s,\]}])", text))
    if not numbers:
        return wrong_shape(path, seed)
    number = random.Random(seed).choice(numbers)
    digit = str((int(number[0][-1]) + 1) % 10)
    path.write_text(text[: number.end() - 1] + digit + text[number.end() :], "utf-8")
    return f"{number[0]} at character {number.start()} to {number[0][:-1]}{digit}"


def wrong_shape(path: Path, seed: int = 0) -> str:
    """Valid JSON of another shape."""
    shapes = ("[]", "{}", "null", "7", '"text"', '{"folder": 3}', "[[1, 2], {}]")
    shape = random.Random(seed).choice(shapes)
    path.write_text(shape, "utf-8")
    return f"replaced by {shape}"


DAMAGES: tuple[Callable[[Path, int], str], ...] = (flip_byte, truncate, empty, delete, garbage)
"""For every file; JSON files take `edit_json_number` and `wrong_shape` as well."""


def edit_table_value(path: Path, seed: int = 0) -> str:
    """Another number in a valid parquet file."""
    table = pq.read_table(path)
    rng = random.Random(seed)
    numeric = [
        (i, column)
        for i, column in enumerate(table.columns)
        if (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)) and len(column)
    ]
    if not numeric:
        return truncate(path, seed)
    at, column = rng.choice(numeric)
    values, row = column.to_pylist(), rng.randrange(len(column))
    before, values[row] = values[row], (values[row] or 0) + 1
    field = table.schema.field(at)
    pq.write_table(table.set_column(at, field, pa.array(values, field.type)), path)
    return f"{field.name} of row {row}: {before} to {values[row]}"


def edit_database_row(path: Path, seed: int = 0) -> str:
    """Another byte in the value of one row of a valid results database."""
    rng = random.Random(seed)
    with closing(sqlite3.connect(path)) as file:
        table = results_table(file)
        rows = file.execute(f"select rowid, value from {table} order by rowid").fetchall()
        rowid, content = rng.choice([row for row in rows if row[1]])
        at = rng.randrange(len(content))
        changed = content[:at] + bytes([content[at] ^ rng.randint(1, 255)]) + content[at + 1 :]
        file.execute(f"update {table} set value = ? where rowid = ?", (changed, rowid))
        file.commit()
    return f"byte {at} of row {rowid} of {len(rows)}"


def results_table(file: sqlite3.Connection) -> str | None:
    """Name of the table of a results database whose rows have a key and a value."""
    names = file.execute("select name from sqlite_master where type = 'table'").fetchall()
    for (name,) in names:
        columns = {column[1] for column in file.execute(f"pragma table_info({name})")}
        if {"key", "value"} <= columns:
            return name
    return None


# Disks


class Disk(NamedTuple):
    """A file system of its own."""

    path: Path

    def resize(self, kilobytes: int) -> None:
        self._remount(f"size={kilobytes}k")

    def read_only(self, yes: bool = True) -> None:
        self._remount("ro" if yes else "rw")

    def _remount(self, option: str) -> None:
        words = ["mount", "-o", f"remount,{option}", str(self.path)]
        subprocess.run(words, check=True, capture_output=True)


@contextmanager
def small_disk(path: Path, kilobytes: int) -> Iterator[Disk]:
    """A tmpfs of so many kB at `path`; skips the test where none can be mounted."""
    path.mkdir(parents=True, exist_ok=True)
    if shutil.which("mount") is None:
        pytest.skip("no mount command")
    words = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path)]
    process = subprocess.run(words, capture_output=True, text=True)
    if process.returncode:
        pytest.skip(f"no file system can be mounted here: {process.stderr.strip()}")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


# Commands


def command(words: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None) -> CommandResult:
    """`python -m saexp` in this process; an exception counts as a traceback and exit code 1."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        try:
            result = run_outputs.command(cwd, *words)
        except Exception:
            return CommandResult(1, "", traceback.format_exc())
    return CommandResult(result.code, result.out, result.err)


class Started(NamedTuple):
    """`python -m saexp` in a process of its own."""

    process: interpreters.Process
    began: float

    def wait(self, seconds: float = PATIENCE_SECONDS) -> CommandResult:
        """What it said in the end. Raises TimeoutError, and kills it, where it takes longer."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise TimeoutError(f"still running after {seconds} s: {self.read()}") from None
        return CommandResult(code, *self.read())

    def read(self) -> tuple[str, str]:
        return self.process.read()


def start(words: Sequence[str], cwd: Path, env: Mapping[str, str | None] | None = None) -> Started:
    """Begin a command in a fork of the server of interpreters.

    Variables of `env` that are None are removed.
    """
    variables = {**os.environ, **(env or {})}
    environment = {name: value for name, value in variables.items() if value is not None}
    process = interpreters.Process(["-m", "saexp", *words], cwd, environment, ends_at_once=True)
    return Started(process, time.monotonic())


def kill_after(started: Started, seconds: float, sig: int = signal.SIGKILL) -> bool:
    """Send a signal so many seconds after the start; False where it had ended by then."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        started.process.wait(max(0.0, started.began + seconds - time.monotonic()))
    if started.process.returncode is not None:
        return False
    started.process.send_signal(sig)
    return True


# Results


def digests_of_results(folder: Path) -> dict[str, str]:
    """Relative path -> digest of what must be equal between equal runs.

    Metrics and the content of tables without seconds and tokens forwarded, and the bytes of labels
    and weights.
    """
    digests = {}
    for path in sorted(folder.rglob("*")):
        try:
            content = _content(path)
        except (OSError, ValueError, pa.ArrowException) as error:
            content = f"unreadable: {error}".encode()
        if content is not None:
            digests[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return digests


def _content(path: Path) -> bytes | None:
    if not path.is_file() or path.name.startswith(".tmp-"):
        return None
    if path.name == "metrics.json":
        return json.dumps(_lasting_metrics(path), sort_keys=True).encode()
    if path.suffix == ".parquet":
        return table_content(path)
    if path.suffix == ".safetensors" or (path.suffix == ".jsonl" and path.name != "tracker.jsonl"):
        return path.read_bytes()
    return None


def table_content(path: Path) -> bytes:
    """Names, types and values of a table, without what describes the file that it is in."""
    table = _lasting_table(path).replace_schema_metadata(None).combine_chunks()
    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    return stream.getvalue().to_pybytes()


def _lasting_metrics(path: Path) -> dict[str, Any]:
    metrics = json.loads(path.read_text("utf-8"))
    return {k: v for k, v in metrics.items() if k.rpartition("/")[2] not in _SPENT}


def _lasting_table(path: Path) -> pa.Table:
    table = pq.read_table(path)
    spent = [name for name in table.column_names if name.rpartition("/")[2] in _SPENT]
    return table.drop_columns(spent)


def equal_up_to_rounding(one: Path, other: Path) -> bool:
    """Whether two tables, or two files of metrics, differ in the last digits of floats alone."""
    if not (one.is_file() and other.is_file()):
        return False
    if one.name == "metrics.json":
        frames = [pd.DataFrame([_lasting_metrics(path)]) for path in (one, other)]
    elif one.suffix == ".parquet":
        frames = [_lasting_table(path).to_pandas() for path in (one, other)]
    else:
        return False
    try:
        pd.testing.assert_frame_equal(*frames, rtol=1e-5, atol=1e-8)
    except AssertionError:
        return False
    return True


def one_line(result: CommandResult, code: int = 1) -> str:
    """The message after `saexp: `: exit code `code`, one such line, no traceback."""
    assert result.code == code, result
    assert "Traceback" not in result.err, result.err
    lines = [line for line in result.err.splitlines() if line.startswith("saexp: ")]
    assert len(lines) == 1, result.err
    return lines[0].removeprefix("saexp: ")
