"""Settings of one analyzer: `analyzer.options`, checked against what it knows."""

from collections.abc import Mapping
from typing import Any

from saexp.config import AnalyzerConfig
from saexp.errors import ConfigError
from saexp.registry import did_you_mean


def read_options(cfg: AnalyzerConfig, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults with what was typed in their place. Raises ConfigError for an unknown key."""
    for key in cfg.options:
        if key not in defaults:
            hint = did_you_mean(key, defaults) if defaults else "it has none"
            raise ConfigError(
                f"analyzer.options.{key}: analyzer={cfg.name} has no such setting; {hint}"
            )
    return {**defaults, **cfg.options}


def whole(name: str, value: Any, least: int = 1) -> int:
    """A whole number of at least `least`, else ConfigError; `name` is the option's."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(
            f"analyzer.options.{name}={value} is no whole number of at least {least}; "
            f"type such as analyzer.options.{name}={max(least, 10)}"
        )
    return value
