"""A component that nothing is registered as is an error before anything is built or loaded."""

from pathlib import Path

import pytest

import saexp
from saexp import registry
from saexp.errors import ConfigError

WRONG = [
    (["intervention.outcomes=[refusl]"], "no outcome is called 'refusl'; did you mean refusal?"),
    (["analyzer.name=contrst"], "no analyzer is called 'contrst'; did you mean contrast?"),
    (["intervention.name=ster"], "no intervention is called 'ster'; did you mean steer?"),
    (["intervention.where=entty"], "intervention.where=entty is not known; did you mean entity, "),
    (["positions.name=midle"], "no positions is called 'midle'; did you mean middle"),
    (["dataset.name=jsnl"], "no dataset is called 'jsnl'; did you mean jsonl?"),
    (["task=collect", "positions.name=midle"], "no positions is called 'midle'"),
    (["task=dashboard", "dataset.name=jsnl"], "no dataset is called 'jsnl'"),
    (["task=train", "positions.name=midle"], "no positions is called 'midle'"),
    (["task=evaluate", "dataset.name=jsnl"], "no dataset is called 'jsnl'"),
    (["task=label", "dataset.name=jsnl"], "no dataset is called 'jsnl'"),
]


class Built(Exception):
    """Something was built."""


@pytest.fixture(autouse=True)
def nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: object, **__: object) -> None:
        raise Built

    monkeypatch.setattr(registry, "build", build)


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_a_wrong_name_is_reported_first(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        saexp.run(saexp.compose(words), tmp_path)
    assert str(error.value).startswith(message)


UNUSED = [
    ["intervention=none", "intervention.outcomes=[refusl]"],
    ["task=collect", "analyzer.name=contrst", "intervention.name=ster"],
    ["task=evaluate", "positions.name=midle"],
    ["task=cache", "dataset.name=jsnl"],
    ["intervention.where=after_entity"],
    [],
]


@pytest.mark.parametrize("words", UNUSED)
def test_what_a_task_does_not_use_is_not_looked_at(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(Built):
        saexp.run(saexp.compose(words), tmp_path)


def test_registered_names_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "PLUGINS", registry.Plugins())
    for kind in ("outcome", "positions"):
        saexp.register(kind, "mine")(dict)
    words = ["intervention.outcomes=[mine]", "positions.name=mine", "intervention.where=mine"]
    with pytest.raises(Built):
        saexp.run(saexp.compose(words), tmp_path)
