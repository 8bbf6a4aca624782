"""Measure what each performance mechanism gains: every workload with and without it.

    python experiments/benchmarks/mechanisms.py                  # all missing cells
    python experiments/benchmarks/mechanisms.py --only "claimed rows"   # one mechanism
    python experiments/benchmarks/mechanisms.py --table          # print the table

Each measurement is a fresh process with an empty cache, on the shipped tiny model and one CPU
thread. Runs with and without a mechanism alternate; the table holds medians of `--repeats` pairs
and whether the results are equal. CPU seconds (user and system, without imports) are what counts:
wall time depends on what else the machine does. Measured runs are appended to
`measured/mechanisms_runs.csv`, so an interrupted benchmark continues where it stopped.
"""

import argparse
import gc
import os
import pickle
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
from workloads import COMMANDS, UNSTABLE, WORKLOADS, Tables, command_line

MEASURED = Path(__file__).parent / "measured"


def two_processes(folder: Path, mechanism: str) -> float:
    """The same small grid in two processes at once with one cache; CPU seconds of both."""
    command = [sys.executable, __file__, "--child", "small_grid", mechanism, str(folder)]
    both = [subprocess.Popen([*command, str(folder / f"out_{i}")]) for i in range(2)]
    if any(process.wait() for process in both):
        raise SystemExit("a process of two_processes failed")
    outs = [pickle.loads((folder / f"out_{i}").read_bytes()) for i in range(2)]  # noqa: S301
    return sum(out["cpu_seconds"] for out in outs)


# Mechanisms: each context runs the project without one of them.


@contextmanager
def no_prefix_sharing() -> Iterator[None]:
    """Collection forwards every text whole (`store.share_prefixes=false`)."""
    from saexp.activations import collector

    whole = collector.forward

    def forward(*args: Any, share_prefixes: bool, **options: Any) -> Any:  # noqa: ARG001
        return whole(*args, share_prefixes=False, **options)

    with patch.object(collector, "forward", forward):
        yield


@contextmanager
def no_prompt_sharing() -> Iterator[None]:
    """Interventions run every prompt whole, also where only its end is edited."""
    from saexp.interventions import generation

    with patch.object(generation, "_same_frequencies", lambda *_: False):
        yield


@contextmanager
def no_block_skipping() -> Iterator[None]:
    """Interventions run the blocks below the edit for every row."""
    from saexp.interventions import generation

    with patch.object(generation, "may_skip", lambda _: False):
        yield


@contextmanager
def no_resuming() -> Iterator[None]:
    """An evaluation runs whole passes instead of resuming at the spliced stream."""
    from saexp.analysis.evaluation_passes import Passes

    with patch.object(Passes, "_resumes_exactly", lambda *_: False):
        yield


@contextmanager
def no_speculative_decoding() -> Iterator[None]:
    """Every row is generated token by token."""
    from saexp.interventions.cached_generation import SpeculativeDecoding

    with patch.object(SpeculativeDecoding, "_can_draft", lambda *_: False):
        yield


@contextmanager
def no_equal_rows() -> Iterator[None]:
    """Equal rows of an intervention are computed as often as they occur."""
    from saexp.interventions.stream_edits import Row

    own = Row.key
    numbers = iter(range(10**9))

    def key(row: Any) -> tuple[Any, ...]:
        return (*own.func(row), next(numbers))

    with patch.object(Row, "key", property(key)):
        yield


@contextmanager
def no_merged_texts() -> Iterator[None]:
    """Texts that are the beginning of another one are forwarded by themselves."""
    from saexp.activations import collector
    from saexp.activations.shared_prefixes import Unit, units

    def whole(placement: Any, shard_rows: np.ndarray, config: Any = None) -> list[Any]:
        merged = units(placement, shard_rows, config)
        alone = []
        for unit in merged:
            ends: dict[int, list[Any]] = {}
            for row in unit.rows:
                ends.setdefault(int(row[2]), []).append(row)
            for rows in ends.values():
                alone.append(Unit(unit.ids[: max(r[1] for r in rows) + 1], np.stack(rows)))
        return alone

    with patch.object(collector, "units", whole):
        yield


@contextmanager
def no_claims() -> Iterator[None]:
    """Processes compute rows that another process is computing."""
    from saexp.interventions import cached_generation as batching
    from saexp.interventions.results_cache import Batch

    def alone(cache: Any, items: Any, compute: Any) -> Iterator[Any]:
        key_of = {id(item): key for key, item in items.items()}
        for batch in compute(list(items.values())):
            results = [(key_of[id(item)], values) for item, values in batch]
            cache.put(results)
            yield Batch(results, computed_here=True)

    with patch.object(batching, "shared", alone):
        yield


@contextmanager
def no_object_cache() -> Iterator[None]:
    """Runs of one process load, encode and analyse anew."""
    from saexp.context import ObjectCache

    def load(_cache: Any, _kind: str, _key: str, build: Callable[[], Any]) -> Any:
        return build()

    with (
        patch.object(ObjectCache, "get", lambda *_: None),
        patch.object(ObjectCache, "load", load),
    ):
        yield


@contextmanager
def no_quick_batchtopk() -> Iterator[None]:
    """sae-lens' own BatchTopK."""
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE

    from saexp.saes import training_architectures as architectures

    with patch.object(architectures, "QuickBatchTopKTrainingSAE", BatchTopKTrainingSAE):
        yield


@contextmanager
def no_kept_memory() -> Iterator[None]:
    """glibc returns the memory of freed tensors to the system."""
    from saexp.saes import training_step

    with patch.object(training_step, "keep_freed_memory", lambda: None):
        yield


@contextmanager
def no_garbage_settings() -> Iterator[None]:
    """Python's own thresholds; `command_line` leaves out the rest."""
    assert gc.isenabled()
    yield


MECHANISMS: dict[str, tuple[Callable[[], Any], Sequence[str]]] = {
    "prefixes (collection)": (no_prefix_sharing, ("default_run", "few_shot", "corpus")),
    "prefixes (interventions)": (no_prompt_sharing, ("default_run", "grid_all_tokens", "few_shot")),
    "lower blocks (interventions)": (
        no_block_skipping,
        ("default_run", "grid_all_tokens", "few_shot"),
    ),
    "speculative decoding": (no_speculative_decoding, ("default_run", "grid_all_tokens")),
    "equal rows": (no_equal_rows, ("default_run", "grid_all_tokens", "few_shot")),
    "merged texts": (no_merged_texts, ("few_shot", "corpus", "entity_prompts")),
    "resumed passes (evaluation)": (no_resuming, ("evaluation",)),
    "claimed rows": (no_claims, ("two_processes",)),
    "object cache": (no_object_cache, ("sweep_cells",)),
    "sums over active latents (BatchTopK)": (no_quick_batchtopk, ("train",)),
    "kept memory (training)": (no_kept_memory, ("train",)),
    "garbage collection settings": (no_garbage_settings, tuple(COMMANDS)),
}


def child(workload: str, mechanism: str, folder: Path, out: Path) -> None:
    """Run one workload in this process and write what it took and gave."""
    without = mechanism != "none"
    if workload in COMMANDS:
        command_line(folder, *COMMANDS[workload], without=without)
        return
    import torch

    import saexp
    import saexp.interventions.run
    import saexp.tasks.analyze
    import saexp.tasks.train  # noqa: F401

    torch.set_num_threads(1)
    saexp.build("model", saexp.compose(["model=tiny"]).model)
    with ExitStack() as stack:
        if without:
            stack.enter_context(MECHANISMS[mechanism][0]())
        cpu, wall = time.process_time(), time.perf_counter()
        tables = WORKLOADS[workload](folder)
        result = {
            "cpu_seconds": time.process_time() - cpu,
            "wall_seconds": time.perf_counter() - wall,
            "tables": tables,
        }
    out.write_bytes(pickle.dumps(result))


def measure(workload: str, mechanism: str, keep: Path | None) -> tuple[float, float, Tables]:
    """(CPU seconds, wall seconds, tables) of one fresh process."""
    with tempfile.TemporaryDirectory(prefix="mechanisms-") as name:
        folder = Path(name)
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        if workload == "two_processes":
            cpu = two_processes(folder, mechanism)
            return cpu, time.perf_counter() - began, {}
        (folder / "work").mkdir()
        command = [sys.executable, __file__, "--child", workload, mechanism]
        command += [str(folder / "work"), str(folder / "out")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (folder / "log").open("w") as log:
            done = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False)
        if done.returncode:
            raise SystemExit((folder / "log").read_text()[-2000:])
        if workload in COMMANDS:
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            return cpu, time.perf_counter() - began, {}
        result = pickle.loads((folder / "out").read_bytes())  # noqa: S301
        if keep is not None:
            keep.write_bytes(pickle.dumps(result["tables"]))
        return result["cpu_seconds"], result["wall_seconds"], result["tables"]


def difference(first: Tables, second: Tables) -> float:
    """Largest relative difference of numbers; infinite where a text or a shape differs."""
    largest = 0.0
    for name, table in first.items():
        other = second.get(name)
        if other is None or table.shape != other.shape:
            return float("inf")
        for column in table.columns.difference(list(UNSTABLE)):
            a, b = table[column], other[column]
            if not pd.api.types.is_numeric_dtype(a):
                if a.astype(str).tolist() != b.astype(str).tolist():
                    return float("inf")
                continue
            x, y = (s.astype("Float64").to_numpy(float, na_value=np.nan) for s in (a, b))
            if (np.isnan(x) != np.isnan(y)).any():
                return float("inf")
            far = np.abs(x - y) / np.maximum(np.abs(x), 1e-3)
            largest = max(largest, float(np.nanmax(far, initial=0.0)))
    return largest


def measure_missing(file: Path, scratch: Path, only: str | None, repeats: int) -> None:
    """Append a row per process to the file of runs: in turn without any change and without each
    mechanism."""
    workloads = dict.fromkeys(w for _, used in MECHANISMS.values() for w in used)
    last = ("default_run", "grid_all_tokens")
    workloads = [*(w for w in workloads if w not in last), *last]
    for repeat in range(repeats):
        for workload in workloads:
            states = [name for name, (_, used) in MECHANISMS.items() if workload in used]
            states = [name for name in states if only in (None, name)]
            # In turn from either end: what runs later finds more of the disk in memory.
            order = ["none", *states][:: -1 if repeat % 2 else 1]
            for state in order if states else []:
                runs = read_runs(file)
                same = runs["workload"].eq(workload) & runs["repeat"].eq(repeat)
                if (same & runs["without"].eq(state)).any():
                    continue
                reference = scratch / f"{workload}.pickle"
                keep = reference if state == "none" and not reference.exists() else None
                cpu, wall, tables = measure(workload, state, keep)
                far = 0.0
                if tables and reference.exists():
                    far = difference(pickle.loads(reference.read_bytes()), tables)  # noqa: S301
                row = [workload, state, repeat, round(cpu, 3), round(wall, 3), far]
                with file.open("a", encoding="utf-8") as lines:
                    lines.write(",".join(map(str, row)) + "\n")
                sys.stderr.write(f"{row}\n")


COLUMNS = ["workload", "without", "repeat", "cpu_seconds", "wall_seconds"]


def read_runs(file: Path) -> pd.DataFrame:
    """All measured runs."""
    if not file.exists():
        file.write_text(",".join([*COLUMNS, "difference"]) + "\n", encoding="utf-8")
    return pd.read_csv(file)


def table(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per mechanism and workload: medians, what the mechanism saves, equality."""
    rows = []
    for workload, mechanism in dict.fromkeys(zip(runs["workload"], runs["without"], strict=True)):
        part = runs[runs["workload"].eq(workload)]
        on, off = (part[part["without"].eq(state)] for state in ("none", mechanism))
        if mechanism == "none" or not len(on):
            continue
        with_it, without = (statistics.median(x["cpu_seconds"]) for x in (on, off))
        rows.append(
            {
                "mechanism": mechanism,
                "workload": workload,
                "cpu_seconds_with": round(with_it, 2),
                "cpu_seconds_without": round(without, 2),
                "saved": f"{100 * (1 - with_it / without):.0f}%",
                "wall_seconds_with": round(statistics.median(on["wall_seconds"]), 2),
                "wall_seconds_without": round(statistics.median(off["wall_seconds"]), 2),
                "largest_difference": max(off["difference"]),
                "pairs": min(len(on), len(off)),
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    """Measure what is missing, print the table and write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--child", nargs=4, metavar=("WORKLOAD", "MECHANISM", "FOLDER", "OUT"))
    parser.add_argument("--only", choices=list(MECHANISMS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=MEASURED)
    args = parser.parse_args()
    if args.child:
        workload, mechanism, folder, out = args.child
        child(workload, mechanism, Path(folder), Path(out))
        return
    file = args.out / "mechanisms_runs.csv"
    scratch = Path(tempfile.gettempdir()) / "saexp-mechanisms"
    scratch.mkdir(exist_ok=True)
    if not args.table:
        measure_missing(file, scratch, args.only, args.repeats)
    summary = table(read_runs(file))
    summary.to_csv(args.out / "mechanisms.csv", index=False)
    sys.stdout.write(summary.to_string(index=False) + "\n")


if __name__ == "__main__":
    main()
