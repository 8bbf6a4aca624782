"""What a run hands on, as a notebook shows it."""

import math
from pathlib import Path

import pandas as pd
import pytest

import saexp
from saexp.errors import ConfigError, StoreError
from saexp.models.resolution import ASSETS
from saexp.pipeline.run_folder import unexplained_notes
from saexp.results import ObjectiveError, Result, check_objective


def test_a_result_shows_what_there_is_in_a_few_lines() -> None:
    result = Result(
        metrics={"a/b": 1.0},
        tables={"latents": pd.DataFrame({"latent": range(500)})},
        figures={"volcano": object()},
        notes=["two skipped"],
        path=Path("outputs/x"),
    )
    assert repr(result).splitlines() == [
        "Result in outputs/x",
        "  metrics: 1",
        "  tables: latents (500 rows)",
        "  figures: volcano",
        "  note: two skipped",
    ]
    assert repr(Result()).splitlines()[0] == "Result in memory"


def test_an_sae_shows_what_it_is() -> None:
    shown = repr(saexp.load_sae(ASSETS / "tiny/sae/layer_2/width_256"))
    assert shown.endswith(
        "width_256: jumprelu, layer_2.resid_post, d_in=128, d_sae=256, float32, "
        "normalize_activations=none)"
    )


def test_the_store_of_a_result_without_one_is_none(tmp_path: Path) -> None:
    (tmp_path / "provenance.json").write_text("{}")
    assert [r.store for r in (Result(), Result(path=tmp_path))] == [None, None]


@pytest.mark.parametrize("content", ["{", "[]", '{"store": {}}', '{"store": 3}'])
def test_a_damaged_provenance_is_one_line_for_the_store(tmp_path: Path, content: str) -> None:
    (tmp_path / "provenance.json").write_text(content)
    with pytest.raises(StoreError, match="provenance.json is damaged; run its command again"):
        _ = Result(path=tmp_path).store


def test_a_store_that_was_deleted_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "provenance.json").write_text('{"store": {"path": "deleted"}}')
    with pytest.raises(StoreError, match="deleted holds no activation store"):
        _ = Result(path=tmp_path).store


def test_numbers_of_latents_that_were_not_found_are_not_put_down_to_few_positions() -> None:
    metrics = {"contrast/best_latent_known": None, "sparsity/mean_active": None, "a/b": 1.0}
    result = Result(metrics=metrics, notes=["no latent is associated with 'known'"])
    reason = "not defined with so few positions, units or resamples"
    assert unexplained_notes(result, "contrast") == [f"{reason}: sparsity/mean_active"]
    assert unexplained_notes(Result(metrics={"contrast/x": None}), "contrast") == []
    assert "contrast/best_latent_known" in unexplained_notes(result)[0]


def test_the_objective_is_a_metric_or_names_the_nearest() -> None:
    result = Result(metrics={"effect/refusal/unknown_group": 0.5, "contrast/x": None})
    assert result.objective("effect/refusal/unknown_group") == 0.5
    assert math.isnan(result.objective("contrast/x"))
    with pytest.raises(ConfigError) as error:
        result.objective("effect/refusal/unknown_grup")
    expected = "no metric 'effect/refusal/unknown_grup'; did you mean effect/refusal/unknown_group?"
    assert str(error.value) == f"objective: {expected}"
    assert math.isnan(Result(metrics={"contrast/x": 1}).objective("effect/refusal/unknown_group"))


WITHOUT_TEST = ["intervention=none"]
OBJECTIVES = [
    ([], "objective=", "objective= is not the name of a metric; type e.g. objective=effect/"),
    ([], "objective=refusal", "objective=refusal is not the name of a metric"),
    ([], "objective=contrst/x", "this run has no metrics contrst/…; did you mean contrast"),
    ([], "objective=probe/x", "this run has no metrics probe/…"),
    (WITHOUT_TEST, "objective=effect/refusal/unknown_top1", "this run has intervention=none"),
    ([], "objective=effect/refusl/unknown_top1", "did you mean refusal?"),
    ([], "objective=effect/hedging/unknown_top1", "type 'intervention.outcomes=[hedging]'"),
    ([], "objective=effect/refusal", "lacks a condition"),
    ([], "objective=effect/refusal/unkown_top1", "names no group of the data (known, unknown)"),
    ([], "objective=contrast/best_auroc_unkown_test", "names no group of the data"),
]


@pytest.mark.parametrize(("words", "objective", "message"), OBJECTIVES)
def test_an_objective_that_a_run_cannot_have_is_refused_before_it(
    words: list[str], objective: str, message: str
) -> None:
    with pytest.raises(ObjectiveError) as error:
        check_objective(saexp.compose([*words, objective]))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "effect/refusal/unknown_group",
            "effect/dont_know/baseline_known",
            "effect/neutral_kl/x_",
        ),
        *("effect/refusal/control_mean", "contrast/surface_auroc_test", "sparsity/l0_layer_2"),
        *("contrast/best_auroc_known_ci_low_test", "placebo/effect_fraction", "power/auroc_test"),
    ],
)
def test_an_objective_that_a_run_may_have_is_taken(name: str) -> None:
    words = ["intervention.latents=[3]"] if name.endswith("x_") else []
    check_objective(saexp.compose([f"objective={name}", *words]))
