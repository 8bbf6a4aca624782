"""The device and the dtype that a model is computed with."""

from collections.abc import Collection
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from saexp.errors import ModelError

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
        found = torch.cpu.get_capabilities()
        return any(found.get(f"{unit}_{kind}", False) for unit in ("avx512", "amx"))
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
