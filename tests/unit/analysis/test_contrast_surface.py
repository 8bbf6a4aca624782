"""The surface baseline beside the contrast: on its observations, strata and definition of AUROC."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse
from sklearn.metrics import roc_auc_score

from saexp.analysis import AnalysisInputs, observations, split_of
from saexp.analysis.contrast import ContrastAnalyzer, compare_with_surface
from saexp.analysis.contrast_checks import fit_surface, read_texts
from saexp.config import AnalyzerConfig
from saexp.context import ObjectCache
from saexp.latents import Latents
from saexp.results import Result
from saexp.stats import separation
from saexp.stats.separation import stratum_weights
from tests.unit.analysis.simulate import GROUPS, KNOWN, TYPES, activations, rows_table
from tests.unit.analysis.surface_texts import names, placed

TEMPLATES = ("In a word: {} is", "We call it {} and")
SURFACE = "contrast/surface_auroc_test"


def make_inputs(second: str = "abcdefij") -> AnalysisInputs:
    """Entities of two rows, each in a template of its own; names of equal length, those of the
    second group of other letters."""
    table = rows_table()
    units = table.drop_duplicates("unit").reset_index(drop=True)
    letters = {"known": "abcdefgh", "unknown": second}
    drawn = [names(1, letters[g], i)[0] for i, g in enumerate(units["group"])]
    of_unit = dict(zip(units["unit"], drawn, strict=True))
    repeat = table.groupby("unit").cumcount()
    where = placed([of_unit[u] for u in table["unit"]], [TEMPLATES[k] for k in repeat])
    columns = {name: where[name] for name in ("text_id", "token_index", "entity")}
    rows = table.assign(**columns)
    return AnalysisInputs(
        latents=Latents(sparse.csr_array(activations(rows)), rows),
        groups=GROUPS,
        layer=4,
        texts=where["tokens"].tolist(),
        objects=ObjectCache(),
    )


def contrast(inputs: AnalysisInputs, **options: object) -> Result:
    cfg = AnalyzerConfig(name="contrast", **options)  # type: ignore[arg-type]
    return ContrastAnalyzer(cfg).analyze(inputs)


@pytest.fixture(scope="module")
def inputs() -> AnalysisInputs:
    return make_inputs()


@pytest.fixture(scope="module")
def result(inputs: AnalysisInputs) -> Result:
    return contrast(inputs)


@pytest.fixture(scope="module")
def single(inputs: AnalysisInputs) -> AnalysisInputs:
    """One row of each entity."""
    rows = inputs.latents.rows
    keep = ~rows["unit"].duplicated().to_numpy()
    part = Latents(inputs.latents.csr[keep], rows[keep].reset_index(drop=True))
    return replace(inputs, latents=part, objects=None)


@pytest.fixture(scope="module")
def single_result(single: AnalysisInputs) -> Result:
    return contrast(single)


def test_its_auroc_is_the_weighted_mean_over_types_of_sklearns(
    single: AnalysisInputs, single_result: Result
) -> None:
    """By hand, on data of one row an entity."""
    metrics = single_result.metrics
    rows = single.latents.rows
    read, first = read_texts(rows, single.texts), (rows["group"] == "known").to_numpy()
    train, test = (np.flatnonzero(rows["split"] == s) for s in ("train", "test"))
    units = rows["unit"].to_numpy()
    fitted = fit_surface([read[i] for i in train], first[train], units[train], {}, 0)
    scores = fitted.score([read[i] for i in test])
    types = rows["entity_type"].to_numpy()[test]
    weights = stratum_weights(first[test], types)
    assert set(weights) == set(TYPES)
    aurocs = {t: roc_auc_score(first[test][types == t], scores[types == t]) for t in TYPES}
    assert metrics[SURFACE] == pytest.approx(sum(weights[t] * aurocs[t] for t in TYPES))
    assert 0.6 < metrics[SURFACE] < 1
    assert metrics[f"{SURFACE}_ci_low"] < metrics[SURFACE] < metrics[f"{SURFACE}_ci_high"]
    for group in GROUPS:
        difference = metrics[f"contrast/best_auroc_{group}_test"] - metrics[SURFACE]
        key = f"contrast/best_minus_surface_{group}_test"
        assert metrics[key] == pytest.approx(difference)
        assert metrics[f"{key}_ci_low"] < difference < metrics[f"{key}_ci_high"]


def test_names_of_the_same_letters_are_not_surface_cues() -> None:
    metrics = contrast(make_inputs("abcdefgh")).metrics
    assert metrics[f"{SURFACE}_ci_low"] < 0.5 < metrics[f"{SURFACE}_ci_high"]
    assert metrics["contrast/best_minus_surface_known_test_ci_low"] > 0.2


def test_labels_of_the_test_split_do_not_enter_the_fit(
    inputs: AnalysisInputs, result: Result
) -> None:
    """With all of its labels exchanged the test split's AUROC is one less what it was."""
    rows = inputs.latents.rows
    other = rows["group"].map({"known": "unknown", "unknown": "known"})
    changed = rows.assign(group=rows["group"].where(rows["split"] != "test", other))
    again = contrast(replace(inputs, latents=Latents(inputs.latents.csr, changed)))
    assert again.metrics[SURFACE] == pytest.approx(1 - result.metrics[SURFACE])


def test_the_order_of_rows_has_no_influence(single: AnalysisInputs, single_result: Result) -> None:
    order = np.random.default_rng(0).permutation(len(single.latents.rows))
    part = Latents(
        single.latents.csr[order], single.latents.rows.iloc[order].reset_index(drop=True)
    )
    one, two = single_result.metrics, contrast(replace(single, latents=part)).metrics
    keys = [k for k in one if "surface" in k]
    assert len(keys) == 11
    assert {k: one[k] for k in keys} == pytest.approx({k: two[k] for k in keys})


def test_where_cross_validation_is_impossible_a_note_says_so(inputs: AnalysisInputs) -> None:
    observed, _ = observations(inputs.latents, GROUPS, 0)
    train, test = (split_of(observed, GROUPS, name, 0)[0] for name in ("train", "test"))
    one = replace(train, units=train.units.assign(unit="the same"))
    comparison = compare_with_surface(inputs, observed, one, test, {"known": KNOWN}, 0)
    assert set(comparison.metrics.values()) == {None}
    assert len(comparison.metrics) == 7
    (note,) = comparison.notes
    assert note.startswith(f"the surface baseline ({SURFACE}) was not fitted: too few units")


def test_without_texts_there_is_none(inputs: AnalysisInputs) -> None:
    assert not [k for k in contrast(replace(inputs, texts=())).metrics if "surface" in k]


def test_without_a_selected_latent_there_is_nothing_to_compare(inputs: AnalysisInputs) -> None:
    dense = np.zeros((len(inputs.latents.rows), 3), dtype=np.float32)
    dense[:, 0] = 1
    nothing = Latents(sparse.csr_array(dense), inputs.latents.rows)
    metrics = contrast(replace(inputs, latents=nothing)).metrics
    assert metrics[SURFACE] is not None
    assert metrics["contrast/best_minus_surface_known_test"] is None


def test_runs_that_share_objects_fit_the_baseline_once_with_the_numbers_of_runs_alone(
    single: AnalysisInputs, single_result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[int] = []
    fit = separation.fit_logistic
    monkeypatch.setattr(
        separation, "fit_logistic", lambda *a, **options: fits.append(1) or fit(*a, **options)
    )
    objects = ObjectCache()
    other_latents = Latents(single.latents.csr[:, ::-1].copy(), single.latents.rows)
    for latents in (single.latents, other_latents):
        shared = contrast(replace(single, latents=latents, objects=objects))
        assert shared.metrics[SURFACE] == single_result.metrics[SURFACE]
    assert len(fits) == 1
    # Another seed, other labels and other texts have a baseline of their own.
    rows = single.latents.rows[:40]
    read, first = read_texts(rows, single.texts), (rows["group"] == "known").to_numpy()
    others = [replace(r, text=r.text.upper()) for r in read]
    for _ in range(2):
        for texts, labels, seed in (
            (read, first, 0),
            (read, first, 1),
            (read, ~first, 0),
            (others, first, 0),
        ):
            fit_surface(texts, labels, rows["unit"].to_numpy(), {}, seed, objects)
    assert len(fits) == 5
