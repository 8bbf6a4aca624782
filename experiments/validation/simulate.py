"""Error rates, biases and coverages of saexp's own inference, on data whose truth is known.

    experiments/validation/run.sh                                  # all scenarios, about 10 minutes
    python experiments/validation/simulate.py OUT.csv --quick      # a tenth of the runs
    python experiments/validation/simulate.py OUT.csv --only contrast

One row per scenario is written as soon as it is measured; started again, the script goes on with
those that OUT.csv lacks. Every scenario has its own seed, so their order does not matter.
"""

import argparse
import csv
import logging
import time
import zlib
from importlib import metadata
from pathlib import Path

import numpy as np
from scenarios import Scenario, scenarios
from tqdm import tqdm

SEED = 18
NOMINAL = {"error rate": 0.05, "bias": 0.0, "coverage": 0.95}
COLUMNS = [
    "scenario",
    "kind",
    "nominal",
    "n_runs",
    "value",
    "share_of_latents",
    "no_interval",
    "no_width",
    "seconds",
    "version",
]


def main() -> None:
    """Measure what the file lacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("out", type=Path, help="CSV file, continued where it exists")
    parser.add_argument("--quick", action="store_true", help="a tenth of the runs")
    parser.add_argument("--only", default="", help="scenarios whose name contains this")
    parser.add_argument("--version", default=metadata.version("saexp"), help="named in the file")
    args = parser.parse_args()
    # Notes of a thousand synthetic contrasts are of no interest.
    logging.getLogger("saexp").setLevel(logging.WARNING)
    done = measured(args.out)
    wanted = [s for s in scenarios() if args.only in s.name and s.name not in done]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(wanted, unit="scenario")
    for scenario in bar:
        bar.set_description(scenario.name[:40])
        append(args.out, row(scenario, quick=args.quick, version=args.version))


def measured(out: Path) -> set[str]:
    """Names of the scenarios that the file has."""
    if not out.exists():
        return set()
    with out.open(encoding="utf-8") as file:
        return {r["scenario"] for r in csv.DictReader(file)}


def row(scenario: Scenario, *, quick: bool, version: str) -> dict[str, object]:
    """Measure one scenario."""
    n_runs = max(scenario.n_runs // 10, 10) if quick else scenario.n_runs
    start = time.perf_counter()
    rng = np.random.default_rng([SEED, zlib.crc32(scenario.name.encode())])
    estimates = scenario.measure(rng, n_runs)
    return {
        "scenario": scenario.name,
        "kind": scenario.kind,
        "nominal": NOMINAL[scenario.kind],
        "n_runs": n_runs,
        **{name: f"{value:.4f}" for name, value in estimates.items()},
        "seconds": f"{time.perf_counter() - start:.1f}",
        "version": version,
    }


def append(out: Path, values: dict[str, object]) -> None:
    """Add a row, with the header where the file is new."""
    new = not out.exists()
    with out.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(values)


if __name__ == "__main__":
    main()
