"""encode, top_latents and contrast."""

import datetime
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from saexp.api import compose
from saexp.config import RunConfig, SAEConfig
from saexp.context import RunContext
from saexp.data.tokenization import pieces
from saexp.digests import remember_in
from saexp.errors import ConfigError, SAEError
from saexp.files import RUN_FOLDER, write_text
from saexp.interactive.model import InteractiveModel, token_indices
from saexp.latents.encode import Latents, encode_rows
from saexp.models.loading import SHIPPED
from saexp.pipeline.run_folder import holding
from saexp.results import TaskResult
from saexp.saes.catalogue import catalogue
from saexp.saes.loading import check_fits, load_path, load_release
from saexp.saes.sae import SparseAutoencoder
from saexp.tasks.analyze import contrast_with
from saexp.tracking import NullTracker

_FILE = "texts.jsonl"


def contrast(
    texts_a: Sequence[str],
    texts_b: Sequence[str],
    *,
    model: InteractiveModel,
    sae: SparseAutoencoder,
    positions: str | Sequence[int] = "last",
    names: tuple[str, str] = ("a", "b"),
    folder: str | Path | None = None,
    cache_dir: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> TaskResult:
    """Latents that differ between two lists of texts: chosen on one half, judged on the other.

    It is the contrast of `saexp.run` without a causal test, with the same split, statistics,
    background filter and report. Open edits are suspended. Texts begin with BOS as the SAE was
    trained, as in a run.

    Args:
        positions: which token of a text is analysed: an option of the config group `positions`, or
            token indices, negative ones from the end.
        names: what the two groups are called in tables and the report.
        folder: where the report and the tables go; a temporary folder where not given.
        cache_dir: activation stores; `outputs/cache` where not given, as in a run.
        overrides: further settings as on the command line, such as `analyzer.alpha=0.1`.

    Returns:
        The result: `.tables["latents"]` has one row per latent, `.path` is the folder with
        `report.html`.

    Raises:
        ConfigError: an unknown setting. DataError: texts that cannot be contrasted.
        SAEError: the SAE does not fit the model.

    Example:
        >>> result = saexp.contrast(known, unknown, model=model, sae=sae)
        >>> result.tables["latents"].query("selected")
    """
    check_fits(sae, model)
    for texts in (texts_a, texts_b):
        if isinstance(texts, str):
            raise ConfigError("contrast compares two lists of texts; give lists of strings")
    if len(set(names)) != 2:
        raise ConfigError(f"names={names}: the two groups need different names")
    place = Path(folder) if folder is not None else Path(tempfile.mkdtemp(prefix="saexp-contrast-"))
    cfg = _config(model, sae, place / _FILE, names, [*_words(positions), *overrides])
    if cache_dir is not None:
        cfg = replace(cfg, cache_dir=str(cache_dir))
    began = datetime.datetime.now().isoformat(timespec="seconds")
    with holding(place):
        _write_texts(place / _FILE, dict(zip(names, (texts_a, texts_b), strict=True)))
        remember_in(cfg.cache_dir)
        context = RunContext(
            folder=place,
            tracker=NullTracker(cfg.tracker),
            command="saexp.contrast",
            started=began,
            inputs=frozenset({(place / _FILE).resolve()}),
        )
        with model.unedited():
            result = contrast_with(cfg, context, model, sae)
    result.path = place
    return result


def _words(positions: str | Sequence[int]) -> list[str]:
    if isinstance(positions, str):
        return [f"positions={positions}"]
    listed = ",".join(str(int(i)) for i in positions)
    return ["positions=indices", f"positions.indices=[{listed}]", "positions.include_special=true"]


def _config(
    model: InteractiveModel,
    sae: SparseAutoencoder,
    file: Path,
    names: tuple[str, str],
    overrides: Sequence[str],
) -> RunConfig:
    """The config of the run, which says of the loaded objects what is known."""
    layer = sae.hookpoint.layer
    words = ["dataset=jsonl", "dataset.path=file", "intervention=none", "tracker=none"]
    cfg = compose([*words, f"layer={layer}", *overrides])
    about_sae = SAEConfig(
        name=str(sae.metadata.get("name", "in-memory")),
        loader="path",
        path=sae.metadata.get("path"),
        layer=layer,
        model_name=model.name,
    )
    data = replace(cfg.dataset, path=str(file), groups=list(names), model_name=model.name)
    return replace(cfg, model=model.cfg, sae=about_sae, dataset=data, width=None)


def _write_texts(file: Path, groups: dict[str, Sequence[str]]) -> None:
    lines = [
        json.dumps({"text": text, "group": name, "id": f"{name}_{i}"}, ensure_ascii=False)
        for name, texts in groups.items()
        for i, text in enumerate(texts)
    ]
    write_text(file, "\n".join(lines) + "\n", option=RUN_FOLDER)


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
