"""Figures and tables of effects hold the controls' numbers, by kind."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from saexp.reports.effect_section import cost_table, effect_figures, effect_tables
from saexp.reports.effects import control_rows, effect_sentences, kinds_of_control
from saexp.reports.saved_run import SavedRun
from tests.unit.reports.written import N_CONTROLS, controls, run, summary


def with_further(folder: Path) -> SavedRun:
    """Beside the random directions, which run at both coefficients, 30 latents at the chosen."""
    run(folder)
    rows = summary()
    template = rows[rows["condition"] == "control_0"].iloc[[0]]
    more = pd.concat([template] * 30, ignore_index=True)
    more["condition"] = [f"scaled_{n}" for n in range(30)]
    more["control_kind"], more["refusal"] = "disruption", np.linspace(0.5, 0.79, 30)
    pd.concat([rows, more]).to_parquet(folder / "effects_summary.parquet")
    known = pd.concat([controls().iloc[[0]]] * 30, ignore_index=True)
    known = known.assign(condition=more["condition"], control_kind="disruption")
    known = known.assign(matched=np.arange(30) < 20, frequency_ratio=0.5, kl_ratio=1.0)
    pd.concat([controls(), known]).to_parquet(folder / "controls.parquet")
    return SavedRun(folder)


def at_chosen(saved: SavedRun) -> list[pd.Series]:
    """Rows of the main condition at its chosen coefficient."""
    assert saved.summary is not None
    rows = saved.summary[saved.summary["main"] & saved.summary["chosen"]]
    return [row for _, row in rows.iterrows()]


def test_curve_controls_are_bands_and_all_at_the_chosen_coefficient_points(tmp_path: Path) -> None:
    figure = effect_figures(with_further(tmp_path))["dose_response_refusal"]
    of_kind = {t.name: [] for t in figure.data}
    for trace in figure.data:
        of_kind[trace.name].append(trace)
    band, points = of_kind["random directions of equal norm"]
    assert list(band.x) == [0.6, 0.9, 0.9, 0.6]
    assert list(band.y) == [0.75, 0.3, 0.25, 0.7]
    assert (len(points.y), set(points.y)) == (N_CONTROLS, {0.7, 0.75})
    (scaled,) = of_kind["latents scaled to equal KL"]
    assert np.allclose(sorted(scaled.y), np.linspace(0.5, 0.79, 30))
    # Beside the chosen coefficient, the kinds apart; each has one entry in the legend.
    assert abs(points.x[0] - 0.6) < 0.05 and abs(scaled.x[0] - 0.6) < 0.05
    assert points.x[0] != scaled.x[0]
    assert [t.showlegend for t in (band, points, scaled)] == [True, False, True]


def test_kinds_of_control_have_the_matched_ones_numbers(tmp_path: Path) -> None:
    saved = with_further(tmp_path)
    scaled, random = kinds_of_control(saved, at_chosen(saved)[0], "refusal")
    assert (scaled.kind, len(scaled.distances), len(scaled.values)) == ("disruption", 30, 20)
    assert scaled.span == "0.50 to 0.69"
    assert (scaled.p_value, random.p_value) == (None, 0.02)
    assert random.n_less_extreme == N_CONTROLS
    table = control_rows(saved)
    assert table is not None
    first = dict(zip(table["head"], table["rows"][0], strict=True))
    assert first == {
        "condition": "known_group",
        "prompts": "unknown",
        "coefficient": 0.6,
        "controls": "latents scaled to equal KL",
        "n": 30,
        "matched": 20,
        "frequency ratio": "0.5 (0.5 to 0.5)",
        "norm ratio": "1 (1 to 1)",
        "KL ratio": "1 (1 to 1)",
        "refusal, range of matched": "0.50 to 0.69",
        "rank p, refusal": None,
        "in the p-value": "yes",
    }


def test_controls_on_prompts_of_another_group_are_not_mixed_in(tmp_path: Path) -> None:
    """Latents of no group are tried on all prompts, and so are their controls."""
    folder = run(tmp_path)
    rows = pd.read_parquet(folder / "effects_summary.parquet")
    other = rows.assign(group="known", refusal=rows["refusal"] - 0.05)
    other["condition"] = other["condition"].replace("baseline_unknown", "baseline_known")
    pd.concat([rows, other]).to_parquet(folder / "effects_summary.parquet")
    saved = SavedRun(folder)
    kinds = [kinds_of_control(saved, row, "refusal")[0] for row in at_chosen(saved)]
    assert [(k.span, len(k.values)) for k in kinds] == [
        ("0.70 to 0.75", N_CONTROLS),
        ("0.65 to 0.70", N_CONTROLS),
    ]
    table = control_rows(saved)
    assert table is not None
    assert [row[1] for row in table["rows"]] == ["unknown", "known"]
    ranges = {(r[2], r[13]) for r in effect_tables(saved)[0]["rows"] if r[0] == "known_group"}
    assert ranges >= {("unknown", "0.70 to 0.75"), ("known", "0.65 to 0.70")}
    first, second = effect_sentences(saved)
    assert "refusal on 20 unknown entities 0.80 -> 0.30" in first and "(0.70 to 0.75)" in first
    assert "refusal on 20 known entities 0.75 -> 0.25" in second and "(0.65 to 0.70)" in second


def test_conditions_beside_the_main_ones_are_marked_exploratory(tmp_path: Path) -> None:
    (table,) = effect_tables(SavedRun(run(tmp_path)))
    rows = [dict(zip(table["head"], row, strict=True)) for row in table["rows"]]
    marks = {(r["condition"], r["coefficient"]): r["exploratory"] for r in rows}
    assert marks["known_7", 0.6] == "yes"
    assert marks["known_group", 0.6] == marks["baseline_unknown", 0.0] == ""
    at = next(r for r in rows if r["condition"] == "known_group" and r["coefficient"] == 0.6)
    assert (at["entities"], at["p, controls"], at["after Holm"]) == (20, 0.02, 0.04)
    assert (at["chosen on train"], at["controls"]) == ("yes", N_CONTROLS)


def test_costs_are_ranges_by_kind(tmp_path: Path) -> None:
    run(tmp_path)
    rows = [["known_group", "group", "", "", 0.6, 0.25], ["other", "single", "", "", 0.6, 0.5]]
    for kind in ("random_norm", "random_kl"):
        rows += [[f"{kind}_{n}", "control", kind, "known_group", 0.6, n / 10] for n in (1, 2)]
    columns = ["condition", "role", "control_kind", "of", "coefficient", "neutral_kl"]
    pd.DataFrame(rows, columns=columns).to_parquet(tmp_path / "costs.parquet")
    table = cost_table(SavedRun(tmp_path))
    assert table is not None
    assert table["head"][3:] == ["random directions of equal norm", "random directions of equal KL"]
    assert table["rows"][0][2:] == [0.25, "0.100 to 0.200", "0.100 to 0.200"]
    assert table["rows"][1][2:] == [0.5, "–", "–"]


@pytest.mark.parametrize("unit", ["entities", "prompts"])
def test_the_number_of_observations_is_of_entities(tmp_path: Path, unit: str) -> None:
    from saexp.reports.effects import observed_on

    run(tmp_path)
    if unit == "prompts":
        pd.DataFrame({"entity": [None]}).to_parquet(tmp_path / "rows.parquet")
    row = {"group": "known", "refusal_n": 20, "refusal_n_prompts": 100}
    observed = observed_on(SavedRun(tmp_path), row, "refusal")
    assert observed == (
        "20 known entities (100 prompts)" if unit == "entities" else "20 known prompts"
    )
    alike = observed_on(SavedRun(tmp_path), row | {"refusal_n_prompts": 20}, "refusal")
    assert alike == f"20 known {unit}"


def test_a_dose_curve_begins_at_the_baseline_where_0_was_not_run(tmp_path: Path) -> None:
    run(tmp_path)
    for coefficients, value in (([0.0, 0.6, 0.9], 0.8), ([0.6, 0.9], 0.75)):
        rows = summary()
        rows.loc[rows["role"] == "baseline", "refusal"] = 0.75
        rows = rows[(rows["role"] == "baseline") | rows["coefficient"].isin(coefficients)]
        rows.to_parquet(tmp_path / "effects_summary.parquet")
        figures = effect_figures(SavedRun(tmp_path))
        for name in ("effect_known_group", "dose_response_refusal"):
            (curve,) = (t for t in figures[name].data if t.name == "the 2 'known' latents")
            assert dict(zip(curve.x, curve.y, strict=True)) == {0: value, 0.6: 0.3, 0.9: 0.2}
