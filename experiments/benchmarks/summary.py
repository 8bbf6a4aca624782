"""Print what gpu.sh measured as one table, and write it as results.json.

python experiments/benchmarks/summary.py RESULTS cuda
"""

import csv
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Line = tuple[str, Any, Any, Any]
"""(what, saexp, the reference, ratio)."""


def collect(folder: Path) -> Iterator[Line]:
    """Tokens per second of collecting one position per text, beside each other way."""
    content = json.loads((folder / "collect.json").read_text("utf-8"))
    tokens = content["about"]["tokens"]
    rates = {
        name: tokens / statistics.median(seconds) for name, seconds in content["seconds"].items()
    }
    own = rates.pop("saexp")
    for name, rate in rates.items():
        yield f"tokens/s, beside {name}", own, rate, own / rate


def table(file: Path) -> Iterator[Line]:
    """The rows of a CSV file with columns measurement, model, unit, saexp, reference, ratio."""
    with file.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            what = ", ".join(
                row[c] for c in ("measurement", "model", "dtype", "unit") if row.get(c)
            )
            yield what, float(row["saexp"]), float(row["reference"]), float(row["ratio"])


def steer(folder: Path) -> Iterator[Line]:
    """Seconds of a steering grid, and what an edit adds to a forward pass."""
    for file in sorted((folder / "steer").glob("steer_*.json")):
        content = json.loads(file.read_text("utf-8"))
        own, other = content["seconds"].values()
        yield f"seconds of the grid {content['grid']}", own, other, content["ratio"]
        bare, edited = content["forward_seconds"].values()
        yield (
            "milliseconds of a pass with an edit, and without",
            1e3 * edited,
            1e3 * bare,
            edited / bare,
        )


def generate(folder: Path) -> Iterator[Line]:
    """Tokens per second of generating."""
    for file in sorted((folder / "generate").glob("generate_*.json")):
        for one in json.loads(file.read_text("utf-8"))["results"]:
            rates = one["tokens_per_second"]
            yield f"tokens/s, {one['dtype']}", rates["saexp"], rates["reference"], one["ratio"]


READERS: dict[str, Callable[[Path], Iterator[Line]]] = {
    "collect": collect,
    "corpus": lambda folder: table(folder / "corpus.csv"),
    "train": lambda folder: table(folder / "train.csv"),
    "steer": steer,
    "generate": generate,
}


def problem(code: int, log: str) -> str:
    """Why a benchmark has no numbers."""
    last = log.strip().splitlines()[-1:] or [""]
    return "took too long" if code == 124 else f"failed (exit code {code}): {last[0]}"


def main() -> None:
    """Read the folder, print the table, write results.json."""
    folder, device = Path(sys.argv[1]), sys.argv[2]
    about: dict[str, Any] = {"device": device}
    try:
        import torch

        about |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
        if device == "cuda" and torch.cuda.is_available():
            about["gpu"] = torch.cuda.get_device_name()
    except ImportError as error:
        about["torch"] = str(error)
    rows, seconds, problems = [], {}, {}
    for name, reader in READERS.items():
        code, n_seconds = map(int, (folder / f"{name}.status").read_text("utf-8").split())
        seconds[name] = n_seconds
        if code:
            log = (folder / f"{name}.log").read_text("utf-8", errors="replace")
            problems[name] = problem(code, log)
            continue
        for what, own, other, ratio in reader(folder):
            rows.append(
                {"benchmark": name, "what": what, "saexp": own, "reference": other, "ratio": ratio}
            )
    content = {"about": about, "seconds": seconds, "problems": problems, "rows": rows}
    file = folder / "results.json"
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    lines = ["| benchmark | what | saexp | reference | ratio |", "|---|---|---|---|---|"]
    for row in rows:
        numbers = (f"{row[c]:.4g}" for c in ("saexp", "reference", "ratio"))
        lines.append(f"| {row['benchmark']} | {row['what']} | {' | '.join(numbers)} |")
    lines += [f"| {name} | {text} | | | |" for name, text in problems.items()]
    lines += ["", f"{json.dumps(about)}, {sum(seconds.values())} s; {file}"]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
