"""What the command line says of keys, options and values that it cannot read; and --help."""

import shlex
from pathlib import Path

import pytest
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

import saexp
from saexp.cli import options_first
from saexp.config import one_line
from saexp.config.run import conf_folder
from saexp.config.tasks import CACHE_ACTIONS
from saexp.errors import ConfigError
from tests.unit.reports.run_outputs import command


def error_line(*words: str) -> str:
    with pytest.raises(ConfigError) as error:
        saexp.compose(words)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_columns_that_can_be_mapped_are_among_the_keys() -> None:
    assert (
        error_line("dataset.columns.txt=x")
        == "dataset.columns=txt is not known; did you mean text?"
    )


QUOTED = [
    ("dataset.group_rule=matching_tokens == 0", "\"dataset.group_rule='matching_tokens == 0'\""),
    ("sae.path=saes/{layer}", "\"sae.path='saes/{layer}'\""),
    ("dataset.text=it costs $5 (or less)", "'dataset.text=\"it costs $5 (or less)\"'"),
    ("+intervention.where_options.rule=a == 0", "\"+intervention.where_options.rule='a == 0'\""),
]


@pytest.mark.parametrize(("word", "typed"), QUOTED)
def test_a_value_that_needs_quotes_is_shown_in_them(word: str, typed: str) -> None:
    assert error_line(word) == (
        f"{word} cannot be read as key=value; quote such a value twice, for the shell and for "
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
    assert error_line(word).endswith("'sae.path=\"saes/{layer}\"'")


MAPPINGS = [
    ("task.rules=3", "task.rules.player.birth_year.tolerance=5"),
    ("task.rules=[1]", "task.rules.player.birth_year.tolerance=5"),
    ("task.templates=3", "\"task.templates.book.creator='Who wrote the book {entity}?'\""),
]


@pytest.mark.parametrize(("word", "typed"), MAPPINGS)
def test_a_value_in_place_of_a_mapping_is_an_error_with_an_example(word: str, typed: str) -> None:
    message = error_line("task=label", word)
    assert message.startswith(f"{word.partition('=')[0]} takes names with values; type ")
    assert message.endswith(f", such as {typed}")
    saexp.compose(["task=label", *shlex.split(typed)])


def test_a_value_in_place_of_a_mapping_of_one_level_is_an_error_with_its_form() -> None:
    assert error_line("dataset.columns=3") == (
        "dataset.columns takes names with values; type dataset.columns.<name>=<value>, or "
        "'dataset.columns={<name>: <value>}'"
    )


def of_launchers(asked: str, *there: str) -> str:
    return str(one_line(MissingConfigException("", f"hydra/launcher/{asked}", list(there))))


def test_a_missing_launcher_is_an_error_that_says_how_to_install_it() -> None:
    assert of_launchers("joblib", "basic") == (
        "hydra/launcher=joblib: no such option; choose from basic; joblib and submitit come with "
        "pip install 'saexp[launchers]', ray with 'saexp[ray]'"
    )
    every = ["basic", "joblib", "ray", "submitit_local", "submitit_slurm"]
    assert of_launchers("jobib", *every) == (
        "hydra/launcher=jobib: no such option; did you mean joblib?"
    )
    assert "pip" not in error_line("model=tinny")


def test_help_names_every_action_of_the_cache_and_stays_short() -> None:
    template = OmegaConf.load(conf_folder() / "config.yaml").hydra.help.template
    for action in CACHE_ACTIONS[1:]:
        assert f"task.action={action}" in template
    assert "task.stores=[" in template
    # The groups, one a line, stand in the place of one line.
    assert len(template.splitlines()) + 10 <= 60


UNKNOWN = [
    ("+coeficient=5", "no key 'coeficient'; did you mean coefficient, "),
    ("++coeficient=5", "no key 'coeficient'; did you mean coefficient, "),
    ("+foo=1", "no key 'foo'; choose from task, model, sae, dataset, "),
    ("+a.b.c=1", "no key 'a'; "),
    ("+analyzer.n_bootstap=5", "no key 'analyzer.n_bootstap'; did you mean "),
    ("+task.option.n=1", "no key 'task.option'; "),
    ("+dataset.columns.txt=a", "dataset.columns=txt is not known; did you mean text?"),
    ("hydra.nope=1", "Hydra has no setting 'hydra.nope'; python -m saexp --info lists them"),
    ("foo=1", "no key 'foo'; choose from task, model, sae, dataset, "),
]


@pytest.mark.parametrize(("word", "line"), UNKNOWN)
def test_a_key_that_nothing_reads_is_refused_with_plus_too(word: str, line: str) -> None:
    assert error_line(word).startswith(line)


ACCEPTED = [
    (["+experiment=entity_recognition"], "positions.name", "entity_last"),
    (["++experiment=uncertainty"], "positions.name", "last"),
    (["+analyzer=probe"], "analyzer.name", "probe"),
    (["+sae_trainer.options.X=3"], "sae_trainer.options.X", 3),
    (["+intervention.where_options.n=2"], "intervention.where_options.n", 2),
    (["intervention.where_options.n=2"], "intervention.where_options.n", 2),
    (["++layer=2"], "layer", 2),
]


@pytest.mark.parametrize(("words", "key", "value"), ACCEPTED, ids=[t[0][0] for t in ACCEPTED])
def test_what_may_be_added_is_taken(words: list[str], key: str, value: object) -> None:
    setting: object = saexp.compose(words)
    for name in key.split("."):
        setting = setting[name] if isinstance(setting, dict) else getattr(setting, name)
    assert setting == value


@pytest.mark.parametrize(("added", "line"), [("foo: 1", "'foo'"), ("model: {fo: 1}", "fo")])
def test_an_experiment_file_with_a_key_that_nothing_reads_is_refused(
    tmp_path: Path, added: str, line: str
) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    text = f"# @package _global_\nlayer: 2\n{added}\n"
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(text)
    result = command(tmp_path, "--config-dir", "conf", "experiment=mine", "tracker=none")
    assert result.code == 1
    assert line in result.err
    assert len(result.err.splitlines()) == 1


LINES = [
    ("model=null", "a group takes the name of one of its options, such as model=gpt2; "),
    ("=3", "a group takes the name of one of its options, such as model=gpt2; "),
    ("plugins=mine", "plugins: takes a list; type 'plugins=[…]'"),
    ("model.name=null", "model.name needs a value; type model.name=<value>"),
    ("~foo", "~foo: no key 'foo'; choose from task, model, "),
    ("~coeficient", "~coeficient: no key 'coeficient'; did you mean coefficient, "),
    ("~tracker.name", "~tracker.name: it cannot be removed; type tracker.name=null"),
    ("~sae", "~sae: a run needs the group sae; type sae=<one of gemmascope, "),
    ("sae=[]", "sae=[]: a run needs the group sae; type sae=<one of gemmascope, "),
    ("tracker=[]", "tracker=[] names no tracker; type tracker=none"),
    ("tracker=[wandb,nosuch]", "tracker=nosuch: no such option; choose from jsonl, mlflow, none, "),
    ("tracker=[wandb,jsnl]", "tracker=jsnl: no such option; did you mean jsonl"),
    ("model=[tiny,gpt2]", "model=[tiny,gpt2]: a run has one model; type -m model=tiny,gpt2 for a"),
    ("~layer", "layer cannot be removed; type layer=null"),
    ("~sae.path", "sae.path cannot be removed; type sae.path=null"),
    ("seed=-1", "seed=-1 is too small; it must be at least 0"),
    ("dataset.n_examples=0", "dataset.n_examples=0 is too small; it must be at least 1"),
    ("analyzer.n_background=0", "analyzer.n_background=0 is too small; it must be at least 1"),
    ("analyzer.n_bootstrap=many", "analyzer.n_bootstrap=many is not a whole number"),
    ("analyzer.alpha=low", "analyzer.alpha=low is not a number"),
    ("verify=perhaps", "verify=perhaps is not true or false"),
]


@pytest.mark.parametrize(("word", "line"), LINES, ids=[x[0] for x in LINES])
def test_values_that_hydra_refuses_are_reported_as_saexp_errors(word: str, line: str) -> None:
    assert error_line(word).startswith(line)


OTHER_COMPONENTS = [
    (["analyzer.k=5"], "analyzer.k is a setting of analyzer=probe, and this run has analyzer=c"),
    (["task=label", "task.n_texts=5"], "task.n_texts is a setting of task=evaluate, and this run"),
    (["latents=[3]"], "task.latents is a setting of task=dashboard, and this run has task=analyze"),
    (["analyzer.name=nothing", "analyzer.n=5"], "no analyzer is called 'nothing'; choose from "),
]


@pytest.mark.parametrize(("words", "line"), OTHER_COMPONENTS)
def test_a_setting_of_another_component_names_that_component(words: list[str], line: str) -> None:
    assert error_line(*words).startswith(line)


FORMER = [
    (["analyzer=probe", "analyzer.options.k=[7]"], "analyzer.k", [7]),
    (["analyzer=probe", "+analyzer.options.k=[7]"], "analyzer.k", [7]),
    (["task=evaluate", "task.options.n_texts=7"], "task.n_texts", 7),
    (["task=dashboard", "latents=[7]"], "task.latents", [7]),
    (["task=collect", "shard=2", "n_shards=4"], "task.shard", 2),
    (["task=cache", "action=prune", "max_size=7GB"], "task.max_size", "7GB"),
    (["dataset=wikidata", "dataset.options.min_known=7"], "dataset.min_known", 7),
]


@pytest.mark.parametrize(("words", "key", "value"), FORMER)
def test_a_former_spelling_is_read_with_a_warning(
    words: list[str], key: str, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    group, name = key.split(".")
    cfg = saexp.compose(words)
    assert getattr(getattr(cfg, group), name) == value
    (record,) = [r for r in caplog.records if r.name == "saexp.config.run"]
    assert f" is now {key}=" in record.getMessage()


def test_a_value_of_a_former_spelling_is_refused_with_its_whole_key() -> None:
    assert error_line("task=collect", "shard=one") == "task.shard=one is not a whole number"


def test_settings_of_a_former_file_are_read(tmp_path: Path) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    text = "# @package _global_\ndefaults: [override /task: collect]\nshard: 0\nn_shards: 99\n"
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(text)
    words = ["--config-dir", "conf", "experiment=mine", "tracker=none", "dataset.n_examples=8"]
    result = command(tmp_path, *words)
    assert result.code == 0, result.err
    assert "shard= is now task.shard=" in result.err


@pytest.mark.parametrize(
    ("words", "read"),
    [
        ("layer=1 -m width=1,2", "-m layer=1 width=1,2"),
        ("layer=1 -cd a=b ~coefficient", "-cd a=b layer=1 ~coefficient"),
        ("a=1 --info config b=2", "--info config a=1 b=2"),
        # Those that Hydra's parser reads stay as typed.
        ("layer=1,2 width=1 -m", "layer=1,2 width=1 -m"),
        ("-m a=1 word b=1", "-m a=1 word b=1"),
        ("", ""),
    ],
)
def test_options_may_stand_between_settings(words: str, read: str) -> None:
    assert options_first(words.split()) == read.split()
