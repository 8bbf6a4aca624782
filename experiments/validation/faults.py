"""A campaign of faults: processes killed, files damaged, disks full or read-only, runs at once.

    python experiments/validation/faults.py --out DIR                  # about 15 minutes, 2 cores
    python experiments/validation/faults.py --out DIR --kills 10 --damages 20 --others 2
    python experiments/validation/faults.py --table                    # the table of docs/faults.md

Every attempt is a line of DIR/attempts.jsonl as soon as it is made; started again with the same
version and seed, the script goes on with those that are missing. DIR/faults.csv counts them.
"""

import argparse
import csv
import json
import logging
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(p) for p in (ROOT, Path(__file__).parent) if str(p) not in sys.path]

import fault_attempts as attempts  # noqa: E402
import table  # noqa: E402
from fault_attempts import Outcome  # noqa: E402
from fault_works import WORKS, Bench  # noqa: E402

PAGE = ROOT / "docs" / "faults.md"
MEASURED = Path(__file__).parent / "faults.csv"
BEGIN = "<!-- begin: experiments/validation/faults.py -->"
END = "<!-- end: experiments/validation/faults.py -->"
COLUMNS: tuple[str, ...] = (
    "kind",
    "work",
    "attempts",
    "hits",
    "failures",
    "lost",
    "wrong",
    "rounded",
    "seconds",
)
COUNTS = COLUMNS[2:-1]
BAD = ("failures", "lost", "wrong")
Row = dict[str, Any]
_SIGTERM_EVERY = 5
"""Of so many signals one is SIGTERM, the others SIGKILL."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attempt:
    """One thing to try; the same number does the same."""

    kind: str
    work: str
    number: int
    make: Callable[[Bench, random.Random], Outcome]


def main() -> None:
    """Make the attempts that DIR lacks, and count them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, help="folder of the attempts, continued if it exists")
    parser.add_argument("--kills", type=int, default=100, help="processes that get a signal")
    parser.add_argument("--damages", type=int, default=200, help="files that are damaged")
    parser.add_argument("--others", type=int, default=12, help="attempts of each other kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="attempts whose kind or work contains this")
    parser.add_argument("--table", action="store_true", help="write docs/faults.md from faults.csv")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    if args.table:
        PAGE.write_text(with_table(PAGE.read_text("utf-8"), read(MEASURED)), encoding="utf-8")
        return
    if args.out is None:
        parser.error("--out is missing: name a folder for the attempts")
    bench = Bench(args.out.resolve() / "work")
    planned = plan(bench, args.kills, args.damages, args.others)
    wanted = [a for a in planned if args.only in a.kind or args.only in a.work]
    rows = campaign(bench, wanted, args.out, args.seed)
    log.info("%s", markdown(count(rows)))


OTHERS: dict[str, tuple[Callable[..., Outcome], Sequence[str]]] = {
    "full disk": (attempts.full_disk, attempts.ON_SMALL_DISKS),
    "read-only cache": (attempts.read_only_cache, attempts.ON_SMALL_DISKS),
    "runs at once": (attempts.at_once, attempts.SHARED),
    "W&B outage": (attempts.wandb_outage, attempts.WITH_OUTAGES),
}
"""Kind -> what does it, and the kinds of work that it is done to."""


def plan(
    bench: Bench, kills: int, damages: int, others: int, names: Sequence[str] = tuple(WORKS)
) -> list[Attempt]:
    """All attempts on these kinds of work.

    The undisturbed runs are made first, as damages depend on what they leave.
    """
    planned = []
    for i in range(kills):
        sig = signal.SIGTERM if i % _SIGTERM_EVERY == _SIGTERM_EVERY - 1 else signal.SIGKILL
        name = names[i % len(names)]
        planned.append(Attempt(sig.name, name, i, partial(attempts.kill, name=name, sig=sig)))
    if damages:
        for i, what in enumerate(attempts.damages(bench, names)[:damages]):
            planned.append(Attempt(what.name, what.work, i, partial(attempts.damage, what=what)))
    for kind, (make, possible) in OTHERS.items():
        of = [name for name in possible if name in names]
        for i in range(others if of else 0):
            name = of[i % len(of)]
            planned.append(Attempt(kind, name, i, partial(make, name=name)))
    return planned


def campaign(bench: Bench, wanted: Sequence[Attempt], out: Path, seed: int) -> list[Row]:
    """Make the attempts that `out` lacks, write its two files; all rows of its attempts."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "attempts.jsonl"
    rows = _lines(file)
    done_keys = {_key(row) for row in rows}
    missing = [a for a in wanted if (a.kind, a.work, a.number, seed) not in done_keys]
    log.info(
        "%d of %d attempts are to be made: about %s",
        len(missing),
        len(wanted),
        _minutes(bench, missing),
    )
    for attempt in tqdm(missing, unit="attempt"):
        row = _row(bench, attempt, seed)
        if row is None:
            continue
        rows.append(row)
        with file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(row, ensure_ascii=False) + "\n")
        if any(row[name] for name in BAD):
            log.info("%s", json.dumps(row, ensure_ascii=False))
    write(out / "faults.csv", count(rows))
    return rows


def _lines(file: Path) -> list[Row]:
    """Rows of an earlier start; a last line that a kill cut short is left out."""
    lines = file.read_text("utf-8").splitlines(keepends=True) if file.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < len(lines):
        file.write_text("".join(whole), encoding="utf-8")
    return [json.loads(line) for line in whole]


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("kind", "work", "number", "seed"))


def _minutes(bench: Bench, missing: Sequence[Attempt]) -> str:
    """How long the attempts take: a fault and a run after it, each a whole run at most."""
    names = {a.work for a in missing}
    seconds = {name: bench.of(name).seconds for name in names}
    return f"{sum(1.5 * seconds[a.work] + 0.5 for a in missing) / 60:.1f} minutes"


def _row(bench: Bench, attempt: Attempt, seed: int) -> Row | None:
    """Make one attempt; a command that does not end counts as failed. None where the machine cannot
    have such a fault."""
    rng = random.Random(f"{seed} {attempt.kind} {attempt.work} {attempt.number}")
    began = time.monotonic()
    try:
        outcome = attempt.make(bench, rng)
    except TimeoutError as error:
        outcome = Outcome(True, "", failure=str(error)[:400])
    except pytest.skip.Exception as reason:
        log.info("left out: %s, %s: %s", attempt.kind, attempt.work, reason)
        return None
    return {
        "kind": attempt.kind,
        "work": attempt.work,
        "number": attempt.number,
        "seed": seed,
        "hits": outcome.hit,
        "failures": outcome.failure,
        "lost": outcome.lost,
        "wrong": outcome.wrong,
        "rounded": outcome.rounded,
        "detail": outcome.detail,
        "seconds": round(time.monotonic() - began, 2),
    }


def count(rows: Iterable[Row]) -> list[Row]:
    """One row per kind and work: how many attempts failed, lost something, or were wrong."""
    counted: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row["kind"], row["work"])
        total = counted.setdefault(
            key, {"kind": key[0], "work": key[1], **dict.fromkeys(COUNTS, 0)}
        )
        total["attempts"] += 1
        for name in COUNTS[1:]:
            total[name] += bool(row[name])
        total["seconds"] = round(total.get("seconds", 0) + row["seconds"], 1)
    return list(counted.values())


def write(file: Path, rows: Iterable[Row]) -> None:
    """A CSV file of counts."""
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def read(file: Path) -> list[Row]:
    """A CSV file of counts."""
    with file.open(encoding="utf-8", newline="") as opened:
        return [{**r, **{n: int(r[n]) for n in COUNTS}} for r in csv.DictReader(opened)]


def with_table(page: str, rows: Sequence[Row]) -> str:
    """The page with the table of these counts between its markers."""
    return table.between(page, BEGIN, END, markdown(rows))


def markdown(rows: Sequence[Row]) -> str:
    """Signals and others by kind and work, damages by kind; the sum of all."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        kind = row["kind"]
        name = f"file: {kind}" if kind in attempts.DAMAGES else f"{kind}, {row['work']}"
        groups.setdefault(name, []).append(row)
    lines = [f"| Fault | {' | '.join(COUNTS)} |", "|---" * (len(COUNTS) + 1) + "|"]
    for name, of_group in {**groups, "all": list(rows)}.items():
        counts = [str(sum(row[column] for row in of_group)) for column in COUNTS]
        lines.append(f"| {name} | {' | '.join(counts)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
