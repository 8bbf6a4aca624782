"""W&B that is set up but does not answer stops no run, fails none, and delays none for long."""

import itertools
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests import interpreters
from tests.e2e.faults.injection import CommandResult, digests_of_results, one_line
from tests.e2e.faults.wandb_server import (
    EMPTY,
    ERROR,
    GARBAGE,
    GOOD,
    HANG,
    REFUSE,
    SLOW,
    UNAUTHORIZED,
    Server,
    wandb_server,
)
from tests.shipped_texts import FEW_NEUTRAL
from tests.unit.reports.run_outputs import wandb_run

FIXED = ["intervention=none", "dataset.n_examples=20", "analyzer.n_bootstrap=0", FEW_NEUTRAL]
FIXED += ["cache_dir=../cache", "hydra.run.dir=.", "hydra.sweep.dir=sweep"]
WAITING_SECONDS = 15
"""Longest wait of a run's main thread: 10 s are promised on an idle machine. On a busy one W&B's
own process is slow to start."""
DELAY_SECONDS = 30
"""Longest time of logging and of its end, which other processes can lengthen."""
OUTAGES = [(REFUSE, None), (ERROR, None), (GARBAGE, None), (GOOD, ERROR), (GOOD, EMPTY)]
"""How the server answers at first, and once a run has begun (None: the same).

W&B's own process ends by a panic where an answer is empty. A server that hangs is there for a whole
run, and one that hangs once a run has begun for `LOGGING`.
"""
ONLINE = ("tracker=wandb",)
SWEEP = ("-m", "task=collect", "layer=0,1", *ONLINE)
RUNS: list["Case"] = [(HANG, None, SWEEP), (HANG, None, ONLINE), (UNAUTHORIZED, None, ONLINE)]
"""Whole runs: what only logs is enough for all else."""
SESSIONS: list["Case"] = [(mode, None, ("online",)) for mode in (SLOW, GOOD)]
SESSIONS += [(mode, later, ("online",)) for mode, later in OUTAGES]
SESSIONS += [(HANG, None, ("offline",))]
"""The longest first."""
N_AT_ONCE = 3
START_SECONDS = 30
"""How long a run waits for a server that answers: several runs share the cores."""

Case = tuple[str, str | None, tuple[str, ...]]
"""How the server answers at first and later, and the words of a run, or W&B's mode."""


class Ended(NamedTuple):
    """A run that has ended."""

    result: CommandResult
    folder: Path
    waited: float
    """Seconds, see `ended`."""
    requests: list[str]
    """Paths that it asked the server for."""


class Runs:
    """Runs of `python -m saexp` that share a cache, and the results without a tracker."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._numbers = folder, itertools.count(1)
        _, expected, self.waited = self.run({}, "tracker=none")
        self.expected = digests_of_results(expected)

    def run(self, env: Mapping[str, str], *words: str) -> tuple[CommandResult, Path, float]:
        """A command that ends as one that a shell starts, with Python's handlers at exit."""
        folder = self._new_folder()
        result, waited = ended(process_of(("-m", "saexp", *words, *FIXED), folder, env))
        return result, folder, waited

    def with_server(self, mode: str, later: str | None, words: tuple[str, ...]) -> Ended:
        """A run whose server answers so."""
        with wandb_server(mode, later) as server:
            result, folder, waited = self.run(environment(server), *words)
            return Ended(result, folder, waited, list(server.requests))

    def session(self, mode: str, later: str | None, words: tuple[str, ...]) -> Ended:
        """What a run does with its tracker, and nothing else."""
        folder = self._new_folder()
        with wandb_server(mode, later) as server:
            process = process_of(("-c", SESSION, *words), folder, environment(server))
            result, waited = ended(process)
            return Ended(result, folder, waited, list(server.requests))

    def _new_folder(self) -> Path:
        folder = self.folder / f"run{next(self._numbers)}"
        folder.mkdir()
        return folder


SESSION = """
import logging, sys
from pathlib import Path
import pandas as pd, plotly.graph_objects as go
from saexp.config import TrackerConfig
from saexp.tracking import Artifact, start
logging.basicConfig(format="[%(name)s][%(levelname)s] %(message)s", level="INFO")
cfg, folder = TrackerConfig(kind="wandb", mode=sys.argv[1]), Path.cwd()
run = start(cfg, folder=folder, config={"layer": 1}, name="n", job_type="analyze", group=None)
for step in range(20):
    run.series("train/tokens", {"train/tokens": step, "train/loss": step})
run.metrics({"collection/n_rows": 3})
run.table("latents", pd.DataFrame({"latent": range(2000)}))
run.figure("volcano", go.Figure(go.Scatter(x=[1], y=[2])))
(folder / "metrics.json").write_text("{}")
run.artifact(Artifact("run", "results", {"metrics.json": folder / "metrics.json"}))
run.finish(0)
"""


def process_of(words: Sequence[str], folder: Path, env: Mapping[str, str]) -> interpreters.Process:
    variables = {n: value for n, value in os.environ.items() if not n.startswith("WANDB_")}
    return interpreters.Process(words, folder, {**variables, **env})


def ended(process: interpreters.Process, limit: float = 240) -> tuple[CommandResult, float]:
    """What a process wrote, and how many seconds of its time its main thread waited for something.

    Computing, and being ready to while other processes have the cores, is not waiting. Systems
    other than Linux do not report it: there all of the time counts. Raises TimeoutError, and kills
    the process, where it takes longer than the limit.
    """
    began, active, code = time.monotonic(), 0.0, None
    while code is None:
        with suppress(OSError):
            times = Path(f"/proc/{process.pid}/schedstat").read_text().split()
            active = (int(times[0]) + int(times[1])) / 1e9
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(0.1)
        if time.monotonic() > began + limit:
            process.kill()
            raise TimeoutError(f"still running after {limit} s: {process.read()}")
    return CommandResult(code, *process.read()), time.monotonic() - began - active


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("outages"))


@pytest.fixture(scope="module")
def started(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Waits for a run or script; some are under way at once, as most of their time they wait."""
    folder = tmp_path_factory.mktemp("logged")
    with ThreadPoolExecutor(N_AT_ONCE) as pool:
        futures = {script: pool.submit(logged, *script, folder) for script in SCRIPTS}
        futures |= {case: pool.submit(runs.session, *case) for case in SESSIONS}
        futures |= {case: pool.submit(runs.with_server, *case) for case in RUNS}
        yield lambda *case: futures[case].result()


def environment(server: Server) -> dict[str, str]:
    env = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40}
    if server.mode in (GOOD, SLOW) and server.later is None:
        env["WANDB_INIT_TIMEOUT"] = str(START_SECONDS)
    return env


def recorded(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*run-*/*.wandb"))


def hints(result: CommandResult) -> list[str]:
    return re.findall(r"wandb sync (\S+)", result.out + result.err)


def check_outage(run: Ended, mode: str, least_waited: float) -> None:
    """It is a success that did not wait long, and its file for `wandb sync` is whole."""
    result, folder, waited, _ = run
    assert result.code == 0, result
    assert "Traceback" not in result.out + result.err
    assert waited < least_waited + WAITING_SECONDS
    (hint,) = hints(result)
    (file,) = (folder / hint).glob("*.wandb")
    about = wandb_run(file)
    assert about["exit_code"] == 0
    assert any(key.startswith("tables/latents") for key in about["keys"])
    assert "collection/n_rows" in about["summary"]
    assert "results" in [artifact.type for artifact in about["artifacts"]]
    answers = (result.out + result.err).count("W&B does not answer")
    assert answers == (mode != GOOD)


@pytest.mark.parametrize(("mode", "later"), OUTAGES)
def test_an_outage_leaves_the_record_of_a_run_complete(
    runs: Runs, started: Callable[..., Ended], mode: str, later: str | None
) -> None:
    check_outage(started(mode, later, ("online",)), mode, runs.waited)


def test_a_whole_run_is_as_without_a_tracker_where_the_server_hangs(
    runs: Runs, started: Callable[..., Ended]
) -> None:
    run = started(HANG, None, ONLINE)
    check_outage(run, HANG, runs.waited)
    results = digests_of_results(run.folder)
    assert {k: v for k, v in results.items() if "wandb/" not in k} == runs.expected


@pytest.mark.parametrize("mode", [GOOD, SLOW])
def test_a_server_that_answers_needs_no_hint(started: Callable[..., Ended], mode: str) -> None:
    """However long the upload takes."""
    result, folder, _, requests = started(mode, None, ("online",))
    assert result.code == 0, result
    assert not hints(result)
    assert "saexp.tracking.wandb][WARNING" not in result.out + result.err
    assert any("media/table/tables/latents" in path for path in requests)
    assert wandb_run(recorded(folder)[0])["exit_code"] == 0


def test_a_refused_key_is_one_line_before_any_work(started: Callable[..., Ended]) -> None:
    result, folder, _, _ = started(UNAUTHORIZED, None, ONLINE)
    message = one_line(result)
    assert message.startswith(
        "tracker=wandb: W&B refuses the run (HTTP 401: user is not logged in)"
    )
    assert not (folder / "metrics.json").exists()


def test_a_sweep_waits_for_an_unreachable_server_once(started: Callable[..., Ended]) -> None:
    result, folder, _, requests = started(HANG, None, SWEEP)
    assert result.code == 0, result
    assert "2 finished" in result.out
    assert (result.out + result.err).count("W&B does not answer") == 1
    assert requests.count("/graphql") == 1
    # Two cells and the sweep's own run, which one command uploads.
    offline = [f.parent for f in recorded(folder) if f.parent.name.startswith("offline-")]
    (hint,) = hints(result)
    assert len(offline) == 3
    assert sorted(folder.glob(hint)) == sorted(offline)


def test_offline_by_configuration_asks_no_server(started: Callable[..., Ended]) -> None:
    result, folder, _, requests = started(HANG, None, ("offline",))
    assert result.code == 0, result
    assert requests == []
    assert "this run is recorded offline; to upload it type" in result.err
    (hint,) = hints(result)
    assert [file.parent for file in recorded(folder)] == [folder / hint]


LOGGING = """
import sys, threading, time
from pathlib import Path
import pandas as pd, plotly.graph_objects as go
from saexp.config import TrackerConfig
from saexp.tracking import start
cfg, folder = TrackerConfig(kind="wandb"), Path(sys.argv[1])
exit_code, n_steps = map(int, sys.argv[2:])
run = start(cfg, folder=folder, config={}, name="n", job_type="train", group=None)
began = time.monotonic()
for step in range(n_steps):
    run.series("train/tokens", {"train/tokens": step, "train/loss": step})
for n in range(3):
    run.table(f"t{n}", pd.DataFrame({"latent": range(2000)}))
    run.figure(f"f{n}", go.Figure(go.Scatter(x=[1], y=[n])))
run.finish(exit_code)
print(time.monotonic() - began, flush=True)
# As a call of W&B that is never answered: Python would wait for it forever.
space = {"__name__": "wandb.waiting", "threading": threading}
exec("def wait(): threading.Event().wait()", space)
threading.Thread(target=space["wait"]).start()
"""
WORKING = """
def work():
    time.sleep(7)
    print("worked", flush=True)
threading.Thread(target=work).start()
"""
"""Longer than the end of the process waits for threads of W&B."""


SCRIPTS = [(LOGGING + WORKING, 3, 20), (LOGGING, 0, 2000)]
"""Scripts, their exit codes and how many steps they log."""


def logged(
    script: str, exit_code: int, n_steps: int, folder: Path
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The script in a process of its own, while the server hangs once the run has begun; and the
    folder that it logged to."""
    run_folder = folder / str(exit_code)
    run_folder.mkdir()
    words = ["-c", script, str(run_folder), str(exit_code), str(n_steps)]
    with wandb_server(GOOD, HANG) as server:
        env = {**os.environ, "WANDB_MODE": "online", **environment(server)}
        return interpreters.run(words, env=env), run_folder


def test_neither_logging_nor_the_end_of_the_process_waits_for_a_server_that_hangs(
    started: Callable[..., Any],
) -> None:
    process, folder = started(*SCRIPTS[1])
    assert process.returncode == 0, process.stderr
    assert float(process.stdout) < DELAY_SECONDS
    offline = next(f for f in recorded(folder) if f.parent.name.startswith("offline-"))
    assert {"tables/t2/nrows", "figures/f2/path"} <= wandb_run(offline)["keys"]


def test_threads_of_the_users_own_end_before_the_process_does(started: Callable[..., Any]) -> None:
    """A failed run's exit code stays."""
    process, _ = started(*SCRIPTS[0])
    assert process.returncode == 3, process.stderr
    assert "worked" in process.stdout


ENDED_WHILE_FINISHING = """
import logging
from pathlib import Path
from saexp.config import TrackerConfig
from saexp.tracking.outages import service
from saexp.tracking.wandb import WandbTracker
logging.basicConfig(format="%(message)s")
tracker = WandbTracker(TrackerConfig(kind="wandb", mode="offline"))
tracker.start(folder=Path.cwd(), config={}, name="n", job_type="analyze", group=None)
# An online run, but for the server.
tracker.online = True
tracker.metrics({"collection/n_rows": 3})
kind = type(tracker.run)
finish = kind.finish
def ends(run, **_):
    kind.finish = finish
    service().kill()
    raise ConnectionError("abandoned")
kind.finish = ends
tracker.finish(0)
"""


def test_a_run_whose_process_of_wandb_ends_while_it_is_finished_is_recorded_again(
    tmp_path: Path,
) -> None:
    done = interpreters.run(["-c", ENDED_WHILE_FINISHING], tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = re.findall(r"\(abandoned\); to upload it type: wandb sync (\S+)", done.stderr)
    (file,) = (tmp_path / folder).glob("*.wandb")
    about = wandb_run(file)
    assert about["exit_code"] == 0
    assert about["summary"]["collection/n_rows"] == 3
