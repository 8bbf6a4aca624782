"""The sentences of a run, word by word, from folders written by hand."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from saexp.api import read_result
from saexp.errors import StoreError
from saexp.reports.analysis import findings, headline, report_figures
from saexp.reports.findings import contrast_sentences
from saexp.reports.saved_run import SavedRun
from saexp.results import is_above_chance, p_value_words
from tests.unit.reports.written import (
    METRICS,
    contrast,
    controls,
    latents,
    run,
    summary,
    write_json,
)

SETTING = (
    "org/tiny, layer_2.resid_post, SAE of 256 latents: 3 of 90 active latents separate known from "
    "unknown on the train split (Benjamini-Hochberg q <= 0.05). The numbers below are measured on "
    "40 held-out entities (18 known, 22 unknown); p-values are Holm-adjusted over the latents "
    "reported here."
)
KNOWN_FINDING = (
    "Latent 7 distinguishes known from unknown entities on held-out data (AUROC 0.900 [0.870, "
    "0.910])"
)
UNKNOWN_FINDING = "No latent is selected for 'unknown'."
KNOWN = (
    "known: latent 7 has AUROC 0.900 [0.870, 0.910] (p < 0.001), separation 0.45; smallest over 2 "
    "entity types: AUROC 0.850, separation 0.40."
)
UNKNOWN = "No latent for 'unknown' is selected."
STEERED = (
    "Adding the 2 'known' latents to unknown prompts at the entity's last token, coefficient 0.6 × "
    "the stream's median norm: refusal on 20 unknown entities 0.80 -> 0.30 [0.20, 0.30]"
)
TESTED = "; below all its controls (rank p = 0.02)"
CONTROLS = (
    " Controls: 49 random directions of equal norm (0.70 to 0.75); the smallest p-value possible "
    "is 0.02."
)
CLAIM = f"{STEERED}{TESTED}.{CONTROLS}"


def change(folder: Path, **settings: object) -> SavedRun:
    """The run with other settings of its intervention."""
    about = SavedRun(folder).provenance
    about["config"]["intervention"] |= settings
    write_json(folder / "provenance.json", about)
    return SavedRun(folder)


def sentences(run: SavedRun) -> list[str]:
    """Those behind the findings."""
    return contrast_sentences(SavedRun(run.folder))


def test_the_headline_is_a_sentence_per_direction_and_the_setting(tmp_path: Path) -> None:
    known = (
        f"{KNOWN_FINDING}, and adding the 2 'known' latents to unknown prompts (coefficient 0.6, "
        "n = 20) lowers the refusal rate from 0.80 to 0.30 [0.20, 0.30], below all its controls "
        "(rank p = 0.02)."
    )
    assert headline(run(tmp_path)).splitlines() == [known, UNKNOWN_FINDING, SETTING]
    assert findings(tmp_path) == [known, UNKNOWN_FINDING, SETTING, KNOWN, UNKNOWN, CLAIM]


def test_without_a_causal_test_no_effects_are_reported(tmp_path: Path) -> None:
    lines = [f"{KNOWN_FINDING}.", UNKNOWN_FINDING, SETTING]
    assert headline(run(tmp_path, causal=False)).splitlines() == lines
    assert sentences(SavedRun(tmp_path)) == [SETTING, KNOWN, UNKNOWN]


def test_without_intervals_types_and_entities_none_are_reported(tmp_path: Path) -> None:
    run(tmp_path, causal=False)
    metrics = {k: None if "_ci_" in k else v for k, v in METRICS.items()}
    write_json(tmp_path / "metrics.json", metrics)
    table = latents()
    table.drop(columns=[c for c in table if "city" in c]).to_parquet(tmp_path / "latents.parquet")
    pd.DataFrame({"entity": [None, None]}).to_parquet(tmp_path / "rows.parquet")
    setting, known, _ = sentences(SavedRun(tmp_path))
    assert "on 40 held-out examples (18 known, 22 unknown)" in setting
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
    known, unknown, *_ = headline(tmp_path).splitlines()
    assert known == f"Control SAE (random): l{KNOWN_FINDING[1:]}."
    assert unknown == f"Control SAE (random): n{UNKNOWN_FINDING[1:]}"


def edited(folder: Path, **columns: object) -> str:
    """The last sentence, where the main condition's row at the chosen coefficient has these."""
    table = summary()
    at = (table["condition"] == "known_group") & table["chosen"]
    for name, value in columns.items():
        table.loc[at, name] = value
    run(folder)
    table.to_parquet(folder / "effects_summary.parquet")
    return contrast_sentences(SavedRun(folder))[-1]


def test_without_controls_that_is_stated(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "controls.parquet").unlink()
    assert contrast_sentences(SavedRun(tmp_path))[-1] == f"{STEERED}; no controls were run."


def test_an_effect_within_its_controls_is_not_called_one(tmp_path: Path) -> None:
    p = {"refusal_p_random_norm": 0.41, "refusal_p_controls": 0.41, "refusal_p_controls_holm": 0.41}
    sentence = edited(tmp_path, **p)
    assert sentence == (
        f"{STEERED}; not distinguishable from its controls (rank p = 0.41). Controls: 49 random "
        "directions of equal norm (0.70 to 0.75)."
    )


def test_the_p_value_after_holm_decides(tmp_path: Path) -> None:
    run(tmp_path)
    table = summary()
    names = [c for c in table if c.startswith("refusal")]
    for name in names:
        table[name.replace("refusal", "answered")] = table[name]
    table["refusal_p_controls_holm"] *= 2
    table.to_parquet(tmp_path / "effects_summary.parquet")
    saved = change(tmp_path, outcomes=["refusal", "answered"])
    assert sentences(saved)[-1] == (
        f"{STEERED}; below all its controls (rank p = 0.02, 0.08 after Holm over 2 tests: not "
        "significant); answered 0.80 -> 0.30 [0.20, 0.30] (rank p = 0.02, 0.04 after Holm over 2 "
        f"tests).{CONTROLS}"
    )


def test_an_effect_beyond_most_controls_says_how_many(tmp_path: Path) -> None:
    more = {"refusal_p_random_norm": 0.04, "refusal_p_controls": 0.04, "refusal": 0.7}
    sentence = edited(tmp_path, **more, refusal_change=-0.1)
    assert "; more extreme than 48 of its 49 controls (rank p = 0.04)." in sentence


def test_a_change_smaller_than_that_of_controls_is_reported_as_such(tmp_path: Path) -> None:
    sentence = edited(tmp_path, refusal=0.79, refusal_change=-0.01)
    assert "; above all its controls, which change it more (rank p = 0.02)." in sentence


def test_kinds_that_are_not_achieved_are_reported_with_their_distances(tmp_path: Path) -> None:
    run(tmp_path)
    about = {"frequency_caliper": 2.0}
    change(tmp_path, **about)
    further = pd.DataFrame({"condition": [f"f_{n}" for n in range(40)], "of": "known_group"})
    further = further.assign(control_kind="frequency", coefficient=0.6, frequency_ratio=4.1)
    further = further.assign(norm_ratio=1.0, kl_ratio=0.5, matched=further.index < 3)
    pd.concat([controls(), further]).to_parquet(tmp_path / "controls.parquet")
    sentence = contrast_sentences(SavedRun(tmp_path))[-1]
    assert sentence == (
        f"{CLAIM[:-1]}; sets of frequency-matched latents are not used, as only 3 of 40 are within "
        "a factor of 2 in activation frequency (median ratio 4.1; 19 are needed)."
    )
    few = controls().assign(matched=controls()["condition"].isin(["control_0", "control_2"]))
    few.to_parquet(tmp_path / "controls.parquet")
    assert contrast_sentences(SavedRun(tmp_path))[-1] == (
        f"{STEERED}; too few matched controls for a p-value. Controls: 2 random directions of "
        "equal norm (0.70), fewer than the 19 needed."
    )


def test_few_entities_have_no_interval_and_no_test(tmp_path: Path) -> None:
    nothing = dict.fromkeys(["refusal_ci_low", "refusal_ci_high"], float("nan"))
    sentence = edited(tmp_path, refusal_n=4, refusal_n_prompts=9, **nothing)
    assert sentence == (
        f"{STEERED.partition(' on 20')[0]} on 4 unknown entities (9 prompts) 0.80 -> 0.30; too few "
        "entities for an interval or a test against controls."
    )


def test_what_it_costs_is_stated_beside_the_controls_cost(tmp_path: Path) -> None:
    run(tmp_path)
    rows = [["known_group", "group", "", "", 0.6, 0.25], ["known_group", "group", "", "", 0.9, 0.5]]
    for kind, start in (("random_norm", 0.1), ("random_kl", 0.25)):
        about = ["control", kind, "known_group", 0.6]
        rows += [[f"{kind}_{n}", *about, start + n / 10] for n in (0, 1)]
    columns = ["condition", "role", "control_kind", "of", "coefficient", "neutral_kl"]
    pd.DataFrame(rows, columns=columns).to_parquet(tmp_path / "costs.parquet")
    cost = (
        " KL divergence on neutral text with the edit at every token: 0.25 nats per token "
        "(controls of equal norm: 0.10 to 0.20)."
    )
    assert contrast_sentences(SavedRun(tmp_path))[-1] == f"{CLAIM}{cost}"


def test_an_effect_that_could_not_be_measured_is_reported_as_none(tmp_path: Path) -> None:
    run(tmp_path)
    table = summary().assign(chosen=False)
    table.loc[table["condition"] == "known_group", "refusal"] = float("nan")
    table.to_parquet(tmp_path / "effects_summary.parquet")
    assert contrast_sentences(SavedRun(tmp_path))[-1] == (
        "Adding the 2 'known' latents to unknown prompts: refusal could not be measured on any "
        "prompt."
    )


def test_coefficient_0_alone_is_reported_as_a_check(tmp_path: Path) -> None:
    run(tmp_path)
    table = summary()
    table[table["coefficient"] == 0].to_parquet(tmp_path / "effects_summary.parquet")
    assert contrast_sentences(SavedRun(tmp_path))[-1] == (
        "Adding the 2 'known' latents to unknown prompts was run only at coefficient 0, which "
        "changes nothing: refusal stays 0.80."
    )


def test_a_unit_without_words_leaves_no_gap(tmp_path: Path) -> None:
    run(tmp_path)
    sentence = sentences(change(tmp_path, name="mine"))[-1]
    assert sentence.startswith(
        "Mine of the 2 'known' latents on unknown prompts at the entity's last token, coefficient "
        "0.6: refusal on"
    )


def test_a_single_latent_and_a_clamp_are_described_specifically(tmp_path: Path) -> None:
    table = summary()
    run(tmp_path)
    table = table[table["role"].isin(["single", "baseline"])]
    table = table.assign(main=table["role"] == "single")
    table.to_parquet(tmp_path / "effects_summary.parquet")
    assert sentences(change(tmp_path, name="clamp", unit="raw"))[-1].startswith(
        "Moving latent 7 towards 'known' on unknown prompts at the entity's last token, "
        "coefficient 0.6 of the way: refusal on 20 unknown entities 0.80 -> 0.50"
    )
    assert (
        "coefficient 0.6 × the unscaled direction:"
        in sentences(change(tmp_path, name="steer", unit="raw"))[-1]
    )


def test_a_run_that_compared_no_groups_says_so(tmp_path: Path) -> None:
    (run(tmp_path, causal=False) / "latents.parquet").unlink()
    assert headline(tmp_path) == "This run compared no groups."


@pytest.mark.parametrize("content", [None, "{"])
def test_a_folder_without_a_readable_run_is_one_line(tmp_path: Path, content: str | None) -> None:
    if content:
        (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(StoreError, match=r"holds no finished run \(provenance\.json is missing"):
        _ = SavedRun(tmp_path).metrics


@pytest.mark.parametrize("name", ["metrics.json", "provenance.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", '{"a": "b"}', "\xff"])
def test_a_damaged_file_is_one_line_that_names_it(tmp_path: Path, name: str, content: str) -> None:
    file = run(tmp_path) / name
    file.write_text(content, encoding="latin-1")
    for read in (read_result, headline):
        with pytest.raises(StoreError) as error:
            read(tmp_path)
        message = str(error.value)
        assert message.startswith(f"{file} is damaged (")
        assert message.endswith("; run its command again, which recomputes what is damaged")
        assert "\n" not in message


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no table at all", bytes(500)])
def test_a_damaged_table_is_one_line_that_names_it(tmp_path: Path, content: bytes) -> None:
    file = run(tmp_path) / "latents.parquet"
    file.write_bytes(content)
    with pytest.raises(StoreError, match="is damaged") as error:
        read_result(tmp_path)
    assert str(error.value).startswith(f"{file} is damaged (")
    assert "\n" not in str(error.value)


def test_selected_latents_are_by_rank_and_of_one_direction(tmp_path: Path) -> None:
    saved = SavedRun(run(tmp_path))
    assert saved.selected("known")["latent"].tolist() == [7, 4]
    assert saved.selected("unknown").empty
    assert saved.main_conditions() == ["known_group"]
    assert saved.groups == ("known", "unknown")


def test_entity_types_are_those_with_a_separation_of_their_own(tmp_path: Path) -> None:
    assert SavedRun(run(tmp_path)).entity_types == ["player", "city"]


def test_entity_types_are_those_of_the_test_split(tmp_path: Path) -> None:
    run(tmp_path, causal=False)
    latents().drop(columns="separation_city_test").to_parquet(tmp_path / "latents.parquet")
    assert SavedRun(tmp_path).entity_types == ["player"]
    latents().drop(columns="separation_city").to_parquet(tmp_path / "latents.parquet")
    assert SavedRun(tmp_path).entity_types == ["player", "city"]
    of_three = latents().assign(separation_song=0.1)
    of_three.to_parquet(tmp_path / "latents.parquet")
    assert "smallest over 2 entity types" in sentences(SavedRun(tmp_path))[1]
    assert list(report_figures(tmp_path)["types"].data[0].x) == ["player", "city"]


def test_an_entity_type_may_end_like_the_splits_name(tmp_path: Path) -> None:
    run(tmp_path)
    table = latents()
    table.columns = [c.replace("city", "contest") for c in table.columns]
    table.to_parquet(tmp_path / "latents.parquet")
    assert SavedRun(tmp_path).entity_types == ["player", "contest"]


def test_the_reported_coefficient_is_the_one_chosen_on_train_prompts(tmp_path: Path) -> None:
    saved = SavedRun(run(tmp_path))
    # On the test split 0.9 changes more.
    assert saved.chosen_coefficient("known_group") == 0.6
    assert saved.chosen_coefficient("nothing") is None


def test_reported_numbers_are_of_the_test_split(tmp_path: Path) -> None:
    run(tmp_path)
    train = summary().assign(split="train", refusal=0.0)
    pd.concat([train, summary()]).to_parquet(tmp_path / "effects_summary.parquet")
    assert contrast_sentences(SavedRun(tmp_path))[-1] == CLAIM


@pytest.mark.parametrize(
    ("p_value", "words"),
    [(0.0123, "= 0.012"), (0.001, "= 0.001"), (9e-4, "< 0.001"), (np.nan, "is not defined")],
)
def test_a_p_value_that_is_not_defined_is_not_a_small_one(p_value: float, words: str) -> None:
    assert p_value_words(p_value) == words
    assert is_above_chance(0.9, p_value, 0.05) == (p_value <= 0.05)
