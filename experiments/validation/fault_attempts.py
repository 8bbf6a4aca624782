"""One attempt: a process killed, a file damaged, a full or read-only disk, identical runs at once.

After every fault the same command is run again; its results must be those of an undisturbed run.
"""

import itertools
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fault_works import (
    WORKS,
    Bench,
    Finished,
    Undisturbed,
    finished,
    lasting,
    rows_computed,
    tokens_forwarded,
)

from tests.e2e.faults.injection import (
    CommandResult,
    delete,
    digests_of_results,
    edit_database_row,
    edit_json_number,
    edit_table_value,
    empty,
    equal_up_to_rounding,
    flip_byte,
    garbage,
    kill_after,
    one_line,
    small_disk,
    start,
    truncate,
    wrong_shape,
)
from tests.e2e.faults.wandb_server import ERROR, GARBAGE, GOOD, HANG, REFUSE, wandb_server

SHARED = ("steering", "collecting", "labels")
"""Kinds of work that identical commands at once divide among them."""
ON_SMALL_DISKS = ("steering", "collecting", "training", "labels", "evaluation")
DAMAGES: dict[str, tuple[Callable[[Path, int], str], tuple[str, ...]]] = {
    "flipped byte": (flip_byte, ()),
    "truncated": (truncate, ()),
    "emptied": (empty, ()),
    "deleted": (delete, ()),
    "random bytes": (garbage, ()),
    "edited number": (edit_json_number, (".json",)),
    "other JSON": (wrong_shape, (".json",)),
    "edited table": (edit_table_value, (".parquet",)),
    "edited row": (edit_database_row, (".sqlite",)),
}
"""Name -> the damage, and the suffixes of the files that it is for (none: all)."""
OUTAGES = (
    *((mode, None) for mode in (REFUSE, HANG, ERROR, GARBAGE)),
    *((GOOD, later) for later in (HANG, ERROR, GARBAGE)),
)
"""What a W&B server does at first, and what once a run has begun."""
WITH_OUTAGES = ("labels", "evaluation", "training")
_LONGEST_DELAY_SECONDS = 60
"""Of a run whose W&B server fails; on an idle machine 10."""
CHECKPOINTS, INDEX = "cache/training/", "cache/finished/"
_RESULTS = (".json", ".parquet", ".html", ".jsonl", ".safetensors", ".csv")
_TRIES = 5
_NEVER_READ = re.compile(r"\.lock$|\.log$|/\.used$|/\.locks/|/\.tmp|-shm$|-wal$")
_NUMBER = re.compile(r"[0-9a-f]{12,}|\d+")


@dataclass(frozen=True)
class Outcome:
    """What came of one attempt; empty text where nothing is wrong."""

    hit: bool
    """Whether the fault met a running process, or a file that a command then read again."""
    detail: str
    failure: str = ""
    """The command failed, or did not say in one line why it stopped."""
    lost: str = ""
    """What was finished before was computed again."""
    wrong: str = ""
    """Results differ from undisturbed ones."""
    rounded: str = ""
    """Numbers differ in their last digits, as rows were computed again in another batch."""


def failed(result: CommandResult, code: int = 0) -> str:
    """Why a command's end counts as a failure: another exit code, a traceback."""
    if result.code == code and "Traceback" not in result.err:
        return ""
    return f"exit code {result.code}: {_end(result.err)}"


def not_one_line(result: CommandResult, code: int = 1) -> str:
    """Why a command that had to stop did not stop as it should."""
    try:
        one_line(result, code)
    except AssertionError:
        return f"exit code {result.code}: {_end(result.err)}"
    return ""


def _end(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-3:])[-400:]


def compared(whole: Undisturbed, cwd: Path, run: str | None = None) -> dict[str, str]:
    """`wrong` and `rounded` of an outcome: files that are not as an undisturbed run leaves them.

    All of them, or those of the folder `run` alone.
    """
    there, expected = lasting(digests_of_results(cwd)), whole.digests
    if run is not None:
        there = {k: v for k, v in there.items() if k.startswith(f"{run}/")}
        expected = {
            f"{run}/{k.removeprefix('run/')}": v
            for k, v in expected.items()
            if k.startswith("run/")
        }
    wrong, rounded = [], []
    for name in sorted({*expected, *there}):
        if expected.get(name) != there.get(name):
            folder, _, rest = name.partition("/")
            undisturbed = whole.state / ("run" if folder == run else folder) / rest
            equal = equal_up_to_rounding(undisturbed, cwd / name)
            (rounded if equal else wrong).append(name)
    return {"wrong": ", ".join(wrong[:4]), "rounded": ", ".join(rounded[:4])}


# Kills


def kill(bench: Bench, rng: random.Random, name: str, sig: signal.Signals) -> Outcome:
    """A signal at a random moment of a run, and the same command again.

    Where the run ended before the moment, it is tried again with the time that it took.
    """
    work, whole = WORKS[name], bench.of(name)
    seconds = whole.seconds
    for _ in range(_TRIES):
        cwd, after = bench.fresh(work), rng.uniform(0, seconds)
        started = start(work.command(), cwd)
        sent = kill_after(started, after, sig)
        result = started.wait()
        detail = f"{sig.name} after {after:.2f} s of {seconds:.2f}"
        if sent and result.code in (-sig, 128 + sig):
            break
        if failure := failed(result):
            return Outcome(sent, detail, failure)
        seconds = min(seconds, time.monotonic() - started.began)
    else:
        return Outcome(False, detail)
    # A process that had not begun has no handler and nothing to say.
    silent = result.code == -sig and not result.err
    failure = "" if silent or sig == signal.SIGKILL else not_one_line(result, 128 + sig)
    before = finished(cwd)
    again = bench.run(work)
    if failure := failure or failed(again):
        return Outcome(True, detail, failure)
    lost = computed_again(before, cwd, whole, again)
    return Outcome(True, detail, lost=lost, **compared(whole, cwd))


def computed_again(before: Finished, cwd: Path, whole: Undisturbed, again: CommandResult) -> str:
    """What of that which was finished before is not the same now, or was computed again."""
    after = finished(cwd)
    lost = [f"rewritten: {n}" for n, was in before.files.items() if after.files.get(n) != was]
    if before.rows - after.rows:
        lost.append(f"{len(before.rows - after.rows)} rows of the database")
    if (n := rows_computed(again)) > len(after.rows) - len(before.rows):
        lost.append(f"{n} rows computed, {len(after.rows) - len(before.rows)} were missing")
    undisturbed = tokens_forwarded(whole.result)
    for key, n in tokens_forwarded(again).items():
        done, total = before.shards.get(key, 0.0), undisturbed.get(key, 0)
        if n > total or (done == 1 and n):
            lost.append(f"{n} of {total} tokens forwarded, {done:.0%} of the shards were there")
    if before.step and f"from step {before.step}" not in again.err:
        lost.append(f"the checkpoint at step {before.step}")
    return "; ".join(lost)


# Damaged files


@dataclass(frozen=True)
class Damage:
    """One damage of one file that a work leaves; `path` is below the work's folder."""

    work: str
    path: str
    file_kind: str
    """Its name without hashes and numbers, in a store, a run, a cell, …"""
    name: str
    """A key of `DAMAGES`."""


def damages(bench: Bench, names: Sequence[str]) -> list[Damage]:
    """All of them, in an order whose beginnings hold all kinds of files evenly."""
    by_kind: dict[str, list[Damage]] = {}
    for name in names:
        states = [bench.of(name).state, *([bench.checkpoints()] if name == "training" else [])]
        for n, state in enumerate(states):
            for path in sorted(str(p.relative_to(state)) for p in state.rglob("*") if p.is_file()):
                # Of a training that was killed, its checkpoints.
                if _is_read(path) and path.startswith(CHECKPOINTS) == bool(n):
                    kind = _file_kind(path)
                    suffix = Path(path).suffix
                    by_kind.setdefault(kind, []).extend(
                        Damage(name, path, kind, damage)
                        for damage, (_, suffixes) in DAMAGES.items()
                        if not suffixes or suffix in suffixes
                    )
    rng = random.Random(0)
    for group in by_kind.values():
        rng.shuffle(group)
    turns = itertools.zip_longest(*by_kind.values())
    return [damage for turn in turns for damage in turn if damage is not None]


def _is_read(path: str) -> bool:
    """Whether a later command may read the file; Hydra itself replaces a single run's config."""
    return not (_NEVER_READ.search(path) or path.startswith("run/.hydra/"))


def _file_kind(path: str) -> str:
    parts = [_NUMBER.sub("#", part) for part in Path(path).parts]
    parts = ["layer" if part.startswith("layer_") else part for part in parts]
    return "/".join(parts)


def damage(bench: Bench, rng: random.Random, what: Damage) -> Outcome:
    """Damage a file of a finished (or, for checkpoints, killed) work, and run the command again."""
    work, whole = WORKS[what.work], bench.of(what.work)
    checkpoint = what.path.startswith(CHECKPOINTS)
    cwd = bench.fresh(work, bench.checkpoints() if checkpoint else whole.state)
    file = cwd / what.path
    done = DAMAGES[what.name][0](file, rng.randrange(2**31))
    damaged = file.read_bytes() if file.is_file() else b""
    if what.path.startswith("cache/") and not what.path.startswith(INDEX):
        # Else the finished run is reused, and nobody reads the rest of the cache.
        shutil.rmtree(cwd / INDEX, ignore_errors=True)
    result = bench.run(work)
    detail = f"{what.path}: {done}"
    if failure := failed(result):
        return Outcome(True, detail, failure)
    comparison = compared(whole, cwd, "run")
    if not comparison["wrong"] and what.path.startswith("run/") and _is_result(file):
        content = file.read_bytes() if file.is_file() else b""
        comparison["wrong"] = f"{what.path} is still damaged" if content == damaged else ""
    return Outcome(True, detail, **comparison)


def _is_result(file: Path) -> bool:
    return file.suffix in _RESULTS and not file.name.startswith(".")


# Disks


def full_disk(bench: Bench, rng: random.Random, name: str) -> Outcome:
    """Run and cache on a disk of random size, which is then made large enough."""
    work, whole = WORKS[name], bench.of(name)
    needed = sum(p.stat().st_size for p in whole.state.rglob("*") if p.is_file()) // 1024
    kilobytes = max(4, int(rng.uniform(0.02, 1.0) * needed))
    cwd = bench.fresh(work)
    with small_disk(cwd, kilobytes) as disk:
        result = bench.run(work)
        detail = f"{kilobytes} kB where {needed} are needed"
        failure = not_one_line(result) if result.code else failed(result)
        if result.code and not failure and "disk full" not in result.err:
            failure = f"does not say that the disk is full: {_end(result.err)}"
        before = finished(cwd)
        disk.resize(needed * 4 + 2**14)
        again = bench.run(work)
        failure = failure or failed(again)
        if failure:
            return Outcome(True, detail, failure)
        lost = computed_again(before, cwd, whole, again)
        return Outcome(result.code != 0, detail, lost=lost, **compared(whole, cwd))


def read_only_cache(bench: Bench, rng: random.Random, name: str) -> Outcome:
    """A cache folder that cannot be written, with everything in it or empty: computing goes on."""
    work, whole = WORKS[name], bench.of(name)
    # Collecting has no other product than the cache, so it stops where it cannot write one.
    filled = rng.random() < 0.5 or name == "collecting"
    cwd = bench.fresh(work)
    with small_disk(cwd / "cache", 2**16) as disk:
        if filled:
            shutil.copytree(whole.state / "cache", disk.path, dirs_exist_ok=True)
            shutil.rmtree(disk.path / "finished")
        disk.read_only()
        result = bench.run(work)
        detail = "read-only, filled" if filled else "read-only, empty"
        failure = failed(result)
        if not (filled or failure or "is not writable" in result.err):
            failure = f"no warning: {_end(result.err)}"
        comparison = {} if failure else compared(whole, cwd, "run")
        return Outcome(True, detail, failure, **comparison)


# Outages


def wandb_outage(bench: Bench, rng: random.Random, name: str) -> Outcome:
    """A W&B server that is not there, hangs or fails, from the start or once the run has begun."""
    work, whole = WORKS[name], bench.of(name)
    cwd, (mode, later) = bench.fresh(work), rng.choice(OUTAGES)
    detail = f"{later} after the start" if later else mode
    with wandb_server(mode, later) as server:
        env = {"WANDB_MODE": None, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40}
        began = time.monotonic()
        result = bench.run(work, "tracker=wandb", env=env)
        seconds = time.monotonic() - began
    failure = failed(result)
    if not failure and seconds > whole.seconds + _LONGEST_DELAY_SECONDS:
        failure = f"{seconds:.0f} s instead of {whole.seconds:.0f}"
    if not failure and "wandb sync" not in result.out + result.err:
        failure = f"does not say how to upload the run: {_end(result.err)}"
    return Outcome(True, detail, failure, **({} if failure else compared(whole, cwd, "run")))


# Several at once


def at_once(bench: Bench, rng: random.Random, name: str) -> Outcome:
    """Two or three identical commands at once, with one cache: nothing is computed twice."""
    work, whole = WORKS[name], bench.of(name)
    cwd, n = bench.fresh(work), rng.choice((2, 3))
    runs = [f"run{i}" for i in range(n)]
    began = [start(work.command(run=r), cwd) for r in runs]
    results = [started.wait() for started in began]
    detail = f"{n} processes"
    if failure := next(filter(None, map(failed, results)), ""):
        return Outcome(True, detail, failure)
    comparisons = [compared(whole, cwd, run) for run in runs]
    combined = {
        key: ", ".join(filter(None, (f[key] for f in comparisons))) for key in comparisons[0]
    }
    rows, needed = sum(map(rows_computed, results)), rows_computed(whole.result)
    tokens = sum(sum(tokens_forwarded(s).values()) for s in results)
    needed_tokens = sum(tokens_forwarded(whole.result).values())
    lost = [f"{rows} rows computed for {needed}"] if rows > needed else []
    lost += [f"{tokens} tokens forwarded for {needed_tokens}"] if tokens > needed_tokens else []
    return Outcome(True, detail, lost="; ".join(lost), **combined)
