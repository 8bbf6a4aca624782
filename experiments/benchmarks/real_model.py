"""Compare saexp with other tools on a real model, SmolLM2-135M, and its shipped SAE.

    OMP_NUM_THREADS=1 python experiments/benchmarks/real_model.py            # after make real-model
    OMP_NUM_THREADS=1 python experiments/benchmarks/real_model.py --dtypes float32 --only collection

Collection of the stream after block 15 at every token of 100 texts; its encoding; the SAE's
evaluation; greedy generation of 8 prompts and 20 tokens while a decoder row is added at every
token; training steps of SAEs. All in one process, on the same model weights, tokens, batches, dtype
and number of threads. First each tool runs once, and its results must equal saexp's within a
tolerance, else the script stops. Then saexp and the other tool run in turn, `--repeats` times; a
ratio is the other tool's time divided by saexp's just before it, so that a ratio above 1 means that
saexp is faster. Times are of the CPU where one thread is used, because wall time depends on what
else the machine does.

TransformerLens and sae-lens are dependencies of `saexp[bench]`; nnsight is measured where it can be
imported. The rows are written to `measured/real_model_cpu.csv`.
"""

import argparse
import csv
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import real_model_saes as saes
import real_model_ways as ways
import torch
from real_model_ways import RealModel, Work

import saexp

MEASURED = Path(__file__).parent / "measured"
COLUMNS = (
    "work",
    "dtype",
    "other",
    "unit",
    "saexp",
    "reference",
    "ratio",
    "lowest",
    "highest",
    "difference",
)
WORKS: dict[str, Callable[[RealModel], Work]] = {
    "collection": ways.collection,
    "encoding": ways.encoding,
    "evaluation": saes.evaluation,
    "generation": ways.generation,
    "batchtopk": partial(saes.sae_steps, architecture="batchtopk"),
    "topk": partial(saes.sae_steps, architecture="topk"),
    "standard": partial(saes.sae_steps, architecture="standard"),
    "training": partial(saes.with_the_model, architecture="batchtopk"),
}
PACKAGES = ("torch", "transformers", "transformer-lens", "sae-lens", "nnsight")


def clock() -> float:
    """Seconds of the CPU with one thread, else of the wall."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(run: Callable[[], Any]) -> float:
    """How long a run takes."""
    began = clock()
    run()
    return clock() - began


def compared(work: Work, dtype: str, repeats: int) -> Iterator[dict[str, Any]]:
    """A row for each other tool. Raises SystemExit where results differ."""
    own = work.own()
    for name, run in work.others.items():
        difference = work.difference(own, run())
        if not difference <= work.tolerance:
            raise SystemExit(f"{work.name}, {dtype}: {name} differs from saexp by {difference:.3g}")
        pairs = [(seconds(work.own), seconds(run)) for _ in range(repeats)]
        ratios = sorted(other / own_seconds for own_seconds, other in pairs)
        yield {
            "work": work.name,
            "dtype": dtype,
            "other": name,
            "unit": f"{work.unit} per {'CPU ' if torch.get_num_threads() == 1 else ''}second",
            "saexp": round(work.amount / statistics.median(a for a, _ in pairs)),
            "reference": round(work.amount / statistics.median(b for _, b in pairs)),
            "ratio": round(statistics.median(ratios), 2),
            "lowest": round(ratios[0], 2),
            "highest": round(ratios[-1], 2),
            "difference": f"{difference:.1e}",
        }


def show(rows: list[dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(str(row[c]) for c in COLUMNS)} |" for row in rows]
    return "\n".join(lines)


def version(package: str) -> str:
    """`torch 2.13.0`, or that the package is not installed."""
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"{package} is not installed and left out"


def main() -> None:
    """Measure, print the table, write it as CSV."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(WORKS), help="of what is measured")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--layer", type=int, default=15, choices=[7, 15, 22])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=MEASURED / "real_model_cpu.csv")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for dtype in args.dtypes.split(","):
        cfg = saexp.compose(["model=smollm2", f"dtype={dtype}", "device=cpu"])
        with tempfile.TemporaryDirectory(prefix="real-model-") as folder:
            real_model = RealModel(saexp.build("model", cfg.model), args.layer, Path(folder))
            for name in args.only.split(","):
                for row in compared(WORKS[name](real_model), dtype, args.repeats):
                    rows.append(row)
                    cells = (row[c] for c in ("work", "dtype", "other", "ratio"))
                    sys.stderr.write(", ".join(map(str, cells)) + "\n")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", encoding="utf-8", newline="") as file:
        writer: csv.DictWriter[str] = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    sys.stdout.write(show(rows) + "\n\n" + ", ".join(map(version, PACKAGES)) + "\n")


if __name__ == "__main__":
    main()
