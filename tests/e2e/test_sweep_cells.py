"""Sweeps whose cells need more than their layer says, fail early, or differ in other keys."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from hydra import initialize_config_dir

from saexp.config import register_schema
from saexp.config.run import conf_folder
from saexp.context import ObjectCache
from saexp.models.resolution import ASSETS
from saexp.reports.sweep import findings
from saexp.sweeps.passes import passes
from tests.shipped_texts import FEW_NEUTRAL
from tests.unit.reports.run_outputs import command, table_of

SMALL = ["tracker=none", "intervention=none", "analyzer.n_bootstrap=0"]
SMALL += [
    "analyzer.n_background=200",
    FEW_NEUTRAL,
    "analyzer.scores=false",
    "dataset.n_examples=20",
    "hydra.sweep.dir=sweep",
]
SAES = [str(ASSETS / f"tiny/sae/layer_{n}/width_256") for n in (1, 3)]


def planned(*cells: Sequence[str]) -> list[list[Any]]:
    register_schema()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        (plan,) = passes([list(cell) for cell in cells], ObjectCache()).values()
    return plan


def test_custom_saes_are_planned_at_the_hookpoints_in_their_files() -> None:
    cells = [["sae=local", f"sae.path='{path}'", "layer=null"] for path in SAES]
    assert planned(*cells) == [[1, "resid_post"], [3, "resid_post"]]
    # A cell with a list of layers is planned by those; its SAE is read by the cell.
    listed = ["sae=local", f"sae.path='{SAES[0]}'", "layer=[0,4]"]
    assert [0, None] in planned(*cells, listed)
    # Beyond reach from here, the layer that the cell names is what is known.
    far = ["sae=local", "sae.path=nowhere", "layer=2"]
    assert sorted(planned(*cells, far), key=str) == [
        [1, "resid_post"],
        [2, None],
        [3, "resid_post"],
    ]


def test_a_sweep_over_custom_saes_is_one_pass(tmp_path: Path) -> None:
    paths = ",".join(f"'{path}'" for path in SAES)
    result = command(tmp_path, "-m", "sae=local", f"sae.path={paths}", "layer=null", *SMALL)
    assert result.code == 0, result.err[-2000:]
    forwarded = table_of(result.sweep)["collection/tokens_forwarded"].tolist()
    assert forwarded[0] > 0
    assert forwarded[1:] == [0]


def test_layers_whose_latents_an_intervention_changes_are_planned() -> None:
    words = ["layer=2", "intervention.latents=selected_per_layer"]
    cells = [[*words, f"intervention.layers=[{a},{b}]"] for a, b in ((1, 2), (2, 3))]
    assert [h for h in planned(*cells) if h[1] is None] == [[n, None] for n in (1, 2, 3)]
    every = [*words, "intervention.layers=all"]
    assert [h[0] for h in planned(every)] == list(range(5))
    clamp_words = ["layer=2", "intervention=clamp", "intervention.values=[1,1]"]
    assert [h[0] for h in planned([*clamp_words, "intervention.latents={0:[3],4:[5]}"])] == [
        0,
        2,
        4,
    ]


def test_one_cells_impossible_stream_fails_no_other(tmp_path: Path) -> None:
    streams = "task.streams=[resid_post],[foo],[resid_mid]"
    result = command(tmp_path, "-m", "task=collect", "layer=1", streams, *SMALL)
    table = table_of(result.sweep)
    assert table["status"].tolist() == ["finished", "failed", "finished"]
    assert "no stream 'foo'" in table["error"][1]
    assert table["collection/tokens_forwarded"].dropna().tolist()[1:] == [0]


def test_no_stream_at_all_is_one_line(tmp_path: Path) -> None:
    result = command(tmp_path, "task=collect", "layer=1", "task.streams=[]")
    assert result.code == 1
    assert result.err.splitlines()[-1] == (
        "saexp: task.streams=[] contains no stream; type task.streams=[resid_post]"
    )


def test_the_best_cell_is_described_by_all_that_was_swept() -> None:
    about = {"status": "finished", "layer": 2, "width": 256, "contrast/best_latent_known": 3}
    rows = [
        {
            **about,
            "model": model,
            "contrast/best_auroc_known": auroc,
            "contrast/best_auroc_known_test": auroc,
        }
        for model, auroc in (("tiny", 0.9), ("tiny_control", 0.7))
    ]
    (finding,) = findings(pd.DataFrame(rows))
    assert finding == (
        "known: the best latent is 3 with held-out AUROC 0.900 at layer 2, width 256, model tiny "
        "(chosen on the train split)."
    )
    (finding,) = findings(pd.DataFrame(rows[:1]))
    assert finding.endswith(" at layer 2, width 256 (chosen on the train split).")


def test_a_control_sae_never_is_the_best_cell() -> None:
    """Though it has the higher AUROC, which is at chance: it stands beside the trained one."""
    about = {"status": "finished", "layer": 2, "width": 256, "contrast/best_latent_known": 3}
    key = "contrast/best_auroc_known"
    cells = [("tiny", None, 0.55, 0.60), ("random", "random", 0.7, 0.58)]
    rows = [
        {**about, "sae": sae, "control": control, key: train, f"{key}_test": test}
        | {f"{key}_ci_low_test": 0.51, f"{key}_ci_high_test": 0.65}
        | {"contrast/best_p_value_known_test": 0.04 if control is None else 0.06}
        for sae, control, train, test in cells
    ]
    (finding,) = findings(pd.DataFrame(rows))
    assert finding == (
        "known: the best latent is 3 with held-out AUROC 0.600 [0.510, 0.650] at layer 2, width "
        "256, sae tiny (chosen on the train split); for comparison, the best latent of the control "
        "SAEs (random) is 3 with held-out AUROC 0.580 [0.510, 0.650] (not above chance on held-out "
        "entities) at layer 2, width 256, sae random, which is not a finding."
    )
    (alone,) = findings(pd.DataFrame(rows[1:]))
    assert alone.startswith(
        "known: this sweep has no trained SAE; for comparison, the best latent of"
    )
    (unset,) = findings(pd.DataFrame([{**rows[0], "layer": [1, 2], "width": None}]))
    assert " at layer [1, 2] (chosen on the train split)" in unset
