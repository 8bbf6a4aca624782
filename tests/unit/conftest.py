"""Types and array shapes are checked in unit tests."""

from tests import shape_checks

CHECKED = ("models", "data", "activations", "saes", "latents", "analysis", "interventions")
shape_checks.install([f"saexp.{package}" for package in CHECKED])
