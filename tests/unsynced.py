"""Tests don't wait until files are on disk: no test switches the machine off.

What a killed process has written is in the system's memory, where every other process finds it.
For the tests' process and the forks of `interpreters.py`; a new interpreter waits as users' do.
"""

import os


def install() -> None:
    """Replace `os.fsync` in this process by a check that the file is open."""
    os.fsync = _check_open


def _check_open(file: int) -> None:
    os.fstat(file)
