"""Words of messages and reports."""

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
"""Kinds of control of a causal test; KL is measured on neutral text."""


def counted(n: int, one: str, many: str | None = None) -> str:
    """A number and its noun: "1 row", "3 rows"; `many` where that is not `one` with an s."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def brief(text: str, length: int) -> str:
    """One line of at most this many characters, cut between words."""
    line = " ".join(text.split())
    if len(line) <= length:
        return line
    return line[: length - 1].rpartition(" ")[0].rstrip(".,;:") + " …"


def html_table(title: str, rows: Mapping[str, Any]) -> str:
    """A title and a table of two columns, name and value, as a notebook shows it."""
    cells = "".join(
        f"<tr><th style='text-align:left'>{escape(str(name))}</th>"
        f"<td style='text-align:left'>{escape(str(value))}</td></tr>"
        for name, value in rows.items()
    )
    return f"<div><b>{escape(title)}</b><table>{cells}</table></div>"


def sae_words(about: Any) -> str:
    """ "SAE of 256 latents", or which control it is; `about` is what provenance.json says of it."""
    # In a table with trained SAEs the cell is empty.
    control = f"{about['control']} control " if isinstance(about.get("control"), str) else ""
    return f"{control}SAE of {about['d_sae']} latents"


def p_value_words(p_value: float) -> str:
    """ "= 0.012", or "< 0.001" where it is smaller; "is not defined" of NaN."""
    if p_value != p_value:
        return "is not defined"
    return f"= {p_value:.2g}" if p_value >= 0.001 else "< 0.001"


def is_above_chance(auroc: float, p_value: float, alpha: float) -> bool:
    """Whether an AUROC, in the direction chosen on the train split, is above 0.5 by its p-value.

    `p_value` is two-sided, corrected for the number of latents of which it is said.
    """
    return auroc > 0.5 and p_value <= alpha


def at_chance_words(auroc: float, p_value: float | None, units: str = "entities") -> str:
    """ " (not above chance on held-out entities)" for an AUROC that is not, at level 0.05.

    `p_value` is as in `is_above_chance`; nothing is claimed without one.
    """
    if p_value is None or p_value != p_value or is_above_chance(auroc, p_value, 0.05):
        return ""
    return f" (not above chance on held-out {units})"
