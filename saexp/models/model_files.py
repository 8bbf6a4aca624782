"""What a model's small files hold, looked at before anything is built of it."""

import json
import pickle
from pathlib import Path, PurePosixPath
from typing import Any

from saexp.errors import ModelError
from saexp.hub import why_absent

_MOST_LAYERS = 10_000
"""More blocks would fill the memory before any weight is read."""
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_PLAIN = (OSError, ValueError, RuntimeError)
"""Errors whose text says what is wrong."""


def why_unreadable(error: BaseException) -> str:
    """Why something of a model cannot be loaded, from what transformers or torch raised."""
    if isinstance(error, pickle.UnpicklingError | EOFError):
        # torch's own text advises to open it all the same.
        return "a pickle that is damaged or holds more than tensors, so it is not opened"
    reason = why_absent(error)
    return reason if isinstance(error, _PLAIN) and reason else f"{type(error).__name__}: {reason}"


def check_depth(config: Path, name: str) -> None:
    """Raise ModelError for a config.json that asks for more blocks than any model has."""
    try:
        content = json.loads(config.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        # Reported when it is loaded.
        return
    holders = [content, content.get("text_config")] if isinstance(content, dict) else []
    for holder in (h for h in holders if isinstance(h, dict)):
        for key in _DEPTHS:
            value = holder.get(key)
            if isinstance(value, int | float) and value > _MOST_LAYERS:
                raise ModelError(
                    f"model.name={name}: its config has {key}={value}; saexp loads models of up "
                    f"to {_MOST_LAYERS:,} layers"
                )


def check_sizes(config: Any, name: str) -> None:
    """Raise ModelError for a config without blocks or width, or of other types."""
    for key in ("num_hidden_layers", "hidden_size"):
        value = getattr(config, key, None)
        if type(value) is not int or value < 1:
            raise ModelError(
                f"model.name={name}: its config has {key}={value!r}, not a positive integer"
            )


def shards_in(index: Path) -> list[str]:
    """Names of the files that an index of weights lists. Raises ValueError where it is damaged."""
    content = json.loads(index.read_text("utf-8"))
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{index.name} has no weight_map")
    names = list(listed.values())
    for name in names:
        inside = isinstance(name, str) and ".." not in PurePosixPath(name).parts
        if not inside or PurePosixPath(name).is_absolute():
            raise ValueError(f"{index.name} names the file {name!r}")
    return sorted(set(names))


def token_ids(value: Any, key: str, name: str) -> list[int]:
    """One id, several or none, as a list. Raises ModelError for anything else."""
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ModelError(f"model.name={name}: its {key} is {value!r}, not a token id or a list")
    return list(ids)
