"""Show that a change of the code left results as they were: metrics and tables of two versions.

    python experiments/validation/same_results.py --before REVISION --out outputs/same_results

Runs the default command and the studies with the code of REVISION (in a git worktree) and with the
code of this checkout, each with a cache of its own, and compares every metrics.json and every table
that the runs leave. Metrics, columns and tables that were renamed are listed in renamed.json. What
was computed is reused when the command is typed again.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
STUDIES = (
    "default",
    "entity_recognition",
    "memorization",
    "prompt_features",
    "sae_quality",
    "train_from_scratch",
)
RELATIVE = 1e-9
"""Relative difference that is taken for rounding."""
_COSTS = ("seconds", "tokens_forwarded", "samples_per_second")
"""Last words of metrics and columns that say what a run cost."""

_PLACES = ("cache_dir", "folder")
"""Columns of a sweep's table that depend on where it ran."""
Renamed = Mapping[str, Mapping[str, str]]
"""`metrics`, `columns` and `tables`: name before -> name after."""


def run_study(study: str, code: Path, out: Path) -> None:
    """Run a study with the code of a checkout, unless that was done before."""
    done = out / "done"
    if done.is_file():
        return
    out.mkdir(parents=True, exist_ok=True)
    cache = f"cache_dir={out.resolve()}/cache"
    environment = {**os.environ, "PYTHONPATH": str(code), "PYTHON": sys.executable}
    environment |= {"OUT": str(out.resolve() / "runs"), "EXTRA": cache, "QUIET": "tracker=none"}
    words = ["bash", str(code / "experiments" / study / "run.sh")]
    if study == "default":
        folder = f"hydra.run.dir={out.resolve()}/runs"
        words = [sys.executable, "-m", "saexp", "tracker=none", cache, folder]
    sys.stderr.write(f"{study} with the code in {code}\n")
    subprocess.run(words, cwd=code, env=environment, check=True, stdout=subprocess.DEVNULL)
    done.write_text("\n")


def differences(before: Path, after: Path, renamed: Renamed) -> Iterator[str]:
    """One line per difference between what the runs below two folders left."""
    first, second = _by_name(before), _by_name(after)
    if not first:
        yield f"{before}: no results"
    pairs = {n: n.with_stem(renamed.get("tables", {}).get(n.stem, n.stem)) for n in first}
    extra = second.keys() - set(pairs.values())
    yield from (f"{name}: only after the change" for name in sorted(extra))
    for old, new in sorted(pairs.items()):
        if new not in second:
            yield f"{old}: missing after the change"
        elif old.suffix == ".json":
            yield from _metrics(first[old], second[new], renamed.get("metrics", {}), str(new))
        else:
            # A sweep's table has the metrics of its cells as columns.
            names = {**renamed.get("metrics", {}), **renamed.get("columns", {})}
            yield from _table(first[old], second[new], names, str(new))


def _by_name(folder: Path) -> dict[Path, Path]:
    """Relative path -> file. Of a sweep's cell only the number: its folder names `cache_dir`."""
    files = {}
    for file in _results(folder):
        parts = file.relative_to(folder).parts
        files[Path(*(p.partition("_")[0] if p[0].isdigit() else p for p in parts))] = file
    return files


def _results(folder: Path) -> Iterator[Path]:
    yield from folder.rglob("metrics.json")
    yield from folder.rglob("*.parquet")


def _metrics(before: Path, after: Path, renamed: Mapping[str, str], label: str) -> Iterator[str]:
    old, new = (json.loads(f.read_text("utf-8")) for f in (before, after))
    old = {_new_name(name, renamed): value for name, value in old.items()}
    yield from (f"{label}: {name} is missing" for name in sorted(old.keys() - new.keys()))
    yield from (f"{label}: {name} is new" for name in sorted(new.keys() - old.keys()))
    for name in sorted(old.keys() & new.keys()):
        if not _is_cost(name) and not _equal(old[name], new[name]):
            yield f"{label}: {name} was {old[name]}, is {new[name]}"


def _new_name(name: str, renamed: Mapping[str, str]) -> str:
    """Name after the change of a metric; of several SAEs, it ends in layer and width."""
    for old, new in renamed.items():
        if name == old or name.startswith((f"{old}_layer_", f"{old}_width_")):
            return new + name.removeprefix(old)
    return name


def _table(before: Path, after: Path, renamed: Mapping[str, str], label: str) -> Iterator[str]:
    old, new = pd.read_parquet(before), pd.read_parquet(after)
    old = old.rename(columns=lambda column: _new_name(column, renamed))
    yield from (f"{label}: column {c} is missing" for c in old.columns.difference(new.columns))
    yield from (f"{label}: column {c} is new" for c in new.columns.difference(old.columns))
    if len(old) != len(new):
        yield f"{label}: {len(old)} rows before, {len(new)} after"
        return
    for column in old.columns.intersection(new.columns):
        if _is_cost(column):
            continue
        pairs = zip(old[column].tolist(), new[column].tolist(), strict=True)
        rows = [i for i, (a, b) in enumerate(pairs) if not _equal(a, b)]
        if rows:
            was, now = old[column].iloc[rows[0]], new[column].iloc[rows[0]]
            yield f"{label}: {column} differs in {len(rows)} rows; row {rows[0]}: {was} -> {now}"


def _is_cost(name: str) -> bool:
    return name.rpartition("/")[2] in (*_COSTS, *_PLACES)


def _equal(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray | list) and isinstance(b, np.ndarray | list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, float | int) and isinstance(b, float | int):
        return a == b or bool(np.isclose(a, b, rtol=RELATIVE, atol=0, equal_nan=True))
    # pandas' NA is neither equal nor unequal to anything.
    if a is None or b is None or a is pd.NA or b is pd.NA:
        return bool(pd.isna(a) and pd.isna(b))  # type: ignore[arg-type]
    return bool(a == b) or bool(pd.isna(a) and pd.isna(b))  # type: ignore[arg-type]


def main() -> int:
    """Run, compare, print; 0 where nothing differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--before", required=True, help="git revision to compare with")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/same_results")
    parser.add_argument("--studies", nargs="+", default=STUDIES, choices=STUDIES)
    asked = parser.parse_args()
    code = asked.out.resolve() / "code"
    if not code.is_dir():
        git = ["git", "-C", str(ROOT), "worktree", "add", "--detach", str(code), asked.before]
        subprocess.run(git, check=True)
    renamed = json.loads((HERE / "renamed.json").read_text("utf-8"))
    n_different = 0
    for study in asked.studies:
        places = asked.out / "before" / study, asked.out / "after" / study
        for version, folder in zip((code, ROOT), places, strict=True):
            run_study(study, version, folder)
        lines = list(differences(places[0] / "runs", places[1] / "runs", renamed))
        n_different += len(lines)
        n_files = len(list(_results(places[0] / "runs")))
        heading = f"{study}: {n_files} files compared, {len(lines)} differences"
        sys.stdout.write("\n  ".join([heading, *lines]) + "\n")
    return int(n_different > 0)


if __name__ == "__main__":
    raise SystemExit(main())
