"""Python processes that begin with their imports done: forks of one server for all tests' workers.

A new interpreter takes 4 s of CPU to import what a run imports, 10 s with sae-lens. The server
imports these once. A fork runs its command as an interpreter does, in its own process and folder,
with its own environment and output, and ends like one, with the handlers at exit. What is
read when a library is imported (HF_HOME among the variables) is the server's.
"""

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import multiprocessing.util
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
_PRELOADED = "tests.preloaded"
_NUMBER = 8
"""Bytes of a process id or exit code in an answer of the server."""


class Process:
    """`python <words>` in a fork of the server, with the methods of `subprocess.Popen`.

    Output goes to files of its own, which `communicate` reads in the end. With `ends_at_once` the
    process is over when its command is, as a worker of multiprocessing: a signal finds it with the
    command's handlers, or not at all.
    """

    def __init__(
        self,
        words: Sequence[str],
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        *,
        ends_at_once: bool = False,
    ) -> None:
        self.args = list(words)
        self.returncode: int | None = None
        self._texts: tuple[str, str] | None = None
        self._output = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        request: dict[str, Any] = {"words": self.args, "cwd": str(cwd or Path.cwd())}
        request |= {"env": dict(os.environ if env is None else env), "at_once": ends_at_once}
        self._server = _connected()
        numbers = [file.fileno() for file in self._output]
        content = json.dumps(request).encode()
        socket.send_fds(self._server, [len(content).to_bytes(_NUMBER, "big")], numbers)
        self._server.sendall(content)
        self.pid = self._answer()

    def _answer(self) -> int:
        content = b""
        while len(content) < _NUMBER:
            part = self._server.recv(_NUMBER - len(content))
            if not part:
                raise ConnectionError("the server of forked interpreters has ended")
            content += part
        return int.from_bytes(content, "big", signed=True)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; negative: the signal that ended it. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            self._server.settimeout(timeout)
            try:
                self.returncode = self._answer()
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            self._server.close()
            self._texts = self.read()
            for file in self._output:
                file.close()
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            # It may end in between; the server of forks reaps it.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to stdout and stderr until its end."""
        self.wait(timeout)
        return self.read()

    def read(self) -> tuple[str, str]:
        """What it has written to stdout and stderr so far."""
        if self._texts is not None:
            return self._texts
        sizes = [os.fstat(file.fileno()).st_size for file in self._output]
        # Not by reading from the position that the process writes at.
        parts = [os.pread(f.fileno(), n, 0) for f, n in zip(self._output, sizes, strict=True)]
        out, err = (part.decode("utf-8", "replace") for part in parts)
        return out, err


def run(
    words: Sequence[str],
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """`python <words>` in a fork of the server. Raises TimeoutExpired, and kills it, after that."""
    process = Process(words, cwd, env)
    try:
        out, err = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.wait(), out, err)


def _connected() -> socket.socket:
    """A connection to the server, which is started where there is none yet."""
    # Workers of pytest-xdist are children of the process that collects their results.
    owner = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    folder = Path(tempfile.gettempdir()) / f"saexp-interpreters-{owner}"
    folder.mkdir(exist_ok=True)
    path = folder / "socket"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            # Connections wait until the server has imported everything.
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(path))
            listener.listen(64)
            _start_server(listener, owner)
            listener.close()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    return connection


def _start_server(listener: socket.socket, owner: int) -> None:
    listener.set_inheritable(True)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    words = [sys.executable, "-m", "tests.interpreters", str(listener.fileno()), str(owner)]
    # Not a Popen, which would warn that it outlives the test that needed it first.
    os.posix_spawn(words[0], words, {**os.environ, "PYTHONPATH": path}, setsid=True)


# The server


def serve(listener: socket.socket, owner: int) -> dict[str, Any]:
    """Fork at each request while the process `owner` lives; returns the request in the fork."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener.settimeout(0.5)
    while True:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            if not is_running(owner):
                _end(Path(listener.getsockname()).parent)
            continue
        if os.fork() == 0:
            listener.close()
            connection.setblocking(True)
            return _forked_twice(connection)
        connection.close()


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def _end(folder: Path) -> None:
    for name in ("socket", "lock"):
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()
    sys.exit()


def _forked_twice(connection: socket.socket) -> dict[str, Any]:
    """The request, in a fork of this process, which waits for it and reports its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length, files, _, _ = socket.recv_fds(connection, _NUMBER, 2)
    n, content = int.from_bytes(length, "big"), b""
    while len(content) < n:
        content += connection.recv(n - len(content))
    if child := os.fork():
        connection.sendall(child.to_bytes(_NUMBER, "big", signed=True))
        _, status = os.waitpid(child, 0)
        with contextlib.suppress(OSError):
            code = os.waitstatus_to_exitcode(status)
            connection.sendall(code.to_bytes(_NUMBER, "big", signed=True))
        os._exit(0)
    connection.close()
    for number, file in enumerate(files, start=1):
        os.dup2(file, number)
        os.close(file)
    _renew_thread_pool()
    return json.loads(content)


def _renew_thread_pool() -> None:
    """Make torch replace its thread pool now: it does so at the first use after a fork, without a
    lock, and fails ("Invalid thread pool!") if two threads are the first at the same time."""
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(torch.get_num_threads())


def prepare(
    request: Mapping[str, Any], folders: Iterable[tempfile.TemporaryDirectory[str]]
) -> None:
    """The state in which a new interpreter would be."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    for folder in folders:
        # A library's own, made when it was imported: the server's other forks use it.
        atexit.unregister(folder.cleanup)
        folder._finalizer.detach()  # pyright: ignore[reportAttributeAccessIssue]
    os.chdir(request["cwd"])
    sys.path[0] = ""


def run_words(words: list[str]) -> None:
    """What `python <words>` does, for -W ignore, -m and -c."""
    if words[:2] == ["-W", "ignore"]:
        warnings.simplefilter("ignore")
        words = words[2:]
    option, what, *arguments = words
    sys.argv = [option, *arguments]
    if option == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        assert option == "-c", words
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


def end_at_once(words: list[str]) -> NoReturn:
    """Run the command, and end without Python's finalization."""
    code: Any = 1
    try:
        run_words(words)
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    multiprocessing.util._exit_function()  # pyright: ignore[reportAttributeAccessIssue]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_as_interpreter(words: list[str]) -> None:
    """Run the command, and end with its threads and handlers at exit, as Python does.

    What follows in Python takes the modules apart, which would copy the server's memory.
    """
    try:
        run_words(words)
        code = 0
    except SystemExit as stop:
        if not isinstance(stop.code, int | None):
            raise
        code = stop.code or 0
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _preload() -> list[tempfile.TemporaryDirectory[str]]:
    """Import what a run imports; returns the folders that libraries remove at exit."""
    importlib.import_module(_PRELOADED)
    gc.collect()
    folders = [x for x in gc.get_objects() if type(x) is tempfile.TemporaryDirectory]
    gc.freeze()
    return folders


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as inherited:
        # A process that a test starts must not keep the socket.
        inherited.set_inheritable(False)
        shared_folders = _preload()
        accepted = serve(inherited, int(sys.argv[2]))
    prepare(accepted, shared_folders)
    if accepted["at_once"]:
        end_at_once(accepted["words"])
    end_as_interpreter(accepted["words"])
