"""Shape checking is switched on for unit tests: jaxtyping's shapes with beartype's types."""

from jaxtyping import install_import_hook

CHECKED = ("models", "data", "activations", "saes", "latents", "analysis", "interventions")
install_import_hook([f"saexp.{package}" for package in CHECKED], "beartype.beartype")
