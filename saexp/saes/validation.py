"""Checks whether an SAE fits the stream that it reads, and compares it with published values."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saexp.errors import SAEError
from saexp.models import Hookpoint
from saexp.saes import SparseAutoencoder
from saexp.saes.formats.saelens import recorded_frequencies

L0_FACTOR = 3.0
"""Largest ratio between the measured L0 and the catalogue's, in either direction."""
EXPLAINED_BELOW = 0.2
"""Explained variance may be this much below the catalogue's, which was measured on other texts and
may include BOS. A higher value is not a problem."""
INACTIVE_WITHIN = 0.25
"""Largest difference between the fraction of inactive latents and the one that their recorded
frequencies predict."""
NORM_FACTOR = 2.0
"""Largest ratio between the vectors' mean norm and the one the SAE was scaled for, either way."""
_UNKNOWN = "unknown"


@dataclass(frozen=True)
class Measurements:
    """Measurements at `n` positions of neutral text, without special tokens."""

    n: int
    l0: float
    explained_variance: float
    explained_variance_legacy: float
    """Mean over positions of 1 - |error|² / |x - mean x|²."""
    mean_norm: float
    """Mean norm of the encoded vectors (centred, where the SAE expects centred vectors)."""
    inactive: Float[Tensor, " d_sae"]
    """1.0 for each latent that is active at none of the positions, else 0.0."""

    @property
    def inactive_fraction(self) -> float:
        """Fraction of latents that are active at none of the positions."""
        return float(self.inactive.mean())


@dataclass(frozen=True)
class Comparison:
    """A measured quantity beside its published value."""

    quantity: str
    name: str
    """Name in metrics: `check/<name>`, and `check/expected_<name>` where that is known."""
    measured: float
    expected: float | None
    tolerance: str
    verdict: str
    """`fits`, `differs`, or `unknown` where no value is published."""
    problem: str | None = None


def compare(sae: SparseAutoencoder, measurements: Measurements) -> list[Comparison]:
    """Compare L0, explained variance, inactive latents and mean norm with published values."""
    return [
        _l0(sae, measurements),
        _explained_variance(sae, measurements),
        *_inactive(sae, measurements),
        _norm(sae, measurements),
    ]


def measure(
    sae: SparseAutoencoder,
    x: Float[Tensor, "n d"],
    target: Float[Tensor, "n d_out"],
    features: Float[Tensor, "n d_sae"],
    reconstruction: Float[Tensor, "n d_out"],
) -> Measurements:
    """Measure the quantities that published values exist for."""
    expected, actual = target.double(), reconstruction.double()
    error, spread = (
        (expected - actual).square().sum(-1),
        ((expected - expected.mean(0)).square().sum(-1)),
    )
    vectors = x - x.mean(-1, keepdim=True) if sae.settings.centre else x
    active = features != 0
    return Measurements(
        n=len(x),
        l0=float(active.sum(-1).float().mean()),
        explained_variance=float(1 - error.sum() / spread.sum()),
        explained_variance_legacy=float((1 - error / spread).mean()),
        mean_norm=float(vectors.norm(dim=-1).mean()),
        inactive=(~active.any(0)).float().cpu(),
    )


def _name(sae: SparseAutoencoder) -> str:
    return str(sae.metadata.get("name", "the SAE"))


def _verdict(problem: str | None) -> str:
    return "fits" if problem is None else "differs"


def _l0(sae: SparseAutoencoder, measurements: Measurements) -> Comparison:
    expected, tolerance = sae.metadata.get("expected_l0"), f"within a factor of {L0_FACTOR:g}"
    about = ("active latents a token (L0)", "l0", measurements.l0)
    if not expected:
        return Comparison(*about, None, tolerance, _UNKNOWN)
    problem = None
    if not expected / L0_FACTOR <= measurements.l0 <= expected * L0_FACTOR:
        problem = (
            f"{_name(sae)} has {measurements.l0:.0f} active latents a token at "
            f"{sae.hookpoint.name} on neutral text; the catalogue reports {expected:.0f}"
        )
    return Comparison(*about, float(expected), tolerance, _verdict(problem), problem)


def _explained_variance(sae: SparseAutoencoder, measurements: Measurements) -> Comparison:
    """Uses the nearer of two definitions, since the catalogue does not say which one it used."""
    expected = sae.metadata.get("expected_explained_variance")
    both = (measurements.explained_variance, measurements.explained_variance_legacy)
    tolerance = f"at most {EXPLAINED_BELOW:g} below, by the nearer of two definitions"
    about = ("explained variance", "explained_variance")
    if expected is None:
        return Comparison(*about, both[0], None, tolerance, _UNKNOWN)
    here = min(both, key=lambda v: abs(v - expected))
    problem = None
    if here < expected - EXPLAINED_BELOW:
        at = (sae.hookpoint_out or sae.hookpoint).name
        problem = (
            f"{_name(sae)} explains {both[0]:.2f} of the variance at {at} on neutral text "
            f"({both[1]:.2f} by the older definition); the catalogue reports {expected:.2f}, more "
            f"than {EXPLAINED_BELOW:g} above"
        )
    return Comparison(*about, here, float(expected), tolerance, _verdict(problem), problem)


def _inactive(sae: SparseAutoencoder, measurements: Measurements) -> list[Comparison]:
    """The fraction of inactive latents, compared with what the frequencies recorded in training
    predict for this number of positions, and the fraction of latents recorded as dead."""
    here, n = measurements.inactive_fraction, f"{measurements.n:,} positions"
    never = (f"share of latents that never fire in {n}", "inactive_fraction", here)
    dead = (f"share of dead latents (here: never fire in {n})", "dead_fraction", here)
    tolerance = f"within {INACTIVE_WITHIN:g} of its recorded frequencies, positions independent"
    dead_tolerance = f"no more than {INACTIVE_WITHIN:g} of the latents recorded as dead fire"
    file = sae.metadata.get("frequencies")
    if not file:
        return [
            Comparison(*never, None, tolerance, _UNKNOWN),
            Comparison(*dead, None, dead_tolerance, _UNKNOWN),
        ]
    frequency = recorded_frequencies(file)
    if len(frequency) != sae.d_sae:
        raise SAEError(
            f"{file} has {len(frequency)} frequencies and {_name(sae)} has {sae.d_sae} latents; "
            "they may belong to another SAE; type sae.check=off to ignore them"
        )
    expected = float((1 - frequency).pow(measurements.n).mean())
    problem = None
    if abs(here - expected) > INACTIVE_WITHIN:
        problem = (
            f"a fraction {here:.2f} of the latents of {_name(sae)} is active at none of {n} of "
            f"neutral text; the frequencies recorded in training predict {expected:.2f}"
        )
    inactive = Comparison(*never, expected, tolerance, _verdict(problem), problem)
    recorded = frequency < 1e-9
    dead_fraction, problem = float(recorded.double().mean()), None
    active = 1 - float(measurements.inactive[recorded].mean()) if bool(recorded.any()) else 0.0
    if active > INACTIVE_WITHIN:
        problem = (
            f"a fraction {active:.2f} of the latents of {_name(sae)} that were dead in training is "
            f"active in {n} of neutral text"
        )
    verdict = _verdict(problem)
    return [inactive, Comparison(*dead, dead_fraction, dead_tolerance, verdict, problem)]


def _expected_norm(sae: SparseAutoencoder) -> float | None:
    """The mean norm of inputs in training, from the input scaling; None where it is unknown."""
    if expected := sae.metadata.get("expected_norm"):
        return float(expected)
    if (
        sae.settings.normalize_activations != "expected_average_only_in"
        or sae.settings.norm_factor is None
    ):
        return None
    if sae.metadata.get("norm_factor_by") == "estimate":
        return None
    return sae.d_in**0.5 / sae.settings.norm_factor


def _norm(sae: SparseAutoencoder, measurements: Measurements) -> Comparison:
    expected, tolerance = _expected_norm(sae), f"within a factor of {NORM_FACTOR:g}"
    about = ("mean norm of the vectors read", "mean_norm", measurements.mean_norm)
    if expected is None:
        return Comparison(*about, None, tolerance, _UNKNOWN)
    problem = None
    if not expected / NORM_FACTOR <= measurements.mean_norm <= expected * NORM_FACTOR:
        problem = (
            f"{_name(sae)} was scaled for vectors of mean norm {expected:.4g}, and at "
            f"{sae.hookpoint.name} it is {measurements.mean_norm:.4g} on neutral text; "
            "check that the SAE was trained on this model and stream, and its scaling factor"
        )
    return Comparison(*about, expected, tolerance, _verdict(problem), problem)


def problems(comparisons: Sequence[Comparison]) -> list[str]:
    """One line for each quantity that differs."""
    return [c.problem for c in comparisons if c.problem is not None]


def ordinary(rows: Tensor, special: Tensor) -> Tensor:
    """The rows that are not special tokens; all rows where every one is special."""
    return rows[~special] if not bool(special.all()) else rows


POOR = 0.4
"""Explained variance below which an SAE is reported not to fit."""
BETTER = 0.1
"""Another reading is reported as the cause where its explained variance is higher by this."""
N_ROWS = 1024


Pair = tuple[Tensor, Tensor]
"""(the stream that a transcoder reads, the stream that it predicts)."""


@dataclass(frozen=True)
class Fit:
    """Result of `check_fit`."""

    l0: float
    explained_variance: float
    others: dict[str, float] = field(default_factory=dict)
    """Explained variance under other readings: neighbouring layers, scaled, centred, no BOS."""
    problems: list[str] = field(default_factory=list)
    """One line each; empty where the SAE fits."""
    measurements: Measurements | None = None
    """Measurements at ordinary tokens only, which are compared with published values."""
    comparisons: list[Comparison] = field(default_factory=list)
    """Comparisons with the values of the catalogue and of the SAE's files."""


@torch.inference_mode()
def check_fit(
    sae: SparseAutoencoder,
    acts: Float[Tensor, "n d"],
    special: Bool[Tensor, " n"],
    neighbours: Mapping[Hookpoint, Float[Tensor, "_ d"] | Pair],
    target: Float[Tensor, "n d_out"] | None = None,
) -> Fit:
    """Measure how well the SAE reconstructs `acts`, and whether another reading fits better.

    Other readings are a neighbouring layer, scaled or centred inputs, and inputs without special
    tokens. Explained variance is 1 - sum |x - x_hat|² / sum |x - mean x|².

    Args:
        sae: the SAE or transcoder.
        acts: rows of the stream that it encodes.
        special: which rows are special tokens.
        neighbours: ordinary rows one layer down and up; pairs of both streams for a transcoder.
        target: the stream that a transcoder predicts, at the same rows.
    """
    step = max(1, len(acts) // N_ROWS)

    def subsample(rows: Tensor) -> Tensor:
        return rows[::step].to(sae.device, torch.float32)

    x, mark = subsample(acts), special[::step].to(sae.device)
    expected = x if target is None else subsample(target)
    features, own = _read(sae, x, expected)
    l0 = float((features != 0).sum(-1).float().mean())
    plain, plain_target = ordinary(x, mark), ordinary(expected, mark)
    active = ordinary(features, mark)
    measurements = measure(sae, plain, plain_target, active, sae.decode(active, plain).float())
    comparisons = compare(sae, measurements)
    others = {}
    for hookpoint, near in neighbours.items():
        pair = (near, near) if isinstance(near, Tensor) else near
        others[f"at {hookpoint.name}"] = _read(sae, *map(subsample, pair))[1]
    if bool(mark.any()) and not bool(mark.all()):
        others["without special tokens"] = _read(sae, x[~mark], expected[~mark])[1]
    if sae.is_transcoder:
        messages = [*_problems(sae, own, others), *problems(comparisons)]
        return Fit(l0, own, others, messages, measurements, comparisons)
    if sae.settings.normalize_activations == "none":
        factor = sae.d_in**0.5 / float(x.norm(dim=-1).mean())
        others["scaled to norm sqrt(d_in)"] = _changed(
            sae, x, lambda v: v * factor, lambda v: v / factor
        )
    if not sae.settings.centre:
        mean = x.mean(-1, keepdim=True)
        others["centred"] = _changed(sae, x, lambda v: v - mean, lambda v: v + mean)
    messages = [*_problems(sae, own, others), *problems(comparisons)]
    return Fit(l0, own, others, messages, measurements, comparisons)


def _read(sae: SparseAutoencoder, x: Tensor, target: Tensor) -> tuple[Tensor, float]:
    features = sae.encode(x)
    return features, _explained(target, sae.decode(features, x).float())


def _changed(
    sae: SparseAutoencoder,
    x: Tensor,
    transform: Callable[[Tensor], Tensor],
    inverse: Callable[[Tensor], Tensor],
) -> float:
    """Explained variance where the SAE reads transformed inputs."""
    changed = transform(x)
    return _explained(x, inverse(sae.decode(sae.encode(changed), changed).float()))


def _explained(x: Tensor, reconstruction: Tensor) -> float:
    x, reconstruction = x.double(), reconstruction.double()
    spread = (x - x.mean(0)).square().sum()
    return float(1 - (x - reconstruction).square().sum() / spread)


_REMEDIES = {
    "without special tokens": "the positions include special tokens such as BOS, and it was not "
    "trained on them; type positions.include_special=false",
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
            "too: its reconstruction metrics have no meaning; activations and directions are valid"
        ]
    # The stream that an SAE reconstructs or a transcoder predicts.
    at = (sae.hookpoint_out or sae.hookpoint).name
    cause = max(others, key=lambda k: others[k], default=None)
    if cause is not None and others[cause] >= max(POOR, own + BETTER):
        remedy = _REMEDIES.get(
            cause, "it looks trained on that layer; check its metadata against the model's blocks"
        )
        return [
            f"{name} explains {own:.2f} of the variance at {at} on neutral text, and "
            f"{others[cause]:.2f} {cause}: {remedy}"
        ]
    if own < POOR:
        return [
            f"{name} explains only {own:.2f} of the variance at {at} on neutral text, and no more "
            f"under any other reading tried: is it {_kind(sae)} of this very model and stream "
            "(base or chat, resid_post or mlp_out), trained on texts like these?"
        ]
    return []


def _kind(sae: SparseAutoencoder) -> str:
    return "a transcoder" if sae.is_transcoder else "an SAE"
