"""Phrases that messages and reports share."""

from collections.abc import Mapping
from html import escape
from typing import Any

CONTROL_WORDS = {
    "frequency": "frequency-matched latents",
    "disruption": "latents scaled to equal KL",
    "random_norm": "random directions of equal norm",
    "random_kl": "random directions of equal KL",
    "own_group": "patches from other prompts of the same group",
}
"""Kind of control of a causal test -> what reports call it; KL is measured on neutral text."""


def counted(n: int, one: str, many: str | None = None) -> str:
    """A number and its noun: "1 row", "3 rows"; `many` is a plural other than `one` with an s."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def brief(text: str, length: int) -> str:
    """The text as one line of at most `length` characters, cut between words."""
    line = " ".join(text.split())
    if len(line) <= length:
        return line
    return line[: length - 1].rpartition(" ")[0].rstrip(".,;:") + " …"


def html_table(title: str, rows: Mapping[str, Any]) -> str:
    """HTML of a title and a table with the columns name and value, for notebooks."""
    cells = "".join(
        f"<tr><th style='text-align:left'>{escape(str(name))}</th>"
        f"<td style='text-align:left'>{escape(str(value))}</td></tr>"
        for name, value in rows.items()
    )
    return f"<div><b>{escape(title)}</b><table>{cells}</table></div>"


def sae_words(about: Any) -> str:
    """ "SAE of 256 latents", with the kind of control it is, if any; `about` is its entry in
    provenance.json."""
    # In a sweep's table the value is missing for a trained SAE.
    control = f"{about['control']} control " if isinstance(about.get("control"), str) else ""
    return f"{control}SAE of {about['d_sae']} latents"


def p_value_words(p_value: float) -> str:
    """ "= 0.012", "< 0.001" for smaller values, "is not defined" for NaN."""
    if p_value != p_value:
        return "is not defined"
    return f"= {p_value:.2g}" if p_value >= 0.001 else "< 0.001"


def is_above_chance(auroc: float, p_value: float, alpha: float) -> bool:
    """Whether an AUROC, in the direction selected on the train split, is significantly above 0.5.

    `p_value` is two-sided and corrected for the number of latents that are reported.
    """
    return auroc > 0.5 and p_value <= alpha


def at_chance_words(auroc: float, p_value: float | None, units: str = "entities") -> str:
    """ " (not above chance on held-out entities)" for an AUROC that is not, at level 0.05.

    `p_value` is as in `is_above_chance`; without it the text is empty.
    """
    if p_value is None or p_value != p_value or is_above_chance(auroc, p_value, 0.05):
        return ""
    return f" (not above chance on held-out {units})"
