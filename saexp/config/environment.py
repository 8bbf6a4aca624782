"""Values of a config: validation of numbers and widths, and values from the environment.

A value that `oc.env` reads may be a secret. What a run stores, logs or prints shows the
interpolation that was typed instead.
"""

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from saexp.errors import ConfigError
from saexp.registry import did_you_mean


def parse_width(value: Any, key: str = "width") -> int | None:
    """'16k' -> 16384, '1m' -> 1048576, a plain integer as it is; None stays None.

    Raises ConfigError, which names the setting `key`, for anything else.
    """
    if value is None:
        return None
    match = re.fullmatch(r"\s*(\d+)\s*([kKmM]?)\s*", str(value))
    if isinstance(value, bool) or not match or int(match[1]) == 0:
        raise ConfigError(
            f"{key}={value} is not an SAE width; type a number such as {key}=16k or 16384"
        )
    return int(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2].lower()]


def parse_widths(value: Any) -> list[int]:
    """A width, or a list of widths, as numbers of latents; empty for None. Raises ConfigError."""
    listed = value if isinstance(value, list | tuple) else [value]
    return [width for one in listed if (width := parse_width(one)) is not None]


def parse_layers(value: Any) -> list[int]:
    """A layer, or a list of layers, as a list of integers."""
    layers = value if isinstance(value, list | tuple) else [value]
    if not layers:
        raise ConfigError("layer=[] contains no layer; type a 0-based block index such as layer=12")
    for layer in layers:
        if isinstance(layer, bool) or not re.fullmatch(r"\d+", str(layer)):
            raise ConfigError(
                f"layer={layer} is not a block index; type a whole number from 0, such as layer=12"
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
                f"coefficient={one} is not a number; type coefficient=4 or 'coefficient=[0,1,2]'"
            )
        numbers.append(number)
    if not numbers:
        raise ConfigError("coefficient=[] contains no coefficient; type e.g. coefficient=4")
    return numbers


def one_of(key: str, value: str, options: tuple[str, ...]) -> None:
    """Raise ConfigError for a value that is not among the options."""
    if value not in options:
        raise ConfigError(f"{key}={value} is not known; {did_you_mean(value, options)}")


def at_least(key: str, value: float, least: float) -> None:
    """Raise ConfigError for a number below the least one."""
    if value < least:
        raise ConfigError(f"{key}={value} is too small; it must be at least {least}")


def is_whole(value: Any, least: int) -> bool:
    """Whether it is an integer (no bool) of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


_SHORTEST = 8
"""A value of at least this many characters is replaced wherever a text quotes it; a shorter one,
such as `gpu`, only where it is the whole value of its setting."""

_CHOICES = re.compile(
    r"(task|dataset|positions|analyzer|intervention|sae_trainer)\.name|tracker\.kind"
    r"|intervention\.(?!where_options).+|task\.streams.*|sae\.stream|analyzer\.by"
    r"|dataset\.(groups|entity_types).*|((model|sae|store)\.)?(device|dtype)"
)
"""Settings whose values are names that reports look up, so that they are stored as they are."""


@dataclass
class TypedValues:
    """What was typed for the values of the configs that this process composed."""

    settings: dict[tuple[str, str], str] = field(default_factory=dict)
    """(key, value) -> as typed, of all texts, and of lists and mappings that come from the
    environment as a whole (as JSON); the last one counts."""
    quotable: dict[str, str] = field(default_factory=dict)
    """Value -> as typed, of values that are long enough to be replaced in texts."""


_TYPED = TypedValues()
"""One per process, because what must be masked passes through places that no config reaches: log
handlers, error lines, and the exception hooks of other packages."""


def remember(cfg: DictConfig) -> None:
    """Record which text values of a config depend on the environment, however indirectly."""
    with _recording() as read:
        _remember(cfg, OmegaConf.to_container(cfg, resolve=False), "", read)


def known() -> TypedValues:
    """A copy of everything that was recorded in this process, for another process."""
    return TypedValues(dict(_TYPED.settings), dict(_TYPED.quotable))


def add(recorded: TypedValues) -> None:
    """Add what another process recorded."""
    _TYPED.settings.update(recorded.settings)
    _TYPED.quotable.update(recorded.quotable)


def resolved(config: dict[str, Any]) -> dict[str, Any]:
    """The config that a run stored as typed, with the current values from the environment.

    Raises OmegaConf's errors for a variable that is not set.
    """
    # The content of a saved run is a subclass of dict, which OmegaConf refuses.
    plain = json.loads(json.dumps(config))
    content = OmegaConf.to_container(OmegaConf.create(plain), resolve=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


@contextlib.contextmanager
def _recording() -> Iterator[dict[str, str]]:
    """Variables that `oc.env` reads inside, with their values (empty: the default was used)."""
    read: dict[str, str] = {}

    def env(*arguments: Any) -> Any:
        read[str(arguments[0])] = os.environ.get(str(arguments[0]), "")
        return oc.env(*arguments)

    OmegaConf.register_new_resolver("oc.env", env, replace=True)
    try:
        yield read
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _remember(cfg: DictConfig | ListConfig, raw: Any, prefix: str, read: dict[str, str]) -> None:
    """`raw` is the config's content as typed."""
    for key, typed in raw.items() if isinstance(raw, dict) else enumerate(raw or ()):
        path = f"{prefix}{key}"
        if isinstance(typed, dict | list):
            _remember(cfg[key], typed, f"{path}.", read)
        elif isinstance(typed, str) and typed != "???":
            _remember_text(cfg, key, typed, path, read)


def _remember_text(
    cfg: DictConfig | ListConfig, key: Any, typed: str, path: str, read: dict[str, str]
) -> None:
    read.clear()
    # A value that cannot be resolved is an error where the config is used.
    with contextlib.suppress(OmegaConfBaseException):
        value = cfg[key] if "${" in typed else typed
        if isinstance(value, DictConfig | ListConfig):
            if not read:
                _remember(value, OmegaConf.to_container(value, resolve=False), f"{path}.", read)
                return
            # Made by `oc.decode`: its parts have no keys of their own in what was typed.
            value = OmegaConf.to_container(value, resolve=True)
        if isinstance(value, str | dict | list) and read and not _CHOICES.fullmatch(path):
            _TYPED.settings[path, _text(value)] = typed
            _record_quotable(value, typed, read)
        elif isinstance(value, str):
            _TYPED.settings[path, value] = value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _record_quotable(value: Any, typed: str, read: dict[str, str]) -> None:
    texts = {text: f"${{oc.env:{name}}}" for name, text in read.items()}
    texts |= dict.fromkeys(_texts_in(value), typed)
    for text, shown in texts.items():
        # A setting that repeats another one would be shown as `${model.name}`.
        if len(text) >= _SHORTEST and ("oc.env" in shown or text not in _TYPED.quotable):
            _TYPED.quotable[text] = shown


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(part)


def as_typed(config: Any, prefix: str = "") -> Any:
    """A config's content in which values from the environment are replaced by interpolations.

    `prefix` is the key of `config` in the whole config, with a dot at its end.
    """
    if isinstance(config, dict):
        return {key: _as_typed(value, f"{prefix}{key}") for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [_as_typed(value, f"{prefix}{i}") for i, value in enumerate(config)]
    return config


def _as_typed(value: Any, path: str) -> Any:
    value = str(value) if isinstance(value, Path) else value
    if not isinstance(value, str | dict | list | tuple):
        return value
    typed = _TYPED.settings.get((path, _text(value)))
    if isinstance(value, str):
        return masked(value) if typed is None else typed
    return as_typed(value, f"{path}.") if typed is None else typed


def masked(text: str) -> str:
    """A text in which values from the environment are replaced by their interpolations."""
    for value in sorted(_TYPED.quotable, key=len, reverse=True):
        text = text.replace(value, _TYPED.quotable[value])
    return text


def mask_logs() -> None:
    """Mask what the log handlers of this process write."""
    if _TYPED.quotable:
        for handler in logging.getLogger().handlers:
            handler.addFilter(_mask_record)


def _mask_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = masked(record.getMessage()), None
    return True
