"""Words about an effect."""

import math

import pandas as pd

from saexp.reports.effects import _change


def test_an_outcome_without_values_is_not_nan_in_words() -> None:
    names = ("answer_logit", "answer_logit_ci_low", "answer_logit_ci_high")
    without = pd.Series(dict.fromkeys(names, math.nan))
    assert _change(without, without, "answer_logit") == "has no value on these prompts"
    after = pd.Series(dict(zip(names, (1.0, 0.5, 1.5), strict=True)))
    before = pd.Series({"answer_logit": 0.25})
    assert _change(after, before, "answer_logit") == "0.25 -> 1.00 [0.50, 1.50]"
