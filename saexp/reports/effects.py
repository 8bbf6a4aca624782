"""What an intervention did, from its saved tables: sentences, tables and examples."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from saexp.reports.effect_controls import (
    control_words,
    is_significant,
    n_tests,
    p_words,
    verdict,
)
from saexp.reports.saved import SavedRun
from saexp.stats.means import MIN_N as MIN_ENTITIES
from saexp.stats.multiplicity import ALPHA
from saexp.wording import counted, p_value_words

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
