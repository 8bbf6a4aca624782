"""Hydra's composition of configs without work that it repeats, in two fifths of the time.

For the tests' process and the forks of `interpreters.py`; a new interpreter composes as users do.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins import file_config_source
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

_OWN = {"hydra.conf", str(Path(__file__).parents[1] / "conf"), ""}
"""Paths of Hydra's own configs, of the project's, and of the registered dataclasses."""


class _Files:
    """`OmegaConf`, with each file parsed once as long as it does not change."""

    def __init__(self) -> None:
        self._parsed: dict[tuple[str, int, int], Any] = {}

    def load(self, file: Any) -> Any:
        about = Path(file.name).stat()
        key = (file.name, about.st_mtime_ns, about.st_size)
        if key not in self._parsed:
            self._parsed[key] = OmegaConf.load(file)
        return copy.deepcopy(self._parsed[key])

    def __getattr__(self, name: str) -> Any:
        return getattr(OmegaConf, name)


class _Composed:
    """What Hydra composes before it applies overrides: the options of all groups, merged.

    It depends on the words that choose options, on the config files and on the registered
    dataclasses; it is kept for the project's own files, until another dataclass is registered.
    """

    def __init__(self) -> None:
        self._choose = config_loader_impl.create_defaults_list
        self._merge = ConfigLoaderImpl._compose_config_from_defaults_list
        self._store = ConfigStore.store
        self._choices: dict[Any, DefaultsList] = {}
        self._merged: dict[int, Any] = {}

    def install(self) -> None:
        config_loader_impl.create_defaults_list = self.choose
        # Not methods of this class, which would be called without the loader or the store.
        ConfigLoaderImpl._compose_config_from_defaults_list = lambda loader, defaults, repo: (
            self.merge(loader, defaults, repo)
        )
        ConfigStore.store = lambda store, *args, **options: self.store(store, *args, **options)

    def choose(self, **about: Any) -> DefaultsList:
        repo, words = about["repo"], about["overrides_list"]
        sources = tuple((source.provider, source.path) for source in repo.get_sources())
        if not {path for _, path in sources} <= _OWN:
            return self._choose(**about)
        others = Overrides(repo=repo, overrides_list=words).config_overrides
        chosen = [w for w in words if not (w.is_sweep_override() or any(w is o for o in others))]
        key = (about["config_name"], about["prepend_hydra"], about["skip_missing"], sources)
        key += tuple(word.input_line for word in chosen)
        if key not in self._choices:
            self._choices[key] = self._choose(**about)
        return replace(self._choices[key], config_overrides=others)

    def merge(self, loader: Any, defaults: Any, repo: Any) -> Any:
        if not any(defaults is choice.defaults for choice in self._choices.values()):
            return self._merge(loader, defaults, repo)
        if id(defaults) not in self._merged:
            self._merged[id(defaults)] = self._merge(loader, defaults, repo)
        return copy.deepcopy(self._merged[id(defaults)])

    def store(self, store: Any, *args: Any, **options: Any) -> None:
        self._choices.clear()
        self._merged.clear()
        self._store(store, *args, **options)


def install() -> None:
    """Change Hydra in this process."""
    # The config of a command is composed once more, only to look for hydra.mode, which no config
    # of the project sets; this is what is found.
    Hydra.get_mode = lambda *_, **__: None
    # All registered dataclasses would be copied for each config.
    ConfigStore.__deepcopy__ = lambda self, _: self  # type: ignore[attr-defined]
    file_config_source.OmegaConf = _Files()  # type: ignore[assignment]
    _Composed().install()
