"""Load an SAE, encode texts with it, list the top latents, and contrast two lists of texts."""

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

from saexp import registry
from saexp.analysis.base import as_analyzer
from saexp.api import compose
from saexp.api.model import InteractiveModel, token_indices
from saexp.config import RunConfig, SAEConfig
from saexp.context import RunContext
from saexp.data.tokenization import token_pieces
from saexp.digests import remember_in
from saexp.errors import ConfigError, SAEError
from saexp.files import RUN_FOLDER, write_text
from saexp.latents.encode import Latents, encode_rows
from saexp.models.source import SHIPPED
from saexp.pipeline.run_folder import holding
from saexp.pipeline.session import Session
from saexp.results import Result
from saexp.saes.catalogue import catalogue
from saexp.saes.loading import check_fits, load_path, load_release
from saexp.saes.sae import SparseAutoencoder
from saexp.tasks.analyze import analyze_session
from saexp.tracking import NullTracker

_TEXTS_FILE = "texts.jsonl"


def contrast(
    texts_a: Sequence[str],
    texts_b: Sequence[str],
    *,
    model: InteractiveModel,
    sae: SparseAutoencoder,
    positions: str | Sequence[int] = "last",
    names: tuple[str, str] = ("a", "b"),
    folder: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> Result:
    """Find the latents that separate two lists of texts.

    This is the analysis of `saexp.run` without its causal test: latents are selected on one half of
    the texts and evaluated on the other, with the same statistics, background filter and report.
    Edits made by open contexts do not apply. Whether texts begin with BOS follows the SAE's
    training, as in a run.

    Args:
        positions: the token of each text that is analysed: an option of the config group
            `positions`, or token indices, where negative indices count from the end.
        names: names of the two groups in tables and in the report.
        folder: the folder for the report and the tables; by default a new temporary folder.
        overrides: further settings in the syntax of the command line, such as
            `["analyzer.alpha=0.1", "cache_dir=/scratch/cache"]`.

    Returns:
        The result: `.tables["latents"]` has one row per latent, `.path` is the folder with
        `report.html`.

    Raises:
        ConfigError: an unknown setting.
        DataError: texts that cannot be contrasted, for example because there are too few.
        SAEError: the SAE does not fit the model.

    Example:
        >>> result = saexp.contrast(known, unknown, model=model, sae=sae)
        >>> result.tables["latents"].query("selected")
    """
    check_fits(sae, model)
    for texts in (texts_a, texts_b):
        if isinstance(texts, str):
            raise ConfigError("contrast compares two lists of texts; pass two lists of strings")
    if len(set(names)) != 2:
        raise ConfigError(f"names={names}: the two groups need different names")
    place = Path(folder) if folder is not None else Path(tempfile.mkdtemp(prefix="saexp-contrast-"))
    settings = [*_positions_overrides(positions), *overrides]
    cfg = _run_config(model, sae, place / _TEXTS_FILE, names, settings)
    began = datetime.datetime.now().isoformat(timespec="seconds")
    with holding(place):
        _write_texts(place / _TEXTS_FILE, dict(zip(names, (texts_a, texts_b), strict=True)))
        remember_in(cfg.cache_dir)
        context = RunContext(
            folder=place,
            tracker=NullTracker(cfg.tracker),
            command="saexp.contrast",
            started=began,
            inputs=frozenset({(place / _TEXTS_FILE).resolve()}),
        )
        with model.unedited():
            with context.stage("load"):
                analyzer = as_analyzer(registry.build("analyzer", cfg.analyzer))
                session = Session.open(cfg, context, analyzer, model=model, sae=sae)
            result = analyze_session(session)
    result.path = place
    return result


def _positions_overrides(positions: str | Sequence[int]) -> list[str]:
    if isinstance(positions, str):
        return [f"positions={positions}"]
    indices = ",".join(str(int(i)) for i in positions)
    return ["positions=indices", f"positions.indices=[{indices}]", "positions.include_special=true"]


def _run_config(
    model: InteractiveModel,
    sae: SparseAutoencoder,
    file: Path,
    names: tuple[str, str],
    overrides: Sequence[str],
) -> RunConfig:
    """The config of the run; for provenance it describes the objects that are in memory."""
    layer = sae.hookpoint.layer
    fixed = ["dataset=jsonl", "dataset.path=file", "intervention=none", "tracker=none"]
    cfg = compose([*fixed, f"layer={layer}", *overrides])
    sae_config = SAEConfig(
        name=str(sae.metadata.get("name", "in-memory")),
        loader="path",
        path=sae.metadata.get("path"),
        layer=layer,
        model_name=model.name,
    )
    data = replace(cfg.dataset, path=str(file), groups=list(names), model_name=model.name)
    return replace(cfg, model=model.cfg, sae=sae_config, dataset=data, width=None)


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
    """Load a sparse autoencoder or transcoder of any supported format.

    Args:
        source: a release of the SAELens catalogue (`gpt2-small-res-jb`), a folder or file,
            `<hub repository>/<path in it>`, or `tiny` / `tiny_control`, which ship with saexp.
        layer: 0-based block index. Required for a release without `id`, for a shipped SAE, and
            where the files do not contain it.
        stream: the stream that is encoded; required where the files do not contain it.
        width: number of latents (`16k` or an integer), for releases with several widths.
        id: id of the SAE in its release, instead of `layer` and `width`.
        l0: average number of active latents per token, for releases with several.
        device: device of the weights.
        dtype: dtype of the weights and of all computation.

    Raises:
        SAEError: there is no such SAE, its files cannot be read, or they contradict `layer` or
            `stream`.

    Example:
        >>> sae = saexp.load_sae("gpt2-small-res-jb", layer=8)
        >>> sae = saexp.load_sae("tiny", layer=2)
    """
    name = str(source)
    fields: dict[str, Any] = {
        "name": name,
        "layer": layer,
        "stream": stream,
        "width": width,
        "device": device,
        "dtype": dtype,
    }
    is_local = Path(name).expanduser().exists()
    if name in SHIPPED and not is_local:
        if layer is None:
            raise SAEError(f"load_sae({name!r}) needs a layer; type layer=2")
        fields |= {"width": width or _SHIPPED_WIDTH, "name": "tiny"}
        return load_path(SAEConfig(loader="path", path=_SHIPPED_PATH, model_name=name, **fields))
    if not is_local and (id is not None or name in catalogue()):
        return load_release(SAEConfig(loader="release", release=name, id=id, l0=l0, **fields))
    return load_path(SAEConfig(loader="path", path=_escape_braces(name), **fields))


def _escape_braces(path: str) -> str:
    """The path with literal braces, since `sae.path` is a template."""
    return path.replace("{", "{{").replace("}", "}}")


def encode(
    model: InteractiveModel,
    sae: SparseAutoencoder,
    texts: str | Sequence[str],
    *,
    positions: str | Sequence[int] = "all",
    chat: bool | None = None,
) -> Latents:
    """Compute the activations of all latents at the tokens of texts, as a sparse matrix.

    `.csr` is a float32 `[n_rows, d_sae]` matrix. Row i of it belongs to row i of `.rows`, a table
    with the columns `text` (index of the text), `token_index`, `token_id` and `token`. `.dense()`
    returns the matrix as a tensor. Edits made by open contexts apply. `positions` and `chat` are
    those of `model.activations`; by default all tokens are encoded, special tokens included.

    Raises:
        SAEError: the SAE does not fit the model.
        ModelError, DataError: as `model.activations`.

    Example:
        >>> latents = saexp.encode(model, sae, ["The player scored.", "It rains."])
        >>> latents.dense().shape
    """
    check_fits(sae, model)
    prompts = model.prompts([texts] if isinstance(texts, str) else list(texts), chat)
    indices = [token_indices(p, positions) for p in prompts]
    rows = pd.DataFrame(
        [
            (p.number, i, p.tokens.ids[i], token)
            for p, of_text in zip(prompts, indices, strict=True)
            for i, token in zip(
                of_text, token_pieces(p.tokens, model.tokenizer, of_text), strict=True
            )
        ],
        columns=["text", "token_index", "token_id", "token"],
    )
    if rows.empty:
        return Latents(sparse.csr_array((0, sae.d_sae), dtype=np.float32), rows)
    streams = model.streams(prompts, sae.hookpoints, indices)
    acts = torch.cat([of_text[sae.hookpoint] for of_text in streams])
    out = sae.hookpoint_out
    target = None if out is None else torch.cat([of_text[out] for of_text in streams]).cpu()
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
    """List the `k` most active latents at each token of a text, the most active first.

    Columns: `token_index`, `token`, `rank` (from 1), `latent`, `activation` (in the SAE's unit).
    Inactive latents are not listed, so a token can have fewer than `k` rows. Raises what `encode`
    raises.

    Example:
        >>> saexp.top_latents(model, sae, "The player scored twice.", k=3)
    """
    latents = encode(model, sae, text, positions=positions, chat=chat)
    csr, parts = latents.csr, []
    for i, row in enumerate(latents.rows.itertuples()):
        entries = slice(csr.indptr[i], csr.indptr[i + 1])
        values, ids = csr.data[entries], csr.indices[entries]
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
