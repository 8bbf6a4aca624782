"""What an intervention changed and how it compares with its controls, in sentences."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from saexp.errors import counted
from saexp.reports import interval_words
from saexp.reports.saved_run import SavedRun
from saexp.results import CONTROL_WORDS, outcome_words, p_value_words
from saexp.stats import MIN_N as MIN_ENTITIES
from saexp.stats.significance import ALPHA, MIN_CONTROLS

_CALIPER = {
    "frequency": ("frequency_caliper", "frequency_ratio", " in activation frequency"),
    "disruption": ("kl_caliper", "kl_ratio", " in KL"),
    "random_kl": ("kl_caliper", "kl_ratio", " in KL"),
}


@dataclass(frozen=True)
class KindOfControl:
    """The controls of one kind of a condition at one coefficient, for one outcome."""

    kind: str
    are_sets: bool
    """Whether a control is a set of latents."""
    distances: pd.DataFrame
    """Their rows of the table `controls`."""
    values: pd.Series
    """The outcome under each matched control."""
    p_value: float | None

    @property
    def achieved(self) -> bool:
        """Whether enough controls are matched for a p-value."""
        return len(self.values) >= MIN_CONTROLS

    @property
    def words(self) -> str:
        """The kind, in words that follow a number."""
        sets = "sets of " if self.are_sets and self.kind in ("frequency", "disruption") else ""
        return f"{sets}{CONTROL_WORDS.get(self.kind, self.kind.replace('_', ' '))}"

    @property
    def span(self) -> str:
        """The range of the outcome over the matched controls."""
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
    """The kinds that a row of the summary has at its coefficient, on the same prompts."""
    summary, controls = run.summary, run.controls
    if summary is None or controls is None:
        return []
    same = (summary["coefficient"] == row["coefficient"]) & (summary["group"] == row["group"])
    same &= summary["of"] == row["condition"]
    values = summary[same].set_index("condition")[outcome]
    of_row = controls[
        (controls["of"] == row["condition"]) & (controls["coefficient"] == row["coefficient"])
    ]
    kinds = []
    for kind in [k for k in CONTROL_WORDS if k in set(of_row["control_kind"])]:
        part = of_row[of_row["control_kind"] == kind]
        matched = [c for c in part.loc[part["matched"], "condition"] if c in values.index]
        p = row.get(f"{outcome}_p_{kind}")
        kinds.append(
            KindOfControl(
                kind=kind,
                are_sets="+" in str(row["latent"]),
                distances=part,
                values=values.loc[matched].dropna(),
                p_value=None if p is None or pd.isna(p) else float(p),
            )
        )
    return kinds


def n_tests(run: SavedRun) -> int:
    """The number of tests that Holm's adjustment corrects for."""
    summary = run.summary
    if summary is None:
        return 0
    columns = [f"{o}_p_controls_holm" for o in run.outcomes]
    n = int(summary[[c for c in columns if c in summary]].notna().sum().sum())
    return n * int(summary["n_choices"].iloc[0]) if "n_choices" in summary and n else n


def p_words(row: Any, outcome: str, n: int) -> str:
    """A rank p-value, and its value after Holm over the run's `n` tests."""
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
    """How a condition compares with its controls, as a clause with the p-value."""
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
    before = row[outcome] - row[f"{outcome}_change"]
    less = all(abs(row[f"{outcome}_change"]) < (k.values - before).abs().median() for k in used)
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
    """The range under every kind of control, and why a kind is not used."""
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
    """Why a kind of control gives no p-value."""
    n, n_matched = len(kind.distances), int(kind.distances["matched"].sum())
    if kind.kind not in _CALIPER:
        return f"{n_matched} {kind.words} ({kind.span}), fewer than the {MIN_CONTROLS} needed"
    option, column, of = _CALIPER[kind.kind]
    caliper = float(run.config["intervention"].get(option) or 0)
    ratios = kind.distances[column].dropna()
    median = f"median ratio {ratios.median():.2g}; " if len(ratios) else ""
    return (
        f"{kind.words} are not used, as only {n_matched} of {n} are within a factor of {caliper:g}"
        f"{of} ({median}{MIN_CONTROLS} are needed)"
    )


def control_rows(run: SavedRun) -> dict[str, Any] | None:
    """Each kind of control of the main conditions at their chosen coefficient, how closely it is
    matched, and the range of every outcome."""
    summary, rows = run.summary, []
    if summary is None:
        return None
    for row in summary[summary["main"] & summary["chosen"]].to_dict("records"):
        by_outcome = [kinds_of_control(run, row, o) for o in run.outcomes]
        for kinds in zip(*by_outcome, strict=True):
            distances = kinds[0].distances
            cells: list[Any] = [row["condition"], row["group"], row["coefficient"]]
            cells.append(CONTROL_WORDS[kinds[0].kind])
            cells += [len(distances), int(distances["matched"].sum())]
            cells += [_ratios(distances[f"{c}_ratio"]) for c in ("frequency", "norm", "kl")]
            for kind in kinds:
                cells += [kind.span, kind.p_value]
            rows.append([*cells, "yes" if all(k.achieved for k in kinds) else "no"])
    head = ["condition", "prompts", "coefficient", "controls", "n", "matched"]
    head += ["frequency ratio", "norm ratio", "KL ratio"]
    for outcome in run.outcomes:
        head += [f"{outcome}, range of matched", f"rank p, {outcome}"]
    return {"head": [*head, "in the p-value"], "rows": rows} if rows else None


def _ratios(values: pd.Series) -> str:
    """The median and the range."""
    values = values.dropna()
    if values.empty:
        return "–"
    return f"{values.median():.2g} ({values.min():.2g} to {values.max():.2g})"


_UNITS = {
    "resid_norm": "× the stream's median norm",
    "max_act": "× the latents' maximum activation",
    "p99_act": "× the latents' 99th percentile",
    "raw": "× the unscaled direction",
    "clamp": "of the way",
    "scale": "× the latents' activation, added",
    "ablate": "of the way to zero",
    "project_out": "of the component",
    "splice": "of the way to the reconstruction",
    "patch": "of the way to the paired prompt's activation",
    "orthogonalize": "(1: the directions are removed)",
}
_ACTIONS = {
    "steer": ("adding", "to"),
    "clamp": ("moving", "on"),
    "scale": ("scaling", "on"),
    "ablate": ("ablating", "on"),
    "project_out": ("projecting out", "on"),
    "splice": ("splicing in", "on"),
    "patch": ("patching", "into"),
    "orthogonalize": ("orthogonalizing the weights against", "on"),
}
"""Intervention -> (its verb, the preposition before the prompts)."""
_POSITIONS = {
    "all": "every token",
    "prompt": "the prompt's tokens",
    "generated": "the generated tokens",
    "last": "the last token",
    "entity": "the entity's tokens",
    "entity_all": "the entity's tokens",
    "entity_last": "the entity's last token",
    "entity_to_end": "the tokens from the entity on",
    "after_entity": "the token after the entity",
    "continuation": "the continuation's tokens",
}


def position_words(where: str) -> str:
    """Positions in words, or their name if there are no words for it."""
    return _POSITIONS.get(where, f"positions {where.replace('_', ' ')}")


def unit_words(cfg: dict[str, Any]) -> str:
    """The unit of an intervention's coefficient, as words that follow the number."""
    name = str(cfg["name"])
    return _UNITS.get(str(cfg["unit"]) if name == "steer" else name, "")


def coefficient_title(cfg: dict[str, Any]) -> str:
    """Title of an axis that shows coefficients."""
    unit = unit_words(cfg)
    return f"coefficient ({unit})" if unit else "coefficient"


def target_words(row: Any, *, towards: bool = False) -> str:
    """What a condition changes: its latents, its direction or the patched activation.

    `towards` is for interventions that move latents to their values on a group.
    """
    latents = str(row["latent"])
    if row["role"] in ("single", "group"):
        n = len(latents.split("+"))
        layers = sorted({int(x.partition(":")[0]) for x in latents.split("+") if ":" in x})
        of_layers = f" of layers {', '.join(map(str, layers))}" if len(layers) > 1 else ""
        if row["direction"] in ("latent", "latents"):
            return f"latent {latents}" if n == 1 else f"{n} latents{of_layers}"
        if towards:
            selected = f"latent {latents}" if n == 1 else f"{n} latents{of_layers}"
            return f"{selected} towards '{row['direction']}'"
        if n == 1:
            return f"the '{row['direction']}' latent {latents}"
        return f"the {n} '{row['direction']}' latents{of_layers}"
    name = str(row["condition"]).removeprefix(f"{row['direction']}_")
    if name == "splice":
        return "the reconstruction"
    if name.startswith("patch_"):
        return f"{name.removeprefix('patch_')} from {row['direction']} prompts"
    return f"the {name.replace('_', ' ')} direction towards '{row['direction']}'"


def action_words(cfg: dict[str, Any], row: Any) -> str:
    """What an intervention does: "adding the 2 'unknown' latents to known prompts"."""
    verb, preposition = _ACTIONS.get(str(cfg["name"]), (f"{cfg['name']} of", "on"))
    target = target_words(row, towards=cfg["name"] == "clamp")
    return f"{verb} {target} {preposition} {prompts_of(row['group'])}"


def capitalized(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def prompts_of(group: str) -> str:
    """The prompts of a group; just "prompts" if the data set has no groups."""
    return "prompts" if group == "all" else f"{group} prompts"


def observed_on(run: SavedRun, row: Any, outcome: str) -> str:
    """What a value is the mean over: "20 known entities (100 prompts)"."""
    group = "" if row["group"] == "all" else f"{row['group']} "
    n, n_prompts = int(row[f"{outcome}_n"]), int(row[f"{outcome}_n_prompts"])
    if run.unit_word != "entities":
        return counted(n, f"{group}prompt")
    prompts = f" ({counted(n_prompts, 'prompt')})" if n_prompts != n else ""
    return f"{counted(n, f'{group}entity', f'{group}entities')}{prompts}"


def main_rows(run: SavedRun) -> Iterator[tuple[pd.Series, pd.Series]]:
    """Per main condition and group of prompts, at the coefficient chosen on the train split: its
    row of the summary, and that of the same prompts without intervention."""
    for condition in run.main_conditions() if run.outcomes else []:
        coefficient = run.chosen_coefficient(condition)
        if coefficient is not None:
            yield from _rows(run, condition, coefficient)


def with_baseline(run: SavedRun, rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of a condition on one group of prompts in the order of the coefficient, at 0 the value
    without intervention if 0 was not run."""
    summary = run.summary
    assert summary is not None
    first = rows.iloc[0]
    if (rows["coefficient"] == 0).any():
        return rows.sort_values("coefficient")
    at_zero = summary[(summary["role"] == "baseline") & (summary["group"] == first["group"])]
    same = {name: first[name] for name in ("condition", "role", "of", "direction", "latent")}
    return pd.concat([at_zero.assign(**same, coefficient=0.0), rows]).sort_values("coefficient")


def effect_clause(run: SavedRun, row: pd.Series, before: pd.Series) -> str:
    """The effect on the first outcome, as a clause: "adding the 2 'unknown' latents to known
    prompts (coefficient 0.9, n = 100) raises the refusal rate from 0.00 to 0.97 [0.92, 0.99], above
    all its controls"."""
    outcome = run.outcomes[0]
    name = f"the {outcome_words(outcome)}{' rate' if run.is_rate(outcome) else ''}"
    at = f"n = {int(row[f'{outcome}_n'])}"
    if run.config["intervention"]["name"] != "orthogonalize":
        at = f"coefficient {row['coefficient']:g}, {at}"
    action = f"{action_words(run.config['intervention'], row)} ({at})"
    interval = interval_words(row[f"{outcome}_ci_low"], row[f"{outcome}_ci_high"], 2)
    change = f"from {before[outcome]:.2f} to {row[outcome]:.2f}{interval}"
    if f"{before[outcome]:.2f}" == f"{row[outcome]:.2f}":
        verb, change = "leaves", f"at {row[outcome]:.2f}{interval}"
    elif not is_significant(row, outcome):
        verb = "changes"
    else:
        verb = "raises" if row[outcome] > before[outcome] else "lowers"
    if _is_few(row, outcome):
        return (
            f"{action} {verb} {name} {change} (too few entities for an interval or a test against "
            "controls)"
        )
    return f"{action} {verb} {name} {change}, {verdict(run, row, outcome)}"


def effect_sentences(run: SavedRun) -> list[str]:
    """One sentence per main condition and group of prompts: the first outcome in full, the numbers
    of the others after it."""
    sentences = []
    for condition in run.main_conditions() if run.outcomes else []:
        first, *others = run.outcomes
        coefficient = run.chosen_coefficient(condition)
        if coefficient is None:
            sentences.append(f"{_unchanged(run, condition, first)}.")
            continue
        for row, before in _rows(run, condition, coefficient):
            sentence = _effect(run, row, before, first)
            sentence += "".join(_further(run, row, before, o) for o in others)
            sentences.append(f"{sentence}{_attention(run, row)}.{_details(run, row, first)}")
    return sentences


def _rows(
    run: SavedRun, condition: str, coefficient: float
) -> Iterator[tuple[pd.Series, pd.Series]]:
    """Per group of prompts the condition's row of the summary and the baseline's."""
    summary = run.summary
    assert summary is not None
    at = (summary["condition"] == condition) & (summary["coefficient"] == coefficient)
    for _, row in summary[at].iterrows():
        is_baseline = (summary["role"] == "baseline") & (summary["group"] == row["group"])
        yield row, summary[is_baseline].iloc[0]


def _change(row: pd.Series, before: pd.Series, outcome: str) -> str:
    """ "0.00 -> 0.97 [0.92, 0.99]"."""
    if pd.isna(before[outcome]) and pd.isna(row[outcome]):
        return "has no value on these prompts"
    interval = interval_words(row[f"{outcome}_ci_low"], row[f"{outcome}_ci_high"], 2)
    return f"{before[outcome]:.2f} -> {row[outcome]:.2f}{interval}"


def _effect(run: SavedRun, row: pd.Series, before: pd.Series, outcome: str) -> str:
    cfg = run.config["intervention"]
    where, coefficient = "", ""
    if cfg["name"] != "orthogonalize":
        where = f" at {position_words(cfg['where'])}"
        coefficient = f", coefficient {row['coefficient']:g} {unit_words(cfg)}".rstrip()
    sentence = (
        f"{capitalized(action_words(cfg, row))}{where}{coefficient}: {outcome_words(outcome)} on "
        f"{observed_on(run, row, outcome)} {_change(row, before, outcome)}"
    )
    if _is_few(row, outcome):
        return f"{sentence}; too few entities for an interval or a test against controls"
    return f"{sentence}; {verdict(run, row, outcome)}"


def _is_few(row: pd.Series, outcome: str) -> bool:
    """Whether there are too few entities for intervals and p-values."""
    return int(row[f"{outcome}_n"]) < MIN_ENTITIES


def _details(run: SavedRun, row: pd.Series, outcome: str) -> str:
    """Sentences on the controls of the first outcome and on the cost."""
    controls = "" if _is_few(row, outcome) else control_words(run, row, outcome)
    return f"{controls}{_cost(run, row['condition'], row['coefficient'])}"


def _further(run: SavedRun, row: pd.Series, before: pd.Series, outcome: str) -> str:
    """Another outcome at the same coefficient: before, after, and against controls."""
    significant = is_significant(row, outcome)
    compared = ""
    if significant is not None:
        conclusion = "" if significant else ": not significant"
        if float(row[f"{outcome}_p_controls"]) > ALPHA:
            conclusion = ": not distinguishable from its controls"
        compared = f" ({p_words(row, outcome, n_tests(run))}{conclusion})"
    return f"; {outcome_words(outcome)} {_change(row, before, outcome)}{compared}"


def _attention(run: SavedRun, effect: pd.Series) -> str:
    """Attention from the last token to the entity, if it was measured for the condition."""
    table, condition = run.table("attention_summary"), effect["condition"]
    if table is None or condition not in set(table["condition"]):
        return ""
    row = table[table["condition"] == condition].iloc[0]
    comparisons = []
    if row["n"] >= MIN_ENTITIES:
        comparisons.append(
            f"p {p_value_words(float(row['p_value']))} against the unsteered prompts"
        )
    controls = table.loc[(table["of"] == condition) & (table["role"] == "control"), "edited"]
    if len(controls):
        comparisons.append(f"{len(controls)} controls {controls.min():.3f} to {controls.max():.3f}")
    compared = f" ({'; '.join(comparisons)})" if comparisons else ""
    return (
        f"; attention from the last token to the entity {row['original']:.3f} -> "
        f"{row['edited']:.3f}{compared}"
    )


def _unchanged(run: SavedRun, condition: str, outcome: str) -> str:
    """A condition without a chosen coefficient: nothing was changed, or nothing was measured."""
    summary = run.summary
    assert summary is not None
    rows = summary[summary["condition"] == condition]
    row = rows.iloc[0]
    action = capitalized(action_words(run.config["intervention"], row))
    if (rows["coefficient"] == 0).all():
        return (
            f"{action} was run only at coefficient 0, which changes nothing: "
            f"{outcome_words(outcome)} stays {row[outcome]:.2f}"
        )
    return f"{action}: {outcome_words(outcome)} could not be measured on any prompt"


def _cost(run: SavedRun, condition: str, coefficient: float) -> str:
    costs = run.table("costs")
    if costs is None:
        return ""
    row = costs[(costs["condition"] == condition) & (costs["coefficient"] == coefficient)]
    if row.empty:
        return ""
    controls = costs[(costs["of"] == condition) & (costs["role"] == "control")]
    controls = controls[controls["coefficient"] == coefficient]
    # Controls that are scaled to equal KL have the same cost by construction.
    is_scaled = controls["control_kind"].isin(["disruption", "random_kl"])
    kl = controls.loc[~is_scaled, "neutral_kl"]
    name = run.config["intervention"]["name"]
    kind = "controls of equal norm" if name == "steer" else "controls"
    compared = f" ({kind}: {kl.min():.2f} to {kl.max():.2f})" if len(kl) else ""
    how = "with the edited weights" if name == "orthogonalize" else "with the edit at every token"
    value = f"{row['neutral_kl'].iloc[0]:.2f}"
    return f" KL divergence on neutral text {how}: {value} nats per token{compared}."
