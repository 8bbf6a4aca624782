"""The dtype that a model is computed in: as typed, or the checkpoint's own where it is native."""

import platform

import pytest
import torch

from saexp.config import ModelConfig
from saexp.errors import ConfigError, ModelError
from saexp.models.loading import LanguageModel
from saexp.models.resolution import (
    SHIPPED,
    checkpoint_dtype,
    native_dtypes,
    pick_precision,
    quantization_options,
)
from tests.random_models import random_hf

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("name", "checkpoint", "native", "dtype"),
    [
        ("auto", BF16, {BF16}, BF16),
        ("auto", BF16, {F16}, F32),
        ("auto", BF16, set(), F32),
        ("auto", F16, {BF16, F16}, F16),
        ("auto", F16, {BF16}, F32),
        ("auto", F32, {BF16, F16}, F32),
        ("auto", F64, {BF16, F16}, F32),
        ("auto", None, {BF16, F16}, F32),
        ("float32", BF16, {BF16}, F32),
        ("bfloat16", F32, set(), BF16),
        ("float16", BF16, set(), F16),
    ],
)
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_auto_takes_a_16_bit_checkpoints_own_dtype_where_it_is_native(
    name, checkpoint, native, dtype, device
):
    assert pick_precision(name, device, checkpoint, native).dtype == dtype


def test_the_source_says_where_the_dtype_comes_from():
    sources = [
        pick_precision(name, CPU, checkpoint, native).source
        for name, checkpoint, native in [
            ("float16", BF16, {BF16}),
            ("auto", BF16, {BF16}),
            ("auto", BF16, set()),
            ("auto", F32, {BF16}),
            ("auto", None, {BF16}),
        ]
    ]
    assert sources == [
        "dtype=float16",
        "dtype=auto, as the checkpoint",
        "dtype=auto, as this cpu does not compute the checkpoint's bfloat16 natively",
        "dtype=auto, as the checkpoint is in float32",
        "dtype=auto",
    ]


def test_a_note_where_auto_chooses_16_bits_on_a_cpu():
    note = "the model runs in bfloat16, as the checkpoint; dtype=float32 gives exact activations"
    assert pick_precision("auto", CPU, BF16, {BF16}).note == note
    for name, device, native in (
        ("auto", CUDA, {BF16}),
        ("auto", CPU, set()),
        ("bfloat16", CPU, {BF16}),
    ):
        assert pick_precision(name, device, BF16, native).note is None


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc/cpuinfo as the reference")
def test_the_cpus_own_list_of_instructions_agrees():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            words = set(file.read().split())
    except OSError:
        pytest.skip("no /proc/cpuinfo")
    dtypes = native_dtypes(CPU)
    assert (BF16 in dtypes) == bool(words & {"avx512_bf16", "amx_bf16"})
    if F16 in dtypes:
        assert words & {"avx512_fp16", "amx_fp16"}


def test_no_16_bit_dtype_on_mps():
    assert native_dtypes(MPS) == frozenset()


def test_the_dtype_that_a_config_gives():
    hf = random_hf("llama")
    config = hf.config
    for value in (BF16, F32, None):
        config.dtype = value
        assert checkpoint_dtype(config) == value
    config.dtype = "float16"
    assert checkpoint_dtype(config) == F16


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_a_checkpoint_in_a_folder(tmp_path, dtype):
    hf = random_hf("llama").to(dtype)
    hf.config.dtype = dtype
    hf.save_pretrained(tmp_path)
    model = LanguageModel(ModelConfig(name=str(tmp_path), device="cpu"))
    expected = dtype if dtype in native_dtypes(CPU) else F32
    assert model.dtype == expected
    assert next(model.hf.parameters()).dtype == expected
    assert bool(model.notes) == (expected != F32)
    exact = LanguageModel(ModelConfig(name=str(tmp_path), device="cpu", dtype="float32"))
    assert exact.dtype == F32
    assert not exact.notes
    for a, b in zip(model.hf.parameters(), exact.hf.parameters(), strict=True):
        assert torch.equal(a.float(), b)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_models_are_computed_in_float32(name):
    model = LanguageModel(ModelConfig(name=name, device="cpu"))
    assert checkpoint_dtype(model.config) == BF16
    assert (model.dtype, model.precision.source, model.notes) == (F32, "dtype=auto", [])


def test_a_model_in_memory_keeps_its_dtype():
    model = LanguageModel.wrap(random_hf("llama").bfloat16())
    assert (model.dtype, model.precision.source) == (BF16, "the model in memory")
    assert model.with_bos(False).dtype == BF16


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_quantisation_without_cuda_is_refused_in_one_line(device: str) -> None:
    with pytest.raises(ModelError, match="model.quantization=4bit needs a CUDA device") as error:
        quantization_options("4bit", torch.device(device), torch.bfloat16)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "bits"), [("4bit", 4), ("8bit", 8)])
def test_quantisation_is_an_option_of_transformers(
    monkeypatch: pytest.MonkeyPatch, name: str, bits: int
) -> None:
    cuda = torch.device("cuda:1")
    monkeypatch.setattr("saexp.models.resolution.find_spec", lambda _: None)
    with pytest.raises(
        ModelError, match=r'needs the package bitsandbytes; type pip install "saexp\['
    ):
        quantization_options(name, cuda, torch.bfloat16)
    monkeypatch.setattr("saexp.models.resolution.find_spec", lambda package: package)
    options = quantization_options(name, cuda, torch.bfloat16)
    config = options["quantization_config"]
    assert (config.load_in_4bit, config.load_in_8bit) == (bits == 4, bits == 8)
    assert options["device_map"] == {"": "cuda:1"}
    assert quantization_options(None, cuda, torch.bfloat16) == {}


def test_an_unknown_quantisation_is_refused() -> None:
    with pytest.raises(ConfigError, match="model.quantization=3bit is not known; did you mean"):
        ModelConfig(name="tiny", quantization="3bit")
