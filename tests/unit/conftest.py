"""Types and array shapes are checked in unit tests; records are caught at the root logger."""

from tests import caught_logs, shape_checks

CHECKED = ("models", "data", "activations", "saes", "latents", "analysis", "interventions")
shape_checks.install([f"saexp.{package}" for package in CHECKED])
caught_logs.install()
