"""The kinds of work that faults are injected into, and what an undisturbed run of each leaves."""

import json
import re
import shutil
import signal
import sqlite3
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.faults.injection import CommandResult, digests_of_results, results_table, start

_ROWS = re.compile(r"\d+ rows, (\d+) computed, (\d+) were stored")
_TOKENS = re.compile(r"collected \d+ rows, (\d+) tokens forwarded.*\((\w{24})\)")
_ALL = ("tracker=none", "cache_dir=cache", "resume=true", "store.shard_rows=500")
_FEW = ("dataset.n_examples=20", "analyzer.n_bootstrap=0")
_STEER = (
    *_FEW,
    "intervention.n_controls=4",
    "intervention.n_curve_controls=2",
    "intervention.max_new_tokens=8",
    "coefficient=[0.3,0.6]",
)
_TRAIN = (
    "task=train",
    "layer=2",
    "width=128",
    "sae_trainer.n_samples=100000",
    "sae_trainer.batch_size=256",
    "sae_trainer.checkpoint_every=10",
    "sae_trainer.log_every=5",
)


@dataclass(frozen=True)
class Work:
    """A command; `run` is the run's or the sweep's folder, `cache` the cache's, below its own."""

    name: str
    words: tuple[str, ...]
    cache_of: str | None = None
    """Another kind of work whose cache it begins with."""

    @property
    def is_sweep(self) -> bool:
        return "-m" in self.words

    def command(self, *more: str, run: str = "run") -> list[str]:
        """Arguments of `python -m saexp`; `more` are further overrides."""
        folders = [f"hydra.run.dir={run}"]
        if self.is_sweep:
            # Names of cells' folders do not depend on `more`.
            folders = [f"hydra.sweep.dir={run}", "hydra.sweep.subdir=${hydra.job.num}"]
        words = [*self.words, *_ALL, *folders]
        changed = {word.partition("=")[0] for word in more}
        return [w for w in words if w.partition("=")[0] not in changed] + list(more)


WORKS = {
    work.name: work
    for work in (
        Work("steering", _STEER),
        Work("collecting", ("task=collect", "layer=[0,1,2,3,4]", "store.batch_tokens=512")),
        Work("training", _TRAIN),
        Work("sweep", ("-m", "layer=1,2", "width=256,512", "intervention=none", *_FEW)),
        Work("labels", ("task=label", "dataset.n_examples=6", "task.n_samples=8")),
        Work(
            "evaluation",
            (
                "task=evaluate",
                "layer=[1,2]",
                "task.n_texts=100",
                "task.n_bootstrap=50",
            ),
        ),
        Work("report", _STEER, cache_of="steering"),
        Work("dashboard", ("task=dashboard", "task.latents=[12,160]")),
    )
}


@dataclass(frozen=True)
class Undisturbed:
    """What a run leaves that nothing happens to, and how long it takes."""

    state: Path
    """Copy of the folder that holds `run` and `cache`."""
    seconds: float
    digests: dict[str, str]
    result: CommandResult


def lasting(digests: dict[str, str]) -> dict[str, str]:
    """Without checkpoints, which a finished training needs no more, and files of W&B."""
    left_out = ("cache/training/", "run/wandb/")
    return {k: v for k, v in digests.items() if not k.startswith(left_out)}


@dataclass
class Bench:
    """Where attempts are made; every attempt of a work is made in the same folder, since saexp
    stores absolute paths."""

    folder: Path
    undisturbed: dict[str, Undisturbed] = field(default_factory=dict)
    midway: Path | None = None

    def of(self, name: str) -> Undisturbed:
        """The undisturbed run of a kind of work, run the first time that it is asked for."""
        if not self.undisturbed:
            # The server that processes are forked from takes its time to start.
            self.folder.mkdir(parents=True, exist_ok=True)
            start(["--help"], self.folder).wait()
        if name not in self.undisturbed:
            self.undisturbed[name] = self._run_undisturbed(WORKS[name])
        return self.undisturbed[name]

    def _run_undisturbed(self, work: Work) -> Undisturbed:
        cwd = self.fresh(work)
        began = time.monotonic()
        result = self.run(work)
        seconds = time.monotonic() - began
        assert result.code == 0, f"{work.name} fails undisturbed: {result.err[-2000:]}"
        state = self.folder / work.name / "undisturbed"
        copy(cwd, state)
        return Undisturbed(state, seconds, lasting(digests_of_results(cwd)), result)

    def fresh(self, work: Work, state: Path | None = None) -> Path:
        """The folder of the work's attempts with a copy of `state`, or of what it begins with."""
        cwd = self.cwd(work)
        if state is None and work.cache_of is not None:
            copy(self.of(work.cache_of).state / "cache", cwd / "cache", clear=cwd)
            # Lest that work's results are reused, instead of written again.
            shutil.rmtree(cwd / "cache" / "finished")
        elif state is None:
            shutil.rmtree(cwd, ignore_errors=True)
            cwd.mkdir(parents=True)
        else:
            copy(state, cwd)
        return cwd

    def cwd(self, work: Work) -> Path:
        return self.folder / work.name / "now"

    def run(
        self, work: Work, *more: str, env: Mapping[str, str | None] | None = None
    ) -> CommandResult:
        """The command in the work's folder, in a process of its own, to its end."""
        return start(work.command(*more), self.cwd(work), env).wait()

    def checkpoints(self) -> Path:
        """State of a training that was killed when it had two checkpoints."""
        if self.midway is None:
            work = WORKS["training"]
            cwd = self.fresh(work)
            started = start(work.command(), cwd)
            while started.process.poll() is None:
                if len(list(cwd.glob("cache/training/*/step_*"))) >= 2 or _steps(cwd) >= 100:
                    started.process.kill()
                time.sleep(0.001)
            assert started.wait().code == -signal.SIGKILL, started.read()
            self.midway = self.folder / work.name / "midway"
            copy(cwd, self.midway)
        return self.midway


def _steps(cwd: Path) -> int:
    steps = [int(p.name.removeprefix("step_")) for p in cwd.glob("cache/training/*/step_*")]
    return max(steps, default=0)


def copy(state: Path, folder: Path, clear: Path | None = None) -> None:
    """Replace a folder by a copy of another; `clear` is removed first, `folder` by default."""
    shutil.rmtree(clear or folder, ignore_errors=True)
    shutil.copytree(state, folder, symlinks=True)


@dataclass(frozen=True)
class Finished:
    """What is finished at one moment: it must not be computed again."""

    files: dict[str, tuple[int, int]]
    """Shards that a manifest lists, and metrics of runs recorded as finished: inode and time."""
    rows: frozenset[bytes]
    """Keys of the results database."""
    shards: dict[str, float]
    """Store -> fraction of its shards that are listed."""
    step: int
    """Last step of a training with a checkpoint."""


def finished(cwd: Path) -> Finished:
    """What is finished in a work's folder; a file that cannot be read lists nothing."""
    files, shards = {}, {}
    for path in cwd.glob("cache/activations/*/manifest.json"):
        with suppress(ValueError):
            manifest = json.loads(path.read_text("utf-8"))
            n = -(-manifest["n_rows"] // manifest["shard_rows"])
            listed = manifest["hookpoints"]
            shards[path.parent.name] = min((len(s) / n for s in listed.values()), default=0.0)
            for name, of_hookpoint in listed.items():
                for shard in of_hookpoint:
                    files.update(_identity(cwd, path.parent / name / f"{shard}.safetensors"))
    for path in cwd.glob("cache/finished/*.json"):
        with suppress(ValueError):
            run = Path(json.loads(path.read_text("utf-8"))["folder"])
            files.update(_identity(cwd, run / "metrics.json"))
    return Finished(files, database_keys(cwd), shards, _whole_steps(cwd))


def _identity(cwd: Path, path: Path) -> dict[str, tuple[int, int]]:
    about = path.stat()
    return {str(path.relative_to(cwd.resolve())): (about.st_ino, about.st_mtime_ns)}


def _whole_steps(cwd: Path) -> int:
    if (cwd / "run" / "sae").is_dir():
        # The trained SAE is being saved, or is; its training is over.
        return 0
    return _steps(cwd)


def database_keys(cwd: Path) -> frozenset[bytes]:
    """Keys of all rows of the results database."""
    path = cwd / "cache" / "generations.sqlite"
    if not path.is_file():
        return frozenset()
    with closing(sqlite3.connect(path)) as file:
        table = results_table(file)
        rows = file.execute(f"select key from {table}").fetchall() if table else []
    return frozenset(key for (key,) in rows)


def rows_computed(result: CommandResult) -> int:
    """Rows that a command says it computed and stored in the results database."""
    return sum(int(n) for n, _ in _ROWS.findall(result.err))


def tokens_forwarded(result: CommandResult) -> dict[str, int]:
    """Store -> tokens that a command says it forwarded for it."""
    tokens: dict[str, int] = {}
    for n, key in _TOKENS.findall(result.err):
        tokens[key] = tokens.get(key, 0) + int(n)
    return tokens
