"""Every intervention on the shipped model, as a run: its files, identities, and bad input."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import saexp
from saexp.context import ObjectCache
from saexp.errors import SaexpError
from saexp.interventions.cached_generation import SpeculativeDecoding
from saexp.interventions.stream_edits import Row
from saexp.pipeline.objects import language_model
from saexp.results import Result
from tests.shipped_texts import FEW_NEUTRAL

SMALL = ["tracker=none", "analyzer.n_bootstrap=0", "intervention.n_prompts=12"]
SMALL += ["intervention.n_choice_prompts=6", "intervention.n_controls=2", "sae.check=off"]
SMALL += [
    "intervention.n_curve_controls=1",
    "intervention.n_neutral=3",
    "analyzer.n_background=500",
    FEW_NEUTRAL,
    "analyzer.scores=false",
]
FEW = ["intervention.n_prompts=4", "intervention.n_choice_prompts=2"]
FEW += ["intervention.max_new_tokens=6", "dataset.n_examples=80"]
"""Enough for what does not depend on the finding."""
OBJECTS = ObjectCache()
"""Shared by the runs of this file, as by the cells of a sweep (see test_shared.py)."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def ran(cache: Path, folder: Path, *words: str) -> Result:
    cfg = saexp.compose([*SMALL, f"cache_dir={cache}", *words])
    return saexp.run(cfg, folder, objects=OBJECTS)


def test_of(result: Result) -> pd.DataFrame:
    table = result.tables["effects_summary"]
    return table[table["split"] == "test"]


test_of.__test__ = False  # type: ignore[attr-defined]

MODES: dict[str, list[str]] = {
    "clamp": ["intervention.rule=at_least", "intervention.top_k=1", "intervention.n_controls=1"],
    "scale": ["intervention.top_k=1", "intervention.n_controls=1"],
    "ablate": ["intervention.top_k=1"],
    "project_out": [
        "intervention.layers=all",
        "intervention.directions=[latents,mean_difference]",
        "intervention.top_k=1",
        "intervention.n_controls=1",
    ],
    "splice": [],
    "patch": ["intervention.layers=[0,1]", "intervention.n_controls=1"],
    "orthogonalize": [
        "intervention.embedding=true",
        "intervention.n_controls=1",
        "intervention.top_k=1",
    ],
}
"""Words of each; steering has a test of its own, with every outcome."""


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_effects_controls_a_report_its_identity_and_leaves_the_weights(
    cache: Path, tmp_path: Path, mode: str
) -> None:
    outcomes = "intervention.outcomes=[refusal,answer_probability]"
    identified(cache, tmp_path, *FEW, f"intervention={mode}", outcomes, *MODES[mode])


def identified(cache: Path, folder: Path, *words: str) -> Result:
    """A run with coefficient 0, which changes nothing, and with effects and their controls."""
    cfg = saexp.compose([*SMALL, f"cache_dir={cache}", *words])
    model = language_model(cfg, OBJECTS)
    before = {k: v.clone() for k, v in model.hf.state_dict().items()}
    result = saexp.run(cfg, folder, objects=OBJECTS)
    after = model.hf.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    effects = result.tables["effects"]
    base = effects[effects["role"] == "baseline"].set_index("example_id")
    zero = effects[(effects["role"] != "baseline") & (effects["coefficient"] == 0)]
    assert len(zero)
    assert (zero["generated_text"] == base.loc[zero["example_id"], "generated_text"].values).all()
    same = base.loc[zero["example_id"], "answer_probability"].to_numpy()
    assert (zero["answer_probability"].to_numpy() == same).all()
    summary = test_of(result)
    assert {"baseline", "control"} < set(summary["role"])
    main = summary[~summary["role"].isin(["baseline", "control"])]
    assert main["answer_probability_change"].abs().max() > 0.01
    assert (main.loc[main["coefficient"] == 0, "answer_probability_change"] == 0).all()
    page = (folder / "report.html").read_text("utf-8")
    assert "All conditions: refusal" in page
    for name in result.figures:
        assert f'id="fig-{name}"' in page
    return result


@pytest.mark.parametrize(("limit", "exact"), [(10, None), (30, 1.0)])
def test_continuations_longer_than_the_limit_are_left_out_with_a_note(
    cache: Path, tmp_path: Path, limit: int, exact: float | None
) -> None:
    """Memorised passages have 21 tokens; ten of them neither match nor fail to."""
    words = ["experiment=memorization", "layer=3", "intervention=steer", "coefficient=[0.1]"]
    words += [f"intervention.max_new_tokens={limit}", "intervention.n_controls=1"]
    words += ["intervention.n_choice_prompts=0", "intervention.top_k=1", "intervention.n_neutral=1"]
    words += ["intervention.control_kinds=[random_norm]"]
    result = ran(cache, tmp_path, *words, "intervention.n_prompts=6")
    effects = result.tables["effects"]
    cut = [note for note in result.notes if "max_new_tokens cuts off" in note]
    assert result.metrics["effect/exact_match/baseline_memorized"] == exact
    assert result.metrics["effect/matching_tokens/baseline_memorized"] == min(limit, 21)
    page = (tmp_path / "report.html").read_text("utf-8")
    if exact is None:
        gone = effects[effects["exact_match"].isna()]
        assert set(gone["group"]) >= {"memorized"}
        n = gone["example_id"].nunique()
        # A prompt is left out of every condition, so that all are of the same prompts.
        assert len(gone) == effects["example_id"].isin(gone["example_id"]).sum()
        assert cut == [
            f"exact_match: {n} prompts have no answer, or one that intervention.max_new_tokens "
            "cuts off; left out"
        ]
        assert "exact match could not be measured on any prompt" in page
    else:
        assert cut == []
        assert effects["exact_match"].notna().all()


def test_the_whole_reconstruction_with_its_error_changes_no_answer(
    cache: Path, tmp_path: Path
) -> None:
    words = [*FEW, "intervention=splice", "intervention.error=true", "intervention.n_controls=0"]
    result = ran(cache, tmp_path, *words, "intervention.outcomes=[answer_logit]")
    summary = test_of(result)
    main = summary[summary["role"] == "place"]
    assert main["answer_logit_change"].abs().max() < 1e-4


def test_every_outcome_is_there_with_its_interval_and_its_tests(
    cache: Path, tmp_path: Path
) -> None:
    names = ["refusal", "accuracy", "yes_no", "answer_probability", "answer_rank", "answer_logit"]
    names += ["neutral_kl", "perplexity", "repetition", "length", "attention"]
    asked = f"intervention.outcomes=[{','.join(names)}]"
    few = ["intervention.top_k=1", "intervention.n_controls=1"]
    few += ["intervention.directions=[latents,mean_difference,probe,random]"]
    few += ["intervention.control_kinds=[frequency,random_norm]"]
    result = identified(cache, tmp_path, asked, "coefficient=[0,0.6]", *few)
    conditions = set(result.tables["effects"]["condition"])
    assert {"unknown_mean_difference", "unknown_probe"} < conditions
    (condition,) = (c for c in conditions if c.removeprefix("unknown_").isdigit())
    summary = test_of(result)
    scored = [n for n in names if n not in ("neutral_kl", "attention", "yes_no")]
    steered = summary[(summary["condition"] == condition) & (summary["coefficient"] == 0.6)]
    for name in scored:
        row = steered.iloc[0]
        if name != "repetition":
            assert row[f"{name}_ci_low"] <= row[name] <= row[f"{name}_ci_high"], name
        assert 0 < row[f"{name}_p"] <= 1
    # No text repeats itself: a mean of equal values has no interval.
    assert steered["repetition"].eq(0).all() and steered["repetition_ci_low"].isna().all()
    row = steered.iloc[0]
    assert row["refusal_change"] > 0.5
    assert row["accuracy_change"] < -0.5
    assert row["answer_probability_change"] < -0.5
    costs = result.tables["costs"]
    assert (costs.loc[costs["coefficient"] == 0, "neutral_kl"] == 0).all()
    assert (costs.loc[costs["coefficient"] != 0, "neutral_kl"] > 0).all()
    heads = result.tables["attention"]
    # The stream of block 2 is changed, so attention of blocks 0 to 2 is as it was.
    early = heads[heads["layer"] <= 2]
    assert early["difference"].abs().max() < 1e-6
    assert heads.loc[heads["layer"] > 2, "difference"].abs().max() > 1e-3
    assert any(name.startswith("effect/attention/unknown") for name in result.metrics)


STOPPED = [*FEW, "coefficient=[0,0.4]", "intervention.batch_tokens=150"]
STOPPED += ["intervention.top_k=1"]


def counted(patch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of rows that are computed from now on, call by call."""
    real, n_rows = SpeculativeDecoding.run, []

    def counts(guessing: SpeculativeDecoding, rows: list[Row]) -> Iterator[Any]:
        n_rows.append(len(rows))
        yield from real(guessing, rows)

    patch.setattr(SpeculativeDecoding, "run", counts)
    return n_rows


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, int]:
    """A run in a cache of its own, and how many rows it computed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        n_rows = counted(patch)
        return ran(folder / "cache", folder / "run", *STOPPED), sum(n_rows)


def test_a_run_stopped_in_two_stages_goes_on_where_it_was(
    undisturbed: tuple[Result, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, computed = SpeculativeDecoding.run, []

    def stopped(stage: int, name: str) -> None:
        """A run that is interrupted after two more batches of the n-th stage that it computes."""
        stages: list[int] = []

        def dies(guessing: SpeculativeDecoding, rows: list[Row]) -> Iterator[Any]:
            stages.append(len(computed))
            for batch in real(guessing, rows):
                if len(stages) == stage and len(computed) - stages[-1] == 2:
                    raise KeyboardInterrupt
                computed.append(len(batch))
                yield batch

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(SpeculativeDecoding, "run", dies)
            ran(tmp_path / "cache", tmp_path / name, *STOPPED)
        assert len(stages) == stage
        assert len(computed) == stages[-1] + 2

    # The first stage is that of the baselines, which is a single batch; the second run has them.
    stopped(2, "in_the_second")
    stopped(2, "in_the_third")
    n_rows = counted(monkeypatch)
    again = ran(tmp_path / "cache", tmp_path / "again", *STOPPED)
    whole, n_whole = undisturbed
    for name in ("effects", "controls"):
        pd.testing.assert_frame_equal(again.tables[name], whole.tables[name])
    assert sum(n_rows) == n_whole - sum(computed)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["intervention.outcomes=[refusals]"], "no outcome is called 'refusals'; did you mean ref"),
        (["intervention.latents=[9999]"], "latent 9999"),
        (["coefficient=[]"], "coefficient=.. contains no coefficient"),
        (["intervention.where=entty"], "entty"),
        (["intervention.rule=sometimes"], "intervention.rule=sometimes is not known; choose from"),
        (["intervention.directions=[up]"], "intervention.directions=up is not known; choose from"),
        (
            ["intervention=patch", "intervention.where=generated"],
            "intervention=patch needs prompt positions",
        ),
        (["intervention=patch", "intervention.heads=all"], "streams=.attn_z."),
        (
            ["intervention=patch", "intervention.layers=[77]"],
            "layer=77 is out of range: tiny has layers 0-4",
        ),
        (["intervention=ablate", "intervention.layers=all"], "at the SAE's own layer"),
        (["intervention=orthogonalize", "coefficient=[0.5]"], r"type 'coefficient=\[0,1\]'"),
        (["intervention=clamp", "intervention.values=[1]"], "1 targets for 0 listed latents"),
        (["intervention.where=indices"], "positions.indices|indices"),
    ],
)
def test_bad_input_is_one_line(cache: Path, tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(SaexpError, match=message) as error:
        ran(cache, tmp_path, "dataset.n_examples=80", *words)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_prompts_without_the_places_asked_for_are_counted(cache: Path, tmp_path: Path) -> None:
    few = ["intervention.max_new_tokens=2", "intervention.n_controls=1", "intervention.top_k=1"]
    few += ["dataset.n_examples=80", "intervention.outcomes=[refusal]", "intervention.n_prompts=8"]
    # Two tokens are no refusal yet.
    few += ["intervention.alternatives=null"]
    words = [*few, "intervention.where=entity_last_n", "+intervention.where_options.n=2"]
    result = ran(cache, tmp_path / "n", *words, "coefficient=0.5")
    assert test_of(result)["refusal_n"].max() == 8
    words = [*few, "intervention.where=substring", "+intervention.where_options.substring=player"]
    result = ran(cache, tmp_path / "s", *words, "coefficient=0.5")
    assert any("prompts not steered" in note for note in result.notes)
