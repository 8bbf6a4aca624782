"""What the command line says of keys, options and values that it cannot read; and --help."""

import shlex

import pytest
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

import saexp
from saexp.config.folder import conf_folder
from saexp.config.messages import one_line
from saexp.errors import ConfigError
from saexp.tasks.cache import ACTIONS


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
