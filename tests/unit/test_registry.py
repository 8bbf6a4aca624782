"""Names are found lazily, near misses are named, nothing is registered twice."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import saexp
from saexp import registry
from saexp.errors import ConfigError
from tests.shipped_texts import FEW_NEUTRAL

BUILTIN = [(kind, name) for kind, known in registry._BUILTIN.items() for name in known]
CHEAP = ["dataset.n_examples=5", FEW_NEUTRAL, "intervention=none", "tracker=none"]


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


def test_a_custom_analyzer_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module on the path, named in `plugins`, run from a config of its own."""
    monkeypatch.setattr(registry, "PLUGINS", registry.Plugins())
    (tmp_path / "my_saexp_plugin.py").write_text(
        "import saexp\n"
        "from saexp.results import Result\n\n"
        "@saexp.register('analyzer', 'counting')\n"
        "class Counting:\n"
        "    def __init__(self, cfg):\n"
        "        self.cfg = cfg\n\n"
        "    def analyze(self, inputs):\n"
        "        factor = self.cfg.options['factor']\n"
        "        return Result(metrics={'counting/rows': factor * len(inputs.latents)})\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    cfg = saexp.compose(
        ["analyzer.name=counting", "+analyzer.options.factor=2", "plugins=[my_saexp_plugin]"]
        + [f"cache_dir={tmp_path}/cache", *CHEAP]
    )
    result = saexp.run(cfg, tmp_path / "run")
    assert result.metrics["counting/rows"] == 2 * 40
    assert (tmp_path / "run/report.html").is_file()
    sys.modules.pop("my_saexp_plugin")


TYPED = """
import saexp
from dataclasses import dataclass
from saexp.config import AnalyzerConfig
from saexp.results import Result

@dataclass(kw_only=True)
class ScaledConfig(AnalyzerConfig):
    factor: int = 2

def section(run):
    return f"<p>factor {run.config['analyzer']['factor']}: {run.metrics['scaled/rows']} rows</p>"

@saexp.register("analyzer", "scaled", config=ScaledConfig, report_section=section)
class Scaled:
    def __init__(self, cfg):
        self.cfg = cfg

    def analyze(self, inputs):
        return Result(metrics={"scaled/rows": self.cfg.factor * len(inputs.latents)})
"""


@pytest.fixture
def typed_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(registry, "PLUGINS", registry.Plugins())
    (tmp_path / "typed_saexp_plugin.py").write_text(TYPED, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "plugins=[typed_saexp_plugin]"
    sys.modules.pop("typed_saexp_plugin")


def test_settings_of_a_plugin_are_typed_without_a_yaml_file(typed_plugin: str) -> None:
    cfg = saexp.compose([typed_plugin, "analyzer=scaled", "analyzer.factor=5", "seed=3"])
    assert type(cfg.analyzer).__name__ == "ScaledConfig"
    assert vars(cfg.analyzer).items() >= {"factor": 5, "name": "scaled", "seed": 3}.items()
    assert saexp.compose([typed_plugin, "analyzer.name=scaled"]).analyzer == replace(
        cfg.analyzer, factor=2, seed=0
    )
    for word, message in (
        ("analyzer.factr=3", "no key 'analyzer.factr'; did you mean analyzer.factor"),
        ("analyzer.factor=many", "analyzer.factor=many is not a whole number"),
    ):
        with pytest.raises(ConfigError, match=message):
            saexp.compose([typed_plugin, "analyzer=scaled", word])
    with pytest.raises(ConfigError, match="analyzer.factor is a setting of analyzer=scaled"):
        saexp.compose([typed_plugin, "analyzer.factor=3"])


def test_an_analyzer_of_a_plugin_adds_a_section_to_the_report(
    typed_plugin: str, tmp_path: Path
) -> None:
    words = [typed_plugin, "analyzer=scaled", f"cache_dir={tmp_path}/cache", *CHEAP]
    result = saexp.run(saexp.compose(words), tmp_path / "run")
    page = (tmp_path / "run/report.html").read_text("utf-8")
    assert f"<p>factor 2: {result.metrics['scaled/rows']} rows</p>" in page


def test_a_config_class_must_extend_that_of_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "PLUGINS", registry.Plugins())
    saexp.register("analyzer", "odd", config=int)(dict)
    with pytest.raises(ConfigError, match="must be a dataclass that extends saexp.config.Analyz"):
        saexp.compose(["analyzer.name=odd"])
