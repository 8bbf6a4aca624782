"""What Hydra's users type out of habit: `~group`, completion in the shell, keys in --help."""

from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import saexp
from saexp.config import RunConfig
from saexp.config.run import conf_folder, for_hydra
from tests.unit.reports.run_outputs import command


def test_a_group_left_out_is_none_where_it_has_that_option() -> None:
    cfg = saexp.compose(["~intervention", "~tracker"])
    assert (cfg.intervention.name, cfg.tracker.kind) == ("none", "none")
    assert for_hydra(["~intervention=steer"]) == ["intervention=none"]
    # Other deletions stay Hydra's.
    others = ["~layer", "~analyzer.alpha"]
    assert for_hydra(others) == others


PATHS = [
    ("path=a,b", 'task.path="a","b"'),
    ("++path=a", '++task.path="a"'),
    ('path=with"quote', r'task.path="with\"quote"'),
    ("path=0_layer=1,width=2", 'task.path="0_layer=1,width=2"'),
    ("path=0_layer=1,width=2,a", 'task.path="0_layer=1,width=2","a"'),
    # Not there: one folder, as its name has an override.
    ("path=gone/0_layer=1,width=2", 'task.path="gone/0_layer=1,width=2"'),
    ("path=gone,a", "task.path=gone,a"),
    ("path='a'", "task.path='a'"),
]


@pytest.mark.parametrize(("word", "read"), PATHS)
@pytest.mark.parametrize("task", ["task=report", "++task=workspace"])
def test_paths_of_saved_runs_are_quoted_for_hydra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, word: str, read: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", 'with"quote', "0_layer=1,width=2"):
        Path(name).mkdir()
    assert for_hydra([task, word])[1] == read
    assert for_hydra([word]) == [word]


COMPLETED = [
    ("saexp inter", {"intervention.", "intervention="}),
    ("saexp intervention=s", {"intervention=scale", "intervention=splice", "intervention=steer"}),
    ("saexp -m task=re", {"task=report"}),
    ("saexp la", {"layer="}),
    ("saexp co", {"coefficient=", "collector.", "collector="}),
    ("saexp sweep.d", {"sweep.dry_run="}),
    ("saexp analyzer.n_b", {"analyzer.n_background=", "analyzer.n_bootstrap="}),
    ("saexp hydra/sweeper=sae", {"hydra/sweeper=saexp_optuna"}),
]


@pytest.mark.parametrize(("line", "words"), COMPLETED)
def test_the_shell_completes_groups_options_and_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, words: set[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    result = command(tmp_path, "-sc", "query=bash")
    assert result.code == 0, result.err
    assert set(result.out.split()) == words
    assert list(tmp_path.iterdir()) == []


PATH_LINES = [
    ("saexp task=report path=", "path=run/"),
    ("saexp task=report path=run/", "path=run/0_layer=1,width=2/"),
    ("saexp task=report ++task.path=run/0_layer=1,w", "++task.path=run/0_layer=1,width=2/"),
    ("saexp -m hydra.sweep.dir=r", "hydra.sweep.dir=run/"),
    ("saexp dataset.path=r", "dataset.path=rows.csv dataset.path=run/"),
    ("saexp dataset.path=none", ""),
]


@pytest.mark.parametrize(("line", "words"), PATH_LINES)
def test_the_shell_completes_folders_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, words: str
) -> None:
    (tmp_path / "run/0_layer=1,width=2").mkdir(parents=True)
    (tmp_path / "rows.csv").touch()
    monkeypatch.setenv("COMP_LINE", line)
    assert command(tmp_path, "-sc", "query=bash").out.strip() == words


def test_a_query_without_a_shell_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COMP_LINE", raising=False)
    result = command(tmp_path, "-sc", "query=bash")
    assert result.code == 1
    assert result.err.startswith("saexp: -sc query= is for a shell")
    assert len(result.err.splitlines()) == 1


def test_every_group_of_the_configs_is_one_of_runs() -> None:
    """What else is in `conf` is listed by --help as a group, which explains the one such folder."""
    groups = {folder.name for folder in conf_folder().iterdir() if folder.is_dir()}
    extra = {"experiment", "wandb_sweeps"}
    assert extra <= groups <= extra | {field.name for field in fields(RunConfig)}


def test_every_top_level_key_is_completed_and_the_script_is_bashs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMP_LINE", "saexp ")
    monkeypatch.setenv("COMP_POINT", "6")
    keys = {"layer=", "width=", "coefficient=", "seed=", "device=", "dtype=", "cache_dir="}
    keys |= {"resume=", "verify=", "objective=", "sweep.", "task="}
    assert keys <= set(command(tmp_path, "-sc", "query=bash").out.split())
    script = command(tmp_path, "-sc", "install=bash").out
    assert script.rstrip().endswith("-F hydra_bash_completion saexp")


def test_help_describes_the_keys_of_searches_and_dry_runs() -> None:
    template = OmegaConf.load(conf_folder() / "config.yaml").hydra.help.template
    lines = [line.strip() for line in template.splitlines()]
    for key in ("objective ", "sweep.dry_run "):
        assert any(line.startswith(key) for line in lines)
