"""Reading and checking the values people type: widths, layers, coefficients, choices."""

import re
from typing import Any

from saexp.errors import ConfigError


def parse_width(value: Any) -> int | None:
    """'16k' -> 16384, '1m' -> 1048576, a plain integer as it is; None stays None."""
    if value is None:
        return None
    match = re.fullmatch(r"\s*(\d+)\s*([kKmM]?)\s*", str(value))
    if isinstance(value, bool) or not match or int(match[1]) == 0:
        raise ConfigError(
            f"width={value} is no SAE width; type a number such as width=16k or 16384"
        )
    return int(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2].lower()]


def parse_layers(value: Any) -> list[int]:
    """A layer, or a list of layers, as a list of integers."""
    layers = value if isinstance(value, list | tuple) else [value]
    if not layers:
        raise ConfigError("layer=[] names no layer; type a 0-based block index such as layer=12")
    for layer in layers:
        if isinstance(layer, bool) or not re.fullmatch(r"\d+", str(layer)):
            raise ConfigError(
                f"layer={layer} is no block index; type a whole number from 0, such as layer=12"
            )
    return [int(layer) for layer in layers]


def parse_coefficients(value: Any) -> list[float]:
    """A coefficient, or a list of them, as floats in the order given."""
    values = value if isinstance(value, list | tuple) else [value]
    numbers = []
    for one in values:
        try:
            number = float(one)
        except (TypeError, ValueError):
            number = float("nan")
        if isinstance(one, bool) or number != number or abs(number) == float("inf"):
            raise ConfigError(
                f"coefficient={one} is no number; type coefficient=4 or 'coefficient=[0,1,2]'"
            )
        numbers.append(number)
    if not numbers:
        raise ConfigError("coefficient=[] names no strength; type e.g. coefficient=4")
    return numbers


def one_of(key: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ConfigError(f"{key}={value} is not known; choose from {', '.join(options)}")


def at_least(key: str, value: float, least: float) -> None:
    if value < least:
        raise ConfigError(f"{key}={value} is too small; it must be at least {least}")
