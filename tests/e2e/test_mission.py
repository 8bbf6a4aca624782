"""`model=gemma2b sae=gemmascope layer=12`, offline, against a cache in the hub's own layout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd

from tests.hub_caches import GEMMA_SCOPE, add_gemma_scope, repository, save_gemma_2

SAE_ID = "layer_12/width_16k/canonical"


def test_the_missions_own_command(tmp_path: Path) -> None:
    home = tmp_path / "hf"
    with repository(home, "google/gemma-2-2b") as files:
        save_gemma_2(files)
    add_gemma_scope(home, (12, 16))
    command = [sys.executable, "-m", "saexp", "model=gemma2b", "sae=gemmascope", "layer=12"]
    # The command as it stands; what follows only makes it read and generate less.
    command += ["dataset.n_examples=12", "analyzer.n_background=100", "analyzer.n_bootstrap=50"]
    command += ["intervention.max_new_tokens=2", "intervention.n_prompts=2"]
    command += ["intervention.n_choice_prompts=2", "intervention.n_neutral=1"]
    command += ["intervention.n_controls=2", "intervention.top_k=1"]
    env = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    env.pop("HF_HUB_CACHE", None)
    process = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr[-2000:]
    folder = next((tmp_path / "outputs").glob("2*/*"))
    assert (folder / "report.html").is_file()
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    assert 20 < metrics["sparsity/l0"] < 300
    rows = pd.read_parquet(folder / "rows.parquet")
    assert len(rows) >= 24
    provenance = (folder / "provenance.json").read_text("utf-8")
    assert "layer_12.resid_post" in provenance
    assert f"{GEMMA_SCOPE}/{SAE_ID}" in provenance
