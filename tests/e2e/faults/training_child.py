"""A streamed training in a process whose memory is limited, beside a corpus that exceeds it."""

import ctypes
import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import torch

import saexp
from saexp.data.corpora import DOCUMENTS, MANIFEST, TOKENS, Corpus
from saexp.digests import sealed
from saexp.models.resolution import ASSETS

BOUND = 96 * 2**20
"""Bytes that the process may allocate beside what it has after a first, small training."""
N_SAMPLES = 220_000
"""Their activations have 128 numbers of 4 bytes each: 113 MB."""
N_TOKENS = 60_000_000
"""Of 2 bytes each: 120 MB."""


def _data_bytes() -> int:
    """Size of the process' private writable memory, which RLIMIT_DATA limits."""
    status = Path("/proc/self/status").read_text("utf-8")
    (line,) = [one for one in status.splitlines() if one.startswith("VmData:")]
    return int(line.split()[1]) * 1024


def _enlarge(folder: Path) -> None:
    """Repeat the contexts of a tokenized corpus on disk, as if they were of further documents."""
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    n_times = -(-N_TOKENS // manifest["n_tokens"])
    documents = np.fromfile(folder / DOCUMENTS, dtype="<i8")
    tokens = (folder / TOKENS).read_bytes()
    with (folder / TOKENS).open("wb") as file, (folder / DOCUMENTS).open("wb") as numbers:
        for n in range(n_times):
            file.write(tokens)
            numbers.write((documents + n * manifest["n_documents"]).tobytes())
    for name in ("n_tokens", "n_contexts", "n_documents"):
        manifest[name] *= n_times
    for name in (TOKENS, DOCUMENTS):
        manifest["files"][name]["bytes"] *= n_times
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest)), encoding="utf-8")


def _fails(allocate: Any) -> bool:
    """Whether memory runs out."""
    try:
        allocate()
    except (MemoryError, RuntimeError) as error:
        return isinstance(error, MemoryError) or "memory" in str(error)
    return False


def train_in_bounds(folder: Path, reported: Any) -> None:
    """Reports {tokens of the corpus, tokens read, explained variance} of the training, and whether
    memory runs out where the corpus or the activations are loaded."""
    torch.set_num_threads(1)
    words = [
        "task=train",
        "dataset=corpus",
        f"dataset.path={ASSETS / 'tiny/background.txt'}",
        "dataset.document=line",
        "dataset.context_size=512",
        "layer=0",
        "width=64",
        "sae_trainer=topk",
        "sae_trainer.options.k=8",
        "sae_trainer.batch_size=1024",
        "sae_trainer.buffer_rows=4096",
        "store.batch_tokens=2048",
        "tracker=none",
        f"cache_dir={folder / 'cache'}",
    ]
    # Imports all that a training imports, and tokenizes.
    saexp.run(saexp.compose([*words, "sae_trainer.n_samples=8192"]), folder / "first")
    (tokens_folder,) = (p.parent for p in (folder / "cache").rglob(TOKENS))
    _enlarge(tokens_folder)
    corpus = Corpus.open(tokens_folder)
    # What the first training has freed and not returned to the system would add to the bound.
    ctypes.CDLL(None).malloc_trim(0)
    limit = _data_bytes() + BOUND
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    # One held-out context: its activations and logits are in memory.
    options = [f"sae_trainer.n_samples={N_SAMPLES}", "sae_trainer.held_out=0.00001"]
    metrics = saexp.run(saexp.compose([*words, *options]), folder / "bounded").metrics
    tensors: list[torch.Tensor] = []
    reported.put(
        {
            "corpus_tokens": corpus.n_tokens,
            "n_tokens": metrics["train/n_tokens"],
            "explained_variance": metrics["reconstruction/explained_variance"],
            "no_memory_for_corpus": _fails(lambda: np.array(corpus._tokens)),
            "no_memory_for_activations": _fails(
                lambda: tensors.extend(torch.ones(1024, 128) for _ in range(N_SAMPLES // 1024))
            ),
        }
    )
