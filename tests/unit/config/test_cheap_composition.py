"""The tests' fast composition of configs gives what Hydra's own gives (`cheap_composition.py`)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import Container, DictConfig, Node

from saexp.config.run import conf_folder, register_schema
from tests.cheap_composition import PLAIN

Composed = Callable[..., DictConfig]


@contextmanager
def hydras_own() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, (owner, function) in PLAIN.items():
            patch.setattr(owner, name, function)
        yield


@contextmanager
def composing(folder: Path) -> Iterator[Composed]:
    with initialize_config_dir(str(folder), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        yield lambda words, mode=RunMode.RUN: loader.load_configuration("config", words, mode)


def described(node: Node) -> Any:
    """Values, types and flags of a config, in their order."""
    about = node._metadata
    own = [type(node), about.ref_type, about.object_type, about.optional, about.key, about.flags]
    content = node._content if isinstance(node, Container) else node._value()
    if isinstance(content, dict):
        return [*own, [(key, described(child)) for key, child in content.items()]]
    if isinstance(content, list):
        return [*own, [described(child) for child in content]]
    return [*own, content]


@pytest.mark.parametrize(
    ("words", "mode"),
    [
        ([], RunMode.RUN),
        (["layer=1", "dataset.n_examples=40", "hydra.run.dir=x"], RunMode.RUN),
        (["task=train", "sae_trainer=topk", "experiment=uncertainty", "+former=1"], RunMode.RUN),
        (["intervention=none,steer", "layer=1,2", "hydra/launcher=joblib"], RunMode.MULTIRUN),
        (["~analyzer.alpha", "tracker=none", "tracker=jsonl"], RunMode.RUN),
    ],
)
def test_configs_are_those_of_hydra(words: list[str], mode: RunMode) -> None:
    register_schema()
    with composing(conf_folder()) as composed:
        with hydras_own():
            expected = described(composed(words, mode))
        first = composed(words, mode)
        assert described(first) == expected
        # Copies, which no command changes for the next.
        first.seed = 7
        del first.model
        assert described(composed(words, mode)) == expected
        with_seed = composed([*words, "seed=1"], mode)
        assert with_seed.seed == 1
        assert described(with_seed.model) == described(composed(words, mode).model)


def test_changed_files_and_classes_are_read_again(tmp_path: Path) -> None:
    (tmp_path / "group").mkdir()
    primary, option = tmp_path / "config.yaml", tmp_path / "group/option.yaml"
    store = ConfigStore.instance()
    try:
        for n in range(3):
            if n == 0:
                primary.write_text("defaults: [group: option, own: cls, _self_]\nat: first\n")
            elif n == 1:
                primary.write_text("defaults: [group: option, own: cls, _self_]\nat: second\n")
            option.write_text("value: " + "1" * (n + 1))
            cls = make_dataclass("Settings", [("size", int, n)])
            store.store(group="own", name="cls", node=cls)
            with composing(tmp_path) as composed:
                config = composed([])
                assert composed([]) == config
            assert (config.group.value, config.own.size) == (int("1" * (n + 1)), n)
            assert config.at == ("first", "second", "second")[n]
            assert config.own._metadata.object_type is cls
    finally:
        del store.repo["own"]


def test_an_option_that_is_missing_stays_an_error() -> None:
    register_schema()
    with composing(conf_folder()) as composed:
        for _ in range(2):
            with pytest.raises(HydraException, match="task/nothing"):
                composed(["task=nothing"])
            with pytest.raises(HydraException, match="'nothing'"):
                composed(["nothing=1"])
