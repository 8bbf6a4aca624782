"""Which format a folder, a file or a place in a repository is in, and reading it."""

from pathlib import Path
from typing import Any

from saexp.config import parse_layers
from saexp.errors import SAEError
from saexp.hub import is_path
from saexp.models.hookpoints import Hookpoint
from saexp.saes.base import SparseAutoencoder
from saexp.saes.formats import (
    dictionary_learning,
    gemma_scope,
    gemma_scope2,
    llama_scope,
    saelens,
    sparsify,
)
from saexp.saes.hub import about, download, present

_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt")
_DANGER = "which can run code when opened; saexp loads safetensors and npz, so convert it first"
_IN_REPOS = (
    (saelens.CONFIG, saelens.WEIGHTS),
    (sparsify.CONFIG, sparsify.WEIGHTS),
    (llama_scope.CONFIG, llama_scope.WEIGHTS),
    (gemma_scope2.CONFIG, gemma_scope2.WEIGHTS),
    (dictionary_learning.CONFIG, dictionary_learning.WEIGHTS),
)
"""(config, weights) of the formats that are folders with a config."""


def load_sae_files(place: Path, stream: str | None, layer: Any, name: str) -> SparseAutoencoder:
    """Detect the format from the files and read it. Raises SAEError for what is not there."""
    place = place.expanduser()
    is_ours = place.name == dictionary_learning.WEIGHTS
    if is_ours and dictionary_learning.is_dictionary_learning(place.parent):
        place = place.parent
    if place.suffix in _PICKLES and (place.is_file() or not place.exists()):
        raise SAEError(f"{place} is a pickle file, {_DANGER}")
    if not place.exists():
        parts = place.parts
        if len(parts) < 2 or is_path(str(place)):
            raise SAEError(f"sae.path={place}: no such folder or file")
        return _from_repo("/".join(parts[:2]), "/".join(parts[2:]), stream, layer)
    if place.name in (gemma_scope2.WEIGHTS, saelens.WEIGHTS, sparsify.WEIGHTS):
        place = place.parent
    found = _read_folder(place, stream, layer, name) if place.is_dir() else None
    if found is not None:
        return found
    file = place / gemma_scope.WEIGHTS if place.is_dir() else place
    if file.is_file() and file.suffix == ".npz":
        return gemma_scope.load_gemma_scope(
            file, _npz_ends(file, stream, layer), {"name": name, **about(file)}
        )
    raise _unknown(place)


def _read_folder(
    folder: Path, stream: str | None, layer: Any, name: str
) -> SparseAutoencoder | None:
    """A folder in one of the formats that have a config; None where it is in none of them."""

    def facts(form: Any) -> dict[str, Any]:
        return {"name": name, **about(folder / form.WEIGHTS, folder / form.CONFIG)}

    given = _given(stream, layer)
    if saelens.is_saelens(folder):
        return saelens.load_saelens(folder, facts(saelens))
    if sparsify.is_sparsify(folder):
        return sparsify.load_sparsify(folder, facts(sparsify), given)
    if llama_scope.is_llama_scope(folder):
        return llama_scope.load_llama_scope(folder, facts(llama_scope))
    if gemma_scope2.is_gemma_scope2(folder):
        return gemma_scope2.load_gemma_scope2(folder, facts(gemma_scope2), given)
    if dictionary_learning.is_dictionary_learning(folder):
        return dictionary_learning.load_dictionary_learning(
            folder, facts(dictionary_learning), stream
        )
    return None


def _unknown(place: Path) -> SAEError:
    inside = sorted(f.name for f in place.iterdir()) if place.is_dir() else []
    pickled = [name for name in inside if name.endswith(_PICKLES)]
    if pickled:
        return SAEError(f"{place} holds only a pickle file ({pickled[0]}), {_DANGER}")
    if any(name.startswith("params_layer_") for name in inside):
        gemma_scope2.refuse_across_layers("clt", str(place))
    return SAEError(
        f"sae.path={place} is no SAE saexp knows: expected {saelens.CONFIG} with "
        f"{saelens.WEIGHTS}, {llama_scope.CONFIG} with {llama_scope.WEIGHTS}, or "
        f"{gemma_scope.WEIGHTS}; or {sparsify.CONFIG} with {sparsify.WEIGHTS}, or "
        f"{gemma_scope2.CONFIG} with {gemma_scope2.WEIGHTS} or {dictionary_learning.WEIGHTS}"
    )


def _from_repo(repo: str, path: str, stream: str | None, layer: Any) -> SparseAutoencoder:
    prefix = f"{path}/" if path else ""
    name = f"{repo}/{path}".rstrip("/")
    gemma_scope2.refuse_across_layers(name, name)
    if path.endswith(".npz") or gemma_scope.is_gemma_scope(repo):
        inner = path if path.endswith(".npz") else f"{prefix}{gemma_scope.WEIGHTS}"
        ends = gemma_scope.ends_of(repo, path)
        file = download(repo, inner)
        return gemma_scope.load_gemma_scope(file, ends, {"name": name, **about(file)})
    lacking = []
    for config, weights in _IN_REPOS:
        if present(repo, f"{prefix}{config}") is None:
            continue
        file = present(repo, f"{prefix}{weights}")
        if file is None:
            lacking.append(weights)
            continue
        if weights == sparsify.WEIGHTS:
            present(repo, _beside(path, sparsify.RUN_CONFIG))
        if weights == saelens.WEIGHTS:
            present(repo, f"{prefix}{saelens.SPARSITY}")
        folder = file.parents[len(Path(weights).parts) - 1]
        return load_sae_files(folder, stream, layer, name)
    if gemma_scope2.is_in(repo):
        return load_sae_files(
            download(repo, f"{prefix}{gemma_scope2.WEIGHTS}").parent, stream, layer, name
        )
    # Neither is there, or it would have been read; the error says which and why.
    try:
        folder = download(repo, f"{prefix}{lacking[0] if lacking else saelens.CONFIG}").parent
    except SAEError as error:
        if lacking:
            raise
        raise SAEError(f"sae.path={name}: no such folder here, and {error}") from error
    return load_sae_files(folder, stream, layer, name)


def _beside(path: str, file: str) -> str:
    """The file one folder above `path`, past a folder for a seed."""
    parts = Path(path).parts
    above = parts[:-2] if parts and parts[-1].startswith("seed") else parts[:-1]
    return "/".join([*above, file])


def _given(stream: str | None, layer: Any) -> Hookpoint | None:
    """What the user says, where they say both."""
    if stream is None or layer is None:
        return None
    return Hookpoint(parse_layers(layer)[0], stream)


def _npz_ends(file: Path, stream: str | None, layer: Any) -> gemma_scope.Ends:
    """From the path, else from the user's words."""
    try:
        return gemma_scope.ends_of(str(file.parent), str(file.parent))
    except SAEError:
        given = _given(stream, layer)
        if given is None:
            raise
        return given, None
