"""Values and types of weights, in files of every format: what is impossible is one line."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import saexp
from saexp.config import SAEConfig
from saexp.errors import SAEError
from saexp.registry import build
from saexp.saes import SAESettings, SparseAutoencoder
from saexp.saes.formats.saelens import recorded_frequencies
from tests.unit.saes.every_format import EVERY, FORMATS, change, line_of, sound_saelens, void
from tests.unit.saes.make import D_IN, D_SAE, HOOK_NAME, parameters, sae, write_saelens
from tests.unit.saes.make_formats import dictionary, write_dictionary, write_llama


@EVERY
def test_sound_files_are_read(form: str, tmp_path: Path) -> None:
    assert saexp.load_sae(FORMATS[form][0](tmp_path)).d_sae == D_SAE


@EVERY
@pytest.mark.parametrize(("bad", "shown"), [(torch.nan, "NaN"), (torch.inf, "Inf")])
def test_nan_and_infinities_are_counted(form: str, bad: float, shown: str, tmp_path: Path) -> None:
    write, weights, decoder, _ = FORMATS[form]
    sae_folder = write(tmp_path)

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[decoder].view(-1)[:2] = bad

    change(sae_folder / weights, spoil)
    name = decoder if form == "Llama Scope" else "W_dec"
    assert line_of(sae_folder) == (
        f"{sae_folder / weights}: {name} holds 2 {shown} of {D_IN * D_SAE} values"
    )


def test_nan_is_counted_before_the_decoder_is_scaled(tmp_path: Path) -> None:
    sae_folder = write_dictionary(tmp_path / "t", "AutoEncoder")
    change(sae_folder / "ae.pt", lambda t: void(t["decoder.weight"].view(-1)[:1].fill_(torch.nan)))
    assert (
        line_of(sae_folder) == f"{sae_folder / 'ae.pt'}: W_dec holds 1 NaN of {D_IN * D_SAE} values"
    )


@EVERY
def test_a_decoder_of_zeros(form: str, tmp_path: Path) -> None:
    write, weights, decoder, _ = FORMATS[form]
    sae_folder = write(tmp_path)
    change(sae_folder / weights, lambda tensors: void(tensors[decoder].zero_()))
    assert (
        line_of(sae_folder) == f"{sae_folder / weights}: all {D_IN * D_SAE} values of W_dec are 0"
    )


@EVERY
def test_a_few_decoder_rows_of_zeros_are_dead_latents(form: str, tmp_path: Path) -> None:
    write, weights, decoder, _ = FORMATS[form]
    sae_folder = write(tmp_path)

    def kill(tensors: dict[str, Tensor]) -> None:
        turned = tensors[decoder].shape[0] != D_SAE
        (tensors[decoder].T if turned else tensors[decoder])[:3] = 0

    change(sae_folder / weights, kill)
    assert bool((saexp.load_sae(sae_folder).W_dec[:3] == 0).all())


@EVERY
@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.bool, torch.int64, torch.complex64]
)
def test_other_types_are_not_converted(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    write, weights, decoder, _ = FORMATS[form]
    sae_folder = write(tmp_path)

    def convert(tensors: dict[str, Tensor]) -> None:
        tensors[decoder] = tensors[decoder].to(dtype)

    change(sae_folder / weights, convert)
    shown = str(dtype).removeprefix("torch.")
    accepted = "float16, bfloat16, float32, float64"
    name = "W_dec" if form == "Gemma Scope" else decoder
    assert line_of(sae_folder) == (
        f"{sae_folder / weights}: {name} is stored as {shown}; saexp reads {accepted}"
    )


def test_eight_bit_floats_are_not_converted(tmp_path: Path) -> None:
    sae_folder = sound_saelens(tmp_path)
    change(
        sae_folder / "sae_weights.safetensors",
        lambda t: t.update(W_enc=t["W_enc"].to(torch.float8_e4m3fn)),
    )
    assert "W_enc is stored as float8_e4m3fn; saexp reads float16" in line_of(sae_folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_other_sizes_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    sae_folder = sound_saelens(tmp_path)
    file = sae_folder / "sae_weights.safetensors"
    change(file, lambda t: t.update({n: v.to(dtype) for n, v in t.items()}))
    assert saexp.load_sae(sae_folder).W_dec.dtype == torch.float32
    change(file, lambda t: void(t["b_enc"][1:2].fill_(torch.nan)))
    assert line_of(sae_folder) == f"{file}: b_enc holds 1 NaN of {D_SAE} values"


def test_sums_that_overflow_are_no_infinities() -> None:
    p = parameters("standard")
    p["b_enc"] = torch.full((D_SAE,), 3e38)
    autoencoder = SparseAutoencoder(
        p, SAESettings(architecture="standard", hookpoint=sae().hookpoint)
    )
    assert float(autoencoder.b_enc.max()) < torch.inf
    p["b_enc"] = torch.full((D_SAE,), 6e4, dtype=torch.float16)
    SparseAutoencoder(p, SAESettings(architecture="standard", hookpoint=sae().hookpoint))


def test_numbers_that_the_dtype_asked_for_does_not_hold(tmp_path: Path) -> None:
    sae_folder = sound_saelens(tmp_path)
    file = sae_folder / "sae_weights.safetensors"
    change(file, lambda t: void(t["b_enc"][:1].fill_(1e6)))
    cfg = SAEConfig(name="mine", loader="path", path=str(sae_folder), dtype="float16")
    message = rf"{file} in float16: b_enc holds 1 Inf of {D_SAE} values"
    with pytest.raises(SAEError, match=message):
        build("sae", cfg)
    assert float(saexp.load_sae(sae_folder).b_enc[0]) == 1e6


@pytest.mark.parametrize(("d_in", "d_sae"), [(0, D_SAE), (D_IN, 0)])
def test_empty_tensors(d_in: int, d_sae: int, tmp_path: Path) -> None:
    sae_folder = write_saelens(
        tmp_path / "sae",
        {"metadata": {"hook_name": HOOK_NAME}},
        parameters("standard", d_in, d_sae),
    )
    assert line_of(sae_folder).endswith(f"W_enc has shape [{d_in}, {d_sae}]: no values")


@pytest.mark.parametrize("k", [D_SAE + 1, -1])
def test_more_active_latents_than_there_are(k: int) -> None:
    with pytest.raises(SAEError, match=f"k={k} is not between 1 and its {D_SAE} latents"):
        sae("topk", k=k)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_scaling_factors(factor: float) -> None:
    with pytest.raises(SAEError, match="scaling factor is .*, not a positive number"):
        sae(normalize_activations="expected_average_only_in", norm_factor=factor)


@EVERY
@pytest.mark.parametrize("damage", ["truncated", "longer", "garbage", "empty", "header"])
def test_damaged_weights(form: str, damage: str, tmp_path: Path) -> None:
    write, weights, _, _ = FORMATS[form]
    sae_folder = write(tmp_path)
    content = (sae_folder / weights).read_bytes()
    damaged = {
        "truncated": content[: len(content) // 2],
        "longer": content + b"more",
        "garbage": bytes(range(256)) * 40,
        "empty": b"",
        "header": b"\xff" * 12 + content[12:],
    }[damage]
    (sae_folder / weights).write_bytes(damaged)
    if damage == "longer" and form in ("Gemma Scope", "dictionary_learning"):
        # A zip archive is read from its end, which may have something behind it.
        return
    assert line_of(sae_folder).startswith(f"{sae_folder / weights} is not a")


@pytest.mark.parametrize(
    "header",
    [
        {"W_enc": {"dtype": "F32", "shape": [10**12, 10**12], "data_offsets": [0, 8]}},
        {"W_enc": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}},
        {"W_enc": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}},
        {"W_enc": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"W_enc": 3},
        [],
    ],
)
def test_absurd_headers(header: Any, tmp_path: Path) -> None:
    sae_folder = sound_saelens(tmp_path)
    text = json.dumps(header).encode()
    file = sae_folder / "sae_weights.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    assert line_of(sae_folder).startswith(f"{file} is not a safetensors file (")


@EVERY
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_shapes_of_other_axes(form: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    write, weights, decoder, _ = FORMATS[form]
    encoder = decoder.replace("dec", "enc", 1)
    for name in (decoder, encoder):
        sae_folder = write(tmp_path / name)
        own = "encoder.weight" if form == "sparsify" and name == encoder else name

        def reshape(tensors: dict[str, Tensor], own: str = own) -> None:
            assert own in tensors
            tensors[own] = torch.ones(shape)

        change(sae_folder / weights, reshape)
        assert f"has shape {list(shape)}, not" in line_of(sae_folder)


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_biases_of_other_shapes(shape: tuple[int, ...], tmp_path: Path) -> None:
    for number, (form, name) in enumerate(
        [("Gemma Scope", "b_dec"), ("Llama Scope", "encoder.bias"), ("SAELens", "b_enc")]
    ):
        write, weights, _, _ = FORMATS[form]
        sae_folder = write(tmp_path / str(number))
        change(sae_folder / weights, lambda t, name=name: t.update({name: torch.ones(shape)}))
        assert "has shape" in line_of(sae_folder)
    sae_folder = write_llama(tmp_path / "norms", sparsity_include_decoder_norm=True)
    file = sae_folder / "checkpoints/final.safetensors"
    change(file, lambda t: t.update({"encoder.bias": torch.ones(shape)}))
    assert "these shapes do not fit together: encoder.weight [40, 12], enc" in line_of(sae_folder)


def test_objects_and_names_in_a_pickle(tmp_path: Path) -> None:
    sae_folder = write_dictionary(tmp_path / "t", "AutoEncoder", tensors={1: torch.ones(2)})
    assert "it holds other objects too" in line_of(sae_folder)
    tensors = dictionary("AutoEncoderTopK") | {"k": torch.tensor(-3)}
    sae_folder = write_dictionary(tmp_path / "k", "AutoEncoderTopK", tensors=tensors)
    assert "k in its weights is -3, not a positive integer" in line_of(sae_folder)
    tensors = dictionary("AutoEncoderTopK") | {"b_dec": torch.ones(D_IN).to_sparse()}
    sae_folder = write_dictionary(tmp_path / "sparse", "AutoEncoderTopK", tensors=tensors)
    assert "b_dec is sparse or quantized, not a plain tensor" in line_of(sae_folder)


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_hostile_pickles_are_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "it ran"
    sae_folder = write_dictionary(tmp_path / "t", "AutoEncoder", tensors={"bias": Hostile(proof)})
    assert line_of(sae_folder).startswith(
        f"{sae_folder / 'ae.pt'} is not a plain file of tensors ("
    )
    (sae_folder / "ae.pt").write_bytes(pickle.dumps(Hostile(proof)))
    assert line_of(sae_folder).startswith(
        f"{sae_folder / 'ae.pt'} is not a plain file of tensors ("
    )
    assert not proof.exists()
    np.savez(tmp_path / "params.npz", W_enc=np.array([Hostile(proof)], dtype=object))
    with pytest.raises(SAEError, match="is not an npz file of plain arrays"):
        saexp.load_sae(tmp_path / "params.npz", layer=3, stream="resid_post")
    assert not proof.exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.tensor([0.5, -2.0]), "does not hold one log10 frequency per latent"),
        (torch.ones(2, 2), "does not hold one log10 frequency per latent"),
        (torch.tensor([torch.nan, -2.0]), "holds 1 NaN of 2 values"),
        (torch.ones(2, dtype=torch.int8), "is stored as int8"),
    ],
)
def test_recorded_frequencies(values: Tensor, message: str, tmp_path: Path) -> None:
    file = tmp_path / "sparsity.safetensors"
    save_file({"sparsity": values}, file)
    with pytest.raises(SAEError, match=message) as caught:
        recorded_frequencies(file)
    assert str(caught.value).startswith(str(file))
