"""Loads an SAE from a config, a path or a repository, and checks that it is the requested one."""

import hashlib
import math
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saexp.config import SAEConfig, parse_layers
from saexp.digests import code_digest, contents, digest_of, state_sha256
from saexp.errors import SAEError
from saexp.hub import is_path
from saexp.models import Hookpoint
from saexp.models.loading import LanguageModel
from saexp.models.resolution import HUB_IDS, SHIPPED, pick_device
from saexp.saes import SAESettings, SparseAutoencoder
from saexp.saes.catalogue import (
    Entry,
    fill_path,
    find_entry,
    format_of,
    n_latents,
    neuronpedia_of,
    show_width,
)
from saexp.saes.formats import (
    Streams,
    check_values,
    dictionary_learning,
    download,
    download_if_present,
    file_metadata,
    gemma_scope,
    saelens,
)
from saexp.stats.significance import random_directions


def sae_identity(sae: Any) -> str | None:
    """Digest of everything that determines an SAE's activations and reconstructions.

    It covers the content of the weight and config files, the current settings (an estimated factor,
    the dtype, the streams) and the code of the class. None for weights without a fingerprint, such
    as those of an SAE built in memory; nothing computed with it may be cached.
    """
    code, weights = code_digest(type(sae)), sae.metadata.get("fingerprint")
    if not weights or code is None:
        return None
    settings = {
        name: repr(value)
        for name, value in vars(sae).items()
        if not name.startswith("_") and isinstance(value, str | int | float | SAESettings | None)
    }
    streams = [str(sae.hookpoint), str(getattr(sae, "hookpoint_out", None))]
    config = sae.metadata.get("config_fingerprint")
    return digest_of(weights, config, settings, streams, str(sae.W_dec.dtype), code)


_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt")
_UNSAFE = "which can run code when opened; saexp loads safetensors and npz, so convert it first"
_SAELENS = (saelens.CONFIG, saelens.WEIGHTS)
_SPARSIFY = (dictionary_learning.SPARSIFY_CONFIG, dictionary_learning.SPARSIFY_WEIGHTS)
_LLAMA_SCOPE = (gemma_scope.LLAMA_SCOPE_CONFIG, gemma_scope.LLAMA_SCOPE_WEIGHTS)
_GEMMA_SCOPE_2 = (gemma_scope.CONFIG_2, gemma_scope.WEIGHTS_2)
_DICTIONARY_LEARNING = (dictionary_learning.CONFIG, dictionary_learning.WEIGHTS)
_IN_REPOS = (_SAELENS, _SPARSIFY, _LLAMA_SCOPE, _GEMMA_SCOPE_2, _DICTIONARY_LEARNING)
"""(config, weights) of the formats whose folders have a config."""


def load_sae_files(path: Path, stream: str | None, layer: Any, name: str) -> SparseAutoencoder:
    """Load an SAE from a file, a folder or `<hub repository>/<path in it>`; detects the format.

    Raises SAEError where there is none, or none in a known format.
    """
    path = path.expanduser()
    is_weights = path.name == dictionary_learning.WEIGHTS
    if is_weights and dictionary_learning.is_dictionary_learning(path.parent):
        path = path.parent
    if path.suffix in _PICKLES and (path.is_file() or not path.exists()):
        raise SAEError(f"{path} is a pickle file, {_UNSAFE}")
    if not path.exists():
        parts = path.parts
        if len(parts) < 2 or is_path(str(path)):
            raise _no_such_path(path)
        return _from_repo("/".join(parts[:2]), "/".join(parts[2:]), stream, layer)
    if path.name in (_GEMMA_SCOPE_2[1], _SAELENS[1], _SPARSIFY[1]):
        path = path.parent
    sae = _read_folder(path, stream, layer, name) if path.is_dir() else None
    if sae is not None:
        return sae
    file = path / gemma_scope.WEIGHTS if path.is_dir() else path
    if file.is_file() and file.suffix == ".npz":
        return gemma_scope.load_gemma_scope(
            file, _npz_streams(file, stream, layer), {"name": name, **file_metadata(file)}
        )
    raise _unknown_format(path)


def _read_folder(
    folder: Path, stream: str | None, layer: Any, name: str
) -> SparseAutoencoder | None:
    """The SAE of a folder in one of the formats with a config; None for any other folder."""

    def metadata(files: tuple[str, str]) -> dict[str, Any]:
        config, weights = files
        return {"name": name, **file_metadata(folder / weights, folder / config)}

    requested = _requested_hookpoint(stream, layer)
    if saelens.is_saelens(folder):
        return saelens.load_saelens(folder, metadata(_SAELENS))
    if dictionary_learning.is_sparsify(folder):
        return dictionary_learning.load_sparsify(folder, metadata(_SPARSIFY), requested)
    if gemma_scope.is_llama_scope(folder):
        return gemma_scope.load_llama_scope(folder, metadata(_LLAMA_SCOPE))
    if gemma_scope.is_gemma_scope2(folder):
        return gemma_scope.load_gemma_scope2(folder, metadata(_GEMMA_SCOPE_2), requested)
    if dictionary_learning.is_dictionary_learning(folder):
        return dictionary_learning.load_dictionary_learning(
            folder, metadata(_DICTIONARY_LEARNING), stream
        )
    return None


def _unknown_format(path: Path) -> SAEError:
    names = sorted(f.name for f in path.iterdir()) if path.is_dir() else []
    pickled = [name for name in names if name.endswith(_PICKLES)]
    if pickled:
        return SAEError(f"{path} holds only a pickle file ({pickled[0]}), {_UNSAFE}")
    if any(name.startswith("params_layer_") for name in names):
        gemma_scope.refuse_across_layers("clt", str(path))
    return SAEError(
        f"sae.path={path} is not an SAE in a format that saexp reads: expected "
        f"{' with '.join(_SAELENS)}, {' with '.join(_LLAMA_SCOPE)}, or {gemma_scope.WEIGHTS}; or "
        f"{' with '.join(_SPARSIFY)}, or {' with '.join(_GEMMA_SCOPE_2)} or "
        f"{dictionary_learning.WEIGHTS}"
    )


def _from_repo(repo: str, path: str, stream: str | None, layer: Any) -> SparseAutoencoder:
    prefix = f"{path}/" if path else ""
    name = f"{repo}/{path}".rstrip("/")
    gemma_scope.refuse_across_layers(name, name)
    if path.endswith(".npz") or gemma_scope.is_gemma_scope_repo(repo):
        inner = path if path.endswith(".npz") else f"{prefix}{gemma_scope.WEIGHTS}"
        streams = gemma_scope.streams_of(repo, path)
        file = download(repo, inner)
        return gemma_scope.load_gemma_scope(file, streams, {"name": name, **file_metadata(file)})
    missing = []
    for config, weights in _IN_REPOS:
        if download_if_present(repo, f"{prefix}{config}") is None:
            continue
        file = download_if_present(repo, f"{prefix}{weights}")
        if file is None:
            missing.append(weights)
            continue
        if weights == dictionary_learning.SPARSIFY_WEIGHTS:
            download_if_present(repo, _run_config(path))
        if weights == saelens.WEIGHTS:
            download_if_present(repo, f"{prefix}{saelens.SPARSITY}")
        folder = file.parents[len(Path(weights).parts) - 1]
        return load_sae_files(folder, stream, layer, name)
    if gemma_scope.is_gemma_scope2_repo(repo):
        return load_sae_files(
            download(repo, f"{prefix}{gemma_scope.WEIGHTS_2}").parent, stream, layer, name
        )
    # No format is complete: downloading a missing file gives an error with its name and the reason.
    try:
        folder = download(repo, f"{prefix}{missing[0] if missing else saelens.CONFIG}").parent
    except SAEError as error:
        if missing:
            raise
        raise SAEError(f"sae.path={name}: no such folder here, and {error}") from error
    return load_sae_files(folder, stream, layer, name)


def _run_config(path: str) -> str:
    """Path of sparsify's run config: one folder above `path`, or above its folder of a seed."""
    parts = Path(path).parts
    above = parts[:-2] if parts and parts[-1].startswith("seed") else parts[:-1]
    return "/".join([*above, dictionary_learning.RUN_CONFIG])


def _requested_hookpoint(stream: str | None, layer: Any) -> Hookpoint | None:
    """The hookpoint of the config; None unless it sets both stream and layer."""
    if stream is None or layer is None:
        return None
    return Hookpoint(parse_layers(layer)[0], stream)


def _npz_streams(file: Path, stream: str | None, layer: Any) -> Streams:
    """Streams that the path gives, otherwise those of the config."""
    try:
        return gemma_scope.streams_of(str(file.parent), str(file.parent))
    except SAEError:
        requested = _requested_hookpoint(stream, layer)
        if requested is None:
            raise
        return requested, None


ESTIMATE = "estimate"
_ONE_FACTOR = "expected_average_only_in"


def load_release(cfg: SAEConfig, **_: Any) -> SparseAutoencoder:
    """An SAE of sae-lens' catalogue, from the hub or its local cache."""
    entry = _catalogued(cfg)
    metadata = {
        "name": f"{entry.release}/{entry.id}",
        "release": entry.release,
        "id": entry.id,
        "neuronpedia_id": neuronpedia_of(entry),
        "expected_l0": entry.expected_l0,
        "expected_explained_variance": entry.expected_explained_variance,
        "chosen": entry.chosen,
    }
    sae = format_of(entry).read(entry, metadata)
    if "fingerprint" not in sae.metadata:
        sae = sae.with_metadata(fingerprint=state_sha256(sae))
    return _finish(sae, cfg)


def _catalogued(cfg: SAEConfig) -> Entry:
    """The catalogue's entry, checked before anything is downloaded."""
    entry = find_entry(cfg)
    name = f"{entry.release}/{entry.id}"
    _check_hookpoint(format_of(entry).streams(entry)[0], cfg.layer, cfg.stream, name)
    return entry


def check_exists(cfg: SAEConfig) -> None:
    """Raise SAEError for an SAE that is not in the catalogue, does not ship, or whose path is not
    there, as loading it would; reads no weights."""
    if cfg.loader == "release":
        _catalogued(cfg)
    elif cfg.loader == "path":
        _check_shipped(cfg)
        path = fill_path(cfg).expanduser()
        if not path.exists() and (len(path.parts) < 2 or is_path(str(path))):
            raise _no_such_path(path)


def _no_such_path(path: Path) -> SAEError:
    return SAEError(f"sae.path={path}: no such folder or file")


def load_path(cfg: SAEConfig, **_: Any) -> SparseAutoencoder:
    """An SAE from a folder or file; `{assets}`, `{layer}` … are filled in."""
    _check_shipped(cfg)
    return _finish(load_sae_files(fill_path(cfg), cfg.stream, cfg.layer, cfg.name), cfg)


def hookpoints_of(path: str, layer: Any, stream: str | None) -> list[tuple[int, str]]:
    """(layer, stream) that the SAE of these files reads, and the one that a transcoder predicts.

    The result is cached for files of this content, the SAE is not.
    """
    content = tuple(contents(Path(path)))
    return list(_hookpoints_of(path, layer, stream, content))


@lru_cache(maxsize=1024)
def _hookpoints_of(
    path: str,
    layer: Any,
    stream: str | None,
    content: tuple[tuple[str, str], ...],  # noqa: ARG001
) -> tuple[tuple[int, str], ...]:
    sae = load_sae_files(Path(path), stream, layer, path)
    return tuple((h.layer, h.stream) for h in sae.hookpoints)


def _check_shipped(cfg: SAEConfig) -> None:
    """Raise SAEError, with the models, layers or widths that ship, for others of a shipped SAE."""
    if not cfg.path or not ("{assets}" in cfg.path or "{repository}" in cfg.path):
        return
    models = _models_of(cfg.name)
    if cfg.model_name not in models:
        example = cfg.model_name if cfg.model_name in HUB_IDS else "gemmascope"
        raise SAEError(
            f"sae={cfg.name} ships for model={' and '.join(m for m in models if '/' not in m)}, "
            f"not for {cfg.model_name}; type e.g. sae={example} or sae=local sae.path=FOLDER"
        )
    layer, width = parse_layers(cfg.layer)[0], n_latents(cfg.width)
    path = fill_path(cfg)
    folder = path.parent.parent
    if "{repository}" in str(cfg.path) and not folder.is_dir():
        raise SAEError(
            f"sae={cfg.name}: its files are in the repository of saexp and not in the installed "
            "package; clone the repository, and run python -m saexp in it or type "
            "sae=local 'sae.path=\"<clone>/experiments/real_model/saes/layer_{layer}/"
            "width_{width}\"'"
        )
    layers = sorted(int(p.name.removeprefix("layer_")) for p in folder.glob("layer_*"))
    if layer not in layers:
        listed = ", ".join(map(str, layers))
        raise SAEError(f"sae={cfg.name} has no layer={layer}; it has layers {listed}")
    widths = sorted(int(p.name.removeprefix("width_")) for p in path.parent.glob("width_*"))
    if width not in widths:
        listed = ", ".join(map(show_width, widths))
        raise SAEError(
            f"sae={cfg.name} has no width={cfg.width} for {cfg.model_name}; it has {listed}"
        )


def _models_of(name: str) -> tuple[str, ...]:
    """`model.name` of the models that shipped SAEs of this `sae.name` belong to."""
    return (name, HUB_IDS[name]) if name in HUB_IDS else SHIPPED


def load_sae(source: str | Path, layer: int | None = None, stream: str | None = None) -> Any:
    """Load an SAE of any supported format from a folder, a file, or `<hub repo>/<path in it>`.

    `layer` and `stream` are needed where the files do not give them. Raises SAEError where they
    contradict the files.
    """
    sae = load_sae_files(Path(source), stream, layer, str(source))
    _check_hookpoint(sae.hookpoint, layer, stream, str(source))
    if sae.lacks_factor:
        raise _no_factor(str(source))
    return _converted(sae, sae.device, torch.float32)


def random_sae(cfg: SAEConfig, *, d_in: int | None = None, **_: Any) -> SparseAutoencoder:
    """A control: a top-k SAE (k=32) with random unit-norm decoder rows and a tied encoder.

    The directions depend on the seed, the stream (layer included) and the size, so that control
    SAEs of two layers have no direction in common.
    """
    size = cfg.d_in or d_in
    if size is None or cfg.layer is None:
        raise SAEError("sae=random needs a size and a layer: type sae.d_in=<d_model> layer=<block>")
    width = n_latents(cfg.width) or 8 * size
    hookpoint = Hookpoint(parse_layers(cfg.layer)[0], cfg.stream or "resid_post")
    decoder = random_directions(width, size, cfg.seed, "control SAE", hookpoint.name, width)
    content = repr((width, size, cfg.seed, hookpoint.name)).encode()
    k = max(1, min(32, width // 16))
    sae = SparseAutoencoder(
        {
            "W_enc": decoder.T.contiguous(),
            "W_dec": decoder,
            "b_enc": torch.zeros(width),
            "b_dec": torch.zeros(size),
        },
        SAESettings(architecture="topk", k=k, hookpoint=hookpoint),
        metadata={
            "name": f"random control, {hookpoint.name}, width {width}, seed {cfg.seed}",
            "control": "random",
            "format": "random",
            "architecture": "topk",
            "fingerprint": hashlib.sha256(content).hexdigest(),
        },
    )
    return _finish(sae, cfg)


def _finish(sae: SparseAutoencoder, cfg: SAEConfig) -> SparseAutoencoder:
    """Check layer, stream and width against the config, then move to its device and dtype."""
    name = sae.metadata.get("name", cfg.name)
    _check_hookpoint(sae.hookpoint, cfg.layer, cfg.stream, name)
    width = n_latents(cfg.width)
    if width is not None and width != sae.d_sae:
        raise SAEError(f"width={cfg.width}, but {name} has d_sae={sae.d_sae}")
    sae = _with_factor(sae, cfg.norm_factor, name)
    dtype = torch.float32 if cfg.dtype == "auto" else getattr(torch, cfg.dtype)
    return _converted(sae, pick_device(cfg.device), dtype)


def _converted(
    sae: SparseAutoencoder, device: torch.device, dtype: torch.dtype
) -> SparseAutoencoder:
    """Move the SAE to device and dtype. Raises SAEError where its values overflow in the dtype."""
    largest = torch.finfo(sae.W_dec.dtype).max
    sae.to(device=device, dtype=dtype)
    if torch.finfo(dtype).max < largest:
        short = str(dtype).removeprefix("torch.")
        name = sae.metadata.get("path", sae.metadata.get("name", "the SAE"))
        check_values(dict(sae.named_buffers()), f"{name} in {short}")
    return sae


def _no_factor(name: str) -> SAEError:
    return SAEError(
        f"{name}: its inputs are scaled by a factor that its files do not give; type "
        "sae.norm_factor=<number>, or sae.norm_factor=estimate to derive it from the activations"
    )


def _with_factor(sae: SparseAutoencoder, requested: Any, name: str) -> SparseAutoencoder:
    """The SAE with the requested scaling; `estimate` leaves the factor to `estimate_factor`.

    Raises SAEError where the files contradict the request, or need a factor and lack it.
    """
    if requested is None:
        if sae.lacks_factor:
            raise _no_factor(name)
        return sae
    if sae.is_transcoder or sae.settings.normalize_activations not in ("none", _ONE_FACTOR):
        raise SAEError(
            f"sae.norm_factor={requested}, but the inputs of {name} are not scaled by one factor; "
            "leave it out"
        )
    in_files = sae.settings.norm_factor
    if in_files is not None and (
        requested == ESTIMATE or not math.isclose(in_files, requested, rel_tol=1e-6)
    ):
        raise SAEError(
            f"sae.norm_factor={requested}, but the files of {name} say {in_files:g}; leave it out"
        )
    if requested == ESTIMATE:
        return sae.with_factor(None).with_metadata(norm_factor_by="estimate")
    return sae.with_factor(float(requested)).with_metadata(norm_factor_by="sae.norm_factor")


@torch.inference_mode()
def estimate_factor(sae: SparseAutoencoder, chunks: Iterable[Float[Tensor, "_ d"]]) -> float:
    """The factor that brings the rows' mean norm to sqrt(d_in), as in the training of sae-lens and
    Anthropic (Conerly et al. 2024, Circuits Updates April).

    Raises SAEError where every row is zero.
    """
    total, n = 0.0, 0
    for acts in chunks:
        total += float(acts.reshape(len(acts), -1).double().norm(dim=-1).sum())
        n += len(acts)
    if not total:
        raise SAEError("sae.norm_factor=estimate: every activation is zero; type a number")
    return sae.d_in**0.5 * n / total


def _check_hookpoint(at: Hookpoint, layer: Any, stream: str | None, name: str) -> None:
    """Raise SAEError where the requested layer or stream is not the SAE's."""
    if layer is not None:
        layers = parse_layers(layer)
        if len(layers) != 1:
            raise SAEError(f"layer={layers}: one SAE reads one layer; sweep with -m layer=0,1,2")
        if layers[0] != at.layer:
            raise SAEError(
                f"layer={layers[0]}, but {name} was trained on {at.name}; type layer={at.layer}"
            )
    if stream is not None and Hookpoint(at.layer, stream).stored != at.stored:
        raise SAEError(f"sae.stream={stream}, but {name} was trained on {at.name}; leave it out")


def check_fits(sae: SparseAutoencoder, model: LanguageModel) -> None:
    """Raise SAEError unless the model has the SAE's hookpoints at the SAE's sizes."""
    name = sae.metadata.get("name", "the SAE")
    short = model.name.rpartition("/")[2]
    sizes = {sae.hookpoint: ("reads", sae.d_in)}
    if sae.hookpoint_out is not None:
        sizes[sae.hookpoint_out] = ("predicts", sae.d_out)
    for hookpoint, (verb, size) in sizes.items():
        model.check_layer(hookpoint.layer)
        if hookpoint.stream != "attn_z" and size != model.d_model:
            raise SAEError(
                f"{name} {verb} vectors of {size} numbers, but {short} has "
                f"d_model={model.d_model}; choose an SAE that was trained on this model"
            )
