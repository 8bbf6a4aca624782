"""Types and array shapes are checked in unit tests; records are caught at the root logger."""

import pytest

CHECKED = ("models", "data", "activations", "saes", "latents", "analysis", "interventions")


def pytest_configure(config: pytest.Config) -> None:
    """Before a test imports a module; not in the process that hands the tests to workers."""
    if config.getoption("numprocesses", None):
        return
    from tests import caught_logs, shape_checks

    shape_checks.install([f"saexp.{package}" for package in CHECKED])
    caught_logs.install()
