"""Number words read as digits, and amounts and years with their ranges."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saexp.labeling.answer_values import amounts, with_digits, years

ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
)
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def spelled(n: int) -> str:
    """A number below a billion in English words, written from the grammar."""
    for size, name in ((10**6, "million"), (10**3, "thousand"), (100, "hundred")):
        if n >= size:
            rest = n % size
            link = " and " if size == 100 else " "
            return f"{spelled(n // size)} {name}" + (link + spelled(rest) if rest else "")
    if n < 20:
        return ONES[n]
    return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")


@given(st.integers(2, 10**9 - 1))
def test_spelled_numbers_are_read(n: int):
    assert with_digits(f"It has {spelled(n)} people.") == f"It has {n} people."


@given(st.integers(1910, 1999).filter(lambda y: y % 100 >= 10))
def test_years_are_read_as_two_numbers(n: int):
    assert with_digits(f"in {spelled(n // 100)} {spelled(n % 100)}.") == f"in {n}."


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("one of the two films", "one of the 2 films"),
        ("one hour and ten minutes", "1 hour and 10 minutes"),
        ("two and a half hours", "2.5 hours"),
        ("a hundred and twenty minutes", "120 minutes"),
        ("half a million people", "500000 people"),
        ("5 million people", "5 million people"),
        ("millions of people", "millions of people"),
        ("someone tenacious", "someone tenacious"),
        ("five six seven", "five six seven"),
    ],
)
def test_words_that_are_and_are_not_numbers(text: str, read: str):
    assert with_digits(text) == read


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90 minutes", [(90, None)]),
        ("90-100 minutes", [(90, 100)]),
        ("90 to 100 minutes", [(90, 100)]),
        ("between 90 and 100 minutes", [(90, 100)]),
        ("90 and 100 minutes", [(90, None), (100, None)]),
        ("1 to 2 hours", [(60, 120)]),
        ("90 or 100", [(90, 100)]),
        ("the 2nd film, 16%, 12 percent, 7 minutes", [(7, None)]),
    ],
)
def test_amounts_with_ranges(text: str, expected: list):
    got = amounts(text, {"minutes": 1.0, "hours": 60.0})
    assert [(a.value, a.other) for a in got] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1969 or 1970", [(1969, 1970)]),
        ("between 1965 and 1975", [(1965, 1975)]),
        ("1965–1975", [(1965, 1975)]),
        ("(1914–1999)", [(1914, None)]),
        ("1914 and 1999", [(1914, None), (1999, None)]),
        ("on 1963-02-17", [(1963, None)]),
    ],
)
def test_years_with_ranges(text: str, expected: list):
    assert [(y.value, y.other) for y in years(text)] == expected
