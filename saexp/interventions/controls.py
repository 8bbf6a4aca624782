"""Latents to compare with: as often active and as long in the decoder, but telling nothing."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

CONTROL_KINDS = ("frequency", "disruption", "random_norm", "random_kl")
"""Frequency-matched latents; latents scaled to equal KL on neutral text; random directions of equal
norm; random directions of equal KL."""
N_ACHIEVED = 19
"""A kind of control with fewer matched controls gives no p-value: its floor would exceed 0.05."""


@dataclass(frozen=True)
class Controls:
    """Control sets for a set of latents, each as large as that set."""

    sets: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...]


def matched_controls(
    table: pd.DataFrame,
    latents: tuple[int, ...],
    n: int,
    *,
    alpha: float,
    avoid: frozenset[int] = frozenset(),
) -> Controls:
    """The `n` nearest sets by firing frequency (log) and decoder norm (log), member by member.

    `table` has latent, frequency, norm and q_value. Candidates fire at least once, are not
    significant, and are none of `latents` or `avoid`. Fewer than `n` are used, with a note, where
    there are not enough.
    """
    open_to = table[
        (table["frequency"] > 0)
        & ~(table["q_value"] <= alpha)
        & ~table["latent"].isin([*latents, *avoid])
    ].reset_index(drop=True)
    possible = min(n, len(open_to) // max(len(latents), 1))
    notes = ()
    if possible < n:
        notes = (
            f"only {possible} of {n} control sets for latents {_joined(latents)}: "
            f"{len(open_to)} latents fire without being significant",
        )
    places = np.log(np.stack([open_to["frequency"], open_to["norm"]], axis=1).clip(min=1e-9))
    of_latent = table.set_index("latent")
    free = np.ones(len(open_to), dtype=bool)
    sets = []
    for _ in range(possible):
        chosen = []
        for latent in latents:
            own = of_latent.loc[latent, ["frequency", "norm"]].to_numpy(dtype=float)
            distance = np.abs(places - np.log(own.clip(min=1e-9))).sum(axis=1)
            distance[~free] = np.inf
            nearest = int(np.argmin(distance))
            free[nearest] = False
            chosen.append(int(open_to["latent"].to_numpy()[nearest]))
        sets.append(tuple(chosen))
    return Controls(tuple(sets), notes)


def _joined(latents: tuple[int, ...]) -> str:
    return "+".join(map(str, latents))
