"""Hydra's composition of configs without work that it repeats.

For the tests' process and the forks of `interpreters.py`; a new interpreter composes as users do.
"""

import copy
import functools
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf, _utils, base, grammar_parser

_load = OmegaConf.load


class _Files:
    """`OmegaConf.load`, with each file parsed once as long as it does not change."""

    def __init__(self) -> None:
        self._parsed: dict[tuple[str, int, int], Any] = {}

    def load(self, file_: Any) -> Any:
        if not isinstance(file_, TextIOWrapper):
            return _load(file_)
        about = Path(file_.name).stat()
        key = (file_.name, about.st_mtime_ns, about.st_size)
        if key not in self._parsed:
            self._parsed[key] = _load(file_)
        return copy.deepcopy(self._parsed[key])


def install() -> None:
    """Change Hydra in this process."""
    # The config of a command is composed once more, only to look for hydra.mode, which no config
    # of the project sets; this is what is found.
    Hydra.get_mode = lambda *_, **__: None
    # All registered dataclasses would be copied for each config.
    ConfigStore.__deepcopy__ = lambda self, _: self  # type: ignore[attr-defined]
    # Not in the modules that call it: Hydra executes those again when it looks for plugins.
    OmegaConf.load = staticmethod(_Files().load)
    # Trees of interpolations, which are read only.
    parse = functools.lru_cache(maxsize=10_000)(grammar_parser.parse)
    for module in (base, _utils):
        module.parse = parse  # type: ignore[attr-defined]
