"""What is told of a run, word by word, from folders written by hand."""

from pathlib import Path

import pandas as pd
import pytest

from saexp.errors import StoreError
from saexp.reports.finding import headline, sentences
from saexp.reports.saved import SavedRun
from tests.reports.written import METRICS, contrast, latents, run, summary, write_json

SETTING = (
    "org/tiny, layer_2.resid_post, SAE of 256 latents: 3 of 90 active latents separate known from "
    "unknown (Benjamini-Hochberg q <= 0.05 over them, train split); numbers below are of 40 "
    "held-out entities (18 known, 22 unknown), p-values after Holm over the latents named."
)
KNOWN = (
    "known: latent 7 has AUROC 0.900 [0.870, 0.910] (p < 0.001), separation 0.45; smallest over 2 "
    "entity types: AUROC 0.850, separation 0.40."
)
UNKNOWN = "No latent for 'unknown' is selected."
STEERED = (
    "adding 2 latents for 'known' at the entity's last token, coefficient 0.6 x the stream's "
    "median norm: refusal on 20 unknown prompts 0.80 -> 0.30 [0.20, 0.30]"
)
BESIDE = "; 2 matched controls 0.70 to 0.75 (p < 0.001 against their mean)"


def change(folder: Path, **settings: object) -> SavedRun:
    """The run with other settings of its intervention."""
    about = SavedRun(folder).provenance
    about["config"]["intervention"] |= settings
    write_json(folder / "provenance.json", about)
    return SavedRun(folder)


def test_the_headline_is_the_setting_each_direction_and_each_effect(tmp_path: Path) -> None:
    told = headline(run(tmp_path)).splitlines()
    assert told == [SETTING, KNOWN, UNKNOWN, f"{STEERED}{BESIDE}."]


def test_without_a_causal_test_nothing_is_told_of_effects(tmp_path: Path) -> None:
    assert headline(run(tmp_path, causal=False)).splitlines() == [SETTING, KNOWN, UNKNOWN]


def test_without_intervals_types_and_entities_none_are_told(tmp_path: Path) -> None:
    run(tmp_path, causal=False)
    metrics = {k: None if "_ci_" in k else v for k, v in METRICS.items()}
    write_json(tmp_path / "metrics.json", metrics)
    table = latents()
    table.drop(columns=[c for c in table if "city" in c]).to_parquet(tmp_path / "latents.parquet")
    pd.DataFrame({"entity": [None, None]}).to_parquet(tmp_path / "rows.parquet")
    setting, known, _ = sentences(SavedRun(tmp_path))
    assert "of 40 held-out examples (18 known, 22 unknown)" in setting
    assert known == "known: latent 7 has AUROC 0.900 (p < 0.001), separation 0.45."


def test_the_strongest_latent_stands_beside_the_most_selective_one(tmp_path: Path) -> None:
    """As in a run on a real model: the selected latent is at chance, a dense one is not."""
    run(tmp_path, causal=False)
    best = contrast("known", 7, train=0.53, test=0.517, p_value=0.31)
    strongest = contrast("known", 1098, train=0.72, test=0.701, p_value=0.0042)
    beside = {k.replace("/best", "/strongest"): v for k, v in strongest.items()}
    beside |= {f"contrast/strongest_min_{n}_known_test": 0.1 for n in ("auroc", "separation")}
    about = {"contrast/strongest_background_freq_known": 0.0312}
    unknown = {"contrast/strongest_latent_unknown": None}
    write_json(tmp_path / "metrics.json", {**METRICS, **best, **beside, **about, **unknown})
    _, known, _ = sentences(SavedRun(tmp_path))
    assert known == (
        "known: latent 7, the most selective, has AUROC 0.517 [0.487, 0.527] (not above chance on "
        "held-out entities, p = 0.31), separation 0.26; smallest over 2 entity types: AUROC 0.850, "
        "separation 0.40. The strongest on the train split is latent 1098, active on 3.1% of "
        "background tokens: AUROC 0.701 [0.671, 0.711] (p = 0.0042), separation 0.35; smallest "
        "over 2 entity types: AUROC 0.100, separation 0.10."
    )
    nothing = contrast("known", None)
    write_json(tmp_path / "metrics.json", {**METRICS, **nothing, **beside, **about, **unknown})
    _, known, _ = sentences(SavedRun(tmp_path))
    assert known.startswith("No latent for 'known' is selected. The strongest on the train split")


def test_a_control_sae_is_called_one(tmp_path: Path) -> None:
    run(tmp_path, causal=False)
    about = SavedRun(tmp_path).provenance
    about["sae"]["control"] = "random"
    write_json(tmp_path / "provenance.json", about)
    assert sentences(SavedRun(tmp_path))[0] == SETTING.replace("SAE of", "random control SAE of")


def test_where_no_control_was_matched_that_is_told(tmp_path: Path) -> None:
    table = summary()
    run(tmp_path)
    table[table["role"] != "control"].to_parquet(tmp_path / "effects_summary.parquet")
    assert headline(tmp_path).splitlines()[-1] == f"{STEERED}; no control could be matched."


def test_what_it_costs_is_told_beside_the_controls_cost(tmp_path: Path) -> None:
    run(tmp_path)
    rows = [["known_group", "group", "", 0.6, 0.25], ["known_group", "group", "", 0.9, 0.5]]
    rows += [[f"control_{n}", "control", "known_group", 0.6, 0.1 + n / 10] for n in (0, 1)]
    columns = ["condition", "role", "of", "coefficient", "neutral_kl"]
    pd.DataFrame(rows, columns=columns).to_parquet(tmp_path / "costs.parquet")
    cost = "; KL per token of neutral text edited at every token 0.25 nats, controls 0.10 to 0.20"
    assert headline(tmp_path).splitlines()[-1] == f"{STEERED}{BESIDE}{cost}."


def test_an_effect_that_was_chosen_nowhere_is_said_to_be_none(tmp_path: Path) -> None:
    run(tmp_path)
    table = summary().assign(chosen=False)
    told = (
        "adding 2 latents for 'known' changes refusal of unknown prompts at no coefficient by more "
    )
    for train, how in ((True, " on train prompts (20 test prompts"), (False, " (20 prompts")):
        parts = [table, table.assign(split="train")] if train else [table]
        pd.concat(parts).to_parquet(tmp_path / "effects_summary.parquet")
        assert headline(tmp_path).splitlines()[-1] == (
            f"{told}than its controls{how}: 0.80 before, 0.20 to 0.30 after, controls 0.25 to "
            "0.75)."
        )


def test_coefficient_0_alone_is_told_as_the_check_it_is(tmp_path: Path) -> None:
    run(tmp_path)
    table = summary()
    table[table["coefficient"] == 0].to_parquet(tmp_path / "effects_summary.parquet")
    assert headline(tmp_path).splitlines()[-1] == (
        "adding 2 latents for 'known' was run at coefficient 0 alone, which changes nothing: "
        "refusal of unknown prompts stays 0.80."
    )


def test_a_unit_without_words_leaves_no_gap(tmp_path: Path) -> None:
    run(tmp_path)
    told = sentences(change(tmp_path, name="mine"))[-1]
    assert told.startswith(
        "mine on 2 latents for 'known' at the entity's last token, coefficient 0.6: refusal on"
    )


def test_a_single_latent_and_a_clamp_are_told_in_their_own_words(tmp_path: Path) -> None:
    table = summary()
    run(tmp_path)
    table[table["role"].isin(["single", "baseline"])].to_parquet(
        tmp_path / "effects_summary.parquet"
    )
    assert sentences(change(tmp_path, name="clamp", unit="raw"))[-1].startswith(
        "moving latent 7 towards 'known' at the entity's last token, coefficient 0.6 of the way: "
        "refusal on 20 unknown prompts 0.80 -> 0.50"
    )
    assert (
        "coefficient 0.6 x the direction as it is:"
        in sentences(change(tmp_path, name="steer", unit="raw"))[-1]
    )


def test_a_run_that_compared_no_groups_says_so(tmp_path: Path) -> None:
    (run(tmp_path, causal=False) / "latents.parquet").unlink()
    assert headline(tmp_path) == "This run compared no groups."


@pytest.mark.parametrize("content", [None, "{"])
def test_a_folder_without_a_readable_run_is_one_line(tmp_path: Path, content: str | None) -> None:
    if content:
        (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(StoreError, match=r"holds no finished run \(metrics\.json: ") as error:
        _ = SavedRun(tmp_path).metrics
    assert "\n" not in str(error.value)


def test_selected_latents_are_by_rank_and_of_one_direction(tmp_path: Path) -> None:
    saved = SavedRun(run(tmp_path))
    assert saved.selected("known")["latent"].tolist() == [7, 4]
    assert saved.selected("unknown").empty
    assert saved.main_conditions() == ["known_group"]
    assert saved.groups == ("known", "unknown")


def test_entity_types_are_those_with_a_separation_of_their_own(tmp_path: Path) -> None:
    assert SavedRun(run(tmp_path)).entity_types == ["player", "city"]


def test_an_entity_type_may_end_like_the_splits_name(tmp_path: Path) -> None:
    run(tmp_path)
    table = latents()
    table.columns = [c.replace("city", "contest") for c in table.columns]
    table.to_parquet(tmp_path / "latents.parquet")
    assert SavedRun(tmp_path).entity_types == ["player", "contest"]


def test_the_coefficient_told_is_the_one_chosen_on_train_prompts(tmp_path: Path) -> None:
    saved = SavedRun(run(tmp_path))
    # On the test split 0.9 changes more.
    assert saved.told_coefficient("known_group", "refusal") == 0.6
    assert saved.told_coefficient("nothing", "refusal") is None


def test_numbers_told_are_of_the_test_split(tmp_path: Path) -> None:
    run(tmp_path)
    train = summary().assign(split="train", refusal=0.0)
    pd.concat([train, summary()]).to_parquet(tmp_path / "effects_summary.parquet")
    assert headline(tmp_path).splitlines()[-1] == f"{STEERED}{BESIDE}."
