"""The catalogue of SAE releases of sae-lens, read as data, and links to Neuronpedia."""

import difflib
import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from saexp.config import SAEConfig, parse_layers, parse_width
from saexp.digests import content_name, digest_of
from saexp.errors import SAEError
from saexp.models import Hookpoint
from saexp.saes import SAE, SparseAutoencoder
from saexp.saes.formats import (
    Streams,
    dictionary_learning,
    download,
    download_if_present,
    file_metadata,
    gemma_scope,
    lens_hookpoint,
    saelens,
)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One SAE of a release."""

    release: str
    id: str
    repo: str
    path: str
    neuronpedia: str | None
    layer: int | None
    width: int | None
    l0: int | None
    release_model: str | None
    loader: str | None
    expected_l0: float | None
    expected_explained_variance: float | None = None
    """As reported by the SAE's authors or sae-lens; None where the catalogue has no value, or 1.0,
    which it uses for unknown."""
    l0_name: str | None = None
    """small, medium or big, where the release names its L0s."""
    variant: str = ""
    """The rest of the id, such as `affine` or `seed_1`."""
    chosen: str | None = None
    """Defaults chosen where the config leaves them open: `l0 medium of big, medium, small`."""
    overrides: dict[str, Any]
    """Config values that the files of the release lack or have wrong."""


@cache
def catalogue() -> dict[str, Any]:
    """The catalogue that sae-lens ships."""
    spec = importlib.util.find_spec("sae_lens")
    if spec is None or not spec.submodule_search_locations:
        raise SAEError("the catalogue of releases needs sae-lens; type pip install sae-lens")
    file = Path(spec.submodule_search_locations[0]) / "pretrained_saes.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(file.read_text("utf-8"), Loader=loader)  # noqa: S506


def _factor_override(sae: dict[str, Any]) -> dict[str, Any]:
    factor = sae.get("norm_scaling_factor")
    return {} if factor is None else {"norm_scaling_factor": factor}


def _explained_variance(sae: dict[str, Any]) -> float | None:
    value = sae.get("variance_explained")
    return None if value is None or value == 1.0 else float(value)


def _first_group(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match[1] if match else None


def entries(release: str) -> list[Entry]:
    """All SAEs of a release. Raises SAEError, with similar names, for an unknown release."""
    releases = catalogue()
    if release not in releases:
        raise SAEError(f"sae.release={release} is not known; {_nearest(release, list(releases))}")
    content = releases[release]
    result = []
    for sae in content["saes"]:
        location = f"{sae['id']}/{sae.get('path', '')}"
        layer = _first_group(r"(?:layer_?|blocks\.|layers\.|/?\bl)(\d+)", location)
        width = _first_group(r"width_(\d+[kKmM]?)", location) or _first_group(
            r"-(\d+[km])(?:__|$)", sae.get("neuronpedia") or ""
        )
        l0 = _first_group(r"average_l0_(\d+)", location)
        l0_name = re.search(r"_l0_(small|medium|big)(?:_(\w+))?$", sae["id"])
        if l0_name and sae.get("l0"):
            l0 = sae["l0"]
        result.append(
            Entry(
                release=release,
                id=sae["id"],
                repo=content["repo_id"],
                path=str(sae.get("path", sae["id"])),
                neuronpedia=sae.get("neuronpedia"),
                layer=int(layer) if layer else None,
                width=n_latents(width),
                l0=int(l0) if l0 else None,
                release_model=content.get("model"),
                loader=content.get("conversion_func"),
                l0_name=l0_name[1] if l0_name else None,
                variant=(l0_name[2] or "") if l0_name else "",
                expected_l0=float(sae.get("l0") or l0 or 0) or None,
                expected_explained_variance=_explained_variance(sae),
                overrides={**content.get("config_overrides", {}), **_factor_override(sae)},
            )
        )
    return result


def find_entry(cfg: SAEConfig) -> Entry:
    """The SAE of a config, by id, or by layer, width and L0.

    Raises SAEError, with the nearest widths, layers, L0s or ids, where there is none.
    """
    if not cfg.release:
        raise SAEError("sae.release is not set; type e.g. sae.release=gpt2-small-res-jb")
    release = cfg.release.format(model=_short_model(cfg.model_name))
    candidates = entries(release)
    if cfg.id is not None:
        chosen = [e for e in candidates if e.id == cfg.id]
        if not chosen:
            near = _nearest(cfg.id, [e.id for e in candidates])
            raise SAEError(f"sae.id={cfg.id} is not in {release}; {near}")
        return chosen[0]
    return _by_layer(cfg, release, candidates)


def _by_layer(cfg: SAEConfig, release: str, candidates: list[Entry]) -> Entry:
    if cfg.layer is None:
        raise SAEError(f"which SAE of {release}? type layer=<block index> or sae.id=<id>")
    layer = parse_layers(cfg.layer)[0]
    width = n_latents(cfg.width)
    layers = sorted({e.layer for e in candidates if e.layer is not None})
    chosen = [e for e in candidates if e.layer == layer]
    if not chosen:
        nearest = min(layers, key=lambda n: abs(n - layer), default=None)
        raise SAEError(
            f"{release} has no SAE at layer={layer}; it has layers "
            f"{', '.join(map(str, layers)) or 'that are not known'}; try layer={nearest}"
            f"{_other_release(release, layer, width)}"
        )
    widths = sorted({e.width for e in chosen if e.width is not None})
    if width is not None and widths:
        chosen = [e for e in chosen if e.width == width]
        if not chosen:
            nearest = min(widths, key=lambda n: abs(n - width))
            listed = ", ".join(map(show_width, widths))
            raise SAEError(
                f"{release} has no width={cfg.width} at layer={layer}; it has {listed}; "
                f"try width={show_width(nearest)}{_other_release(release, layer, width)}"
            )
    if cfg.l0 is not None and any(e.l0 is not None for e in chosen):
        l0s = sorted(e.l0 for e in chosen if e.l0 is not None)
        if cfg.l0 not in l0s:
            nearest = min(l0s, key=lambda n: abs(n - (cfg.l0 or 0)))
            listed = ", ".join(map(str, l0s))
            raise SAEError(
                f"{release} has no sae.l0={cfg.l0} at layer={layer}; it has {listed}; "
                f"try sae.l0={nearest}"
            )
        chosen = [e for e in chosen if e.l0 == cfg.l0]
    chosen = _with_defaults(chosen)
    if len(chosen) > 1:
        ids = ", ".join(e.id for e in chosen[:8])
        raise SAEError(
            f"{release} has {len(chosen)} SAEs at layer={layer}: {ids}; type sae.id=<id>"
        )
    return chosen[0]


def _with_defaults(candidates: list[Entry]) -> list[Entry]:
    """Of SAEs with several L0 names or variants, those of L0 `medium` without a variant."""
    if len(candidates) < 2 or any(e.l0_name is None for e in candidates):
        return candidates
    chosen, choices = candidates, []
    for label, value_of, default in (
        ("l0", lambda e: e.l0_name, "medium"),
        ("variant", lambda e: e.variant or "plain", "plain"),
    ):
        values = sorted({value_of(e) for e in chosen})
        if len(values) > 1 and default in values:
            chosen = [e for e in chosen if value_of(e) == default]
            choices.append(f"{label} {default} of {', '.join(values)}")
    return [replace(e, chosen="; ".join(choices) or None) for e in chosen]


def _nearest(word: str, known: list[str]) -> str:
    """The known names that are similar, else some of them."""
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(known[:8])} …"


def _other_release(release: str, layer: int, width: int | None) -> str:
    """The most similar release of the same model and format with this width at this layer."""
    keys = ("model", "conversion_func")
    content = catalogue()[release]
    others = [
        name
        for name, other in catalogue().items()
        if all(other.get(k) == content.get(k) for k in keys)
        and any(e.layer == layer and width in (None, e.width) for e in entries(name))
    ]
    near = difflib.get_close_matches(release, others, n=1, cutoff=0.5)
    return f" or sae.release={near[0]}" if near else ""


def n_latents(width: Any) -> int | None:
    """Latents of a width: '16k' is 16384, and '65k', '131k', … are 65536, 131072, …"""
    n = parse_width(width)
    thousands = re.fullmatch(r"\s*(\d+)k\s*", str(width).lower())
    if n is None or not thousands:
        return n
    power = 1 << int(int(thousands[1]) * 1000).bit_length()
    return power if power // 1000 == int(thousands[1]) else n


def show_width(width: int) -> str:
    """The width as releases spell it: 16384 is 16k, 65536 is 65k."""
    if 2**16 <= width < 2**20 and width & (width - 1) == 0:
        return f"{width // 1000}k"
    for unit, letter in ((1024**2, "m"), (1024, "k")):
        if width % unit == 0:
            return f"{width // unit}{letter}"
    return str(width)


def _short_model(name: str | None) -> str:
    """The model as Gemma Scope spells it: google/gemma-2-2b is 2b-pt, gemma-3-1b-it is 1b-it."""
    match = re.search(r"gemma-[23]-(\d+[bm])(?:-pt)?(-it)?$", name or "")
    if not match:
        return (name or "").rpartition("/")[2]
    return f"{match[1]}-{'it' if match[2] else 'pt'}"


PACKAGE = Path(__file__).resolve().parent.parent
ASSETS = PACKAGE / "assets"


def fill_path(cfg: SAEConfig) -> Path:
    """`sae.path` with the names in braces filled in.

    `{assets}` is the folder of the package's files, `{repository}` the one that holds the package.

    Raises SAEError where it is not set, and for other names in braces.
    """
    if not cfg.path:
        raise SAEError("sae.path is not set; type sae.path=<folder with the SAE's files>")
    width = n_latents(cfg.width)
    names = {
        "assets": ASSETS,
        "repository": PACKAGE.parent,
        "model_name": cfg.model_name,
        "layer": cfg.layer,
        "width": width,
    }
    try:
        return Path(cfg.path.format(**names))
    except (KeyError, ValueError, IndexError) as error:
        raise SAEError(
            f"sae.path={cfg.path}: only {', '.join(names)} may be in braces; double other braces"
        ) from error


Metadata = dict[str, Any]
_LLAMA_SCOPE = {"r": "resid_post", "a": "attn_out", "m": "mlp_out"}


@dataclass(frozen=True)
class Format:
    """One `conversion_func` of the catalogue."""

    read: Callable[[Entry, Metadata], SparseAutoencoder]
    """Loads the SAE, downloading its files; the metadata are those of the catalogue."""
    streams: Callable[[Entry], Streams]
    """The streams that the SAE reads and predicts, determined without any file."""


def format_of(entry: Entry) -> Format:
    """The format of a catalogue entry. Raises SAEError where saexp does not read it."""
    if entry.loader not in FORMATS:
        readable = ", ".join(sorted(filter(None, FORMATS)))
        raise SAEError(
            f"{entry.release}/{entry.id} has the format '{entry.loader}', which is not supported; "
            f"saexp reads {readable}"
        )
    return FORMATS[entry.loader]


def neuronpedia_of(entry: Entry) -> str | None:
    """The catalogue's Neuronpedia id; None where its layer is not the SAE's.

    For resid_post, Neuronpedia's layer may also be that of the next block.
    """
    layer = re.search(r"/(\d+)-", entry.neuronpedia or "")
    at = format_of(entry).streams(entry)[0]
    layers = (at.layer, at.layer + 1) if at.stream == "resid_post" else (at.layer,)
    return None if layer and int(layer[1]) not in layers else entry.neuronpedia


def _folder(
    entry: Entry, metadata: Metadata, files: tuple[str, str], *, needs_config: bool = True
) -> Path:
    """The entry's folder in the hub's cache, with (config, weights) downloaded to it."""
    config, weights = files
    get = download if needs_config else download_if_present
    get(entry.repo, f"{entry.path}/{config}")
    file = download(entry.repo, f"{entry.path}/{weights}")
    folder = file.parents[len(Path(weights).parts) - 1]
    metadata.update(file_metadata(file, folder / config))
    return folder


def _gemma_scope(entry: Entry, metadata: Metadata) -> SparseAutoencoder:
    path = entry.path if entry.path.endswith(".npz") else f"{entry.path}/{gemma_scope.WEIGHTS}"
    file = download(entry.repo, path)
    streams = gemma_scope.streams_of(entry.repo, entry.path)
    return gemma_scope.load_gemma_scope(file, streams, {**metadata, **file_metadata(file)})


def _gemma_scope2(entry: Entry, metadata: Metadata) -> SparseAutoencoder:
    gemma_scope.refuse_across_layers(entry.path, metadata["name"])
    files = (gemma_scope.CONFIG_2, gemma_scope.WEIGHTS_2)
    folder = _folder(entry, metadata, files, needs_config=False)
    return gemma_scope.load_gemma_scope2(folder, metadata)


def _saelens(entry: Entry, metadata: Metadata) -> SparseAutoencoder:
    download_if_present(entry.repo, f"{entry.path}/{saelens.SPARSITY}")
    folder = _folder(entry, metadata, (saelens.CONFIG, saelens.WEIGHTS))
    return saelens.load_saelens(folder, metadata, entry.overrides)


def _llama_scope(entry: Entry, metadata: Metadata) -> SparseAutoencoder:
    files = (gemma_scope.LLAMA_SCOPE_CONFIG, gemma_scope.LLAMA_SCOPE_WEIGHTS)
    return gemma_scope.load_llama_scope(_folder(entry, metadata, files), metadata)


def _dictionary_learning(entry: Entry, metadata: Metadata) -> SparseAutoencoder:
    files = (dictionary_learning.CONFIG, dictionary_learning.WEIGHTS)
    return dictionary_learning.load_dictionary_learning(_folder(entry, metadata, files), metadata)


def _cross_layer(entry: Entry, metadata: Metadata) -> SparseAutoencoder:
    """One layer of a cross-layer transcoder; the catalogue's path is the layer."""
    layer = int(entry.path)
    config = download(entry.repo, saelens.CONFIG_BY_LOADER)
    encoder, decoder = (download(entry.repo, name) for name in saelens.weights(layer))
    files = saelens.Files(config, encoder, decoder)
    of_files = file_metadata(encoder, config)
    of_files["fingerprint"] = digest_of(content_name(encoder), content_name(decoder))
    return saelens.load_layer(files, layer, {**metadata, **of_files})


def _streams_of_hook_name(entry: Entry) -> Streams:
    """From an id that begins with a TransformerLens hook name."""
    match = re.match(r"blocks\.\d+\.(?:attn\.)?hook_[a-z]+(?:_(?:pre|mid|post|out))?", entry.id)
    name = (match[0] if match else entry.id).replace(".hook_z", ".attn.hook_z")
    return lens_hookpoint(name.replace(".attn.attn.", ".attn."), entry.id), None


def _streams_of_trainer(entry: Entry) -> Streams:
    """From a path of dictionary_learning such as `resid_post_layer_7/trainer_1`."""
    match = re.search(r"(resid_pre|resid_post|mlp_out|attn_out)_layer_(\d+)", entry.path)
    if match is None:
        raise SAEError(f"{entry.release}/{entry.id} does not say its layer and stream")
    return Hookpoint(int(match[2]), match[1]), None


def _of_layer(stream: str, stream_out: str | None = None) -> Callable[[Entry], Streams]:
    """A function of an entry: these streams, at the layer at the end of the id."""

    def streams(entry: Entry) -> Streams:
        match = re.search(r"(?:^|[a-z_])(\d+)$", entry.id)
        if match is None:
            raise SAEError(f"{entry.release}/{entry.id} does not say its layer")
        layer = int(match[1])
        return Hookpoint(layer, stream), Hookpoint(layer, stream_out) if stream_out else None

    return streams


def _llama_scope_streams(entry: Entry) -> Streams:
    """From an id such as `l12r_8x` or `l12r_800m_slimpajama`."""
    match = re.match(r"l(\d+)([ram])_", entry.id)
    if match is None:
        raise SAEError(f"{entry.release}/{entry.id} does not say its layer and stream")
    return Hookpoint(int(match[1]), _LLAMA_SCOPE[match[2]]), None


def _gemma_scope_streams(entry: Entry) -> Streams:
    return gemma_scope.streams_of(entry.repo, entry.path)


def _gemma_scope2_streams(entry: Entry) -> Streams:
    streams = gemma_scope.streams2_of(entry.path)
    if streams is None:
        raise SAEError(f"{entry.release}/{entry.id} does not say its layer and stream")
    return streams


def _by_sae_lens(entry: Entry, metadata: Metadata) -> SparseAutoencoder:
    return saelens.load_by_sae_lens(entry.release, entry.id, metadata)


FORMATS: dict[str | None, Format] = {
    None: Format(_saelens, _streams_of_hook_name),
    "sae_lens": Format(_saelens, _streams_of_hook_name),
    "gemma_2": Format(_gemma_scope, _gemma_scope_streams),
    "gemma_2_transcoder": Format(_gemma_scope, _gemma_scope_streams),
    "gemma_3": Format(_gemma_scope2, _gemma_scope2_streams),
    "llama_scope": Format(_llama_scope, _llama_scope_streams),
    "llama_scope_r1_distill": Format(_by_sae_lens, _llama_scope_streams),
    "dictionary_learning_1": Format(_dictionary_learning, _streams_of_trainer),
    "mwhanna_transcoder": Format(_by_sae_lens, _of_layer("mlp_in", "mlp_out")),
    "mntss_clt_layer_transcoder": Format(_cross_layer, _of_layer("resid_mid", "mlp_out")),
    "connor_rob_hook_z": Format(_by_sae_lens, _streams_of_hook_name),
    "deepseek_r1": Format(_by_sae_lens, _streams_of_hook_name),
    "goodfire": Format(_by_sae_lens, _of_layer("resid_post")),
    "qwen_scope": Format(_by_sae_lens, _of_layer("resid_post")),
}
"""`conversion_func` in the catalogue -> the format."""


SITE = "https://neuronpedia.org"
EMBEDDED = "embed=true&embedexplanation=true&embedplots=true&embedtest=false"
"""Query for the view of a latent that Neuronpedia embeds in other pages."""


def neuronpedia_id(sae: SAE) -> str | None:
    """An id such as `gemma-2-2b/12-gemmascope-res-16k`; None where catalogue and config have none.

    It is never derived from the model's name, because not every SAE of a model is on Neuronpedia.
    Raises SAEError for an id that is not `<model>/<source>`.
    """
    value = sae.metadata.get("neuronpedia_id")
    if not value:
        return None
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", str(value)):
        name = sae.metadata.get("name", "the SAE")
        raise SAEError(f"{name}: its Neuronpedia id '{value}' is not of the form <model>/<source>")
    return str(value)


def neuronpedia_url(sae: SAE, latent: int) -> str | None:
    """The latent's page; None for an SAE without an id. Raises SAEError for an invalid latent."""
    _check_latents(sae, [latent])
    source = neuronpedia_id(sae)
    return None if source is None else f"{SITE}/{source}/{latent}"


def neuronpedia_list(sae: SAE, latents: Sequence[int], name: str = "saexp") -> str | None:
    """The page of several latents (a quick list), in their order; None for an SAE without an id.

    Raises SAEError for invalid latents, or where `latents` is empty.
    """
    if not len(latents):
        raise SAEError("neuronpedia_list needs at least one latent")
    _check_latents(sae, latents)
    sae_id = neuronpedia_id(sae)
    if sae_id is None:
        return None
    model, source = sae_id.split("/")
    features = [{"modelId": model, "layer": source, "index": str(f)} for f in latents]
    return f"{SITE}/quick-list/?name={quote(name)}&features={quote(json.dumps(features))}"


def _check_latents(sae: SAE, latents: Sequence[int]) -> None:
    invalid = next((f for f in latents if not 0 <= f < sae.d_sae), None)
    if invalid is not None:
        name = sae.metadata.get("name", "the SAE")
        raise SAEError(f"latent {invalid}: {name} has latents 0-{sae.d_sae - 1}")
