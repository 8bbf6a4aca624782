"""Names are found lazily, near misses are named, nothing is registered twice."""

import sys
from pathlib import Path

import pytest

import saexp
from saexp import registry
from saexp.errors import ConfigError

BUILTIN = [(kind, name) for kind, known in registry._BUILTIN.items() for name in known]


@pytest.mark.parametrize(("kind", "name"), BUILTIN)
def test_every_name_stands_for_something(kind: str, name: str) -> None:
    assert callable(registry.resolve(kind, name))


def test_unknown_names_and_kinds() -> None:
    with pytest.raises(ConfigError, match="no positions is called 'entity_lst'; did you mean"):
        registry.resolve("positions", "entity_lst")
    with pytest.raises(ConfigError, match="no component kind 'gadget'; the kinds are task"):
        registry.resolve("gadget", "x")
    with pytest.raises(ConfigError, match="no component kind 'gadget'"):
        saexp.register("gadget", "x")


def test_a_taken_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "PLUGINS", registry.Plugins())
    with pytest.raises(ConfigError, match="outcome 'refusal' is registered already"):
        saexp.register("outcome", "refusal")(object)
    saexp.register("outcome", "mine")(dict)
    saexp.register("outcome", "mine")(dict)
    with pytest.raises(ConfigError, match="outcome 'mine' is registered already"):
        saexp.register("outcome", "mine")(list)


def test_an_analyzer_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module on the path, named in `plugins`, run from a config of its own."""
    monkeypatch.setattr(registry, "PLUGINS", registry.Plugins())
    (tmp_path / "my_saexp_plugin.py").write_text(
        "import saexp\n"
        "from saexp.results import TaskResult\n\n"
        "@saexp.register('analyzer', 'counting')\n"
        "class Counting:\n"
        "    def __init__(self, cfg):\n"
        "        self.cfg = cfg\n\n"
        "    def analyze(self, inputs):\n"
        "        factor = self.cfg.options['factor']\n"
        "        return TaskResult(metrics={'counting/rows': factor * len(inputs.latents)})\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    cfg = saexp.compose(
        ["analyzer.name=counting", "+analyzer.options.factor=2", "plugins=[my_saexp_plugin]"]
        + ["tracker=none", f"cache_dir={tmp_path}/cache"]
    )
    result = saexp.run(cfg, tmp_path / "run")
    assert result.metrics["counting/rows"] == 2 * 960
    assert (tmp_path / "run/report.html").is_file()
    sys.modules.pop("my_saexp_plugin")
