"""The benchmark of mechanisms replaces functions of saexp by name: the names must exist."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "experiments" / "benchmarks"


def test_every_mechanism_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    mechanisms = importlib.import_module("mechanisms")
    workloads = importlib.import_module("workloads")
    for turn_off, used_in in mechanisms.MECHANISMS.values():
        assert set(used_in) <= {*workloads.WORKLOADS, *workloads.COMMANDS, "two_processes"}
        with turn_off():
            pass
