"""Load an SAE, encode texts, list the top latents, contrast two lists of texts, edit a model.

`steer` and `ablate` use the operations of a run's interventions (`interventions.stream_edits`), so
that a coefficient means the same in a notebook and in a run.
"""

import datetime
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from saexp import registry
from saexp.activations.reader import norm_limit
from saexp.analysis import as_analyzer
from saexp.api import config_of_texts, positions_overrides, write_texts
from saexp.api.model import ActiveEdit, InteractiveModel, Prompt, token_indices
from saexp.config import DatasetConfig, InterventionConfig, PositionsConfig, SAEConfig
from saexp.config.environment import one_of
from saexp.config.groups import PLACES, UNITS
from saexp.context import RunContext
from saexp.data.datasets import background_texts
from saexp.data.tokenization import token_pieces
from saexp.digests import remember_in
from saexp.errors import ConfigError, InterventionError, SAEError
from saexp.interventions import Ablate, Steer
from saexp.interventions.directions import LatentStatistics
from saexp.latents import Latents, encode_rows
from saexp.latents.statistics import active_quantile
from saexp.models import Hookpoint
from saexp.models.hooks import EditFunction
from saexp.models.hooks import edit as edit_streams
from saexp.models.resolution import HUB_IDS, SHIPPED
from saexp.pipeline import Session
from saexp.pipeline.run_folder import holding
from saexp.registry import names
from saexp.results import Result
from saexp.saes import SparseAutoencoder
from saexp.saes.catalogue import catalogue
from saexp.saes.loading import check_fits, load_path, load_release
from saexp.tasks.analyze import analyze_session
from saexp.tracking import NullTracker

ABSOLUTE = "absolute"
"""Unit of a coefficient that gives the length of the added vector."""
_N_NEUTRAL_TOKENS = 4000
"""The default of `analyzer.n_background`."""
_MAX_LENGTH = DatasetConfig(name="text").max_length
_MAX_NORM_RATIO = PositionsConfig(name="all").max_norm_ratio

Where = str | Sequence[int]
Stream = Hookpoint | tuple[int, str] | int
"""A hookpoint; a pair (layer, stream); or a layer, which stands for its resid_post."""


def steer(
    model: InteractiveModel,
    sae: SparseAutoencoder,
    latents: int | Sequence[int],
    coefficient: float,
    unit: str = "resid_norm",
    where: Where = "all",
    **where_options: Any,
) -> AbstractContextManager[None]:
    """Add the decoder directions of latents to the stream that the SAE writes to.

    The edit applies to `model.generate`, `model.logits`, `model.activations` and `saexp.encode`
    while the context is open, and ends when the context is left in any way. Contexts can be nested:
    an inner edit reads the streams that the outer edits have changed. With coefficient 0 all
    results are bit-equal to those without the edit.

    Args:
        latents: one latent or several; the directions of several are added up.
        coefficient: the size of the edit, in units of `unit`.
        unit: `resid_norm`, the median norm of the stream over ordinary tokens of neutral text;
            `absolute`, the length of the added vector; `raw`, the unnormalized decoder rows;
            `max_act` or `p99_act`, each latent's maximum or 99th percentile over the tokens of
            neutral text at which it is active. Neutral text is read once per stream and SAE.
        where: `all` (tokens of the prompt and generated tokens), `prompt`, `last` (of the prompt),
            `generated`, another option of the config group `positions` with its `where_options`,
            or indices of prompt tokens. Special tokens such as BOS are changed only by index.

    Raises:
        ConfigError: an unknown unit or value of `where`.
        SAEError: the SAE does not fit the model.
        InterventionError: the SAE has no such latent, or the unit is not defined for a latent.

    Example:
        >>> with saexp.steer(model, sae, [154], coefficient=0.9):
        ...     model.generate("My name is")
    """
    ids = _latent_ids(model, sae, latents)
    one_of("unit", unit, (*UNITS, ABSOLUTE))
    values = _latent_values(model, sae, ids, unit)
    # With a median norm of 1 the length of the added vector is the coefficient itself.
    config = InterventionConfig(name="steer", unit="resid_norm" if unit == ABSOLUTE else unit)
    ops = Steer(config).edit(ids, ids, "", float(coefficient), values)
    return model.editing(ActiveEdit(ops, _where(where, where_options)))


def ablate(
    model: InteractiveModel,
    sae: SparseAutoencoder,
    latents: int | Sequence[int],
    where: Where = "all",
    **where_options: Any,
) -> AbstractContextManager[None]:
    """Set latents to zero: subtract their activation times their decoder direction.

    The SAE's reconstruction error stays in the stream. `where`, scope and errors are those of
    `steer`.

    Example:
        >>> with saexp.ablate(model, sae, [154]):
        ...     model.logits("My name is")
    """
    ids = _latent_ids(model, sae, latents)
    if sae.device.type != model.device.type:
        raise InterventionError(
            f"the SAE is on {sae.device} and the model on {model.device}; load both with the same "
            "device="
        )
    values = _latent_values(model, sae, ids, "raw")
    ops = Ablate(InterventionConfig(name="ablate")).edit(ids, ids, "", 1.0, values)
    return model.editing(ActiveEdit(ops, _where(where, where_options), {sae.hookpoint: sae}))


def edit(
    model: InteractiveModel, edits: Mapping[Stream, EditFunction]
) -> AbstractContextManager[None]:
    """Replace streams by functions of themselves.

    Args:
        edits: a function for each stream. A stream is a layer (its `resid_post`), a pair
            (layer, stream) or a `Hookpoint`. The function receives `[batch, n_tokens, d_model]`,
            padding and special tokens included (one token at a time while generating), and returns
            a tensor of that shape. It must not write to its input.

    Functions apply in the order in which their contexts were opened, and before the edits of
    `steer` and `ablate` at the same stream. The scope is that of `steer`; direct calls of
    `model.hf` are affected as well.

    Raises:
        ModelError: the model has no such layer or stream.

    Example:
        >>> with saexp.edit(model, {2: lambda x: 0.5 * x}):
        ...     model.logits("My name is")
    """
    functions = {_hookpoint(stream): function for stream, function in edits.items()}
    model.check_streams(h.stored for h in functions)
    return _editing(model, functions)


@contextmanager
def _editing(
    model: InteractiveModel, functions: Mapping[Hookpoint, EditFunction]
) -> Iterator[None]:
    def unless_suspended(function: EditFunction) -> EditFunction:
        return lambda stream: stream if model.suspended else function(stream)

    with edit_streams(model, {h: unless_suspended(f) for h, f in functions.items()}):
        yield


def _hookpoint(stream: Stream) -> Hookpoint:
    if isinstance(stream, Hookpoint):
        return stream
    return Hookpoint(stream, "resid_post") if isinstance(stream, int) else Hookpoint(*stream)


def _latent_ids(
    model: InteractiveModel, sae: SparseAutoencoder, latents: int | Sequence[int]
) -> tuple[int, ...]:
    check_fits(sae, model)
    ids = (latents,) if isinstance(latents, int) else tuple(map(int, latents))
    if not ids:
        raise InterventionError("latents=[] is empty; type e.g. latents=[154]")
    for latent in ids:
        if not 0 <= latent < sae.d_sae:
            raise InterventionError(
                f"latent {latent} is out of range: the SAE has latents 0-{sae.d_sae - 1}"
            )
    if len(set(ids)) < len(ids):
        raise InterventionError(f"latents={list(ids)} contains a latent twice")
    return ids


def _where(where: Where, options: Mapping[str, Any]) -> InterventionConfig:
    if not isinstance(where, str):
        options = {"indices": [int(i) for i in where], "include_special": True, **options}
        return InterventionConfig(name="steer", where="indices", where_options=dict(options))
    one_of("where", where, (*PLACES, *(n for n in names("positions") if n not in PLACES)))
    unknown = sorted(options.keys() - PositionsConfig.__dataclass_fields__.keys())
    if unknown:
        raise ConfigError(f"where={where!r} has no option '{unknown[0]}'")
    return InterventionConfig(name="steer", where=where, where_options=dict(options))


def _latent_values(
    model: InteractiveModel, sae: SparseAutoencoder, latents: tuple[int, ...], unit: str
) -> LatentStatistics:
    """Directions of the latents, and the values that the unit of the coefficient needs."""
    written = sae.hookpoint_out or sae.hookpoint
    directions = sae.directions(list(latents)).float()
    table = pd.DataFrame({"latent": latents, "norm": directions.norm(dim=-1).cpu().numpy()})
    if unit in ("max_act", "p99_act"):
        table[unit] = _active_values(model, sae, latents, 1.0 if unit == "max_act" else 0.99)
        for latent, value in zip(latents, table[unit], strict=True):
            if not value > 0:
                raise InterventionError(
                    f"unit={unit}: latent {latent} is never active on neutral text; type "
                    "unit='resid_norm', 'raw' or 'absolute'"
                )
    return LatentStatistics(
        table=table,
        groups=(),
        median_norm=median_norm(model, written) if unit == "resid_norm" else 1.0,
        directions=sae.directions,
        hookpoint=sae.hookpoint,
        written=written,
        n_layers=model.n_layers,
    )


def median_norm(model: InteractiveModel, at: Hookpoint) -> float:
    """Measure the median norm of a stream over ordinary tokens of neutral text, without edits.

    Texts and tokens are those of a run's background with default settings, without tokens of a norm
    above 5 times the median (attention sinks). The model remembers the value.
    """
    if at not in model.median_norms:
        acts = _neutral(model, [at])[at]
        norms = acts.float().norm(dim=-1).cpu().double().numpy()
        ordinary = norms[norms <= norm_limit(norms, _MAX_NORM_RATIO)]
        model.median_norms[at] = float(np.median(ordinary if len(ordinary) else norms))
    return model.median_norms[at]


def _active_values(
    model: InteractiveModel, sae: SparseAutoencoder, latents: tuple[int, ...], quantile: float
) -> np.ndarray:
    """A quantile of each latent's nonzero activations on neutral text, encoded once per SAE."""
    if sae not in model.neutral_latents:
        acts = _neutral(model, sae.hookpoints)
        x = acts[sae.hookpoint].cpu()
        target = None if sae.hookpoint_out is None else acts[sae.hookpoint_out].cpu()
        index, rows = np.arange(len(x)), pd.DataFrame(index=range(len(x)))
        model.neutral_latents[sae] = encode_rows(x, index, sae, rows, target)[0].csr
    return active_quantile(model.neutral_latents[sae], np.array(latents), quantile)


def _neutral(
    model: InteractiveModel, hookpoints: Sequence[Hookpoint]
) -> dict[Hookpoint, torch.Tensor]:
    """Streams `[n, width]` at random tokens of neutral text."""
    lines = list(dict.fromkeys(background_texts(DatasetConfig(name="text", model_name=model.name))))
    n_each = max(1, -(-_N_NEUTRAL_TOKENS // len(lines)))
    prompts = model.prompts(lines, chat=False, max_length=_MAX_LENGTH)
    indices = [_random_tokens(prompt, n_each) for prompt in prompts]
    with model.unedited():
        streams = model.streams(prompts, hookpoints, indices)
    return {at: torch.cat([of_text[at] for of_text in streams]) for at in hookpoints}


def _random_tokens(prompt: Prompt, n: int) -> list[int]:
    return token_indices(prompt, PositionsConfig(name="random", n=n))


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
    run_folder = (
        Path(folder) if folder is not None else Path(tempfile.mkdtemp(prefix="saexp-contrast-"))
    )
    settings = [*positions_overrides(positions), *overrides]
    cfg = config_of_texts(model, sae, run_folder / _TEXTS_FILE, names, settings)
    began = datetime.datetime.now().isoformat(timespec="seconds")
    with holding(run_folder):
        write_texts(run_folder / _TEXTS_FILE, dict(zip(names, (texts_a, texts_b), strict=True)))
        remember_in(cfg.cache_dir)
        context = RunContext(
            folder=run_folder,
            tracker=NullTracker(cfg.tracker),
            command="saexp.contrast",
            started=began,
            inputs=frozenset({(run_folder / _TEXTS_FILE).resolve()}),
        )
        with model.unedited():
            with context.stage("load"):
                analyzer = as_analyzer(registry.build("analyzer", cfg.analyzer))
                session = Session.open(cfg, context, analyzer, model=model, sae=sae)
            result = analyze_session(session)
    result.path = run_folder
    return result


_SHIPPED_PATH = "{assets}/{model_name}/sae/layer_{layer}/width_{width}"
_REPOSITORY_PATH = "{repository}/experiments/real_model/saes/layer_{layer}/width_{width}"
_SHIPPED = {
    **{name: ("tiny", _SHIPPED_PATH, 256) for name in SHIPPED},
    **{name: (name, _REPOSITORY_PATH, 4096) for name in HUB_IDS},
}
"""Models with SAEs in this repository -> (sae.name, sae.path, default width)."""


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
            `<hub repository>/<path in it>`, or a model with SAEs that ship with saexp: `tiny`,
            `tiny_control`, and, in a clone of its repository, `smollm2`.
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
    if name in _SHIPPED and not is_local:
        sae_name, path, default_width = _SHIPPED[name]
        if layer is None:
            example = 2 if name in SHIPPED else 15
            raise SAEError(f"load_sae({name!r}) needs a layer; type layer={example}")
        fields |= {"width": width or default_width, "name": sae_name}
        return load_path(SAEConfig(loader="path", path=path, model_name=name, **fields))
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
