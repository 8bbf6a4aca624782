"""Latents of the shipped model under labels that mean nothing."""

import tempfile
from functools import cache

import numpy as np
import pandas as pd
import worlds

import saexp
from saexp.analysis import AnalysisInputs
from saexp.analysis.contrast import ContrastAnalyzer
from saexp.config import AnalyzerConfig
from saexp.context import ObjectCache
from saexp.latents import Latents, encode_store
from saexp.pipeline.collect import collect_examples
from saexp.pipeline.objects import language_model, sparse_autoencoder

COLUMNS = ["unit", "group", "split", "entity_type", "n_entity_tokens"]


@cache
def latents() -> Latents:
    """Of the default run's 960 entities."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = saexp.compose(["model=tiny", "device=cpu", f"cache_dir={folder}"])
        objects = ObjectCache()
        model = language_model(cfg, objects)
        sae = sparse_autoencoder(cfg, model, objects)
        collected = collect_examples(cfg, model, [sae.hookpoint])
        encoded, _ = encode_store(collected.store, sae, collected.placement.rows)
        used = encoded.rows["split"].isin(["train", "test"]).to_numpy(dtype=bool)
        return Latents(encoded.csr[used], encoded.rows.loc[used, COLUMNS].reset_index(drop=True))


def shuffled_labels(rng: np.random.Generator, n_runs: int) -> dict[str, float]:
    """Share of shuffles after which the default contrast finds anything.

    The causal test changes selected latents only, so a run claims an effect in no more of them.
    """
    significant, shares = [], []
    for _ in range(n_runs):
        rows = latents().rows
        labels = rows.drop_duplicates("unit").set_index("unit")["group"]
        shuffled = pd.Series(rng.permutation(labels.to_numpy()), index=labels.index)
        inputs = AnalysisInputs(
            latents=Latents(latents().csr, rows.assign(group=rows["unit"].map(shuffled))),
            groups=worlds.GROUPS,
            layer=2,
        )
        cfg = AnalyzerConfig(name="contrast", n_bootstrap=0)
        q = ContrastAnalyzer(cfg).analyze(inputs).tables["latents"]["q_value"].to_numpy()
        significant.append(bool((q <= 0.05).any()))
        shares.append(float((q <= 0.05).mean()))
    return {"value": float(np.mean(significant)), "share_of_latents": float(np.mean(shares))}
