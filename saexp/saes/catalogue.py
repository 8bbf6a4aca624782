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
from saexp.models.hookpoints import Hookpoint
from saexp.saes.formats import (
    Streams,
    about,
    dictionary_learning,
    download,
    gemma_scope,
    lens_hookpoint,
    present,
    saelens,
)
from saexp.saes.sae import SAE, SparseAutoencoder


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
    """As its makers or sae-lens measured it; None where the catalogue has none, or the 1.0 that
    stands for none."""
    l0_name: str | None = None
    """small, medium or big, where the release names its L0s."""
    variant: str = ""
    """What its id says after that: `affine`, `seed_1`."""
    chosen: str | None = None
    """What was chosen for the user, who did not say: `l0 medium of big, medium, small`."""
    overrides: dict[str, Any]
    """Config values of the release that its files lack or have wrong."""


@cache
def catalogue() -> dict[str, Any]:
    """The whole catalogue as sae-lens ships it."""
    spec = importlib.util.find_spec("sae_lens")
    if spec is None or not spec.submodule_search_locations:
        raise SAEError("sae-lens is not installed, so releases have no catalogue; install sae-lens")
    file = Path(spec.submodule_search_locations[0]) / "pretrained_saes.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(file.read_text("utf-8"), Loader=loader)  # noqa: S506


def _factor(sae: dict[str, Any]) -> dict[str, Any]:
    factor = sae.get("norm_scaling_factor")
    return {} if factor is None else {"norm_scaling_factor": factor}


def _explained(sae: dict[str, Any]) -> float | None:
    said = sae.get("variance_explained")
    return None if said is None or said == 1.0 else float(said)


def _number(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match[1] if match else None


def entries(release: str) -> list[Entry]:
    """All SAEs of a release. Raises SAEError naming near misses."""
    releases = catalogue()
    if release not in releases:
        raise SAEError(f"sae.release={release} is not known; {_nearest(release, list(releases))}")
    about = releases[release]
    found = []
    for sae in about["saes"]:
        place = f"{sae['id']}/{sae.get('path', '')}"
        layer = _number(r"(?:layer_?|blocks\.|layers\.|/?\bl)(\d+)", place)
        width = _number(r"width_(\d+[kKmM]?)", place) or _number(
            r"-(\d+[km])(?:__|$)", sae.get("neuronpedia") or ""
        )
        l0 = _number(r"average_l0_(\d+)", place)
        named = re.search(r"_l0_(small|medium|big)(?:_(\w+))?$", sae["id"])
        if named and sae.get("l0"):
            l0 = sae["l0"]
        found.append(
            Entry(
                release=release,
                id=sae["id"],
                repo=about["repo_id"],
                path=str(sae.get("path", sae["id"])),
                neuronpedia=sae.get("neuronpedia"),
                layer=int(layer) if layer else None,
                width=n_latents(width),
                l0=int(l0) if l0 else None,
                release_model=about.get("model"),
                loader=about.get("conversion_func"),
                l0_name=named[1] if named else None,
                variant=(named[2] or "") if named else "",
                expected_l0=float(sae.get("l0") or l0 or 0) or None,
                expected_explained_variance=_explained(sae),
                overrides={**about.get("config_overrides", {}), **_factor(sae)},
            )
        )
    return found


def find(cfg: SAEConfig) -> Entry:
    """The SAE that a config asks for, by id, or by layer, width and L0.

    Raises SAEError naming the nearest widths, layers, L0s or ids.
    """
    if not cfg.release:
        raise SAEError("sae.release is not set; type e.g. sae.release=gpt2-small-res-jb")
    release = cfg.release.format(model=_short_model(cfg.model_name))
    there = entries(release)
    if cfg.id is not None:
        chosen = [e for e in there if e.id == cfg.id]
        if not chosen:
            near = _nearest(cfg.id, [e.id for e in there])
            raise SAEError(f"sae.id={cfg.id} is not in {release}; {near}")
        return chosen[0]
    return _by_place(cfg, release, there)


def _by_place(cfg: SAEConfig, release: str, there: list[Entry]) -> Entry:
    if cfg.layer is None:
        raise SAEError(f"which SAE of {release}? type layer=<block index> or sae.id=<id>")
    layer = parse_layers(cfg.layer)[0]
    width = n_latents(cfg.width)
    layers = sorted({e.layer for e in there if e.layer is not None})
    chosen = [e for e in there if e.layer == layer]
    if not chosen:
        nearest = min(layers, key=lambda n: abs(n - layer), default=None)
        raise SAEError(
            f"{release} has no SAE at layer={layer}; it has layers "
            f"{', '.join(map(str, layers)) or 'that are not known'}; try layer={nearest}"
            f"{_elsewhere(release, layer, width)}"
        )
    widths = sorted({e.width for e in chosen if e.width is not None})
    if width is not None and widths:
        chosen = [e for e in chosen if e.width == width]
        if not chosen:
            nearest = min(widths, key=lambda n: abs(n - width))
            listed = ", ".join(map(show_width, widths))
            raise SAEError(
                f"{release} has no width={cfg.width} at layer={layer}; it has {listed}; "
                f"try width={show_width(nearest)}{_elsewhere(release, layer, width)}"
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
    chosen = _by_name(chosen)
    if len(chosen) > 1:
        ids = ", ".join(e.id for e in chosen[:8])
        raise SAEError(f"{release} has {len(chosen)} SAEs at layer={layer}: {ids}; say sae.id=<id>")
    return chosen[0]


def _by_name(there: list[Entry]) -> list[Entry]:
    """Of SAEs that differ in the name of their L0 or in what follows it: medium, and plain."""
    if len(there) < 2 or any(e.l0_name is None for e in there):
        return there
    kept, said = there, []
    for what, of, wanted in (
        ("l0", lambda e: e.l0_name, "medium"),
        ("variant", lambda e: e.variant or "plain", "plain"),
    ):
        names = sorted({of(e) for e in kept})
        if len(names) > 1 and wanted in names:
            kept = [e for e in kept if of(e) == wanted]
            said.append(f"{what} {wanted} of {', '.join(names)}")
    return [replace(e, chosen="; ".join(said) or None) for e in kept]


def _nearest(word: str, known: list[str]) -> str:
    """Near misses, else a few of the many there are."""
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(known[:8])} …"


def _elsewhere(release: str, layer: int, width: int | None) -> str:
    """The most alike release of the same model and format with this width at this layer."""
    kind = ("model", "conversion_func")
    about = catalogue()[release]
    others = [
        name
        for name, other in catalogue().items()
        if all(other.get(k) == about.get(k) for k in kind)
        and any(e.layer == layer and width in (None, e.width) for e in entries(name))
    ]
    near = difflib.get_close_matches(release, others, n=1, cutoff=0.5)
    return f" or sae.release={near[0]}" if near else ""


def n_latents(width: Any) -> int | None:
    """'16k' -> 16384, and 65k, 131k … as releases call powers of two by their thousands: 65536."""
    n = parse_width(width)
    thousands = re.fullmatch(r"\s*(\d+)k\s*", str(width).lower())
    if n is None or not thousands:
        return n
    power = 1 << int(int(thousands[1]) * 1000).bit_length()
    return power if power // 1000 == int(thousands[1]) else n


def show_width(width: int) -> str:
    """16384 -> 16k, and 65536 -> 65k as releases call it."""
    if 2**16 <= width < 2**20 and width & (width - 1) == 0:
        return f"{width // 1000}k"
    for unit, letter in ((1024**2, "m"), (1024, "k")):
        if width % unit == 0:
            return f"{width // unit}{letter}"
    return str(width)


def _short_model(name: str | None) -> str:
    """google/gemma-2-2b, google/gemma-3-1b-pt -> 2b-pt, 1b-pt, as Gemma Scope names models."""
    match = re.search(r"gemma-[23]-(\d+[bm])(?:-pt)?(-it)?$", name or "")
    if not match:
        return (name or "").rpartition("/")[2]
    return f"{match[1]}-{'it' if match[2] else 'pt'}"


ASSETS = Path(__file__).parent.parent / "assets"


def fill(cfg: SAEConfig) -> Path:
    """`sae.path` with `{assets}`, `{model_name}`, `{layer}` and `{width}` filled in.

    Raises SAEError where it is not set, and for other names in braces.
    """
    if not cfg.path:
        raise SAEError("sae.path is not set; type sae.path=<folder with the SAE's files>")
    width = n_latents(cfg.width)
    names = {"assets": ASSETS, "model_name": cfg.model_name, "layer": cfg.layer, "width": width}
    try:
        return Path(cfg.path.format(**names))
    except (KeyError, ValueError, IndexError) as error:
        raise SAEError(
            f"sae.path={cfg.path}: {{…}} may hold {', '.join(names)} alone; write a brace twice"
        ) from error


Metadata = dict[str, Any]
_LLAMA_SCOPE = {"r": "resid_post", "a": "attn_out", "m": "mlp_out"}


@dataclass(frozen=True)
class Format:
    """One `conversion_func` of the catalogue."""

    read: Callable[[Entry, Metadata], SparseAutoencoder]
    """Downloads what it needs; the metadata are what the catalogue says."""
    streams: Callable[[Entry], Streams]
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
    at = format_of(entry).streams(entry)[0]
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
    streams = gemma_scope.streams_of(entry.repo, entry.path)
    return gemma_scope.load_gemma_scope(file, streams, {**metadata, **about(file)})


def _gemma_scope2(entry: Entry, metadata: Metadata) -> SparseAutoencoder:
    gemma_scope.refuse_across_layers(entry.path, metadata["name"])
    files = (gemma_scope.CONFIG_2, gemma_scope.WEIGHTS_2)
    place = _folder(entry, metadata, files, needs_config=False)
    return gemma_scope.load_gemma_scope2(place, metadata)


def _saelens(entry: Entry, metadata: Metadata) -> SparseAutoencoder:
    present(entry.repo, f"{entry.path}/{saelens.SPARSITY}")
    place = _folder(entry, metadata, (saelens.CONFIG, saelens.WEIGHTS))
    return saelens.load_saelens(place, metadata, entry.overrides)


def _llama_scope(entry: Entry, metadata: Metadata) -> SparseAutoencoder:
    files = (gemma_scope.LLAMA_SCOPE_CONFIG, gemma_scope.LLAMA_SCOPE_WEIGHTS)
    place = _folder(entry, metadata, files)
    return gemma_scope.load_llama_scope(place, metadata)


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


def _named(entry: Entry) -> Streams:
    """Ids are TransformerLens' names, some with a trainer or a variant behind."""
    match = re.match(r"blocks\.\d+\.(?:attn\.)?hook_[a-z]+(?:_(?:pre|mid|post|out))?", entry.id)
    name = (match[0] if match else entry.id).replace(".hook_z", ".attn.hook_z")
    return lens_hookpoint(name.replace(".attn.attn.", ".attn."), entry.id), None


def _trainer(entry: Entry) -> Streams:
    """`resid_post_layer_7/trainer_1` in the path, of SAEs of dictionary_learning."""
    match = re.search(r"(resid_pre|resid_post|mlp_out|attn_out)_layer_(\d+)", entry.path)
    if match is None:
        raise SAEError(f"{entry.release}/{entry.id} does not say its layer and stream")
    return Hookpoint(int(match[2]), match[1]), None


def _of_layer(stream: str, stream_out: str | None = None) -> Callable[[Entry], Streams]:
    """All of a format belong to these streams, of the layer that the id says."""

    def streams(entry: Entry) -> Streams:
        match = re.search(r"(?:^|[a-z_])(\d+)$", entry.id)
        if match is None:
            raise SAEError(f"{entry.release}/{entry.id} does not say its layer")
        layer = int(match[1])
        return Hookpoint(layer, stream), Hookpoint(layer, stream_out) if stream_out else None

    return streams


def _llama_scope_streams(entry: Entry) -> Streams:
    """`l12r_8x`, `l12r_800m_slimpajama`."""
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
    None: Format(_saelens, _named),
    "sae_lens": Format(_saelens, _named),
    "gemma_2": Format(_gemma_scope, _gemma_scope_streams),
    "gemma_2_transcoder": Format(_gemma_scope, _gemma_scope_streams),
    "gemma_3": Format(_gemma_scope2, _gemma_scope2_streams),
    "llama_scope": Format(_llama_scope, _llama_scope_streams),
    "llama_scope_r1_distill": Format(_by_sae_lens, _llama_scope_streams),
    "dictionary_learning_1": Format(_dictionary_learning, _trainer),
    "mwhanna_transcoder": Format(_by_sae_lens, _of_layer("mlp_in", "mlp_out")),
    "mntss_clt_layer_transcoder": Format(_cross_layer, _of_layer("resid_mid", "mlp_out")),
    "connor_rob_hook_z": Format(_by_sae_lens, _named),
    "deepseek_r1": Format(_by_sae_lens, _named),
    "goodfire": Format(_by_sae_lens, _of_layer("resid_post")),
    "qwen_scope": Format(_by_sae_lens, _of_layer("resid_post")),
}
"""`conversion_func` in the catalogue -> the format."""


SITE = "https://neuronpedia.org"
EMBEDDED = "embed=true&embedexplanation=true&embedplots=true&embedtest=false"
"""What Neuronpedia shows of a latent inside another page."""


def neuronpedia_id(sae: SAE) -> str | None:
    """`gemma-2-2b/12-gemmascope-res-16k`; None where neither catalogue nor config names one.

    Never made from the model's name: not every SAE of a model is there. Raises SAEError for an id
    that is not `<model>/<source>`.
    """
    found = sae.metadata.get("neuronpedia_id")
    if not found:
        return None
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", str(found)):
        name = sae.metadata.get("name", "the SAE")
        raise SAEError(f"{name}: its Neuronpedia id '{found}' is not of the form <model>/<source>")
    return str(found)


def neuronpedia_url(sae: SAE, latent: int) -> str | None:
    """The latent's page; None for an SAE that has no id. Raises SAEError for no such latent."""
    _check(sae, [latent])
    place = neuronpedia_id(sae)
    return None if place is None else f"{SITE}/{place}/{latent}"


def neuronpedia_list(sae: SAE, latents: Sequence[int], name: str = "saexp") -> str | None:
    """One page with several latents (a quick list), in the order given; None as above.

    Raises SAEError for no such latent, or for none at all.
    """
    if not len(latents):
        raise SAEError("neuronpedia_list needs at least one latent")
    _check(sae, latents)
    place = neuronpedia_id(sae)
    if place is None:
        return None
    model, source = place.split("/")
    features = [{"modelId": model, "layer": source, "index": str(f)} for f in latents]
    return f"{SITE}/quick-list/?name={quote(name)}&features={quote(json.dumps(features))}"


def _check(sae: SAE, latents: Sequence[int]) -> None:
    wrong = next((f for f in latents if not 0 <= f < sae.d_sae), None)
    if wrong is not None:
        name = sae.metadata.get("name", "the SAE")
        raise SAEError(f"latent {wrong}: {name} has latents 0-{sae.d_sae - 1}")
