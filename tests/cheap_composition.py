"""Hydra's composition of configs without work that it repeats, in a tenth of the time.

For the tests' process and the forks of `interpreters.py`; a new interpreter composes as users do.
What the config files and the chosen options of groups give is composed once and then copied; the
other words of a command are applied to the copy each time.
"""

import io
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf


class _Template:
    """A config of which copies are made, four times as fast as by `copy.deepcopy`.

    Two are equal if their values, types and flags are.
    """

    def __init__(self, config: Any) -> None:
        file, classes = io.BytesIO(), list[type]()
        # By identity: Hydra loads the modules of its launchers twice.
        pickler = pickle.Pickler(file)
        pickler.persistent_id = lambda value: self._number(value, classes)  # type: ignore[method-assign]
        pickler.dump(config)
        self._content, self._classes = file.getvalue(), classes

    @staticmethod
    def _number(value: Any, classes: list[type]) -> int | None:
        if not isinstance(value, type):
            return None
        if value not in classes:
            classes.append(value)
        return classes.index(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Template) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    def copy(self) -> Any:
        unpickler = pickle.Unpickler(io.BytesIO(self._content))
        unpickler.persistent_load = self._classes.__getitem__  # type: ignore[method-assign]
        return unpickler.load()


def _stamp(entry: os.DirEntry[str] | Path) -> tuple[int, int]:
    about = entry.stat()
    return about.st_mtime_ns, about.st_size


def _files(folder: str) -> Iterator[tuple[str, tuple[int, int]]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _files(entry.path)
            else:
                yield entry.path, _stamp(entry)


class _Files:
    """Config files, read once as long as they do not change."""

    def __init__(self) -> None:
        self._read: dict[tuple[Any, ...], _Template] = {}
        self._load = ConfigRepository.load_config

    def load(self, repo: ConfigRepository, config_path: str) -> Any:
        source = next((s for s in repo.get_sources() if s.is_config(config_path)), None)
        if source is None or source.scheme() not in ("file", "pkg"):
            return self._load(repo, config_path)
        file = Path(source.path, config_path.removesuffix(".yaml") + ".yaml")
        # Those of packages don't change.
        stamp = _stamp(file) if source.scheme() == "file" else None
        key = (source.provider, file, stamp)
        if key not in self._read:
            self._read[key] = _Template(self._load(repo, config_path))
        return self._read[key].copy()


class _Store:
    """Counts the changes of what is registered with Hydra; the same once more is no change."""

    def __init__(self) -> None:
        self.n_changes = 0
        self._registered: dict[tuple[Any, ...], _Template] = {}
        self._store = ConfigStore.store

    def store(self, to: ConfigStore, *words: Any, **settings: Any) -> None:
        self._store(to, *words, **settings)
        about = dict(zip(("name", "node", "group", "package", "provider"), words, strict=False))
        about |= settings
        content = _Template(OmegaConf.structured(about.pop("node")))
        key = (id(to), *sorted(about.items()))
        if self._registered.get(key) != content:
            self._registered[key] = content
            self.n_changes += 1


class _Chosen(NamedTuple):
    """The defaults list of some choices, and the files and configs that it was made of."""

    list: DefaultsList
    state: tuple[Any, ...]


class _Composed:
    """Defaults lists and the configs that they give."""

    def __init__(self, store: _Store) -> None:
        self._store = store
        self._chosen: dict[tuple[Any, ...], _Chosen] = {}
        self._configs: dict[int, _Template] = {}
        """Config by the identity of the defaults in `_chosen`."""
        self._create_list = config_loader_impl.create_defaults_list
        self._compose = ConfigLoaderImpl._compose_config_from_defaults_list

    def create_list(
        self, *, repo: Any, config_name: Any, overrides_list: Any, **about: Any
    ) -> DefaultsList:
        overrides = Overrides(repo=repo, overrides_list=overrides_list)
        applied = {id(override) for override in overrides.config_overrides}
        choices = tuple(
            override.input_line
            for override in overrides_list
            if id(override) not in applied and not override.is_sweep_override()
        )
        key = (config_name, choices, *sorted(about.items()))
        state = self._state(repo)
        chosen = self._chosen.get(key)
        if chosen is None or chosen.state != state:
            created = self._create_list(
                repo=repo, config_name=config_name, overrides_list=overrides_list, **about
            )
            if chosen is not None:
                self._configs.pop(id(chosen.list.defaults), None)
            self._chosen[key] = _Chosen(created, state)
            return created
        earlier = chosen.list
        return DefaultsList(
            earlier.defaults, earlier.defaults_tree, overrides.config_overrides, earlier.overrides
        )

    def _state(self, repo: Any) -> tuple[Any, ...]:
        sources = repo.get_sources()
        folders = {source.path for source in sources if source.scheme() == "file"}
        files = {file for folder in folders if Path(folder).is_dir() for file in _files(folder)}
        return (
            *((source.provider, source.path) for source in sources),
            files,
            id(ConfigStore.instance()),
            self._store.n_changes,
        )

    def compose(self, loader: ConfigLoaderImpl, defaults: Any, repo: Any) -> Any:
        key = id(defaults)
        if key not in self._configs:
            config = self._compose(loader, defaults=defaults, repo=repo)
            if not any(chosen.list.defaults is defaults for chosen in self._chosen.values()):
                return config
            self._configs[key] = _Template(config)
        return self._configs[key].copy()


PLAIN = {
    "create_defaults_list": (config_loader_impl, config_loader_impl.create_defaults_list),
    "_compose_config_from_defaults_list": (
        ConfigLoaderImpl,
        ConfigLoaderImpl._compose_config_from_defaults_list,
    ),
    "load_config": (ConfigRepository, ConfigRepository.load_config),
}
"""Hydra's own functions that are replaced: name -> where it is looked up, and the function."""


def install() -> None:
    """Change Hydra in this process."""
    # The config of a command is composed once more, only to look for hydra.mode, which no config
    # of the project sets; this is what is found.
    Hydra.get_mode = lambda *_, **__: None
    # All registered dataclasses would be copied for each config.
    ConfigStore.__deepcopy__ = lambda self, _: self  # type: ignore[attr-defined]
    files = _Files()
    ConfigRepository.load_config = lambda self, config_path: files.load(self, config_path)
    store = _Store()
    ConfigStore.store = lambda *words, **settings: store.store(*words, **settings)
    composed = _Composed(store)
    config_loader_impl.create_defaults_list = composed.create_list
    ConfigLoaderImpl._compose_config_from_defaults_list = lambda self, defaults, repo: (
        composed.compose(self, defaults, repo)
    )
