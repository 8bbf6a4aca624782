"""Values that a run reports are those of the parts it is made of."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file

import saexp
from saexp.analysis.latent_scores import (
    cofiring,
    firing,
)
from saexp.errors import ModelError
from saexp.models.resolution import ASSETS
from tests.random_models import (
    saved_lm,
)
from tests.shipped_texts import FEW_NEUTRAL
from tests.unit.saes.make import write_saelens


def test_a_run_steers_with_the_probe_it_reports(tmp_path: Path) -> None:
    words = ["analyzer=probe", "layer=2", "dataset.n_examples=60", "tracker=none", FEW_NEUTRAL]
    words += ["intervention.directions=[probe]", "intervention.n_prompts=4", "coefficient=[0,1]"]
    words += ["intervention.n_controls=1", "intervention.max_new_tokens=2"]
    words += ["intervention.outcomes=[refusal]", "analyzer.k=[1]", "analyzer.n_bootstrap=0"]
    words += ["intervention.n_neutral=2", "intervention.n_choice_prompts=2"]
    result = saexp.run(saexp.compose([*words, f"cache_dir={tmp_path / 'cache'}"]), tmp_path / "run")
    probes = result.tables["probes"]
    c = probes.loc[(probes["probe"] == "dense") & (probes["data"] == "test"), "c"].item()
    matches = [m for n in result.notes if (m := re.match(r"probe direction: .* C = (\S+) by", n))]
    assert [float(m[1]) for m in matches] == [c]


FIXED = {"normalize_activations": "expected_average_only_in"}


SHIPPED = ASSETS / "tiny/sae/layer_2/width_256"


def test_a_run_estimates_it_and_says_so(tmp_path: Path) -> None:
    """The shipped SAE in units of sqrt(d_in), as if its scaling had been left out of its files."""
    weights = {n: w.float() for n, w in load_file(SHIPPED / "sae_weights.safetensors").items()}
    cfg = json.loads((SHIPPED / "cfg.json").read_text("utf-8"))
    words = ["tracker=none", "intervention=none", "analyzer.n_bootstrap=0", "layer=2"]
    words += [FEW_NEUTRAL, "dataset.n_examples=40", f"cache_dir={tmp_path}/cache"]
    shipped = saexp.run(saexp.compose(words), tmp_path / "shipped")
    wanted = shipped.metrics["reconstruction/explained_variance"]
    # With another factor than the true one it would be an SAE of another stream.
    factor = 128**0.5 / norm_of_neutral_text(tmp_path)
    for name in ("b_enc", "b_dec", "threshold"):
        weights[name] = weights[name] * factor
    sae_folder = write_saelens(tmp_path / "sae", {**cfg, **FIXED}, weights)
    more = ["sae=local", f"sae.path={sae_folder}", "sae.norm_factor=estimate"]
    result = saexp.run(saexp.compose([*words, *more]), tmp_path / "run")
    assert result.metrics["reconstruction/explained_variance"] == pytest.approx(wanted, abs=1e-3)
    (note,) = [n for n in result.notes if "norm_factor" in n]
    assert note.startswith(f"sae.norm_factor={factor:.6g} was estimated from ")
    about = json.loads((tmp_path / "run/provenance.json").read_text("utf-8"))
    assert about["sae"]["norm_factor"] == pytest.approx(factor)
    assert about["sae"]["norm_factor_by"] == "estimate"


def norm_of_neutral_text(folder: Path) -> float:
    stores = [saexp.open_store(p.parent) for p in folder.glob("cache/activations/*/manifest.json")]
    (neutral,) = [s for s in stores if s.manifest["about"]["dataset"] == "background"]
    return float(neutral.acts(2).double().norm(dim=-1).mean())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    words = [
        "tracker=none",
        "intervention=none",
        "analyzer.n_bootstrap=0",
        "positions=entity_all",
        FEW_NEUTRAL,
    ]
    cfg = saexp.compose([*words, "dataset.n_examples=40", f"cache_dir={folder}/cache"])
    saexp.run(cfg, folder / "run")
    return folder / "run"


def test_firing_is_read_from_a_runs_files_on_held_out_rows(run: Path) -> None:
    activations = pd.read_parquet(run / "activations.parquet")
    rows = pd.read_parquet(run / "rows.parquet")
    firings = firing(activations, rows)
    test = rows[rows["split"] == "test"]
    assert len(firings.keys) == len(test) > 0
    for i, latent in enumerate(firings.latents):
        latent_rows = activations[activations["latent"] == latent].reset_index(drop=True)
        assert (
            firings.fires[:, i] == (latent_rows.loc[test.index, "value"] > 1e-6).to_numpy()
        ).all()
    assert cofiring(firings, firings).phi.diagonal() == pytest.approx(1)


def test_a_run_says_so_before_its_contrast(tmp_path: Path) -> None:
    """GPT-2: positions in a table; by analyzer=contrast and by latents that are named."""
    folder, data = tmp_path / "model", tmp_path / "data.jsonl"
    saved_lm("gpt2", folder)
    texts = [f"The player {'Fenlet ' * n}" for n in range(1, 9)]
    rows = [{"text": t, "group": "ab"[i % 2], "id": str(i)} for i, t in enumerate(texts)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["model=hf", f"model.name={folder}", "sae=random", "layer=1", "positions=last"]
    words += ["dataset=jsonl", f"dataset.path={data}", "intervention.where=last", "tracker=none"]
    words += [f"cache_dir={tmp_path}", "intervention.max_new_tokens=60", "dataset.max_length=64"]
    for more in (["analyzer=contrast"], ["analyzer=stats", "intervention.latents=[3]"]):
        run_folder = tmp_path / more[0]
        with pytest.raises(ModelError, match="new ones do not fit into the 64 positions") as error:
            saexp.run(saexp.compose([*words, *more]), run_folder)
        assert "type intervention.max_new_tokens=" in str(error.value)
        assert not (run_folder / "latents.parquet").exists()
