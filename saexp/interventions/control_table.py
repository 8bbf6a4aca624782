"""What the controls of a causal test achieved: their distances, as a table and in words."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from saexp.config import InterventionConfig
from saexp.interventions.facts import Condition
from saexp.stats.exchangeable import MIN_CONTROLS
from saexp.wording import CONTROL_WORDS


def control_table(
    conditions: Sequence[Condition],
    coefficients: Sequence[float],
    kl: Mapping[tuple[str, float], float],
) -> pd.DataFrame:
    """One row per control and coefficient but 0, where a control is the baseline.

    Columns of, condition, control_kind, coefficient (its condition's, also where the control is
    scaled), latents, frequency_ratio, norm_ratio (added norm; NaN where it depends on the prompt),
    kl, kl_own, kl_ratio (per token of neutral text; NaN where not measured), matched. `kl` is by
    (condition, coefficient).
    """
    own = {c.name: c for c in conditions if c.role != "control"}
    rows = [
        {
            "of": c.of,
            "condition": c.name,
            "control_kind": c.control_kind,
            "coefficient": coefficient,
            "latents": c.label,
            "frequency_ratio": c.frequency_ratio,
            "norm_ratio": _norm_ratio(c, own[c.of], k),
            "kl": kl.get((c.name, coefficient), np.nan),
            "kl_own": kl.get((c.of, coefficient), np.nan),
            "matched": c.matched,
        }
        for c in conditions
        for k, coefficient in enumerate(coefficients)
        if c.role == "control" and c.tried(k) and coefficient
    ]
    names = ["of", "condition", "control_kind", "coefficient", "latents", "frequency_ratio"]
    names += ["norm_ratio", "kl", "kl_own", "matched"]
    table = pd.DataFrame(rows, columns=names)
    ratio = table["kl"] / table["kl_own"].where(table["kl_own"] > 0)
    table.insert(names.index("matched"), "kl_ratio", ratio.astype(float))
    return table


def _norm_ratio(control: Condition, own: Condition, k: int) -> float:
    lengths = [c.strengths[k].get("length") if c.strengths else None for c in (control, own)]
    if lengths[0] is None or not lengths[1]:
        return control.norm_ratio
    return lengths[0] / lengths[1]


def control_notes(
    table: pd.DataFrame,
    main: Sequence[Condition],
    chosen: Mapping[str, float],
    cfg: InterventionConfig,
) -> list[str]:
    """A note per kind that could not be matched for some main condition at its coefficient."""
    notes = []
    calipers = {"frequency": cfg.frequency_caliper, "disruption": cfg.kl_caliper}
    calipers["random_kl"] = cfg.kl_caliper
    for kind, caliper in calipers.items():
        parts = []
        for condition in main:
            of = (table["of"] == condition.name) & (table["control_kind"] == kind)
            part = table[of & (table["coefficient"] == chosen.get(condition.name))]
            n = int(part["matched"].sum())
            if len(part) and n < min(MIN_CONTROLS, cfg.n_controls):
                parts.append(f"{condition.name} {n} of {len(part)}")
        if parts:
            notes.append(
                f"{CONTROL_WORDS[kind]}, within a factor of {caliper:g}: {', '.join(parts)}; a "
                f"p-value uses a kind of control of which at least {MIN_CONTROLS} are matched"
            )
    return notes


def left_out_note(kinds: Sequence[Sequence[str]], cfg: InterventionConfig) -> list[str]:
    """A note on kinds asked for that no main condition can have; `kinds` are those of each."""
    had = {kind for some in kinds for kind in some}
    lacking = [kind for kind in cfg.control_kinds if kind not in had]
    if not had or not lacking:
        return []
    reasons = []
    if "frequency" in lacking:
        reasons.append("what is changed are not latents")
    if "random_kl" in lacking:
        reasons.append("nothing is added that could be scaled to a KL")
    if "random_norm" in lacking:
        reasons.append("the change depends on the latents' own activations")
    return [
        f"intervention={cfg.name} has no controls of kind {', '.join(lacking)} here: "
        f"{'; '.join(reasons)}"
    ]
