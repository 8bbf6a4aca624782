"""The surface baseline: what it reads, what it finds, and that nothing of the test split enters."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from saexp.analysis import contrast_checks
from saexp.analysis.contrast_checks import ReadText, fit_surface, read_texts, token_counts
from saexp.errors import DataError
from tests.unit.analysis.surface_texts import BOS, names, placed, tokenized

N = 120


def read_of(rows: pd.DataFrame) -> list[ReadText]:
    return read_texts(rows, rows["tokens"].tolist())


def held_out(rows: pd.DataFrame, first: np.ndarray, seed: int = 0) -> float:
    """AUROC on every third row, fitted on the others."""
    read, units = read_of(rows), rows["unit"].to_numpy()
    test = np.arange(len(rows)) % 3 == 0
    train = np.flatnonzero(~test)
    fitted = fit_surface([read[i] for i in train], first[~test], units[~test], {}, seed)
    scores = fitted.score([read[i] for i in np.flatnonzero(test)])
    return float(roc_auc_score(first[test], scores))


def two_alphabets(n: int = N) -> tuple[pd.DataFrame, np.ndarray]:
    """Names of equal length, the first half of other letters than the second."""
    first = np.arange(n) < n // 2
    entities = [*names(n // 2, "abcdefgh", 1), *names(n - n // 2, "ijklmnop", 2)]
    order = np.random.default_rng(3).permutation(n)
    rows = placed([entities[i] for i in order])
    return rows, first[order]


def test_nothing_after_the_position_is_read() -> None:
    tokens = tokenized("In a word: abcdef is")
    rows = pd.DataFrame({"text_id": [0], "token_index": [8], "entity": ["abcdef"]})
    (read,) = read_texts(rows, [tokens])
    assert read.text == "In a word: abcde"
    assert read.ids == tokens.ids[:9]
    assert read.entity == "abcde"
    assert read.entity_ids == tokens.ids[6:9]
    changed = tokenized("In a word: abcdeX was it")
    others = rows.assign(entity="abcdeX")
    assert read_texts(others, [changed]) == [read]


@pytest.mark.parametrize("index", [0, 3])
def test_before_the_entity_there_is_no_entity(index: int) -> None:
    rows = pd.DataFrame({"text_id": [0], "token_index": [index], "entity": ["abcdef"]})
    (read,) = read_texts(rows, [tokenized("In a word: abcdef is")])
    assert (read.entity, read.entity_ids) == ("", ())
    assert read.ids[0] == BOS


def test_the_last_mention_read_counts() -> None:
    rows = pd.DataFrame({"text_id": [0], "token_index": [5], "entity": ["ab"]})
    (read,) = read_texts(rows, [tokenized("ab cd ab. ab")])
    assert read.text == "ab cd ab. "
    assert read.entity == "ab"
    assert read.entity_ids == tokenized("ab cd ab. ab").ids[4:5]


def test_rows_without_an_entity() -> None:
    rows = pd.DataFrame({"text_id": [0], "token_index": [2], "entity": [pd.NA]})
    assert read_texts(rows, [tokenized("abcd")])[0].entity == ""


def test_token_counts_are_those_of_a_plain_loop() -> None:
    texts = [tokenized("abab"), tokenized("ab")]
    ab = texts[1].ids[1]
    assert token_counts(texts) == {BOS: 2, ab: 3}


def test_names_of_equal_length_and_other_letters_are_separated() -> None:
    rows, first = two_alphabets()
    assert held_out(rows, first) > 0.97


def test_plain_texts_without_entities_are_separated_by_their_words() -> None:
    rows, first = two_alphabets()
    assert held_out(rows.assign(entity=pd.NA), first) > 0.9


def test_groups_that_differ_in_length_alone() -> None:
    first = np.arange(N) % 2 == 0
    long = names(N, "abcdefgh", 1, length=12)
    short = names(N, "abcdefgh", 2, length=6)
    rows = placed([long[i] if first[i] else short[i] for i in range(N)])
    assert held_out(rows, first) > 0.97


def test_groups_that_differ_in_token_frequency_alone() -> None:
    """Every pair of letters is of one group, and none is in two rows."""
    pairs = [f"{a}{b}" for a in "abcdefghijklmnop" for b in "ABCDEFGHIJKLMNOP"][:N]
    order = np.random.default_rng(0).permutation(N)
    rows = placed([pairs[i] for i in order], "xx{}")
    first = np.arange(N) % 2 == 0
    read, units = read_of(rows), rows["unit"].to_numpy()
    counts = {r.ids[-1]: 500 if is_first else 2 for r, is_first in zip(read, first, strict=True)}
    train, test = np.arange(N) < 80, np.arange(N) >= 80
    with_counts, without = (
        fit_surface([read[i] for i in np.flatnonzero(train)], first[train], units[train], c, 0)
        for c in (counts, {})
    )
    tested = [read[i] for i in np.flatnonzero(test)]
    assert roc_auc_score(first[test], with_counts.score(tested)) > 0.97
    assert roc_auc_score(first[test], without.score(tested)) < 0.8


def test_an_entity_of_several_rows_is_no_evidence_about_others() -> None:
    """Labels random per entity, five templates each: rows of one entity in both folds would make
    the penalty weak and the score of new entities no better."""
    rng = np.random.default_rng(9)
    entities = names(60, "abcdefgh", 4)
    label = rng.permutation(60) < 30
    parts = [placed(entities, f"{word} {{}} is") for word in ("In", "At", "Of", "To", "By")]
    rows = pd.concat(parts, ignore_index=True).assign(text_id=range(300))
    first = np.tile(label, 5)
    fitted = fit_surface(read_of(rows), first, rows["unit"].to_numpy(), {}, 0)
    assert fitted.fitted.cv_log_loss > 0.66
    as_if_independent = fit_surface(read_of(rows), first, np.arange(300), {}, 0)
    assert as_if_independent.fitted.cv_log_loss < 0.3


def test_the_order_of_rows_has_no_influence() -> None:
    n = 60
    rows, first = two_alphabets(n)
    first = first ^ (np.random.default_rng(1).random(n) < 0.2)
    order = np.random.default_rng(2).permutation(n)
    new = read_of(placed(names(20, "abcdijkl", 8)))
    read, units = read_of(rows), rows["unit"].to_numpy()
    fits = [
        fit_surface([read[i] for i in idx], first[idx], units[idx], {}, 0)
        for idx in (np.arange(n), order)
    ]
    assert fits[0].fitted.c == fits[1].fitted.c
    np.testing.assert_array_equal(fits[0].score(new), fits[1].score(new))


def test_scores_do_not_depend_on_how_many_rows_are_scored_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, first = two_alphabets(40)
    read, units = read_of(rows), rows["unit"].to_numpy()
    baseline = fit_surface(read, first, units, {}, 0)
    at_once = baseline.score(read)
    monkeypatch.setattr(contrast_checks, "CHUNK", 7)
    np.testing.assert_allclose(baseline.score(read), at_once, rtol=1e-12)


def test_too_few_units_to_cross_validate() -> None:
    rows = placed(names(4, "abcdefgh", 1))
    first = np.array([True, False, False, False])
    with pytest.raises(DataError, match="too few units to cross-validate"):
        fit_surface(read_of(rows), first, rows["unit"].to_numpy(), {}, 0)
