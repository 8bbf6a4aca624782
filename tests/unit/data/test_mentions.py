"""Mentions of a string in a text: word boundaries, scripts without spaces, normalisation."""

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saexp.data import find_mentions


@pytest.mark.parametrize(
    ("text", "wanted", "expected"),
    [
        ("Arthur's Art is Art.", "Art", ["Art is", "Art."]),
        ("Arthur's part", "art", ["art"]),
        ("the assistant saw an ant", "ant", ["ant"]),
        ("Art's work", "Art", ["Art's"]),
        ("snake_case case", "case", ["case"]),
        ("東京は首都。(東京)と東京", "東京", ["東京は", "東京)", "東京"]),
        ("서울은 서울이다", "서울", ["서울은", "서울이"]),
        ("nothing", "Art", []),
        ("anything", "", []),
        ("C++ and C", "C++", ["C++ and"]),
    ],
)
def test_mentions(text: str, wanted: str, expected: list[str]) -> None:
    spans = find_mentions(text, wanted)
    assert len(spans) == len(expected)
    for (start, end), rest in zip(spans, expected, strict=True):
        assert text[start:end] == wanted
        assert text[start:].startswith(rest)


def test_the_last_mention_is_the_last_whole_word() -> None:
    text = "An ant met the assistant"
    assert find_mentions(text, "ant")[-1] == (3, 6)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_text_and_entity_may_differ_in_normalisation(form: str) -> None:
    other = "NFD" if form == "NFC" else "NFC"
    text = unicodedata.normalize(form, "Zoë met Zoë and Zoëy")
    spans = find_mentions(text, unicodedata.normalize(other, "Zoë"))
    mentions = [text[a:b] for a, b in spans]
    assert mentions == [unicodedata.normalize(form, "Zoë")] * 2


def test_a_base_letter_is_not_found_before_its_combining_mark() -> None:
    text = unicodedata.normalize("NFD", "é e")
    assert find_mentions(text, "e") == ((3, 4),)


@given(st.text("ab _-é東", max_size=12), st.text("ab _-é東", min_size=1, max_size=3))
def test_spans_are_occurrences_in_order(text: str, wanted: str) -> None:
    spans = find_mentions(text, wanted)
    assert bool(spans) == (wanted in text)
    assert all(text[a:b] == wanted for a, b in spans)
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))


@given(st.text("ab c", max_size=12), st.text("ab", min_size=1, max_size=2))
def test_ascii_boundaries_are_those_of_regular_expressions(text: str, wanted: str) -> None:
    whole = [m.span() for m in re.finditer(rf"\b{wanted}\b", text)]
    assert not whole or list(find_mentions(text, wanted)) == whole
