"""Whether an SAE fits the stream it reads, and its numbers beside the published ones."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saexp.errors import SAEError
from saexp.models.hookpoints import Hookpoint
from saexp.saes.formats.saelens import recorded_frequencies
from saexp.saes.sae import SparseAutoencoder

L0_FACTOR = 3.0
"""How far L0 may be from the catalogue's, either way."""
EXPLAINED_BELOW = 0.2
"""How far explained variance may be below the catalogue's, which was measured on other texts and
may count BOS; above it is no fault."""
SILENT_WITHIN = 0.25
"""How far the share of latents that never fire may be from what their recorded frequencies say."""
NORM_FACTOR = 2.0
"""How far the vectors' mean norm may be from the one the SAE was scaled for, either way."""
_UNKNOWN = "unknown"


@dataclass(frozen=True)
class Seen:
    """What was measured at `n` positions of neutral text, special tokens left out."""

    n: int
    l0: float
    explained_variance: float
    explained_variance_legacy: float
    """Mean over positions of 1 - |error|² / |x - mean x|²."""
    mean_norm: float
    """Of the vectors read (minus their mean, where the SAE wants them so)."""
    silent: Float[Tensor, " d_sae"]
    """1.0 for each latent that never fired, else 0.0."""

    @property
    def silent_fraction(self) -> float:
        """Share of latents that never fired at these positions."""
        return float(self.silent.mean())


@dataclass(frozen=True)
class Compared:
    """One quantity here beside what is said of it."""

    quantity: str
    name: str
    """In metrics: `check/<name>`, and `check/expected_<name>` where it is known."""
    here: float
    expected: float | None
    tolerance: str
    verdict: str
    """fits, differs, or unknown where nothing is said."""
    problem: str | None = None


def compared(sae: SparseAutoencoder, seen: Seen) -> list[Compared]:
    """L0, explained variance, latents that never fire, and mean norm. What is unknown says so."""
    return [_l0(sae, seen), _explained_variance(sae, seen), *_silent(sae, seen), _norm(sae, seen)]


def measured(
    sae: SparseAutoencoder,
    x: Float[Tensor, "n d"],
    target: Float[Tensor, "n d_out"],
    features: Float[Tensor, "n d_sae"],
    reconstruction: Float[Tensor, "n d_out"],
) -> Seen:
    """The numbers that expectations are about."""
    aim, made = target.double(), reconstruction.double()
    error, spread = (aim - made).square().sum(-1), (aim - aim.mean(0)).square().sum(-1)
    read = x - x.mean(-1, keepdim=True) if sae.settings.centre else x
    on = features != 0
    return Seen(
        n=len(x),
        l0=float(on.sum(-1).float().mean()),
        explained_variance=float(1 - error.sum() / spread.sum()),
        explained_variance_legacy=float((1 - error / spread).mean()),
        mean_norm=float(read.norm(dim=-1).mean()),
        silent=(~on.any(0)).float().cpu(),
    )


def _name(sae: SparseAutoencoder) -> str:
    return str(sae.metadata.get("name", "the SAE"))


def _verdict(problem: str | None) -> str:
    return "fits" if problem is None else "differs"


def _l0(sae: SparseAutoencoder, seen: Seen) -> Compared:
    expected, tolerance = sae.metadata.get("expected_l0"), f"within a factor of {L0_FACTOR:g}"
    about = ("active latents a token (L0)", "l0", seen.l0)
    if not expected:
        return Compared(*about, None, tolerance, _UNKNOWN)
    problem = None
    if not expected / L0_FACTOR <= seen.l0 <= expected * L0_FACTOR:
        problem = (
            f"{_name(sae)} has {seen.l0:.0f} active latents a token at {sae.hookpoint.name} on "
            f"neutral text; its catalogue says {expected:.0f}"
        )
    return Compared(*about, float(expected), tolerance, _verdict(problem), problem)


def _explained_variance(sae: SparseAutoencoder, seen: Seen) -> Compared:
    """By the definition that is nearer, for the catalogue does not say which of two it used."""
    expected = sae.metadata.get("expected_explained_variance")
    both = (seen.explained_variance, seen.explained_variance_legacy)
    tolerance = f"at most {EXPLAINED_BELOW:g} below, by the nearer of two definitions"
    about = ("explained variance", "explained_variance")
    if expected is None:
        return Compared(*about, both[0], None, tolerance, _UNKNOWN)
    here = min(both, key=lambda v: abs(v - expected))
    problem = None
    if here < expected - EXPLAINED_BELOW:
        at = (sae.hookpoint_out or sae.hookpoint).name
        problem = (
            f"{_name(sae)} explains {both[0]:.2f} of the variance at {at} on neutral text "
            f"({both[1]:.2f} by the older definition); its catalogue says {expected:.2f}, more "
            f"than {EXPLAINED_BELOW:g} above"
        )
    return Compared(*about, here, float(expected), tolerance, _verdict(problem), problem)


def _silent(sae: SparseAutoencoder, seen: Seen) -> list[Compared]:
    """Dead latents as recorded, and how many would never fire in as few positions as these."""
    here, n = seen.silent_fraction, f"{seen.n:,} positions"
    never = (f"share of latents that never fire in {n}", "silent_fraction", here)
    dead = (f"share of dead latents (here: never fire in {n})", "dead_fraction", here)
    tolerance = f"within {SILENT_WITHIN:g} of its recorded frequencies, positions independent"
    no_fewer = f"no more than {SILENT_WITHIN:g} of the latents recorded as dead fire"
    file = sae.metadata.get("frequencies")
    if not file:
        unknown = (None, tolerance, _UNKNOWN), (None, no_fewer, _UNKNOWN)
        return [Compared(*never, *unknown[0]), Compared(*dead, *unknown[1])]
    frequency = recorded_frequencies(file)
    if len(frequency) != sae.d_sae:
        raise SAEError(
            f"{file} has {len(frequency)} frequencies and {_name(sae)} has {sae.d_sae} latents; "
            "is it another SAE's? sae.check=off does not read it"
        )
    expected = float((1 - frequency).pow(seen.n).mean())
    problem = None
    if abs(here - expected) > SILENT_WITHIN:
        problem = (
            f"{here:.2f} of the latents of {_name(sae)} never fire in {n} of neutral text; by the "
            f"frequencies recorded in training {expected:.2f} would not"
        )
    found = [Compared(*never, expected, tolerance, _verdict(problem), problem)]
    recorded = frequency < 1e-9
    share, problem = float(recorded.double().mean()), None
    awake = 1 - float(seen.silent[recorded].mean()) if bool(recorded.any()) else 0.0
    if awake > SILENT_WITHIN:
        problem = (
            f"{awake:.2f} of the latents of {_name(sae)} that were dead in training fire in {n} of "
            "neutral text"
        )
    return [*found, Compared(*dead, share, no_fewer, _verdict(problem), problem)]


def _expected_norm(sae: SparseAutoencoder) -> float | None:
    """The mean norm that its input scaling was made for; None where none is said."""
    if said := sae.metadata.get("expected_norm"):
        return float(said)
    if (
        sae.settings.normalize_activations != "expected_average_only_in"
        or sae.settings.norm_factor is None
    ):
        return None
    if sae.metadata.get("norm_factor_by") == "estimate":
        return None
    return sae.d_in**0.5 / sae.settings.norm_factor


def _norm(sae: SparseAutoencoder, seen: Seen) -> Compared:
    expected, tolerance = _expected_norm(sae), f"within a factor of {NORM_FACTOR:g}"
    about = ("mean norm of the vectors read", "mean_norm", seen.mean_norm)
    if expected is None:
        return Compared(*about, None, tolerance, _UNKNOWN)
    problem = None
    if not expected / NORM_FACTOR <= seen.mean_norm <= expected * NORM_FACTOR:
        problem = (
            f"{_name(sae)} was scaled for vectors of mean norm {expected:.4g}, and at "
            f"{sae.hookpoint.name} they have {seen.mean_norm:.4g} on neutral text: is it an SAE of "
            "this very model and stream, and its scaling factor its own?"
        )
    return Compared(*about, expected, tolerance, _verdict(problem), problem)


def problems(found: Sequence[Compared]) -> list[str]:
    """One line for each quantity that differs."""
    return [c.problem for c in found if c.problem is not None]


def ordinary(rows: Tensor, special: Tensor) -> Tensor:
    """The rows that are no special tokens; all where every one is."""
    return rows[~special] if not bool(special.all()) else rows


POOR = 0.4
"""Explained variance below which an SAE is said not to fit."""
BETTER = 0.1
"""By how much another reading must be better to be named as the cause."""
N_ROWS = 1024


Pair = tuple[Tensor, Tensor]
"""(what a transcoder reads, what it predicts)."""


@dataclass(frozen=True)
class Fit:
    """What was measured, and what it says."""

    l0: float
    explained_variance: float
    others: dict[str, float] = field(default_factory=dict)
    """Explained variance under other readings: neighbouring layers, scaled, centred, no BOS."""
    problems: list[str] = field(default_factory=list)
    """One line each; empty where the SAE fits."""
    seen: Seen | None = None
    """What its catalogue and files are compared with: the same without special tokens."""
    compared: list[Compared] = field(default_factory=list)
    """Beside what they say."""


@torch.inference_mode()
def check_fit(
    sae: SparseAutoencoder,
    acts: Float[Tensor, "n d"],
    special: Bool[Tensor, " n"],
    neighbours: Mapping[Hookpoint, Float[Tensor, "_ d"] | Pair],
    target: Float[Tensor, "n d_out"] | None = None,
) -> Fit:
    """Compare the SAE's reading of `acts` with its reading of what may have been meant instead.

    `special`: which rows are special tokens. `neighbours`: ordinary rows one layer down and up; of
    a transcoder both streams there, and `target` is the stream that it predicts at its own.
    Explained variance as in REFERENCE.md, section 3.
    """
    step = max(1, len(acts) // N_ROWS)

    def some(rows: Tensor) -> Tensor:
        return rows[::step].to(sae.device, torch.float32)

    x, mark = some(acts), special[::step].to(sae.device)
    aim = x if target is None else some(target)
    features, own = _read(sae, x, aim)
    l0 = float((features != 0).sum(-1).float().mean())
    plain, plain_aim = ordinary(x, mark), ordinary(aim, mark)
    active = ordinary(features, mark)
    seen = measured(sae, plain, plain_aim, active, sae.decode(active, plain).float())
    found = compared(sae, seen)
    others = {}
    for hookpoint, near in neighbours.items():
        there = (near, near) if isinstance(near, Tensor) else near
        others[f"at {hookpoint.name}"] = _read(sae, *map(some, there))[1]
    if bool(mark.any()) and not bool(mark.all()):
        others["without special tokens"] = _read(sae, x[~mark], aim[~mark])[1]
    if sae.is_transcoder:
        told = [*_problems(sae, own, others), *problems(found)]
        return Fit(l0, own, others, told, seen, found)
    if sae.settings.normalize_activations == "none":
        factor = sae.d_in**0.5 / float(x.norm(dim=-1).mean())
        others["scaled to norm sqrt(d_in)"] = _changed(
            sae, x, lambda v: v * factor, lambda v: v / factor
        )
    if not sae.settings.centre:
        mean = x.mean(-1, keepdim=True)
        others["centred"] = _changed(sae, x, lambda v: v - mean, lambda v: v + mean)
    told = [*_problems(sae, own, others), *problems(found)]
    return Fit(l0, own, others, told, seen, found)


def _read(sae: SparseAutoencoder, x: Tensor, target: Tensor) -> tuple[Tensor, float]:
    features = sae.encode(x)
    return features, _explained(target, sae.decode(features, x).float())


def _changed(
    sae: SparseAutoencoder,
    x: Tensor,
    there: Callable[[Tensor], Tensor],
    back: Callable[[Tensor], Tensor],
) -> float:
    changed = there(x)
    return _explained(x, back(sae.decode(sae.encode(changed), changed).float()))


def _explained(x: Tensor, reconstruction: Tensor) -> float:
    x, reconstruction = x.double(), reconstruction.double()
    spread = (x - x.mean(0)).square().sum()
    return float(1 - (x - reconstruction).square().sum() / spread)


_REMEDIES = {
    "without special tokens": "special tokens such as BOS were let in and it was not trained on "
    "them; leave positions.include_special=false",
    "scaled to norm sqrt(d_in)": "its inputs were scaled in training and its files do not say so; "
    "type sae.norm_factor=estimate, or give the factor as a number (norm_scaling_factor in its "
    "config)",
    "centred": "it was trained on vectors minus their mean (TransformerLens' centred weights), "
    "which its files do not say",
}


def _problems(sae: SparseAutoencoder, own: float, others: Mapping[str, float]) -> list[str]:
    name = sae.metadata.get("name", "the SAE")
    if not sae.metadata.get("reconstructs", True):
        return [
            f"{name} is one layer of a cross-layer transcoder, whose latents write to later layers "
            "too: its numbers of reconstruction say nothing; activations and directions are right"
        ]
    # What it reconstructs, or a transcoder predicts.
    at = (sae.hookpoint_out or sae.hookpoint).name
    found = []
    cause = max(others, key=lambda k: others[k], default=None)
    if cause is not None and others[cause] >= max(POOR, own + BETTER):
        remedy = _REMEDIES.get(
            cause, "it looks trained on that layer; check its metadata against the model's blocks"
        )
        found.append(
            f"{name} explains {own:.2f} of the variance at {at} on neutral text, and "
            f"{others[cause]:.2f} {cause}: {remedy}"
        )
    elif own < POOR:
        found.append(
            f"{name} explains only {own:.2f} of the variance at {at} on neutral text, and no more "
            f"under any other reading tried: is it {_kind(sae)} of this very model and stream "
            "(base or chat, resid_post or mlp_out), trained on texts like these?"
        )
    return found


def _kind(sae: SparseAutoencoder) -> str:
    return "a transcoder" if sae.is_transcoder else "an SAE"
