"""A node of a Ray cluster is killed during a sweep, and the command is run again."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.reports.run_outputs import assert_links_lead_to_reports, table_of

ROOT = Path(__file__).parents[3]
PACKAGES = ("ray", "hydra_plugins.hydra_ray_launcher")
# Cells of some seconds, which begin on both nodes before one has run them all.
SMALL = ["tracker=none", "dataset.n_examples=40", "analyzer.n_bootstrap=0", "intervention=ablate"]
SMALL += [
    "intervention.n_prompts=40",
    "intervention.n_controls=3",
    "intervention.n_choice_prompts=4",
]


def is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not all(map(is_installed, PACKAGES)), reason="needs the extra ray")
def test_a_sweep_that_lost_a_node_is_completed_by_its_command(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.e2e.faults.ray_cluster", str(tmp_path)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    # A process of the cluster starts in another folder than the command.
    env = {**os.environ, "PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.run(
        [*words, "layer=0,1,2,3,4", "width=256", *SMALL],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    first, second = json.loads((tmp_path / "runs.json").read_text("utf-8"))
    assert first["code"] == 1
    lines = [line for line in first["out"].splitlines() if line.startswith("saexp: ")]
    assert "a process of the sweep ended without a result" in lines[-1]
    assert "the same command computes the rest" in lines[-1]
    assert 1 <= len(first["finished"]) < 5
    assert second["code"] == 0, second["out"][-3000:]
    assert len(second["finished"]) == 5
    # No cell is computed twice, and no text is forwarded twice.
    assert first["finished"].items() <= second["finished"].items()
    table = table_of(tmp_path / "sweep")
    assert table["status"].tolist() == ["finished"] * 5
    assert (table["collection/tokens_forwarded"] > 0).sum() <= 1
    assert_links_lead_to_reports(tmp_path / "sweep", 5)
