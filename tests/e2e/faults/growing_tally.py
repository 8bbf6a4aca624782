"""A tally over many rows in a process of its own, whose peak of memory is reported."""

import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import torch

import saexp.latents as encoding
from saexp.latents.statistics import Tally, tally_store, values_at
from saexp.models import Hookpoint
from saexp.saes import SAESettings, SparseAutoencoder
from tests.unit.latents.test_encode import store_of

D_IN, D_SAE = 64, 2048


def tally_much(folder: Path, n_rows: int, reported: Any) -> None:
    """Reports (bytes of all activations, peak bytes of memory): 10 of 2048 latents, half fire."""
    torch.set_num_threads(1)
    encoding.CHUNK_BYTES = 8 * 2**20
    generator = torch.Generator().manual_seed(0)
    decoder = torch.randn(D_SAE, D_IN, generator=generator)
    sae = SparseAutoencoder(
        {
            "W_enc": decoder.T.contiguous(),
            "W_dec": decoder,
            "b_enc": torch.zeros(D_SAE),
            "b_dec": torch.zeros(D_IN),
        },
        SAESettings(architecture="standard", hookpoint=Hookpoint(0, "resid_post")),
    )
    acts = torch.randn(n_rows, D_IN, generator=generator)
    store = store_of(folder, acts, Hookpoint(0, "resid_post"), 4096)
    del acts
    tally = Tally(np.arange(10), d_sae=D_SAE, correlate=True)
    tally_store(store, sae, lambda rows: rows // 20, np.zeros_like, tally)
    values_at(store, sae, {i: tally.top(i)["row"].to_numpy() for i in range(10)})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    reported.put(json.dumps((n_rows * D_IN * 4, peak)))
