"""What catalogue and files say of an SAE, beside what it does: fits, differs, unknown."""

from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from saexp.errors import SAEError
from saexp.saes import SAESettings, SparseAutoencoder
from saexp.saes.catalogue import catalogue, entries
from saexp.saes.formats.saelens import recorded_frequencies
from saexp.saes.loading import load_sae
from saexp.saes.validation import Comparison, Fit, check_fit
from tests.unit.saes.make import D_IN, D_SAE, HOOK_NAME, parameters, points, sae, write_saelens

N = 600
UNKNOWN = {"l0", "explained_variance", "inactive_fraction", "dead_fraction", "mean_norm"}


def looked_at(one: SparseAutoencoder, **metadata: Any) -> tuple[Fit, dict[str, Comparison]]:
    """At random points, with what its catalogue would say."""
    one.metadata |= metadata
    fit = check_fit(one, points(N, D_IN), torch.zeros(N, dtype=torch.bool), {})
    return fit, {c.name: c for c in fit.comparisons}


def notes_about(fit: Fit, words: str) -> list[str]:
    return [p for p in fit.problems if words in p]


def test_what_the_files_do_not_state_is_unknown() -> None:
    fit, checks = looked_at(sae("jumprelu"))
    assert {c.name for c in checks.values() if c.verdict == "unknown"} == UNKNOWN
    assert all(c.expected is None for c in checks.values())
    assert not notes_about(fit, "catalogue")


def test_here_is_what_the_formulas_give() -> None:
    """L0, both definitions of explained variance and the silent share, written out."""
    one = sae("jumprelu", metadata={})
    x = points(N, D_IN).double()
    features = one.encode(x.float()).double()
    error = x - one.decode(features.float()).double()
    spread = x - x.mean(0)
    seen = looked_at(one)[0].measurements
    assert seen is not None
    legacy = (1 - (error**2).sum(1) / (spread**2).sum(1)).mean()
    checks = {
        seen.l0: (features > 0).sum(1).double().mean(),
        seen.explained_variance: 1 - (error**2).mean() / (spread**2).mean(),
        seen.explained_variance_legacy: legacy,
        seen.inactive_fraction: ((features > 0).sum(0) == 0).double().mean(),
        seen.mean_norm: (x**2).sum(1).sqrt().mean(),
    }
    for ours, theirs in checks.items():
        assert ours == pytest.approx(float(theirs), rel=1e-5)
    assert seen.n == N


@pytest.mark.parametrize(("by", "verdict"), [(2.9, "fits"), (3.1, "differs"), (1 / 3.1, "differs")])
def test_l0_within_a_factor_of_three(by: float, verdict: str) -> None:
    l0 = looked_at(sae("jumprelu"))[1]["l0"].measured
    fit, checks = looked_at(sae("jumprelu"), expected_l0=l0 * by)
    assert checks["l0"].verdict == verdict
    assert bool(notes_about(fit, "active latents a token at layer_3.resid_post")) == (
        verdict == "differs"
    )


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(("above", "verdict"), [(0.19, "fits"), (0.21, "differs"), (-3.0, "fits")])
def test_explained_variance_at_most_a_fifth_below(above: float, verdict: str, legacy: bool) -> None:
    """By whichever of the two definitions is nearer."""
    seen = looked_at(sae("jumprelu"))[0].measurements
    assert seen is not None
    pair = (seen.explained_variance, seen.explained_variance_legacy)
    nearer = max(pair) if above > 0 else pair[legacy]
    fit, checks = looked_at(sae("jumprelu"), expected_explained_variance=nearer + above)
    assert checks["explained_variance"].verdict == verdict
    assert bool(notes_about(fit, "the catalogue reports")) == (verdict == "differs")


@pytest.mark.parametrize(("by", "verdict"), [(1.9, "fits"), (2.1, "differs"), (1 / 2.1, "differs")])
def test_the_norm_a_scaling_factor_was_made_for(by: float, verdict: str) -> None:
    norm = float(points(N, D_IN).norm(dim=-1).mean())
    factor = D_IN**0.5 / (norm * by)
    options: dict[str, Any] = {
        "normalize_activations": "expected_average_only_in",
        "norm_factor": factor,
    }
    fit, checks = looked_at(sae("standard", **options))
    assert checks["mean_norm"].expected == pytest.approx(norm * by)
    assert checks["mean_norm"].verdict == verdict
    assert bool(notes_about(fit, "was scaled for vectors of mean norm")) == (verdict == "differs")
    _, checks = looked_at(sae("standard", **options), norm_factor_by="estimate")
    assert checks["mean_norm"].verdict == "unknown"
    _, checks = looked_at(sae("standard"), expected_norm=norm * by)
    assert checks["mean_norm"].verdict == verdict


def half_silent() -> SparseAutoencoder:
    """Its first half never fires."""
    p = parameters("standard")
    p["b_enc"][: D_SAE // 2] = -1e4
    return SparseAutoencoder(p, SAESettings(architecture="standard", hookpoint=sae().hookpoint))


@pytest.mark.parametrize(
    ("first", "second", "problem"),
    [
        (0.0, 0.3, None),
        (1e-5, 0.3, None),
        (0.3, 0.3, "the frequencies recorded in training predict 0.00"),
        (0.0, 0.0, "that were dead in training is active in 600 positions"),
    ],
)
def test_dead_latents_as_recorded(
    tmp_path: Any, first: float, second: float, problem: str | None
) -> None:
    """Rare latents are expected to be silent in so few positions; dead ones to be silent at all."""
    frequency = torch.full((D_SAE,), first)
    frequency[D_SAE // 2 :] = second
    file = tmp_path / "sparsity.safetensors"
    save_file({"sparsity": torch.log10(frequency + 1e-10)}, file)
    torch.testing.assert_close(
        recorded_frequencies(file), frequency.double(), rtol=1e-4, atol=1e-12
    )
    fit, checks = looked_at(half_silent(), frequencies=str(file))
    silent, dead = checks["inactive_fraction"], checks["dead_fraction"]
    assert silent.measured == 0.5
    assert silent.expected == pytest.approx(float((1 - frequency.double()).pow(N).mean()), abs=1e-6)
    assert dead.expected == float((frequency == 0).float().mean())
    assert "600 positions" in dead.quantity
    training_notes = notes_about(fit, "training")
    assert bool(training_notes) == (problem is not None)
    assert problem is None or any(problem in p for p in training_notes)


def test_a_saelens_folder_brings_its_frequencies(tmp_path: Any) -> None:
    cfg = {"architecture": "standard", "metadata": {"hook_name": HOOK_NAME, "prepend_bos": False}}
    folder = write_saelens(tmp_path / "sae", cfg, parameters("standard"))
    assert load_sae(folder).metadata["frequencies"] is None
    file = folder / "sparsity.safetensors"
    save_file({"sparsity": torch.full((D_SAE,), -1.0)}, file)
    loaded = load_sae(folder)
    assert loaded.metadata["frequencies"] == str(file)
    assert loaded.metadata["prepend_bos"] is False
    assert looked_at(loaded)[1]["inactive_fraction"].verdict != "unknown"
    save_file({"sparsity": torch.full((D_SAE - 1,), -1.0)}, file)
    with pytest.raises(SAEError, match=f"has {D_SAE - 1} frequencies and .* has {D_SAE} latents"):
        looked_at(loaded)
    save_file({"sparsity": torch.ones(2, 2)}, file)
    with pytest.raises(SAEError, match="does not hold one log10 frequency per latent"):
        looked_at(loaded)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"metadata": {"prepend_bos": True}}, True),
        ({"metadata": {"prepend_bos": False}}, False),
        ({"prepend_bos": False}, False),
        ({}, True),
        ({"metadata": {"sae_lens_version": "6.0.0"}}, None),
    ],
)
def test_bos_as_the_config_says_it_before_and_after_version_6(
    tmp_path: Any, config: dict[str, Any], says: bool | None
) -> None:
    about = {"hook_name": HOOK_NAME, **config.get("metadata", {})}
    cfg = {"architecture": "standard", **config, "metadata": about}
    if not about.keys() - {"hook_name"}:
        cfg = {"architecture": "standard", **config, "hook_name": HOOK_NAME}
    folder = write_saelens(tmp_path / "sae", cfg, parameters("standard"))
    assert load_sae(folder).metadata["prepend_bos"] is says


def test_expected_values_are_those_of_sae_lens_own_reader(lens: ModuleType) -> None:
    """Its 1.0 and 0.0 mean unknown."""
    directory = lens.loading.pretrained_saes_directory.get_pretrained_saes_directory()
    known = 0
    for release in catalogue():
        theirs = directory[release]
        for entry in entries(release):
            explained, l0 = theirs.expected_var_explained[entry.id], theirs.expected_l0[entry.id]
            assert entry.expected_explained_variance == (None if explained == 1.0 else explained)
            if l0:
                assert entry.expected_l0 == l0
            elif entry.expected_l0 is not None:
                assert f"average_l0_{entry.expected_l0:.0f}" in entry.path
            known += entry.expected_explained_variance is not None
    assert known > 50
