"""Effects summarised as a run does it."""

from collections.abc import Mapping

import pandas as pd

from saexp.interventions.summary import summarise


def summary_of(effects: pd.DataFrame, kinds: Mapping[str, str]) -> pd.DataFrame:
    """The table `effects_summary`."""
    return summarise(effects, kinds)
