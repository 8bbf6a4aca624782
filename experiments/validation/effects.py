"""Effects summarised as a run does it."""

from collections.abc import Mapping

import pandas as pd

from saexp.interventions.effects import summarise


def summary_of(effects: pd.DataFrame, kinds: Mapping[str, str]) -> pd.DataFrame:
    """The table `effects_summary`, with every control matched."""
    columns = ["of", "coefficient", "condition", "control_kind"]
    controls = effects.loc[effects["role"] == "control", columns].drop_duplicates()
    return summarise(effects, kinds, controls=controls.assign(matched=True))
