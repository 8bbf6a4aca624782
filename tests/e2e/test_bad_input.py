"""What the user can mend ends in one line on stderr and exit code 1, never in a traceback."""

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from saexp.cli import main
from saexp.sweeps.planning import PROCESS
from tests.shipped_texts import FEW_NEUTRAL

Command = Callable[..., str]


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Runs a command line that must fail; returns its one line."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["saexp", "tracker=none", FEW_NEUTRAL, *words])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 1
        lines = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("[")]
        assert len(lines) == 1, lines
        assert lines[0].startswith("saexp: ")
        return lines[0].removeprefix("saexp: ")

    return run


def rows(path: Path, *lines: object) -> str:
    text = "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines)
    path.write_text(text + "\n" if text else "", encoding="utf-8")
    return f"dataset.path={path}"


GOOD = {"text": "The player Ann Lee", "group": "a", "entity": "Ann Lee"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=tinny"], "model=tinny: no such option; did you mean tiny?"),
        (["sae=gemascope"], "sae=gemascope: no such option; did you mean gemmascope"),
        (["layr=2"], "no key 'layr'; did you mean layer"),
        (["intervention.n_prompt=2"], "did you mean intervention.n_prompts"),
        (["layer=99"], "layer=99 is out of range: tiny has layers 0-4; try layer=4"),
        (["layer=two"], "layer=two is not a block index; type a whole number from 0"),
        (["width=16k"], "sae=tiny has no width=16k for tiny; it has 256, 512"),
        (["width=wide"], "width=wide is not an SAE width; type a number such as width=16k"),
        (["coefficient=much"], "coefficient=much is not a number; type coefficient=4 or"),
        (["coefficient=[]"], "coefficient=[] contains no coefficient"),
        (["device=cuda:9"], "device=cuda:9 is not on this machine; try device=auto"),
        (["dtype=float8"], "dtype=float8 is not known; did you mean float32"),
        (["dataset=jsonl"], "dataset=jsonl needs a file: type dataset.path=FILE"),
        (["dataset=jsonl", "dataset.path=no.jsonl"], "dataset.path=no.jsonl: no such file"),
        (["model.name=nobody/nothing"], "model.name=nobody/nothing: its config cannot be loaded"),
        (["sae=local", "sae.path=/no/folder"], "sae.path=/no/folder: no such folder or file"),
        (["sae=saelens", "sae.release=gpt2-smal-res-jb"], "did you mean gpt2-small-res-jb"),
        (["sae=gemmascope", "model=gemma2b", "width=3k"], "model.name=google/gemma-2-2b"),
        (
            ["intervention.where=somewhere"],
            "intervention.where=somewhere is not known; ",
        ),
        (["intervention.outcomes=[refusals]"], "no outcome is called 'refusals'; did you mean"),
        (["plugins=[no_such_module_here]"], "no module 'no_such_module_here' can be imported"),
        (["dataset=ioi"], "none of 200 texts has the requested position: no entity span"),
        (
            ["dataset=ioi", "positions=last", "intervention=none", "dataset.n_examples=8"],
            "a contrast needs two groups",
        ),
        (["layer=[0,1]"], "layer=[0, 1]: task=analyze takes one layer; sweep with -m layer=0,1"),
        (["layer=[0,1"], "cannot be read as key=value"),
    ],
)
def test_one_line(refused: Command, words: list[str], message: str) -> None:
    assert message in refused(*words)


def test_the_error_of_a_malformed_row_has_file_and_line(refused: Command, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    message = refused("dataset=jsonl", rows(path, GOOD, "{text: 1}"))
    assert f"{path}:2: is not JSON" in message


def test_an_empty_file(refused: Command, tmp_path: Path) -> None:
    assert "mine.jsonl: is empty" in refused("dataset=jsonl", rows(tmp_path / "mine.jsonl"))


def test_one_group_only(refused: Command, tmp_path: Path) -> None:
    message = refused("dataset=jsonl", rows(tmp_path / "mine.jsonl", GOOD, {**GOOD, "id": "b"}))
    assert "all rows are of one group, a (2); a contrast needs two" in message


def test_an_entity_that_is_not_in_its_text(refused: Command, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    message = refused("dataset=jsonl", rows(path, GOOD, {**GOOD, "entity": "Bob"}))
    assert f"{path}:2: entity 'Bob' does not occur in its text 'The player Ann Lee'" in message


def test_too_few_entities_in_a_split(refused: Command, tmp_path: Path) -> None:
    other = {"text": "The player Bo Dee", "group": "b", "entity": "Bo Dee"}
    message = refused(
        "dataset=jsonl", "intervention=none", rows(tmp_path / "mine.jsonl", GOOD, other)
    )
    assert "a contrast needs at least 2" in message


def test_a_model_and_an_sae_of_different_size(refused: Command, tmp_path: Path) -> None:
    from tests.random_models import random_hf, save

    save(random_hf("llama"), tmp_path / "model")
    message = refused(
        "model=hf",
        f"model.name={tmp_path / 'model'}",
        "layer=1",
        "sae=local",
        f"sae.path={Path(__file__).parents[2]}/saexp/assets/tiny/sae/layer_1/width_256",
    )
    assert "reads vectors of 128 numbers, but model has d_model=32" in message


def test_a_pickle_as_sae(refused: Command, tmp_path: Path) -> None:
    (tmp_path / "sae.pt").write_bytes(pickle.dumps({"W_enc": 1}))
    message = refused("sae=local", f"sae.path={tmp_path / 'sae.pt'}")
    assert "is a pickle file, which can run code when opened" in message


def test_a_layer_that_contradicts_the_sae(refused: Command) -> None:
    folder = Path(__file__).parents[2] / "saexp/assets/tiny/sae/layer_1/width_256"
    message = refused("layer=3", "sae=local", f"sae.path={folder}")
    assert "layer=3, but local was trained on layer_1.resid_post; type layer=1" in message


def test_a_cache_folder_that_cannot_be_written(refused: Command, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file, not a folder", encoding="utf-8")
    message = refused(f"cache_dir={tmp_path / 'taken'}")
    assert "cannot write" in message
    assert "choose another cache_dir=" in message


def test_a_run_folder_that_cannot_be_made(refused: Command, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file, not a folder", encoding="utf-8")
    message = refused(f"hydra.run.dir={tmp_path}/taken/run")
    assert "taken/run" in message


def test_a_cluster_job_that_was_lost(
    refused: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lost = type("FailedJobError", (RuntimeError,), {"__module__": "submitit.core.utils"})

    def sweep() -> None:
        raise lost("Job (task=0) failed with trace:\nTraceback …\nMemoryError: no room\n")

    monkeypatch.setattr("saexp.cli._job", sweep)
    message = refused("-m", "layer=1,2")
    assert message == (
        "a process of the sweep ended without a result (FailedJobError: Job (task=0) failed with "
        "trace: … MemoryError: no room); what was finished is kept, and the same command computes "
        "the rest"
    )
    monkeypatch.setattr(PROCESS, "sweep", tmp_path / "sweep")
    (tmp_path / "sweep").mkdir()
    message = refused("-m", "layer=1,2")
    assert "MemoryError: no room; full error in " in message
    assert "sweep/launcher_error.txt); what was finished is kept" in message
    error_file = (tmp_path / "sweep/launcher_error.txt").read_text("utf-8")
    assert "Traceback …\nMemoryError: no room" in error_file
    assert "in sweep\n" in error_file
