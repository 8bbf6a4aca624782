"""Sets of latents that are changed together: of one SAE, or of the SAEs of several layers."""

from collections.abc import Mapping
from dataclasses import dataclass

from saexp.interventions.facts import LatentFacts
from saexp.models.hookpoints import Hookpoint

Sets = list[tuple[str, str, str, tuple[int, ...]]]
"""Of one SAE: (direction, group of the prompts, role, latents)."""


@dataclass(frozen=True)
class LatentSet:
    """Latents that are changed together on the prompts of one group."""

    name: str
    direction: str
    prompts: str
    role: str
    parts: tuple[tuple[LatentFacts, tuple[int, ...]], ...]
    """Per SAE what is known of its latents, and those that are changed."""
    layered: bool = False
    """Whether latents are named by layer."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Layer of each latent, part by part; none where latents are not named by layer."""
        if not self.layered:
            return ()
        return tuple(f.hookpoint.layer for f, latents in self.parts for _ in latents)

    @property
    def written(self) -> tuple[Hookpoint, ...]:
        """Streams that are changed; none where that is the run's own SAE's."""
        return tuple(f.written for f, _ in self.parts) if self.layered else ()


def layered_sets(
    of_layer: Mapping[int, tuple[LatentFacts, Sets]],
) -> tuple[list[LatentSet], list[str]]:
    """Per direction the latents of all layers together, then each layer's alone.

    Latents of one layer are those that its own SAE's test would change as a group. A layer that has
    none for a direction is left out there, with a note.
    """
    found: dict[tuple[str, str], dict[int, tuple[LatentFacts, tuple[int, ...]]]] = {}
    for layer, (facts, sets) in of_layer.items():
        for direction, prompts, _, latents in sets:
            key = ("latents" if direction == "latent" else direction, prompts)
            # Together they come before each by itself.
            found.setdefault(key, {}).setdefault(layer, (facts, latents))
    made, notes = [], []
    for (direction, prompts), parts in found.items():
        lacking = [n for n in of_layer if n not in parts]
        if lacking:
            notes.append(f"no latent for '{direction}' at layer {', '.join(map(str, lacking))}")
        together = tuple(parts.values())
        if len(parts) > 1:
            name = f"{direction}_layers_{spans(list(parts))}"
            made.append(LatentSet(name, direction, prompts, "group", together, layered=True))
        for layer, part in parts.items():
            role = "group" if len(part[1]) > 1 else "single"
            name = f"{direction}_layer_{layer}"
            made.append(LatentSet(name, direction, prompts, role, (part,), layered=True))
    return made, notes


def spans(numbers: list[int]) -> str:
    """Numbers in rising order, neighbours drawn together: 1, 2, 3, 7 as `1-3_7`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "_".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
