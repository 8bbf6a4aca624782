"""Every study's run.sh, command by command in this process, under a small overlay.

Commands whose stages another test runs in the same way are composed only: `ELSEWHERE`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import saexp
from saexp.cli import main
from tests.shipped_texts import FEW_NEUTRAL

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    p.parent.name if p.stem == "run" else p.stem: p
    for p in sorted((ROOT / "experiments").glob("*/*.sh"))
    if p.parent.name not in ("benchmarks", "tiny_lm", "validation")
}
"""A study's run.sh under the study's name, any other of its scripts under its own.

The simulations of `validation` run in tests/e2e/test_inference_table.py.
"""
SMALL = (
    "analyzer.n_bootstrap=10 intervention.n_prompts=2 intervention.n_choice_prompts=1 "
    "intervention.n_controls=1 intervention.max_new_tokens=4 intervention.top_k=1 "
    f"intervention.n_neutral=1 dataset.n_examples=24 analyzer.n_background=200 {FEW_NEUTRAL}"
)
LAYERS = "2"
"""Of the studies' sweeps, instead of all five."""
OVERLAY = {
    "entity_recognition": SMALL,
    "memorization": SMALL,
    "prompt_features": "intervention.n_controls=1 intervention.max_new_tokens=6 "
    f"analyzer.n_background=200 {FEW_NEUTRAL}",
    "sae_quality": "task.n_texts=12",
    "train_from_scratch": "width=64 sae_trainer.n_samples=2048",
    "uncertainty": "analyzer.n_bootstrap=10 analyzer.n_background=200 dataset.n_examples=12 "
    f"{FEW_NEUTRAL}",
}
"""Words added to every command; `sae_quality` has its own per command."""
_MODES = (
    "tests/e2e/test_interventions.py::"
    "test_every_mode_has_effects_controls_a_report_its_identity_and_leaves_the_weights"
)
_LLAMA = "tests/e2e/real_models/test_llama.py::test_memorization_of_a_published_table"
ELSEWHERE = {
    "entity_recognition/ablate": _MODES,
    "entity_recognition/clamp": _MODES,
    "entity_recognition/orthogonalize": _MODES,
    "memorization/stats": _LLAMA,
    "memorization/contrast": _LLAMA,
    "prompt_features/steer": "tests/e2e/test_experiments.py::test_the_notebook_runs_cell_by_cell",
    "sae_quality/capability": "tests/e2e/real_models/test_gpt2.py::test_a_capability",
    "sae_quality/dashboard": "tests/e2e/test_dashboard.py",
}
"""Study and folder of a run -> test of the same stages."""


def commands(study: str, out: Path, cache: Path) -> list[list[str]]:
    """What run.sh would run, recorded by a stand-in for Python."""
    recorded = out / "commands"
    stand_in = out / "python"
    stand_in.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {recorded}\necho == >> {recorded}\n')
    stand_in.chmod(0o755)
    extra = f"{OVERLAY[study]} cache_dir={cache}"
    env = {**os.environ, "PYTHON": str(stand_in), "OUT": str(out / "runs"), "EXTRA": extra}
    env["LAYERS"] = LAYERS
    subprocess.run(["bash", str(SCRIPTS[study])], env=env, check=True)
    return [c.strip().splitlines() for c in recorded.read_text().split("==\n") if c.strip()]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def typed(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert words[:2] == ["-m", "saexp"]
    monkeypatch.setattr(sys, "argv", ["saexp", *words[2:]])
    main()


@pytest.mark.parametrize("study", SCRIPTS)
def test_every_command_of_a_study_runs(
    study: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands_of_study = commands(study, tmp_path, cache)
    assert commands_of_study
    monkeypatch.chdir(tmp_path)
    n_composed = 0
    for words in commands_of_study:
        if any("task.n_texts" in w for w in words) and "experiment=sae_quality" not in words:
            words = [w for w in words if "task.n_texts" not in w]
        if f"{study}/{words[-1].rpartition('/')[2]}" in ELSEWHERE:
            saexp.compose([w for w in words[2:] if not w.startswith("hydra.")])
            n_composed += 1
        else:
            typed(words, monkeypatch)
    assert n_composed == sum(name.startswith(f"{study}/") for name in ELSEWHERE)
    pages = [*(tmp_path / "runs").rglob("*.html")]
    assert len(pages) >= len(commands_of_study) - n_composed
    assert not list((tmp_path / "runs").rglob("error.txt"))


def test_the_notebook_runs_cell_by_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compose, small = saexp.compose, OVERLAY["prompt_features"].split()
    monkeypatch.setattr(saexp, "compose", lambda words: compose([*words, *small]))
    file = ROOT / "experiments/prompt_features/prompt_features.ipynb"
    cells = json.loads(file.read_text("utf-8"))["cells"]
    assert len(cells) == 10
    shown: list[object] = []
    space: dict[str, object] = {"display": shown.append}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), file.name, "exec"), space)
    (effects,) = shown
    assert set(effects["coefficient"]) == {0.0, 0.5, 1.0}  # type: ignore[index]
