"""What the command line says of keys, options and values that it cannot read; and --help."""

import shlex
from pathlib import Path

import pytest
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

import saexp
from saexp.config.messages import one_line
from saexp.config.run import conf_folder
from saexp.errors import ConfigError
from saexp.tasks.cache import ACTIONS
from tests.unit.reports.left import command


def said(*words: str) -> str:
    with pytest.raises(ConfigError) as error:
        saexp.compose(words)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_columns_that_can_be_mapped_are_among_the_keys() -> None:
    assert said("dataset.columns.txt=x").startswith(
        "no key 'dataset.columns.txt'; did you mean dataset.columns.text, "
    )


QUOTED = [
    ("dataset.group_rule=matching_tokens == 0", "\"dataset.group_rule='matching_tokens == 0'\""),
    ("sae.path=saes/{layer}", "\"sae.path='saes/{layer}'\""),
    ("dataset.text=it costs $5 (or less)", "'dataset.text=\"it costs $5 (or less)\"'"),
    ("+dataset.options.rule=a == 0", "\"+dataset.options.rule='a == 0'\""),
]


@pytest.mark.parametrize(("word", "typed"), QUOTED)
def test_a_value_that_needs_quotes_is_shown_in_them(word: str, typed: str) -> None:
    assert said(word) == (
        f"{word} is no key=value that can be read; quote such a value twice, for the shell and for "
        f"Hydra: {typed}"
    )
    # What is shown is read, and as the same value.
    (override,) = shlex.split(typed)
    cfg = saexp.compose([override]) if "path" not in word else None
    if "group_rule" in word:
        assert cfg is not None
        assert cfg.dataset.group_rule == "matching_tokens == 0"


@pytest.mark.parametrize(
    "word", ["layer=[0,1", "dataset.text='a", "dataset.split={train: 1", "a b"]
)
def test_where_more_than_quotes_may_be_lacking_nothing_is_guessed(word: str) -> None:
    assert said(word).endswith("'sae.path=\"saes/{layer}\"'")


def of_launchers(asked: str, *there: str) -> str:
    return str(one_line(MissingConfigException("", f"hydra/launcher/{asked}", list(there))))


def test_launchers_that_are_not_installed_are_told_how_to_get() -> None:
    assert of_launchers("joblib", "basic") == (
        "hydra/launcher=joblib: no such option; choose from basic; joblib and submitit come with "
        "pip install 'saexp[launchers]', ray with 'saexp[ray]'"
    )
    every = ["basic", "joblib", "ray", "submitit_local", "submitit_slurm"]
    assert of_launchers("jobib", *every) == (
        "hydra/launcher=jobib: no such option; did you mean joblib?"
    )
    assert "pip" not in said("model=tinny")


def test_help_names_every_action_of_the_cache_and_stays_short() -> None:
    template = OmegaConf.load(conf_folder() / "config.yaml").hydra.help.template
    for action in ACTIONS[1:]:
        assert f"action={action}" in template
    assert "stores=[" in template
    # The groups, one a line, stand in the place of one line.
    assert len(template.splitlines()) + 10 <= 60


UNKNOWN = [
    ("+coeficient=5", "no key 'coeficient', with or without +; did you mean coefficient, "),
    ("++coeficient=5", "no key 'coeficient', with or without +; did you mean coefficient, "),
    ("+foo=1", "no key 'foo', with or without +; choose from task, model, sae, dataset, "),
    ("+a.b.c=1", "no key 'a', with or without +; "),
    ("+analyzer.n_bootstap=5", "no key 'analyzer.n_bootstap', with or without +; did you mean "),
    ("+task.option.n=1", "no key 'task.option', with or without +; did you mean task.options, "),
    ("+dataset.columns.txt=a", "dataset.columns=txt is not known; choose from text, "),
    ("hydra.nope=1", "no key 'hydra.nope' of Hydra's own; python -m saexp --info lists them"),
    ("foo=1", "no key 'foo'; choose from task, model, sae, dataset, "),
]


@pytest.mark.parametrize(("word", "line"), UNKNOWN)
def test_a_key_that_nothing_reads_is_refused_with_plus_too(word: str, line: str) -> None:
    assert said(word).startswith(line)


TAKEN = [
    (["+experiment=entity_recognition"], "positions.name", "entity_last"),
    (["++experiment=uncertainty"], "positions.name", "last"),
    (["+analyzer=probe"], "analyzer.name", "probe"),
    (["+sae_trainer.options.X=3"], "sae_trainer.options.X", 3),
    (["+analyzer.options.a.b=3"], "analyzer.options.a.b", 3),
    (["+intervention.where_options.n=2"], "intervention.where_options.n", 2),
    (["++layer=2"], "layer", 2),
]


@pytest.mark.parametrize(("words", "key", "value"), TAKEN, ids=[t[0][0] for t in TAKEN])
def test_what_may_be_added_is_taken(words: list[str], key: str, value: object) -> None:
    found: object = saexp.compose(words)
    for name in key.split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    assert found == value


@pytest.mark.parametrize(("added", "line"), [("foo: 1", "'foo'"), ("model: {fo: 1}", "fo")])
def test_an_experiment_file_with_a_key_that_nothing_reads_is_refused(
    tmp_path: Path, added: str, line: str
) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    text = f"# @package _global_\nlayer: 2\n{added}\n"
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(text)
    found = command(tmp_path, "--config-dir", "conf", "experiment=mine", "tracker=none")
    assert found.code == 1
    assert line in found.err
    assert len(found.err.splitlines()) == 1


LINES = [
    ("model=null", "a group takes the name of one of its options, such as model=gpt2; "),
    ("=3", "a group takes the name of one of its options, such as model=gpt2; "),
    ("plugins=mine", "plugins: takes a list; type 'plugins=[…]'"),
    ("model.name=null", "model.name needs a value; type model.name=<value>"),
    ("~layer", "layer cannot be taken out; type layer=null"),
    ("~sae.path", "sae.path cannot be taken out; type sae.path=null"),
    ("seed=-1", "seed=-1 is too small; it must be at least 0"),
    ("dataset.n_examples=0", "dataset.n_examples=0 is too small; it must be at least 1"),
    ("analyzer.n_background=0", "analyzer.n_background=0 is too small; it must be at least 1"),
    (
        "intervention.where_options={x: 1}",
        "intervention.where_options has no key 'x' that could be changed; to add one type "
        "+intervention.where_options.x=<value>",
    ),
]


@pytest.mark.parametrize(("word", "line"), LINES, ids=[x[0] for x in LINES])
def test_values_that_hydra_refuses_are_told_in_saexp_s_words(word: str, line: str) -> None:
    assert said(word).startswith(line)
