"""What the keys of a model stand for: its files, its device and its dtype.

The files are shipped, made by `make real-model`, in a folder, a GGUF file, or on the hub."""

import json
import logging
import pickle
import re
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from saexp.config import ModelConfig
from saexp.digests import content_name
from saexp.errors import ModelError
from saexp.files import is_writable, locked, remove_temporary, show_bytes, write_folder
from saexp.hub import hub, is_path, why_absent

log = logging.getLogger(__name__)


PACKAGE = Path(__file__).resolve().parent.parent
ASSETS = PACKAGE / "assets"
SHIPPED = ("tiny", "tiny_control")
HUB_IDS = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Models that `make real-model` makes -> the hub id that is loaded where it has not."""
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Weights files in transformers' order of preference; each may be sharded, with an index."""
VERSION = 1
"""Version of the folders that GGUF files are dequantised into."""
_ANY_WEIGHTS = (*WEIGHTS, *(f"{name}.index.json" for name in WEIGHTS))


def made_folder(name: str) -> Path:
    """Where `make real-model` puts a model of `HUB_IDS`: `models/<name>` beside this package."""
    return PACKAGE.parent / "models" / name


def local_folder(name: str) -> Path | None:
    """The folder or GGUF file that `model.name` is; None for a model of the hub."""
    if name in SHIPPED:
        return ASSETS / name / "model"
    if name in HUB_IDS:
        folder = made_folder(name)
        return folder if (folder / "config.json").is_file() else None
    location = Path(name).expanduser()
    return location if location.exists() else None


@dataclass(frozen=True)
class Source:
    """What transformers loads."""

    path: str
    """A folder, or a hub id."""
    gguf_file: Path | None = None
    """The file that holds config, tokenizer and weights, where that is one GGUF file."""


def find_source(cfg: ModelConfig) -> Source:
    """The folder, GGUF file or hub id that `model.name` and `model.gguf_file` are.

    Raises ModelError for anything else.
    """
    name = cfg.name
    location = local_folder(name)
    if location is None:
        hub_id = HUB_IDS.get(name) or _hub_id(name)
        if cfg.gguf_file is None:
            return Source(hub_id)
        return Source(hub_id, _from_hub(hub_id, cfg))
    if location.is_file():
        if location.suffix != ".gguf":
            raise ModelError(
                f"model.name={name} is a file; type the folder of the model, or a GGUF file"
            )
        if cfg.gguf_file is not None:
            raise ModelError(f"model.name={name} is a GGUF file already; leave out model.gguf_file")
        return Source(str(location.parent), location)
    return Source(str(location), gguf_in(location, cfg))


def gguf_in(folder: Path, cfg: ModelConfig) -> Path | None:
    """The GGUF file to load from a folder: `model.gguf_file`, or the only one where there are no
    other weights. Raises ModelError where it is absent or there are several."""
    names = sorted(file.name for file in folder.glob("*.gguf"))
    if cfg.gguf_file is not None:
        if not (folder / cfg.gguf_file).is_file():
            raise ModelError(
                f"model.gguf_file={cfg.gguf_file}: no such file in {folder}, which has "
                f"{', '.join(names) or 'no GGUF file'}"
            )
        return folder / cfg.gguf_file
    if not names or any((folder / weights).is_file() for weights in _ANY_WEIGHTS):
        return None
    if len(names) > 1:
        raise ModelError(
            f"model.name={cfg.name} has {len(names)} GGUF files; type one of them: "
            f"model.gguf_file={names[0]} ({', '.join(names[1:])})"
        )
    return folder / names[0]


def _hub_id(name: str) -> str:
    if is_path(name) or name.count("/") > 1:
        raise ModelError(
            f"model.name={name}: no such folder; type a folder with a model's config.json, or a "
            "hub id such as google/gemma-2-2b"
        )
    if not re.fullmatch(r"(?:[\w.-]+/)?[\w.-]+", name):
        raise ModelError(
            f"model.name={name} is neither a folder here nor a hub id such as google/gemma-2-2b"
        )
    return name


def require_gguf(file: Path) -> None:
    """Raise ModelError where a package that reads GGUF files is not installed."""
    absent = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
    if absent:
        raise ModelError(
            f"{file} is a GGUF file, which needs the package {absent[0]}; "
            'type pip install "saexp[gguf]"'
        )


def _from_hub(hub_id: str, cfg: ModelConfig) -> Path:
    """The GGUF file of a hub repository, downloaded where it is not cached."""
    from transformers.utils import cached_file

    assert cfg.gguf_file is not None
    try:
        with hub():
            file = cached_file(hub_id, cfg.gguf_file, revision=cfg.revision)
    except Exception as error:
        raise ModelError(
            f"model.name={cfg.name}: model.gguf_file={cfg.gguf_file} cannot be loaded "
            f"({why_absent(error)}); type the name of a file in that repository"
        ) from error
    assert file is not None, "an absent file raises"
    return Path(file)


def dequantized(file: Path, cache_dir: str | Path, dtype: Any) -> Path | None:
    """The folder of `cache_dir` with a GGUF file's model in a torch dtype; made on first use.

    None, with a warning, where the cache directory cannot be written. Raises ModelError where a
    package is not installed, StoreError where the disk is full, and whatever transformers raises
    for a file that it cannot read.
    """
    models = Path(cache_dir) / "models"
    name = f"gguf-v{VERSION}-{content_name(file)[:24]}-{str(dtype).removeprefix('torch.')}"
    folder = models / name
    if folder.is_dir():
        return folder
    require_gguf(file)
    if not is_writable(models):
        return None
    with locked(models / ".lock"):
        if not folder.is_dir():
            # Of killed processes: no other one writes here now.
            remove_temporary(models)
            log.info("dequantising %s into %s", file, folder)
            write_folder(folder, lambda temporary: convert(file, temporary, dtype))
            n_bytes = sum(f.stat().st_size for f in folder.iterdir())
            log.info("%s: %s", folder, show_bytes(n_bytes))
    return folder


def convert(file: Path, folder: Path, dtype: Any) -> None:
    """Write a GGUF file's config, tokenizer and weights, in a torch dtype, as a folder.

    Raises ValueError where the file lacks weights, and whatever transformers raises.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": file.name}
    with warnings.catch_warnings():
        # numpy's about the read-only memory map of the file.
        warnings.simplefilter("ignore")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            dtype=dtype,
            output_loading_info=True,
            **options,
            **dequantizing(),
        )
        tokenizer = AutoTokenizer.from_pretrained(
            str(file.parent), clean_up_tokenization_spaces=False, **options
        )
    hf, info = loaded
    if absent := missing_weights(info["missing_keys"]):
        raise ValueError(absent)
    hf.save_pretrained(folder)
    _save_tokenizer(tokenizer, folder)
    for written in folder.iterdir():
        # safetensors makes its files readable to their owner only.
        written.chmod(0o644)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer for `PreTrainedTokenizerFast`, which changes nothing: `AutoTokenizer` may
    choose a class that replaces parts of tokenizer.json by its own.

    Raises ValueError where it is another one when it is loaded again.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text("utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    loaded = PreTrainedTokenizerFast.from_pretrained(str(folder))
    if loaded.backend_tokenizer.to_str() != tokenizer.backend_tokenizer.to_str():
        raise ValueError("its tokenizer changes when it is saved and loaded again")


def dequantizing() -> dict[str, Any]:
    """Options with which transformers dequantises a GGUF file's weights, rather than keep them
    packed where it can compute with those; versions without the choice always dequantise."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def missing_weights(names: Iterable[str]) -> str | None:
    """The reason not to use a model without these weights, for which transformers would continue
    with random values; None without any."""
    absent = sorted(names)
    return f"{len(absent)} are missing in its files, such as {absent[0]}" if absent else None


HALF = (torch.bfloat16, torch.float16)
"""The 16-bit dtypes of checkpoints."""


def pick_device(name: str) -> torch.device:
    """`auto` is cuda, else mps, else cpu. Raises ModelError for a device that is not available."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(name.partition(":")[0], False):
        raise ModelError(f"device={name} is not on this machine; try device=auto")
    return torch.device(name)


def native_dtypes(device: torch.device) -> frozenset[torch.dtype]:
    """The 16-bit dtypes whose matrix products the device computes natively.

    On x86 CPUs those of AVX512-BF16, AVX512-FP16 and AMX. Elsewhere PyTorch converts to float32 and
    back, which is slower than float32. None on mps, where models are computed in float32.
    """
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return frozenset(HALF if has_bfloat16 else [torch.float16])
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return frozenset()
    return frozenset(dtype for dtype in HALF if _cpu_computes(dtype))


def _cpu_computes(dtype: torch.dtype) -> bool:
    if hasattr(torch.cpu, "get_capabilities"):
        kind = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(f"{unit}_{kind}", False) for unit in ("avx512", "amx"))
    # Older versions of PyTorch.
    names = {
        torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
        torch.float16: ("_is_amx_fp16_supported",),
    }[dtype]
    return any(hasattr(torch.cpu, name) and getattr(torch.cpu, name)() for name in names)


def short_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Precision:
    """The dtype of a model's weights and activations, and where it comes from."""

    dtype: torch.dtype
    source: str
    """In words, for provenance.json and the report."""
    note: str | None = None
    """A note for the run's results, where one is due."""


def pick_precision(
    name: str,
    device: torch.device,
    checkpoint: torch.dtype | None,
    native: Collection[torch.dtype] | None = None,
) -> Precision:
    """The dtype for the setting `dtype=name`.

    `auto` takes the dtype of a 16-bit `checkpoint` where it is among the `native` ones (by default
    those of `native_dtypes`), else float32. `checkpoint` is None where the files do not say it.
    """
    if name != "auto":
        return Precision(getattr(torch, name), f"dtype={name}")
    if checkpoint not in HALF:
        known = "" if checkpoint is None else f", as the checkpoint is in {short_name(checkpoint)}"
        return Precision(torch.float32, f"dtype=auto{known}")
    if checkpoint not in (native_dtypes(device) if native is None else native):
        kind = short_name(checkpoint)
        source = (
            f"dtype=auto, as this {device.type} does not compute the checkpoint's {kind} natively"
        )
        return Precision(torch.float32, source)
    note = None
    if device.type == "cpu":
        note = (
            f"the model runs in {short_name(checkpoint)}, as the checkpoint; dtype=float32 gives "
            "exact activations"
        )
    return Precision(checkpoint, "dtype=auto, as the checkpoint", note)


def checkpoint_dtype(config: Any) -> torch.dtype | None:
    """The dtype that a Hugging Face config gives for the weights; None where it gives none."""
    for part in (config.get_text_config(), config):
        value = getattr(part, "dtype", None)
        if value is not None:
            return getattr(torch, value) if isinstance(value, str) else value
    return None


def quantization_options(
    quantization: str | None, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Options of transformers' `from_pretrained` for `model.quantization`, 4bit or 8bit.

    The 4-bit values are NF4, computed in `dtype`. Raises ModelError where the device or a package
    cannot quantise.
    """
    if quantization is None:
        return {}
    if device.type != "cuda":
        raise ModelError(
            f"model.quantization={quantization} needs a CUDA device, and the device is "
            f"{device.type}; leave out model.quantization"
        )
    absent = [name for name in ("bitsandbytes", "accelerate") if find_spec(name) is None]
    if absent:
        raise ModelError(
            f"model.quantization={quantization} needs the package {absent[0]}; "
            'type pip install "saexp[bitsandbytes]"'
        )
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    # The modules are replaced where they are loaded, and cannot be moved afterwards.
    return {"quantization_config": config, "device_map": {"": str(device)}}


_EXPLAINED = (OSError, ValueError, RuntimeError)
"""Errors whose message says what is wrong."""


def why_unreadable(error: BaseException) -> str:
    """Explain why a file of a model cannot be loaded, from the error of transformers or torch."""
    if isinstance(error, pickle.UnpicklingError | EOFError):
        # torch's own message suggests opening it anyway.
        return "a pickle that is damaged or holds more than tensors, so it is not opened"
    reason = why_absent(error)
    return (
        reason if isinstance(error, _EXPLAINED) and reason else f"{type(error).__name__}: {reason}"
    )
