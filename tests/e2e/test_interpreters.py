"""The forked interpreters that other tests use in place of new ones: `tests.interpreters`."""

import os
import signal
from pathlib import Path

from tests import interpreters

CODE = """
import atexit, os, sys
atexit.register(print, "at exit")
print(sys.argv, os.getcwd(), os.environ.get("OF_THE_TEST"), os.environ.get("HOME"))
sys.exit(3)
"""


def test_a_fork_has_the_words_folder_variables_output_and_end_of_an_interpreter(
    tmp_path: Path,
) -> None:
    process = interpreters.run(["-c", CODE, "a", "b"], tmp_path, {"OF_THE_TEST": "1"})
    assert process.returncode == 3
    assert process.stdout.splitlines() == [f"['-c', 'a', 'b'] {tmp_path} 1 None", "at exit"]
    assert process.stderr == ""
    failed = interpreters.run(["-c", "1 / 0"])
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"


def test_a_fork_is_a_process_of_its_own_that_signals_reach() -> None:
    process = interpreters.Process(["-c", "import time; print(1, flush=True); time.sleep(600)"])
    assert process.poll() is None
    assert process.pid != os.getpid()
    while not process.read()[0].endswith("\n"):
        assert process.poll() is None
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    assert process.communicate() == ("1\n", "")


def test_what_a_library_removes_at_exit_is_there_for_the_next_fork() -> None:
    """W&B makes its folder for media when it is imported, and it is imported once."""
    code = "from wandb.sdk.data_types._private import MEDIA_TMP as made; import os; "
    code += "print(os.path.isdir(made.name))"
    assert [interpreters.run(["-c", code]).stdout for _ in range(2)] == ["True\n"] * 2
