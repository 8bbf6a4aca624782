"""The plugin of the documentation: a module and a command."""

import json
import sys
from pathlib import Path

import pandas as pd
import pytest

from saexp.cli import main
from tests.readme_commands import ROOT, blocks
from tests.shipped_texts import FEW_NEUTRAL

(PACKAGE,) = (
    content
    for kind, content in blocks((ROOT / "docs/guides/plugins.md").read_text("utf-8"))
    if kind == "python" and "@saexp.register" in content
)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_saexp.py").write_text(PACKAGE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def typed(monkeypatch: pytest.MonkeyPatch, project_folder: Path, name: str, *words: str) -> Path:
    folder = project_folder / name
    always = ["plugins=[my_saexp]", "tracker=none", "cache_dir=cache", FEW_NEUTRAL]
    always += ["analyzer.n_bootstrap=0"]
    monkeypatch.setattr(sys, "argv", ["saexp", *always, f"hydra.run.dir={folder}", *words])
    main()
    return folder


def test_a_custom_package_adds_components(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = typed(monkeypatch, project, "1", "analyzer=loudest", "analyzer.n=3", "dataset=colours")
    metrics = json.loads((folder / "metrics.json").read_text())
    table = pd.read_parquet(folder / "loudest.parquet")
    assert len(table) == 3
    assert metrics["loudest/latent"] == table["latent"].iloc[0]
    assert "loudest" in (folder / "report.html").read_text("utf-8")
    best = int(table["latent"].iloc[0])
    words = ["analyzer=loudest", "dataset=colours", "intervention=backwards"]
    words += [
        "intervention.outcomes=[shouting]",
        f"intervention.latents=[{best}]",
        "coefficient=[0,1]",
        "intervention.n_controls=1",
    ]
    folder = typed(monkeypatch, project, "2", *words)
    effects = pd.read_parquet(folder / "effects.parquet")
    assert {"shouting", "generated_text"} <= set(effects.columns)
    assert set(effects["coefficient"]) == {0.0, 1.0}
    assert "report: 2/report.html" in capsys.readouterr().out


def test_a_custom_model_and_sae_need_no_code(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from tests.random_models import D_MODEL, random_hf, save
    from tests.unit.saes.make import write_saelens

    save(random_hf("qwen2"), project / "model")
    tensors = {"W_enc": torch.randn(D_MODEL, 40), "W_dec": torch.randn(40, D_MODEL)}
    tensors |= {"b_enc": torch.zeros(40), "b_dec": torch.zeros(D_MODEL)}
    about = {"architecture": "standard", "d_in": D_MODEL, "d_sae": 40, "dtype": "float32"}
    about["metadata"] = {"hook_name": "blocks.1.hook_resid_post"}
    write_saelens(project / "sae", about, tensors)
    words = ["model=hf", "model.name=model", "sae=local", "sae.path=sae", "layer=1"]
    words += ["dataset=colours", "analyzer=loudest", "sae.check=off"]
    words += ["dataset.max_length=60"]
    assert (typed(monkeypatch, project, "3", *words) / "report.html").is_file()
