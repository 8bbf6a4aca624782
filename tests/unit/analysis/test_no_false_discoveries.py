"""Where group labels mean nothing, the contrast says so: real latents, shuffled labels."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import saexp
from saexp.analysis.base import AnalysisInputs
from saexp.analysis.contrast import ContrastAnalyzer
from saexp.config import AnalyzerConfig
from saexp.context import ObjectCache
from saexp.latents.encode import Latents, encode_store
from saexp.pipeline.collect import collect_examples
from saexp.pipeline.objects import language_model, sparse_autoencoder
from saexp.results import Result

GROUPS = ("known", "unknown")
COLUMNS = ["unit", "group", "split", "entity_type", "n_entity_tokens"]


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Latents:
    """The shipped model's entities under its SAE of layer 2, as task=analyze reads them."""
    cache: Path = tmp_path_factory.mktemp("cache")
    cfg = saexp.compose(["model=tiny", "layer=2", f"cache_dir={cache}", "device=cpu"])
    objects = ObjectCache()
    model = language_model(cfg, objects)
    sae = sparse_autoencoder(cfg, model, objects)
    collected = collect_examples(cfg, model, [sae.hookpoint])
    found, _ = encode_store(collected.store, sae, collected.placement.rows)
    assert collected.examples.groups == GROUPS
    used = (found.rows["split"] != "val").to_numpy()
    return Latents(found.csr[used], found.rows.loc[used, COLUMNS].reset_index(drop=True))


def contrast(latents: Latents, rows: pd.DataFrame) -> Result:
    cfg = AnalyzerConfig(name="contrast", n_bootstrap=0)
    return ContrastAnalyzer(cfg).analyze(
        AnalysisInputs(latents=Latents(latents.csr, rows), groups=GROUPS, layer=2)
    )


def shuffled(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The same labels on other entities."""
    of_unit = rows.drop_duplicates("unit").set_index("unit")["group"]
    order = np.random.default_rng(seed).permutation(len(of_unit))
    other = pd.Series(of_unit.to_numpy()[order], index=of_unit.index)
    return rows.assign(group=rows["unit"].map(other))


def redrawn(rows: pd.DataFrame, seed: int, share: float) -> pd.DataFrame:
    """Labels of very unequal frequency."""
    units = rows["unit"].unique()
    known = np.random.default_rng(seed).random(len(units)) < share
    label = pd.Series(np.where(known, *GROUPS), index=units)
    return rows.assign(group=rows["unit"].map(label))


def test_the_true_labels_are_found(latents: Latents) -> None:
    """So that what follows isn't for want of power."""
    metrics = contrast(latents, latents.rows).metrics
    assert metrics["contrast/n_significant"] > 5  # type: ignore[operator]
    assert metrics["contrast/n_significant_test"] > 5  # type: ignore[operator]


def test_shuffled_labels(latents: Latents) -> None:
    """At most 5 % of 100 shuffles have any latent at q <= 0.05."""
    counts = np.array(
        [
            contrast(latents, shuffled(latents.rows, seed)).metrics["contrast/n_significant"]
            for seed in range(100)
        ]
    )
    assert (counts > 0).mean() <= 0.05


@pytest.mark.parametrize("share", [0.06, 0.9])
def test_shuffled_labels_of_unequal_groups(latents: Latents, share: float) -> None:
    """Where the plain normal approximation finds something in most of them."""
    results = [contrast(latents, redrawn(latents.rows, seed, share)) for seed in range(30)]
    assert np.mean([r.metrics["contrast/n_significant"] != 0 for r in results]) <= 0.05
