"""What a run's sentences are about: main conditions, coefficients, and Holm over their tests."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from saexp.interventions.facts import direction_of_set
from saexp.stats.means import MIN_N
from saexp.stats.multiplicity import ALPHA, holm
from saexp.wording import counted


def main_conditions(summary: pd.DataFrame, outcome: str) -> list[str]:
    """Conditions that a run's sentences are about.

    Per direction its latents together (else the first alone), and its other directions; of many
    places the one of the largest change on train prompts (test prompts where there are none).
    Single latents beside a group are exploratory.
    """
    names: list[str] = []
    own = summary[~summary["role"].isin(["baseline", "control"])]
    for _, part in own.groupby(own["direction"].map(direction_of_set), sort=False):
        of_role = {r: list(p["condition"].unique()) for r, p in part.groupby("role")}
        names += (of_role.get("group") or of_role.get("single") or [])[:1]
        names += of_role.get("direction", [])
        places = of_role.get("place", [])
        names += [_strongest(summary, places, outcome)] if len(places) > 1 else places
    return names


def _strongest(summary: pd.DataFrame, conditions: Sequence[str], outcome: str) -> str:
    where = summary["split"] == ("train" if (summary["split"] == "train").any() else "test")
    part = summary[where & summary["condition"].isin(conditions)]
    sizes = part[f"{outcome}_change"].abs().sort_values(ascending=False, kind="stable")
    return str(part.loc[sizes.index[0], "condition"])


def with_claims(
    summary: pd.DataFrame, outcomes: Sequence[str], chosen: Mapping[str, float]
) -> pd.DataFrame:
    """With columns `chosen`, `main`, `n_choices`, and per outcome `_p_controls_holm`.

    `chosen` marks rows of the test split at the coefficient chosen for their condition, its
    controls included. The family of Holm's adjustment is the run's main conditions times its
    outcomes, each at the chosen coefficient on the test split; elsewhere it is NaN. Where the
    coefficient was chosen among several on the test prompts themselves, for want of train prompts,
    it is multiplied by their number (Bonferroni).
    """
    main = main_conditions(summary, outcomes[0])
    marked = np.array(
        [
            r["split"] == "test" and chosen.get(r["of"] or r["condition"]) == r["coefficient"]
            for r in summary.to_dict("records")
        ],
        dtype=bool,
    )
    is_main = summary["condition"].isin(main).to_numpy()
    family = np.flatnonzero(marked & is_main)
    p_values = summary[[f"{o}_p_controls" for o in outcomes]].to_numpy(dtype=float)
    adjusted = np.full_like(p_values, np.nan)
    corrected = holm(p_values[family].ravel()).reshape(len(family), len(outcomes))
    adjusted[family] = np.minimum(corrected * n_choices(summary), 1)
    columns = {f"{o}_p_controls_holm": adjusted[:, i] for i, o in enumerate(outcomes)}
    about = {"chosen": marked, "main": is_main, "n_choices": n_choices(summary), **columns}
    return pd.concat([summary, pd.DataFrame(about, index=summary.index)], axis=1)


def n_choices(summary: pd.DataFrame) -> int:
    """Coefficients that the reported one was chosen among on test prompts, else 1."""
    if (summary["split"] == "train").any():
        return 1
    coefficients = summary.loc[summary["role"] != "baseline", "coefficient"]
    return max(1, int(coefficients[coefficients != 0].nunique()))


def claim_notes(summary: pd.DataFrame, outcomes: Sequence[str]) -> list[str]:
    """Where entities or controls are too few for any effect to be shown."""
    test = summary[summary["split"] == "test"]
    notes = []
    for row in test[test["role"] == "baseline"].to_dict("records"):
        n = max(int(row[f"{o}_n"]) for o in outcomes)
        if n < MIN_N:
            prompts = "" if row["group"] == "all" else f" of group {row['group']}"
            notes.append(
                f"{counted(n, 'entity', 'entities')}{prompts} on the test split: effects on fewer "
                f"than {MIN_N} are reported without interval and p-value; add rows, or raise "
                "intervention.n_prompts"
            )
    family = test[test["chosen"] & test["main"]]
    floors = family[[f"{o}_p_controls_floor" for o in outcomes]].to_numpy(dtype=float)
    floors = floors[~np.isnan(floors)]
    n_tests = len(floors) * n_choices(summary)
    if len(floors) and floors.min() * n_tests > ALPHA:
        notes.append(
            f"no effect can be significant: with {round(1 / floors.min()) - 1} controls the "
            f"smallest p-value is {floors.min():.2g}, after Holm over "
            f"{counted(n_tests, 'test')} {min(1.0, floors.min() * n_tests):.2g}; raise "
            "intervention.n_controls, or test fewer outcomes"
        )
    return notes
