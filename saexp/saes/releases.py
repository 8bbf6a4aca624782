"""Formats of sae-lens' catalogue: how each is read, and where its SAEs belong, by their names."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saexp.digests import content_name, digest_of
from saexp.errors import SAEError
from saexp.models.hookpoints import Hookpoint
from saexp.saes.catalogue import Entry
from saexp.saes.formats import dictionary_learning, gemma_scope, gemma_scope2, llama_scope, saelens
from saexp.saes.formats.files import about, download, lens_hookpoint, present
from saexp.saes.sae import SparseAutoencoder

Metadata = dict[str, Any]
Ends = tuple[Hookpoint, Hookpoint | None]
"""(what it reads, what a transcoder predicts)."""
_LLAMA_SCOPE = {"r": "resid_post", "a": "attn_out", "m": "mlp_out"}


@dataclass(frozen=True)
class Format:
    """One `conversion_func` of the catalogue."""

    read: Callable[[Entry, Metadata], SparseAutoencoder]
    """Downloads what it needs; the metadata are what the catalogue says."""
    ends: Callable[[Entry], Ends]
    """Needs no file."""


def format_of(entry: Entry) -> Format:
    """Raises SAEError for a format that saexp does not read."""
    if entry.loader not in FORMATS:
        readable = ", ".join(sorted(filter(None, FORMATS)))
        raise SAEError(
            f"{entry.release}/{entry.id} has the format '{entry.loader}', which is not supported; "
            f"saexp reads {readable}"
        )
    return FORMATS[entry.loader]


def neuronpedia_of(entry: Entry) -> str | None:
    """The catalogue's Neuronpedia id; None where it names another layer than the SAE's.

    What block 11 of 12 gives is layer 12 there.
    """
    named = re.search(r"/(\d+)-", entry.neuronpedia or "")
    at = format_of(entry).ends(entry)[0]
    layers = (at.layer, at.layer + 1) if at.stream == "resid_post" else (at.layer,)
    return None if named and int(named[1]) not in layers else entry.neuronpedia


def _folder(
    entry: Entry, metadata: Metadata, files: tuple[str, str], *, needs_config: bool = True
) -> Path:
    """The entry's folder in the hub's cache, with (config, weights)."""
    config, weights = files
    get = download if needs_config else present
    get(entry.repo, f"{entry.path}/{config}")
    file = download(entry.repo, f"{entry.path}/{weights}")
    place = file.parents[len(Path(weights).parts) - 1]
    metadata.update(about(file, place / config))
    return place


def _gemma_scope(entry: Entry, metadata: Metadata) -> SparseAutoencoder:
    path = entry.path if entry.path.endswith(".npz") else f"{entry.path}/{gemma_scope.WEIGHTS}"
    file = download(entry.repo, path)
    ends = gemma_scope.ends_of(entry.repo, entry.path)
    return gemma_scope.load_gemma_scope(file, ends, {**metadata, **about(file)})


def _gemma_scope2(entry: Entry, metadata: Metadata) -> SparseAutoencoder:
    gemma_scope2.refuse_across_layers(entry.path, metadata["name"])
    files = (gemma_scope2.CONFIG, gemma_scope2.WEIGHTS)
    place = _folder(entry, metadata, files, needs_config=False)
    return gemma_scope2.load_gemma_scope2(place, metadata)


def _saelens(entry: Entry, metadata: Metadata) -> SparseAutoencoder:
    present(entry.repo, f"{entry.path}/{saelens.SPARSITY}")
    place = _folder(entry, metadata, (saelens.CONFIG, saelens.WEIGHTS))
    return saelens.load_saelens(place, metadata, entry.overrides)


def _llama_scope(entry: Entry, metadata: Metadata) -> SparseAutoencoder:
    place = _folder(entry, metadata, (llama_scope.CONFIG, llama_scope.WEIGHTS))
    return llama_scope.load_llama_scope(place, metadata)


def _dictionary_learning(entry: Entry, metadata: Metadata) -> SparseAutoencoder:
    files = (dictionary_learning.CONFIG, dictionary_learning.WEIGHTS)
    return dictionary_learning.load_dictionary_learning(_folder(entry, metadata, files), metadata)


def _cross_layer(entry: Entry, metadata: Metadata) -> SparseAutoencoder:
    """One layer of a cross-layer transcoder; the catalogue's path is the layer."""
    layer = int(entry.path)
    config = download(entry.repo, saelens.CONFIG_BY_LOADER)
    encoder, decoder = (download(entry.repo, name) for name in saelens.weights(layer))
    files = saelens.Files(config, encoder, decoder)
    known = about(encoder, config)
    known["fingerprint"] = digest_of(content_name(encoder), content_name(decoder))
    return saelens.load_layer(files, layer, {**metadata, **known})


def _named(entry: Entry) -> Ends:
    """Ids are TransformerLens' names, some with a trainer or a variant behind."""
    match = re.match(r"blocks\.\d+\.(?:attn\.)?hook_[a-z]+(?:_(?:pre|mid|post|out))?", entry.id)
    name = (match[0] if match else entry.id).replace(".hook_z", ".attn.hook_z")
    return lens_hookpoint(name.replace(".attn.attn.", ".attn."), entry.id), None


def _trainer(entry: Entry) -> Ends:
    """`resid_post_layer_7/trainer_1` in the path, of SAEs of dictionary_learning."""
    match = re.search(r"(resid_pre|resid_post|mlp_out|attn_out)_layer_(\d+)", entry.path)
    if match is None:
        raise SAEError(f"{entry.release}/{entry.id} does not say its layer and stream")
    return Hookpoint(int(match[2]), match[1]), None


def _of_layer(stream: str, stream_out: str | None = None) -> Callable[[Entry], Ends]:
    """All of a format belong to these streams, of the layer that the id says."""

    def ends(entry: Entry) -> Ends:
        match = re.search(r"(?:^|[a-z_])(\d+)$", entry.id)
        if match is None:
            raise SAEError(f"{entry.release}/{entry.id} does not say its layer")
        layer = int(match[1])
        return Hookpoint(layer, stream), Hookpoint(layer, stream_out) if stream_out else None

    return ends


def _llama_scope_ends(entry: Entry) -> Ends:
    """`l12r_8x`, `l12r_800m_slimpajama`."""
    match = re.match(r"l(\d+)([ram])_", entry.id)
    if match is None:
        raise SAEError(f"{entry.release}/{entry.id} does not say its layer and stream")
    return Hookpoint(int(match[1]), _LLAMA_SCOPE[match[2]]), None


def _gemma_scope_ends(entry: Entry) -> Ends:
    return gemma_scope.ends_of(entry.repo, entry.path)


def _gemma_scope2_ends(entry: Entry) -> Ends:
    ends = gemma_scope2.ends_by_path(entry.path)
    if ends is None:
        raise SAEError(f"{entry.release}/{entry.id} does not say its layer and stream")
    return ends


_BY_SAE_LENS = saelens.load_by_sae_lens
FORMATS: dict[str | None, Format] = {
    None: Format(_saelens, _named),
    "sae_lens": Format(_saelens, _named),
    "gemma_2": Format(_gemma_scope, _gemma_scope_ends),
    "gemma_2_transcoder": Format(_gemma_scope, _gemma_scope_ends),
    "gemma_3": Format(_gemma_scope2, _gemma_scope2_ends),
    "llama_scope": Format(_llama_scope, _llama_scope_ends),
    "llama_scope_r1_distill": Format(_BY_SAE_LENS, _llama_scope_ends),
    "dictionary_learning_1": Format(_dictionary_learning, _trainer),
    "mwhanna_transcoder": Format(_BY_SAE_LENS, _of_layer("mlp_in", "mlp_out")),
    "mntss_clt_layer_transcoder": Format(_cross_layer, _of_layer("resid_mid", "mlp_out")),
    "connor_rob_hook_z": Format(_BY_SAE_LENS, _named),
    "deepseek_r1": Format(_BY_SAE_LENS, _named),
    "goodfire": Format(_BY_SAE_LENS, _of_layer("resid_post")),
    "qwen_scope": Format(_BY_SAE_LENS, _of_layer("resid_post")),
}
"""`conversion_func` in the catalogue -> the format."""
