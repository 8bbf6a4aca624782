"""A sweep of control SAEs: nothing continues from layer to layer, and all says what they are."""

import json
from pathlib import Path

import pytest

from saexp.reports.saved_run import SavedRun
from saexp.reports.sweep import read_matches
from tests.shipped_texts import FEW_NEUTRAL
from tests.unit.reports.run_outputs import CommandResult, command, page_of, table_of

WORDS = ["sae=random", "width=512", "tracker=jsonl", "intervention=none", "hydra.sweep.dir=sweep"]
WORDS += [
    "dataset.n_examples=60",
    "analyzer.n_bootstrap=20",
    "analyzer.n_background=200",
    FEW_NEUTRAL,
    "analyzer.scores=false",
]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> CommandResult:
    result = command(tmp_path_factory.mktemp("controls"), "-m", "layer=0,1", *WORDS)
    assert result.code == 0, result.err[-2000:]
    return result


def cells(swept: CommandResult) -> list[Path]:
    return [swept.sweep / folder for folder in table_of(swept.sweep)["folder"]]


def test_no_latent_of_a_control_goes_on_in_the_next_layer(swept: CommandResult) -> None:
    matches, _ = read_matches(swept.sweep)
    assert len(matches) > 0
    assert (matches["cosine"] < matches["cosine_by_chance"]).all()


def test_finding_title_and_run_name_say_that_it_is_a_control(swept: CommandResult) -> None:
    for layer, folder in enumerate(cells(swept)):
        assert SavedRun(folder).provenance["sae"]["control"] == "random"
        page = (folder / "report.html").read_text("utf-8")
        assert f"layer_{layer}.resid_post, random control SAE of 512 latents</title>" in page
        assert f"tiny, layer_{layer}.resid_post, random control SAE of 512 latents: " in page
        start = json.loads((folder / "tracker.jsonl").read_text("utf-8").splitlines()[0])
        assert start["name"] == f"tiny · random control · layer {layer}"
    assert set(table_of(swept.sweep)["control"]) == {"random"}
    page = page_of(swept.sweep)
    assert (
        "this sweep has no trained SAE; for comparison, the best latent of the control SAEs "
        "(random) is"
    ) in page
    assert "which is not a finding" in page
