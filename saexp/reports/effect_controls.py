"""What a condition's controls do and how closely they are matched, in numbers and words."""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from saexp.reports.saved import SavedRun
from saexp.stats.exchangeable import MIN_CONTROLS
from saexp.stats.multiplicity import ALPHA
from saexp.wording import CONTROL_WORDS, p_value_words

_CALIPER = {
    "frequency": ("frequency_caliper", "frequency_ratio", " in activation frequency"),
    "disruption": ("kl_caliper", "kl_ratio", " in KL"),
    "random_kl": ("kl_caliper", "kl_ratio", " in KL"),
}


@dataclass(frozen=True)
class KindOfControl:
    """The controls of one kind of a condition at one coefficient, for one outcome."""

    kind: str
    several: bool
    """Whether a control is a set of latents."""
    distances: pd.DataFrame
    """Their rows of the table `controls`."""
    values: pd.Series
    """The outcome of the matched ones."""
    p_value: float | None

    @property
    def achieved(self) -> bool:
        """Whether enough are matched for the p-value to be used."""
        return len(self.values) >= MIN_CONTROLS

    @property
    def words(self) -> str:
        """The kind, in words that follow a number."""
        sets = "sets of " if self.several and self.kind in ("frequency", "disruption") else ""
        return f"{sets}{CONTROL_WORDS.get(self.kind, self.kind.replace('_', ' '))}"

    @property
    def span(self) -> str:
        """The range of the outcome."""
        if self.values.empty:
            return "–"
        ends = dict.fromkeys([f"{self.values.min():.2f}", f"{self.values.max():.2f}"])
        return " to ".join(ends)

    @property
    def n_less_extreme(self) -> int:
        """Controls that are less extreme than the condition."""
        assert self.p_value is not None
        return len(self.values) + 1 - round(self.p_value * (len(self.values) + 1))


def kinds_of_control(run: SavedRun, row: Any, outcome: str) -> list[KindOfControl]:
    """One entry per kind that a row of the summary has at its coefficient, on the same prompts."""
    summary, controls = run.summary, run.controls
    if summary is None or controls is None:
        return []
    same = (summary["coefficient"] == row["coefficient"]) & (summary["group"] == row["group"])
    same &= summary["of"] == row["condition"]
    values = summary[same].set_index("condition")[outcome]
    own = controls[
        (controls["of"] == row["condition"]) & (controls["coefficient"] == row["coefficient"])
    ]
    made = []
    for kind in [k for k in CONTROL_WORDS if k in set(own["control_kind"])]:
        part = own[own["control_kind"] == kind]
        matched = [c for c in part.loc[part["matched"], "condition"] if c in values.index]
        p = row.get(f"{outcome}_p_{kind}")
        made.append(
            KindOfControl(
                kind=kind,
                several="+" in str(row["latent"]),
                distances=part,
                values=values.loc[matched].dropna(),
                p_value=None if p is None or pd.isna(p) else float(p),
            )
        )
    return made


def n_tests(run: SavedRun) -> int:
    """Tests that the p-values after Holm are corrected for."""
    summary = run.summary
    if summary is None:
        return 0
    columns = [f"{o}_p_controls_holm" for o in run.outcomes]
    n = int(summary[[c for c in columns if c in summary]].notna().sum().sum())
    return n * int(summary["n_choices"].iloc[0]) if "n_choices" in summary and n else n


def p_words(row: Any, outcome: str, n: int) -> str:
    """A rank p-value, and after Holm over the run's `n` tests."""
    p, holm = row[f"{outcome}_p_controls"], row.get(f"{outcome}_p_controls_holm")
    if holm is None or pd.isna(holm) or n < 2:
        return f"rank p {p_value_words(float(p))}"
    return f"rank p {p_value_words(float(p))}, {float(holm):.2g} after Holm over {n} tests"


def is_significant(row: Any, outcome: str) -> bool | None:
    """Whether a condition differs from its controls, after Holm; None without a p-value."""
    for name in (f"{outcome}_p_controls_holm", f"{outcome}_p_controls"):
        value = row.get(name)
        if value is not None and not pd.isna(value):
            return bool(value <= ALPHA)
    return None


def verdict(run: SavedRun, row: Any, outcome: str) -> str:
    """How a condition compares with its controls, in a clause with the p-value."""
    kinds = kinds_of_control(run, row, outcome)
    used = [k for k in kinds if k.achieved and k.p_value is not None]
    if not kinds:
        return "no controls were run"
    if not used:
        return "too few matched controls for a p-value"
    p = p_words(row, outcome, n_tests(run))
    if float(row[f"{outcome}_p_controls"]) > ALPHA:
        return f"not distinguishable from its controls ({p})"
    if not is_significant(row, outcome):
        p += ": not significant"
    start = row[outcome] - row[f"{outcome}_change"]
    less = all(abs(row[f"{outcome}_change"]) < (k.values - start).abs().median() for k in used)
    weaker = ", which change it more" if less else ""
    if all(row[outcome] > k.values.max() for k in used):
        return f"above all its controls{weaker} ({p})"
    if all(row[outcome] < k.values.min() for k in used):
        return f"below all its controls{weaker} ({p})"
    n_less = sum(k.n_less_extreme for k in used)
    return (
        f"more extreme than {n_less} of its {sum(len(k.values) for k in used)} controls{weaker} "
        f"({p})"
    )


def control_words(run: SavedRun, row: Any, outcome: str) -> str:
    """The range of every kind of control, and why a kind is not used."""
    kinds = kinds_of_control(run, row, outcome)
    used = [k for k in kinds if k.achieved and k.p_value is not None]
    parts = [f"{len(k.values)} {k.words} ({k.span})" for k in used]
    clauses = [", ".join(parts)] if parts else []
    floor = row.get(f"{outcome}_p_controls_floor")
    if parts and floor is not None and row[f"{outcome}_p_controls"] <= floor + 1e-12:
        clauses.append(f"the smallest p-value possible is {float(floor):.2g}")
    clauses += [_unused(run, k) for k in kinds if k not in used]
    return f" Controls: {'; '.join(clauses)}." if clauses else ""


def _unused(run: SavedRun, kind: KindOfControl) -> str:
    """Why a kind gives no p-value, with what it reached."""
    n, n_matched = len(kind.distances), int(kind.distances["matched"].sum())
    if kind.kind not in _CALIPER:
        return f"{n_matched} {kind.words} ({kind.span}), fewer than the {MIN_CONTROLS} needed"
    option, column, of = _CALIPER[kind.kind]
    caliper = float(run.config["intervention"].get(option) or 0)
    ratios = kind.distances[column].dropna()
    median = f", median ratio {ratios.median():.2g}" if len(ratios) else ""
    return (
        f"{kind.words} not used, {n_matched} of {n} within a factor of {caliper:g}{of}{median} "
        f"({MIN_CONTROLS} are needed)"
    )
