"""SAEs by a short name, and the latents of texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from saexp.config import SAEConfig
from saexp.data.tokenization import pieces
from saexp.errors import SAEError
from saexp.interactive.model import InteractiveModel, token_indices
from saexp.latents.encode import Latents, encode_rows
from saexp.models.loading import SHIPPED
from saexp.saes.catalogue import catalogue
from saexp.saes.loading import check_fits, load_path, load_release
from saexp.saes.sae import SparseAutoencoder

_SHIPPED_PATH = "{assets}/{model_name}/sae/layer_{layer}/width_{width}"
_SHIPPED_WIDTH = 256


def load_sae(
    source: str | Path,
    layer: int | None = None,
    stream: str | None = None,
    *,
    width: int | str | None = None,
    id: str | None = None,
    l0: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> SparseAutoencoder:
    """A sparse autoencoder or transcoder of any supported format.

    Args:
        source: a release of the SAELens catalogue (`gpt2-small-res-jb`), a folder or file,
            `<hub repository>/<path in it>`, or `tiny` / `tiny_control`, shipped with saexp.
        layer: 0-based block index; needed for a release without `id`, for a shipped SAE, and for
            files that do not say it.
        stream: the stream that it reads, for files that do not say it.
        width: number of latents (`16k` or an integer), where a release has several.
        id: id of the SAE in its release, instead of `layer` and `width`.
        l0: average number of active latents, where a release has several.
        device, dtype: where and how its weights are held.

    Raises:
        SAEError: no such SAE, files that cannot be read, or a layer or stream that is not its own.

    Example:
        >>> sae = saexp.load_sae("gpt2-small-res-jb", layer=8)
        >>> sae = saexp.load_sae("tiny", layer=2)
    """
    name = str(source)
    about: dict[str, Any] = {
        "name": name,
        "layer": layer,
        "stream": stream,
        "width": width,
        "device": device,
        "dtype": dtype,
    }
    is_there = Path(name).expanduser().exists()
    if name in SHIPPED and not is_there:
        if layer is None:
            raise SAEError(f"load_sae({name!r}) needs a layer; type layer=2")
        about |= {"width": width or _SHIPPED_WIDTH, "name": "tiny"}
        return load_path(SAEConfig(loader="path", path=_SHIPPED_PATH, model_name=name, **about))
    if not is_there and (id is not None or name in catalogue()):
        return load_release(SAEConfig(loader="release", release=name, id=id, l0=l0, **about))
    return load_path(SAEConfig(loader="path", path=_braces(name), **about))


def _braces(path: str) -> str:
    """A path in which nothing is filled in."""
    return path.replace("{", "{{").replace("}", "}}")


def encode(
    model: InteractiveModel,
    sae: SparseAutoencoder,
    texts: str | Sequence[str],
    *,
    positions: str | Sequence[int] = "all",
    chat: bool | None = None,
) -> Latents:
    """Sparse activations of all latents at the tokens of texts.

    Row i of `.csr`, a float32 `[n_rows, d_sae]` matrix, belongs to row i of `.rows`, whose columns
    are `text` (index of the text), `token_index`, `token_id` and `token`. `.dense()` gives the
    matrix as a tensor. Open edits apply. `positions` and `chat` are as in `model.activations`; all
    tokens are encoded by default, special ones included.

    Raises:
        SAEError: the SAE does not fit the model.
        ModelError, DataError: as `model.activations`.

    Example:
        >>> latents = saexp.encode(model, sae, ["The player scored.", "It rains."])
        >>> latents.dense().shape
    """
    check_fits(sae, model)
    prompts = model.prompts([texts] if isinstance(texts, str) else list(texts), chat)
    chosen = [token_indices(p, positions) for p in prompts]
    rows = pd.DataFrame(
        [
            (p.number, i, p.tokens.ids[i], token)
            for p, indices in zip(prompts, chosen, strict=True)
            for i, token in zip(indices, pieces(p.tokens, model.tokenizer, indices), strict=True)
        ],
        columns=["text", "token_index", "token_id", "token"],
    )
    if rows.empty:
        return Latents(sparse.csr_array((0, sae.d_sae), dtype=np.float32), rows)
    found = model.streams(prompts, sae.hookpoints, chosen)
    acts = torch.cat([of_text[sae.hookpoint] for of_text in found])
    out = sae.hookpoint_out
    target = None if out is None else torch.cat([of_text[out] for of_text in found]).cpu()
    return encode_rows(acts.cpu(), np.arange(len(rows)), sae, rows, target)[0]


def top_latents(
    model: InteractiveModel,
    sae: SparseAutoencoder,
    text: str,
    k: int = 10,
    *,
    positions: str | Sequence[int] = "all",
    chat: bool | None = None,
) -> pd.DataFrame:
    """The `k` most active latents at each token of a text, in order.

    Columns: `token_index`, `token`, `rank` (from 1), `latent`, `activation` (the SAE's own unit).
    Inactive latents are left out, so a token can have fewer than `k` rows. Errors as `encode`.

    Example:
        >>> saexp.top_latents(model, sae, "The player scored twice.", k=3)
    """
    latents = encode(model, sae, text, positions=positions, chat=chat)
    csr, parts = latents.csr, []
    for i, row in enumerate(latents.rows.itertuples()):
        here = slice(csr.indptr[i], csr.indptr[i + 1])
        values, ids = csr.data[here], csr.indices[here]
        order = np.lexsort((ids, np.negative(values)))[:k]
        parts.append(
            pd.DataFrame(
                {
                    "token_index": row.token_index,
                    "token": row.token,
                    "rank": np.arange(1, len(order) + 1),
                    "latent": ids[order].astype(np.int64),
                    "activation": values[order],
                }
            )
        )
    return pd.concat(parts, ignore_index=True)
