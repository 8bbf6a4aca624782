"""The surface baseline, power and placebo in words."""

from pathlib import Path
from typing import Any

import pytest

from saexp.reports.analysis import write_report
from saexp.reports.findings import above_surface, contrast_sentences, nothing_found, power_sentences
from saexp.reports.saved_run import SavedRun
from tests.unit.reports.written import METRICS, run, write_json

BASELINE = {
    "contrast/surface_auroc_test": 0.6,
    "contrast/surface_auroc_test_ci_low": 0.55,
    "contrast/surface_auroc_test_ci_high": 0.65,
}
POWER = {"power/auroc_train": 0.71234, "power/auroc_test": 0.6}
POWER_SENTENCE = (
    "With this number of entities, a latent is detected on the train split in 80% of runs if its "
    "AUROC is at least 0.712 (level 0.05, Bonferroni over 90 latents), and confirmed on the test "
    "split if it is at least 0.600 (level 0.05, Bonferroni over 1 latent)."
)


def difference(value: float, low: Any = None, high: Any = None) -> dict[str, Any]:
    key = "contrast/best_minus_surface_known_test"
    return {key: value, f"{key}_ci_low": low, f"{key}_ci_high": high}


def saved(folder: Path, *more: dict[str, Any]) -> SavedRun:
    run(folder, causal=False)
    metrics = dict(METRICS)
    for part in more:
        metrics |= part
    write_json(folder / "metrics.json", metrics)
    return SavedRun(folder)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        (
            BASELINE | difference(0.3, 0.2, 0.4),
            " Its AUROC is 0.300 [0.200, 0.400] above that of the surface ",
        ),
        (difference(0.3, -0.01, 0.5), " It is not distinguishable from surface cues: its AUROC "),
        (difference(-0.1, -0.2, -0.05), " It is not distinguishable from surface cues: its AUROC "),
        (difference(0.3), " Its AUROC minus that of the surface baseline is +0.300, without an "),
    ],
)
def test_a_latent_beside_the_surface_baseline(numbers: dict[str, Any], words: str) -> None:
    assert above_surface(numbers, "known").startswith(words)
    assert above_surface(numbers, "unknown") == ""


def test_how_far_a_latent_is_above_a_baseline_at_chance_is_left_out(tmp_path: Path) -> None:
    at_chance = BASELINE | {"contrast/surface_auroc_test_ci_low": 0.4}
    _, surface, known, _ = contrast_sentences(saved(tmp_path, at_chance, difference(0.3, 0.2, 0.4)))
    assert surface.endswith("not above chance.")
    assert "surface" not in known


def test_the_baseline_stands_before_the_latents_that_are_compared_with_it(tmp_path: Path) -> None:
    _, surface, known, unknown = contrast_sentences(
        saved(tmp_path, BASELINE, difference(0.3, 0.2, 0.4))
    )
    assert surface == (
        "The surface baseline (tokens and n-grams of the text, no model) has AUROC 0.600 "
        "[0.550, 0.650] within entity types."
    )
    assert known.endswith("Its AUROC is 0.300 [0.200, 0.400] above that of the surface baseline.")
    assert unknown == "No latent for 'unknown' is selected."


def test_power_is_part_of_the_finding_where_nothing_was_found(tmp_path: Path) -> None:
    nothing = saved(tmp_path, POWER, {"contrast/best_p_value_known_test": 0.4})
    assert nothing_found(nothing)
    assert POWER_SENTENCE in contrast_sentences(nothing)
    saved_run = saved(tmp_path, POWER, {"contrast/best_p_value_known_test": 0.01})
    assert not nothing_found(saved_run)
    assert POWER_SENTENCE not in contrast_sentences(saved_run)


def test_power_is_always_part_of_the_report(tmp_path: Path) -> None:
    saved(tmp_path, POWER, {"contrast/best_p_value_known_test": 0.01})
    assert POWER_SENTENCE in write_report(tmp_path).read_text("utf-8")


def test_power_of_effects(tmp_path: Path) -> None:
    effects = {
        "power/rate_change": 0.2345,
        "power/rate_n": 40,
        "power/rate_baseline": 0.1,
        "power/p_controls_floor": 0.01,
    }
    change, floor = power_sentences(saved(tmp_path, effects))
    assert change == (
        "With 40 entities, a change of a rate by at least 0.23 from its unsteered value of 0.10 is "
        "detected in 80% of runs (level 0.05, paired)."
    )
    assert floor == (
        "p-values against controls are ranks and cannot be below 0.01, however large the effect."
    )


def test_placebo_shares_in_one_sentence(tmp_path: Path) -> None:
    label = {"": 0.02, "_n": 200, "_ci_low": 0.008, "_ci_high": 0.05}
    latent = {"": 0.25, "_n": 100, "_ci_low": 0.175, "_ci_high": 0.343}
    metrics = {f"placebo/label_fraction{k}": v for k, v in label.items()}
    metrics |= {f"placebo/latent_fraction{k}": v for k, v in latent.items()}
    assert (
        "Placebo: with permuted group labels, 4 of 200 permutations report a latent above chance "
        "(2.0% [0.8%, 5.0%]); 25 of 100 latents drawn at random among the active ones would be "
        "reported as above chance (25.0% [17.5%, 34.3%])."
    ) in contrast_sentences(saved(tmp_path, metrics))
