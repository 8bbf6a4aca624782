"""What an intervention did and how its controls are matched, in sentences and tables."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from saexp.reports.saved import SavedRun
from saexp.stats.intervals import MIN_N as MIN_ENTITIES
from saexp.stats.permutation import MIN_CONTROLS
from saexp.stats.power import ALPHA
from saexp.wording import CONTROL_WORDS, counted, p_value_words

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


_UNITS = {
    "resid_norm": "x the stream's median norm",
    "max_act": "x the latents' maximum activation",
    "p99_act": "x the latents' 99th percentile",
    "raw": "x the direction as it is",
    "clamp": "of the way",
    "scale": "x the latents' own value, added",
    "ablate": "of the way to zero",
    "project_out": "of the component",
    "splice": "of the way to the reconstruction",
    "patch": "of the way to the pair's activation",
    "orthogonalize": "(1: directions taken out)",
}
VERBS = {
    "steer": "adding",
    "clamp": "moving",
    "scale": "scaling",
    "ablate": "silencing",
    "project_out": "removing from the stream",
    "splice": "splicing in",
    "patch": "patching",
    "orthogonalize": "taking out of the weights",
}


PLACES = {
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
"""Where something is read or written, in words."""


def place_words(where: str) -> str:
    """Positions in words; those without words of their own by name."""
    return PLACES.get(where, f"positions {where.replace('_', ' ')}")


def unit_words(cfg: dict[str, Any]) -> str:
    """An intervention's coefficient unit as words that follow the number."""
    name = str(cfg["name"])
    return _UNITS.get(str(cfg["unit"]) if name == "steer" else name, "")


def verb(cfg: dict[str, Any]) -> str:
    """What an intervention does, in words that go before what it changes."""
    return VERBS.get(str(cfg["name"]), f"{cfg['name']} on")


def what(row: Any, with_direction: bool = True, *, towards: bool = False) -> str:
    """What a condition changes, in words: its latents, direction or place.

    Latents are `towards` a group rather than for it where those of both groups are moved there.
    """
    latents = str(row["latent"])
    if row["role"] in ("single", "group"):
        number = len(latents.split("+"))
        named = f"latent {latents}" if number == 1 else f"{number} latents"
        layers = sorted({int(x.partition(":")[0]) for x in latents.split("+") if ":" in x})
        if len(layers) > 1:
            named += f" of layers {', '.join(map(str, layers))}"
        shown = with_direction and row["direction"] not in ("latent", "latents")
        return f"{named} {'towards' if towards else 'for'} '{row['direction']}'" if shown else named
    name = str(row["condition"]).removeprefix(f"{row['direction']}_")
    if name == "splice":
        return "the reconstruction"
    if name.startswith("patch_"):
        place = name.removeprefix("patch_")
        return f"{place} from {row['direction']} prompts" if with_direction else place
    named = f"the {name.replace('_', ' ')} direction"
    return f"{named} towards '{row['direction']}'" if with_direction else named


def prompts_of(group: str) -> str:
    """The prompts of a group in words; of a data set without groups, just prompts."""
    return "prompts" if group == "all" else f"{group} prompts"


def observed_on(run: SavedRun, row: Any, outcome: str) -> str:
    """What a number is the mean over: "20 known entities (100 prompts)"."""
    group = "" if row["group"] == "all" else f"{row['group']} "
    n, n_prompts = int(row[f"{outcome}_n"]), int(row[f"{outcome}_n_prompts"])
    if run.unit_word != "entities":
        return counted(n, f"{group}prompt")
    beside = f" ({counted(n_prompts, 'prompt')})" if n_prompts != n else ""
    return f"{counted(n, f'{group}entity', f'{group}entities')}{beside}"


def effect_sentences(run: SavedRun) -> list[str]:
    """One sentence per main condition and group of prompts that it is run on: the first outcome in
    full, the others' numbers behind it."""
    sentences = []
    for condition in run.main_conditions() if run.outcomes else []:
        first, *others = run.outcomes
        coefficient = run.chosen_coefficient(condition)
        if coefficient is None:
            sentences.append(f"{_unchanged(run, condition, first)}.")
            continue
        for row, before in _rows(run, condition, coefficient):
            sentence = _effect(run, row, before, first)
            sentence += "".join(_beside(run, row, before, o) for o in others)
            sentences.append(f"{sentence}{_attention(run, row)}.{_details(run, row, first)}")
    return sentences


def _rows(
    run: SavedRun, condition: str, coefficient: float
) -> Iterator[tuple[pd.Series, pd.Series]]:
    """Of the summary, by group of prompts: the condition's row, and that of them unsteered."""
    summary = run.summary
    assert summary is not None
    at = (summary["condition"] == condition) & (summary["coefficient"] == coefficient)
    for _, row in summary[at].iterrows():
        start = (summary["role"] == "baseline") & (summary["group"] == row["group"])
        yield row, summary[start].iloc[0]


def _change(row: pd.Series, before: pd.Series, outcome: str) -> str:
    """ "0.00 -> 0.97 [0.92, 0.99]", without an interval where there is none."""
    low, high = row[f"{outcome}_ci_low"], row[f"{outcome}_ci_high"]
    interval = "" if pd.isna(low) else f" [{low:.2f}, {high:.2f}]"
    return f"{before[outcome]:.2f} -> {row[outcome]:.2f}{interval}"


def _effect(run: SavedRun, row: pd.Series, before: pd.Series, outcome: str) -> str:
    cfg = run.config["intervention"]
    where, strength = "", ""
    if cfg["name"] != "orthogonalize":
        where = f" at {place_words(cfg['where'])}"
        strength = f", coefficient {row['coefficient']:g} {unit_words(cfg)}".rstrip()
    sentence = (
        f"{_doing(cfg, row)}{where}{strength}: {_words(outcome)} on "
        f"{observed_on(run, row, outcome)} {_change(row, before, outcome)}"
    )
    if _is_few(row, outcome):
        return f"{sentence}; too few entities for an interval or a test against controls"
    return f"{sentence}; {verdict(run, row, outcome)}"


def _is_few(row: pd.Series, outcome: str) -> bool:
    """Whether intervals and p-values are left out because there are few entities."""
    return int(row[f"{outcome}_n"]) < MIN_ENTITIES


def _details(run: SavedRun, row: pd.Series, outcome: str) -> str:
    """Sentences that follow: the controls of the first outcome, and the cost."""
    controls = "" if _is_few(row, outcome) else control_words(run, row, outcome)
    return f"{controls}{_cost(run, row['condition'], row['coefficient'])}"


def _beside(run: SavedRun, row: pd.Series, before: pd.Series, outcome: str) -> str:
    """Another outcome at the same coefficient: before, after, and how it compares."""
    significant = is_significant(row, outcome)
    compared = ""
    if significant is not None:
        shown = "" if significant else ": not significant"
        if float(row[f"{outcome}_p_controls"]) > ALPHA:
            shown = ": not distinguishable from its controls"
        compared = f" ({p_words(row, outcome, n_tests(run))}{shown})"
    return f"; {_words(outcome)} {_change(row, before, outcome)}{compared}"


def _attention(run: SavedRun, effect: pd.Series) -> str:
    """Attention from the last token to the entity, where it was measured for the condition."""
    table, condition = run.table("attention_summary"), effect["condition"]
    if table is None or condition not in set(table["condition"]):
        return ""
    row = table[table["condition"] == condition].iloc[0]
    beside = []
    if row["n"] >= MIN_ENTITIES:
        beside.append(f"p {p_value_words(float(row['p_value']))} against the unsteered prompts")
    controls = table.loc[(table["of"] == condition) & (table["role"] == "control"), "edited"]
    if len(controls):
        beside.append(f"{len(controls)} controls {controls.min():.3f} to {controls.max():.3f}")
    compared = f" ({'; '.join(beside)})" if beside else ""
    return (
        f"; attention from the last token to the entity {row['original']:.3f} -> "
        f"{row['edited']:.3f}{compared}"
    )


def _doing(cfg: dict[str, Any], row: Any) -> str:
    return f"{verb(cfg)} {what(row, towards=cfg['name'] == 'clamp')}"


def _unchanged(run: SavedRun, condition: str, outcome: str) -> str:
    """A condition without a chosen coefficient: nothing was changed, or nothing measured."""
    summary = run.summary
    assert summary is not None
    own = summary[summary["condition"] == condition]
    row, done = own.iloc[0], _doing(run.config["intervention"], own.iloc[0])
    prompts = prompts_of(row["group"])
    if (own["coefficient"] == 0).all():
        return (
            f"{done} was run at coefficient 0 alone, which changes nothing: {_words(outcome)} of "
            f"{prompts} stays {row[outcome]:.2f}"
        )
    return f"{done}: {_words(outcome)} could be measured on none of the {prompts}"


def _words(outcome: str) -> str:
    return outcome.replace("_", " ")


def _cost(run: SavedRun, condition: str, coefficient: float) -> str:
    costs = run.table("costs")
    if costs is None:
        return ""
    row = costs[(costs["condition"] == condition) & (costs["coefficient"] == coefficient)]
    if row.empty:
        return ""
    others = costs[(costs["of"] == condition) & (costs["role"] == "control")]
    others = others[others["coefficient"] == coefficient]
    # Those that are scaled to equal KL have it by construction.
    others = others[~others["control_kind"].isin(["disruption", "random_kl"])]["neutral_kl"]
    steered = run.config["intervention"]["name"] == "steer"
    which = "controls of equal norm" if steered else "controls"
    beside = f", {which} {others.min():.2f} to {others.max():.2f}" if len(others) else ""
    weights = run.config["intervention"]["name"] == "orthogonalize"
    how = "under the edited weights" if weights else "edited at every token"
    value = f"{row['neutral_kl'].iloc[0]:.2f}"
    return f" KL per token of neutral text {how}: {value} nats{beside}."
