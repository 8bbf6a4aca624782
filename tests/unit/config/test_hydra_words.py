"""What Hydra's users type out of habit: `~group`, completion in the shell, keys in --help."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

import saexp
from saexp.config.run import conf_folder, for_hydra
from tests.unit.reports.left import command


def test_a_group_left_out_is_none_where_it_has_that_option() -> None:
    cfg = saexp.compose(["~intervention", "~tracker"])
    assert (cfg.intervention.name, cfg.tracker.kind) == ("none", "none")
    # Other deletions stay Hydra's.
    others = ["~model", "~intervention=steer", "~layer", "~analyzer.alpha"]
    assert for_hydra(others) == others


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
    said = command(tmp_path, "-sc", "query=bash")
    assert said.code == 0, said.err
    assert set(said.out.split()) == words
    assert list(tmp_path.iterdir()) == []


def test_every_top_level_key_is_completed_and_the_script_is_bashs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMP_LINE", "saexp ")
    monkeypatch.setenv("COMP_POINT", "6")
    keys = {"layer=", "width=", "coefficient=", "seed=", "device=", "dtype=", "cache_dir="}
    keys |= {"resume=", "verify=", "objective=", "sweep.", "task="}
    assert keys <= set(command(tmp_path, "-sc", "query=bash").out.split())
    assert "-F hydra_bash_completion" in command(tmp_path, "-sc", "install=bash").out


def test_help_describes_the_keys_of_searches_and_dry_runs() -> None:
    template = OmegaConf.load(conf_folder() / "config.yaml").hydra.help.template
    lines = [line.strip() for line in template.splitlines()]
    for key in ("objective ", "sweep.dry_run "):
        assert any(line.startswith(key) for line in lines)
