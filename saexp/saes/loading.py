"""From a config, a path or a repository to an SAE; formats are detected from the files."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from saexp.config import SAEConfig, parse_layers
from saexp.errors import SAEError
from saexp.models.hookpoints import Hookpoint
from saexp.models.loading import ASSETS, SHIPPED, LanguageModel, file_sha256, pick_device
from saexp.saes.base import SparseAutoencoder
from saexp.saes.catalogue import Entry, find, n_latents, show_width
from saexp.saes.formats import gemma_scope, llama_scope, saelens

log = logging.getLogger(__name__)

_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt")


def load_release(cfg: SAEConfig, **_: Any) -> SparseAutoencoder:
    """An SAE of sae-lens' catalogue, from the hub or its local cache."""
    entry = find(cfg)
    metadata = {
        "name": f"{entry.release}/{entry.id}",
        "release": entry.release,
        "id": entry.id,
        "neuronpedia_id": entry.neuronpedia,
        "expected_l0": entry.expected_l0,
    }
    if entry.loader == "gemma_2":
        path = entry.path if entry.path.endswith(".npz") else f"{entry.path}/{gemma_scope.WEIGHTS}"
        file = _download(entry.repo, path)
        hookpoint = gemma_scope.hookpoint_of(entry.repo, entry.path)
        sae = gemma_scope.load_gemma_scope(file, hookpoint, {**metadata, **_about(file)})
    elif entry.loader in (None, "sae_lens"):
        folder = _download(entry.repo, f"{entry.path}/{saelens.CONFIG}").parent
        file = _download(entry.repo, f"{entry.path}/{saelens.WEIGHTS}")
        sae = saelens.load_saelens(folder, {**metadata, **_about(file)}, entry.overrides)
    elif entry.loader == "llama_scope":
        folder = _download(entry.repo, f"{entry.path}/{llama_scope.CONFIG}").parent
        file = _download(entry.repo, f"{entry.path}/{llama_scope.WEIGHTS}")
        sae = llama_scope.load_llama_scope(folder, {**metadata, **_about(file)})
    else:
        sae = _by_sae_lens(entry, metadata)
    return _finish(sae, cfg)


def _by_sae_lens(entry: Entry, metadata: dict[str, Any]) -> SparseAutoencoder:
    """Formats saexp has no reader of its own for: sae-lens loads, the weights are taken over."""
    from sae_lens import SAE as LensSAE

    try:
        lens = LensSAE.from_pretrained(entry.release, entry.id, device="cpu")
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SAEError(f"{entry.release}/{entry.id} cannot be loaded ({reason})") from error
    cfg = lens.cfg
    scaling = getattr(cfg, "normalize_activations", "none")
    hookpoint = Hookpoint.parse(str(cfg.metadata.hook_name))
    return SparseAutoencoder(
        {n: p.detach().float().clone() for n, p in lens.named_parameters()},
        architecture=cfg.architecture(),
        hookpoint=hookpoint,
        metadata={**metadata, "format": "sae-lens loader", "architecture": cfg.architecture()},
        k=getattr(cfg, "k", None),
        apply_b_dec_to_input=cfg.apply_b_dec_to_input,
        normalize_activations=scaling,
        centre=saelens.expects_centred(cfg.metadata.to_dict(), hookpoint),
        rescale_acts_by_decoder_norm=getattr(cfg, "rescale_acts_by_decoder_norm", False),
    )


def load_path(cfg: SAEConfig, **_: Any) -> SparseAutoencoder:
    """An SAE from a folder or file; `{assets}`, `{layer}` … are filled in."""
    if not cfg.path:
        raise SAEError("sae.path is not set; type sae.path=<folder with the SAE's files>")
    if "{assets}" in cfg.path:
        _check_shipped(cfg)
    width = n_latents(cfg.width)
    place = cfg.path.format(assets=ASSETS, model_name=cfg.model_name, layer=cfg.layer, width=width)
    return _finish(load_sae_files(Path(place), cfg.stream, cfg.layer, cfg.name), cfg)


def _check_shipped(cfg: SAEConfig) -> None:
    """Name what ships where a layer or width does not."""
    if cfg.model_name not in SHIPPED:
        raise SAEError(
            f"sae={cfg.name} ships for model=tiny and tiny_control, not for {cfg.model_name}; "
            "type e.g. sae=gemmascope or sae=local sae.path=FOLDER"
        )
    folder = ASSETS / cfg.model_name / "sae"
    layer, width = parse_layers(cfg.layer)[0], n_latents(cfg.width)
    layers = sorted(int(p.name.removeprefix("layer_")) for p in folder.glob("layer_*"))
    if layer not in layers:
        listed = ", ".join(map(str, layers))
        raise SAEError(f"sae={cfg.name} has no layer={layer}; it has layers {listed}")
    widths = sorted(
        int(p.name.removeprefix("width_")) for p in (folder / f"layer_{layer}").glob("width_*")
    )
    if width not in widths:
        listed = ", ".join(map(show_width, widths))
        raise SAEError(
            f"sae={cfg.name} has no width={cfg.width} for {cfg.model_name}; it has {listed}"
        )


def load_sae(source: str | Path, layer: int | None = None, stream: str | None = None) -> Any:
    """Any supported format, detected: a folder, a `.npz` file, or `<hub repo>/<path in it>`.

    `layer` and `stream` are needed where the files do not say them; a contradiction is an SAEError.
    """
    sae = load_sae_files(Path(source), stream, layer, str(source))
    _check_place(sae, layer, stream, str(source))
    return sae.float()


def load_sae_files(place: Path, stream: str | None, layer: Any, name: str) -> SparseAutoencoder:
    """Detect the format from the files and read it. Raises SAEError for what is not there."""
    if place.suffix in _PICKLES and (place.is_file() or not place.exists()):
        raise SAEError(
            f"{place} is a pickle file, which can run code when opened; saexp loads safetensors "
            "and npz, so convert it first"
        )
    if not place.exists():
        parts = place.parts
        if len(parts) >= 2 and not place.is_absolute() and not parts[0].startswith("."):
            return _from_repo("/".join(parts[:2]), "/".join(parts[2:]), stream, layer)
        raise SAEError(f"sae.path={place}: no such folder or file")
    if place.is_dir() and saelens.is_saelens(place):
        return saelens.load_saelens(place, {"name": name, **_about(place / saelens.WEIGHTS)})
    if place.is_dir() and llama_scope.is_llama_scope(place):
        file = place / llama_scope.WEIGHTS
        return llama_scope.load_llama_scope(place, {"name": name, **_about(file)})
    file = place / gemma_scope.WEIGHTS if place.is_dir() else place
    if file.is_file() and file.suffix == ".npz":
        return gemma_scope.load_gemma_scope(
            file, _hookpoint(file, stream, layer), {"name": name, **_about(file)}
        )
    pickled = (
        sorted(f.name for f in place.iterdir() if f.suffix in _PICKLES) if place.is_dir() else []
    )
    if pickled:
        raise SAEError(
            f"{place} holds only a pickle file ({pickled[0]}), which can run code when opened; "
            "saexp loads safetensors and npz, so convert it first"
        )
    raise SAEError(
        f"sae.path={place} is no SAE saexp knows: expected {saelens.CONFIG} with "
        f"{saelens.WEIGHTS}, {llama_scope.CONFIG} with {llama_scope.WEIGHTS}, or "
        f"{gemma_scope.WEIGHTS}"
    )


def _from_repo(repo: str, path: str, stream: str | None, layer: Any) -> SparseAutoencoder:
    prefix = f"{path}/" if path else ""
    if path.endswith(".npz") or "gemma-scope" in repo:
        inner = path if path.endswith(".npz") else f"{prefix}{gemma_scope.WEIGHTS}"
        file = _download(repo, inner)
        hookpoint = gemma_scope.hookpoint_of(repo, path)
        return gemma_scope.load_gemma_scope(
            file, hookpoint, {"name": f"{repo}/{path}", **_about(file)}
        )
    folder = _download(repo, f"{prefix}{saelens.CONFIG}").parent
    _download(repo, f"{prefix}{saelens.WEIGHTS}")
    return load_sae_files(folder, stream, layer, f"{repo}/{path}")


def _hookpoint(file: Path, stream: str | None, layer: Any) -> Hookpoint:
    """From the path, else from the user's words."""
    try:
        return gemma_scope.hookpoint_of(str(file.parent), str(file.parent))
    except SAEError:
        if stream is None or layer is None:
            raise
        return Hookpoint(parse_layers(layer)[0], stream)


def _download(repo: str, path: str) -> Path:
    """A file of a hub repository, from the cache where it is there."""
    try:
        return Path(hf_hub_download(repo, path))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise SAEError(
            f"{repo}/{path} is neither cached nor in reach ({reason}); go online once, or point "
            "HF_HOME to a cache that holds it"
        ) from error


def random_sae(cfg: SAEConfig, *, d_in: int | None = None, **_: Any) -> SparseAutoencoder:
    """A control: unit-norm random decoder, tied encoder, biases that let few latents fire."""
    size = cfg.d_in or d_in
    if size is None or cfg.layer is None:
        raise SAEError("sae=random needs a size and a layer: type sae.d_in=<d_model> layer=<block>")
    width = n_latents(cfg.width) or 8 * size
    generator = torch.Generator().manual_seed(cfg.seed)
    decoder = torch.nn.functional.normalize(torch.randn(width, size, generator=generator), dim=-1)
    k = max(1, min(32, width // 16))
    sae = SparseAutoencoder(
        {
            "W_enc": decoder.T.contiguous(),
            "W_dec": decoder,
            "b_enc": torch.zeros(width),
            "b_dec": torch.zeros(size),
        },
        architecture="topk",
        k=k,
        hookpoint=Hookpoint(parse_layers(cfg.layer)[0], cfg.stream or "resid_post"),
        metadata={
            "name": f"random, width {width}, seed {cfg.seed}",
            "format": "random",
            "architecture": "topk",
            "fingerprint": hashlib.sha256(f"{width} {size} {cfg.seed}".encode()).hexdigest(),
        },
    )
    return _finish(sae, cfg)


def _about(file: Path) -> dict[str, Any]:
    blob = file.resolve()
    named = file.is_symlink() and blob.parent.name == "blobs"
    return {"path": str(file), "fingerprint": blob.name if named else file_sha256(blob)}


def _finish(sae: SparseAutoencoder, cfg: SAEConfig) -> SparseAutoencoder:
    """Check the layer and stream against what was asked, then move to device and dtype."""
    name = sae.metadata.get("name", cfg.name)
    _check_place(sae, cfg.layer, cfg.stream, name)
    width = n_latents(cfg.width)
    if width is not None and width != sae.d_sae:
        raise SAEError(f"width={cfg.width}, but {name} has d_sae={sae.d_sae}")
    dtype = torch.float32 if cfg.dtype == "auto" else getattr(torch, cfg.dtype)
    return sae.to(device=pick_device(cfg.device), dtype=dtype)


def _check_place(sae: SparseAutoencoder, layer: Any, stream: str | None, name: str) -> None:
    """Raise SAEError where the layer or stream asked for is not the SAE's own."""
    at = sae.hookpoint
    if layer is not None:
        asked = parse_layers(layer)
        if len(asked) != 1:
            raise SAEError(f"layer={asked}: one SAE reads one layer; sweep with -m layer=0,1,2")
        if asked[0] != at.layer:
            raise SAEError(
                f"layer={asked[0]}, but {name} was trained on {at.name}; type layer={at.layer}"
            )
    if stream is not None and Hookpoint(at.layer, stream) != at:
        raise SAEError(f"sae.stream={stream}, but {name} was trained on {at.name}; leave it out")


def check_fits(sae: SparseAutoencoder, model: LanguageModel) -> None:
    """Raise SAEError unless the model has the SAE's hookpoint at the SAE's size."""
    name = sae.metadata.get("name", "the SAE")
    model.check_layer(sae.hookpoint.layer)
    residual = sae.hookpoint.stream not in ("attn_z",)
    if residual and sae.d_in != model.d_model:
        short = model.name.rpartition("/")[2]
        raise SAEError(
            f"{name} reads vectors of {sae.d_in} numbers, but {short} has d_model={model.d_model}; "
            "choose an SAE that was trained on this model"
        )
