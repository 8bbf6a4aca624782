"""Values and types in SAE files, of every format: what is impossible is one line, never a use."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import saexp
from saexp.config import SAEConfig
from saexp.errors import SAEError
from saexp.registry import build
from saexp.saes.base import SparseAutoencoder
from saexp.saes.formats.saelens import recorded_frequencies
from tests.saes.make import D_IN, D_SAE, HOOK_NAME, parameters, sae, write_npz, write_saelens
from tests.saes.make_formats import (
    dictionary,
    write_dictionary,
    write_gemma2,
    write_llama,
    write_sparsify,
)

SAELENS_CFG: dict[str, Any] = {
    "architecture": "jumprelu",
    "d_in": D_IN,
    "d_sae": D_SAE,
    "dtype": "float32",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "metadata": {
        "hook_name": HOOK_NAME,
        "model_name": "gpt2",
        "prepend_bos": True,
        "neuronpedia_id": None,
        "model_from_pretrained_kwargs": {"center_writing_weights": False},
    },
}
OLD_CFG: dict[str, Any] = {
    "hook_point": HOOK_NAME,
    "d_in": D_IN,
    "d_sae": D_SAE,
    "activation_fn_str": "topk",
    "activation_fn_kwargs": {"k": 5},
    "normalize_activations": True,
    "norm_scaling_factor": 0.7,
    "prepend_bos": True,
}
"""A config before version 6, of a TopK SAE."""


def _saelens(folder: Path) -> Path:
    return write_saelens(folder / "sae", SAELENS_CFG, parameters("jumprelu"))


def _old(folder: Path) -> Path:
    return write_saelens(folder / "sae", OLD_CFG, parameters("topk"))


def _gemma(folder: Path) -> Path:
    place = folder / "gemma-scope-2b-pt-res" / "layer_3" / "width_16k" / "average_l0_9"
    write_npz(place / "params.npz", parameters("jumprelu"))
    return place


def _gemma2(folder: Path) -> Path:
    return write_gemma2(folder / "resid_post" / "layer_3_width_40", parameters("jumprelu"))


def _llama(folder: Path) -> Path:
    return write_llama(folder / "sae")


def _sparsify(folder: Path) -> Path:
    return write_sparsify(folder / "layers.3", parameters("topk"))


def _dictionary(folder: Path) -> Path:
    return write_dictionary(folder / "trainer_0", "AutoEncoderTopK")


FORMATS: dict[str, tuple[Callable[[Path], Path], str, str, str | None]] = {
    "SAELens": (_saelens, "sae_weights.safetensors", "W_dec", "cfg.json"),
    "SAELens 5": (_old, "sae_weights.safetensors", "W_dec", "cfg.json"),
    "Gemma Scope": (_gemma, "params.npz", "W_dec", None),
    "Gemma Scope 2": (_gemma2, "params.safetensors", "w_dec", "config.json"),
    "Llama Scope": (
        *(_llama, "checkpoints/final.safetensors", "decoder.weight", "hyperparams.json"),
    ),
    "sparsify": (_sparsify, "sae.safetensors", "W_dec", "cfg.json"),
    "dictionary_learning": (_dictionary, "ae.pt", "decoder.weight", "config.json"),
}
"""Format -> (writer, its file of weights, its name of the decoder, its config)."""
EVERY = pytest.mark.parametrize("form", FORMATS)


def change(file: Path, do: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors in a file of any format."""
    if file.suffix == ".npz":
        with np.load(file) as arrays:
            tensors = {n: torch.from_numpy(arrays[n]) for n in arrays}
        do(tensors)
        np.savez(file, **{n: t.numpy() for n, t in tensors.items()})  # pyright: ignore
    elif file.suffix == ".pt":
        tensors = torch.load(file, weights_only=True)
        do(tensors)
        torch.save(tensors, file)
    else:
        tensors = load_file(file)
        do(tensors)
        save_file({n: t.contiguous() for n, t in tensors.items()}, file)


def void(_: Any) -> None:
    """What a lambda that changes a tensor gives."""


def line_of(place: Path) -> str:
    with pytest.raises(SAEError) as caught:
        saexp.load_sae(place)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@EVERY
def test_sound_files_are_read(form: str, tmp_path: Path) -> None:
    assert saexp.load_sae(FORMATS[form][0](tmp_path)).d_sae == D_SAE


@EVERY
@pytest.mark.parametrize(("bad", "shown"), [(torch.nan, "NaN"), (torch.inf, "Inf")])
def test_nan_and_infinities_are_counted(form: str, bad: float, shown: str, tmp_path: Path) -> None:
    write, weights, decoder, _ = FORMATS[form]
    place = write(tmp_path)

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[decoder].view(-1)[:2] = bad

    change(place / weights, spoil)
    name = decoder if form == "Llama Scope" else "W_dec"
    assert line_of(place) == (f"{place / weights}: {name} holds 2 {shown} of {D_IN * D_SAE} values")


def test_nan_is_counted_before_the_decoder_is_scaled(tmp_path: Path) -> None:
    place = write_dictionary(tmp_path / "t", "AutoEncoder")
    change(place / "ae.pt", lambda t: void(t["decoder.weight"].view(-1)[:1].fill_(torch.nan)))
    assert line_of(place) == f"{place / 'ae.pt'}: W_dec holds 1 NaN of {D_IN * D_SAE} values"


@EVERY
def test_a_decoder_of_zeros(form: str, tmp_path: Path) -> None:
    write, weights, decoder, _ = FORMATS[form]
    place = write(tmp_path)
    change(place / weights, lambda tensors: void(tensors[decoder].zero_()))
    assert line_of(place) == f"{place / weights}: all {D_IN * D_SAE} values of W_dec are 0"


@EVERY
def test_a_few_decoder_rows_of_zeros_are_dead_latents(form: str, tmp_path: Path) -> None:
    write, weights, decoder, _ = FORMATS[form]
    place = write(tmp_path)

    def kill(tensors: dict[str, Tensor]) -> None:
        turned = tensors[decoder].shape[0] != D_SAE
        (tensors[decoder].T if turned else tensors[decoder])[:3] = 0

    change(place / weights, kill)
    assert bool((saexp.load_sae(place).W_dec[:3] == 0).all())


@EVERY
@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.bool, torch.int64, torch.complex64]
)
def test_other_types_are_not_converted(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    write, weights, decoder, _ = FORMATS[form]
    place = write(tmp_path)

    def convert(tensors: dict[str, Tensor]) -> None:
        tensors[decoder] = tensors[decoder].to(dtype)

    change(place / weights, convert)
    shown = str(dtype).removeprefix("torch.")
    accepted = "float16, bfloat16, float32, float64"
    name = "W_dec" if form == "Gemma Scope" else decoder
    assert line_of(place) == (
        f"{place / weights}: {name} is stored as {shown}; saexp reads {accepted}"
    )


def test_eight_bit_floats_are_not_converted(tmp_path: Path) -> None:
    place = _saelens(tmp_path)
    change(
        place / "sae_weights.safetensors",
        lambda t: t.update(W_enc=t["W_enc"].to(torch.float8_e4m3fn)),
    )
    assert "W_enc is stored as float8_e4m3fn; saexp reads float16" in line_of(place)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_other_sizes_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    place = _saelens(tmp_path)
    file = place / "sae_weights.safetensors"
    change(file, lambda t: t.update({n: v.to(dtype) for n, v in t.items()}))
    assert saexp.load_sae(place).W_dec.dtype == torch.float32
    change(file, lambda t: void(t["b_enc"][1:2].fill_(torch.nan)))
    assert line_of(place) == f"{file}: b_enc holds 1 NaN of {D_SAE} values"


def test_sums_that_overflow_are_no_infinities() -> None:
    p = parameters("standard")
    p["b_enc"] = torch.full((D_SAE,), 3e38)
    made = SparseAutoencoder(p, architecture="standard", hookpoint=sae().hookpoint)
    assert float(made.b_enc.max()) < torch.inf
    p["b_enc"] = torch.full((D_SAE,), 6e4, dtype=torch.float16)
    SparseAutoencoder(p, architecture="standard", hookpoint=sae().hookpoint)


def test_numbers_that_the_dtype_asked_for_does_not_hold(tmp_path: Path) -> None:
    place = _saelens(tmp_path)
    file = place / "sae_weights.safetensors"
    change(file, lambda t: void(t["b_enc"][:1].fill_(1e6)))
    cfg = SAEConfig(name="mine", loader="path", path=str(place), dtype="float16")
    message = rf"{file} in float16: b_enc holds 1 Inf of {D_SAE} values"
    with pytest.raises(SAEError, match=message):
        build("sae", cfg)
    assert float(saexp.load_sae(place).b_enc[0]) == 1e6


@pytest.mark.parametrize(("d_in", "d_sae"), [(0, D_SAE), (D_IN, 0)])
def test_empty_tensors(d_in: int, d_sae: int, tmp_path: Path) -> None:
    place = write_saelens(
        tmp_path / "sae",
        {"metadata": {"hook_name": HOOK_NAME}},
        parameters("standard", d_in, d_sae),
    )
    assert line_of(place).endswith(f"W_enc has shape [{d_in}, {d_sae}]: no values")


@pytest.mark.parametrize("k", [D_SAE + 1, -1])
def test_more_active_latents_than_there_are(k: int) -> None:
    with pytest.raises(SAEError, match=f"k={k} is not between 1 and its {D_SAE} latents"):
        sae("topk", k=k)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_scaling_factors(factor: float) -> None:
    with pytest.raises(SAEError, match="scaling factor is .*, not a positive number"):
        sae(normalize_activations="expected_average_only_in", norm_factor=factor)


WRONG: list[tuple[str, str, Any, str]] = [
    ("SAELens", "d_in", -1, "d_in is -1, not a positive integer"),
    ("SAELens", "d_in", 0, "d_in is 0, not a positive integer"),
    ("SAELens", "d_in", "64", 'd_in is "64", not a positive integer'),
    ("SAELens", "d_in", 1.5, "d_in is 1.5, not a positive integer"),
    ("SAELens", "d_sae", True, "d_sae is true, not a positive integer"),
    ("SAELens", "d_in", D_IN + 1, f"d_in is {D_IN + 1}, not {D_IN} as in the weights"),
    ("SAELens", "d_sae", 7, f"d_sae is 7, not {D_SAE} as in the weights"),
    ("SAELens", "architecture", ["jumprelu"], 'architecture is ["jumprelu"], not text'),
    ("SAELens", "apply_b_dec_to_input", "no", 'apply_b_dec_to_input is "no", not true or false'),
    ("SAELens", "apply_b_dec_to_input", 1, "apply_b_dec_to_input is 1, not true or false"),
    ("SAELens", "metadata", [1], "metadata is [1], not an object of settings"),
    ("SAELens", "metadata", {"hook_name": [3]}, "hook_name is [3], not text"),
    ("SAELens", "metadata", {"hook_name": 3}, "hook_name is 3, not text"),
    (
        *("SAELens", "metadata", {"hook_name": "blocks.0\nx"}),
        'hook_name is "blocks.0\\nx", not one line of at most 1000 printable characters',
    ),
    ("SAELens", "metadata.model_name", 5, "model_name is 5, not text"),
    (
        *("SAELens", "metadata", {"hook_name": HOOK_NAME, "prepend_bos": "false"}),
        'prepend_bos is "false", not true or false',
    ),
    (
        *("SAELens", "metadata.model_from_pretrained_kwargs", "x"),
        'model_from_pretrained_kwargs is "x", not an object of settings',
    ),
    ("SAELens 5", "norm_scaling_factor", "1", 'norm_scaling_factor is "1", not a positive number'),
    ("SAELens 5", "norm_scaling_factor", 0, "norm_scaling_factor is 0, not a positive number"),
    ("SAELens 5", "norm_scaling_factor", -2.0, "norm_scaling_factor is -2.0, not a positive num"),
    ("SAELens 5", "norm_scaling_factor", float("nan"), "norm_scaling_factor is NaN, not a posit"),
    ("SAELens 5", "norm_scaling_factor", float("inf"), "norm_scaling_factor is Infinity, not a "),
    ("SAELens 5", "activation_fn_kwargs", [5], "activation_fn_kwargs is [5], not an object of "),
    ("SAELens 5", "activation_fn_kwargs", {"k": -3}, "activation_fn_kwargs.k is -3, not a posit"),
    ("SAELens 5", "activation_fn_kwargs", {"k": 2.5}, "activation_fn_kwargs.k is 2.5, not a po"),
    ("SAELens 5", "k", "5", 'k is "5", not a positive integer'),
    ("SAELens 5", "activation_fn_kwargs", {"k": 41}, "k=41 is not between 1 and its 40 latents"),
    ("SAELens 5", "normalize_activations", 1, "normalize_activations is 1, not text"),
    ("Gemma Scope 2", "affine_connection", "no", 'affine_connection is "no", not true or false'),
    ("Gemma Scope 2", "l0", "7", 'l0 is "7", not a number'),
    ("Gemma Scope 2", "type", 3, "type is 3, not text"),
    ("Gemma Scope 2", "hf_hook_point_in", [1], "hf_hook_point_in is [1], not text"),
    ("Llama Scope", "d_model", "12", 'd_model is "12", not a positive integer'),
    ("Llama Scope", "d_model", 13, "d_model is 13, not 12 as in the weights"),
    ("Llama Scope", "jump_relu_threshold", float("nan"), "jump_relu_threshold is NaN, not a num"),
    ("Llama Scope", "dataset_average_activation_norm", 3, "dataset_average_activation_norm is 3"),
    (
        *("Llama Scope", "dataset_average_activation_norm", {"in": 0, "out": 1}),
        "dataset_average_activation_norm.in is 0, not a positive number",
    ),
    ("Llama Scope", "sparsity_include_decoder_norm", "false", 'is "false", not true or false'),
    ("Llama Scope", "use_glu_encoder", 0, "use_glu_encoder is 0, not true or false"),
    ("sparsify", "k", -1, "k is -1, not a positive integer"),
    ("sparsify", "d_in", 11, "d_in is 11, not 12 as in the weights"),
    ("sparsify", "num_latents", 41, "num_latents is 41, not 40 as in the weights"),
    ("sparsify", "transcode", "false", 'transcode is "false", not true or false'),
    ("sparsify", "signed", 0, "signed is 0, not true or false"),
    ("dictionary_learning", "trainer", [1], "trainer is [1], not an object of settings"),
    ("dictionary_learning", "trainer.k", "5", 'trainer.k is "5", not a positive integer'),
    ("dictionary_learning", "trainer.layer", -1, "trainer.layer is -1, not an integer of at "),
    ("dictionary_learning", "trainer.layer", "x", 'trainer.layer is "x", not an integer of at l'),
    ("dictionary_learning", "trainer.dict_class", {}, "trainer.dict_class is {}, not text"),
    ("dictionary_learning", "trainer.lm_name", 1, "trainer.lm_name is 1, not text"),
    ("dictionary_learning", "trainer.dict_size", 39, "trainer.dict_size is 39, not 40 as in the"),
    ("dictionary_learning", "buffer", "x", 'buffer is "x", not an object of settings'),
]


def write_config(form: str, place: Path, changes: dict[str, Any]) -> Path:
    """Change a format's config; a key of two parts is of a section."""
    name = FORMATS[form][3]
    assert name is not None
    cfg = json.loads((place / name).read_text())
    for key, value in changes.items():
        section, _, inner = key.rpartition(".")
        (cfg[section] if section else cfg)[inner] = value
    (place / name).write_text(json.dumps(cfg))
    return place / name


@pytest.mark.parametrize(("form", "key", "value", "message"), WRONG)
def test_wrong_settings(form: str, key: str, value: Any, message: str, tmp_path: Path) -> None:
    place = FORMATS[form][0](tmp_path)
    file = write_config(form, place, {key: value})
    line = line_of(place)
    assert message in line
    assert str(file) in line or "k=41" in line


@EVERY
@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b'"text"', b"null", b"3", b"\xff\xfe{", b"{", b'{"a":' * 100_000, b"\x00"],
)
def test_configs_that_are_no_object(form: str, content: bytes, tmp_path: Path) -> None:
    write, _, _, config = FORMATS[form]
    if config is None:
        return
    place = write(tmp_path)
    (place / config).write_bytes(content)
    assert line_of(place).startswith(f"{place / config} is no JSON")
    (place / config).unlink()
    (place / config).mkdir()
    if form == "Gemma Scope 2":
        # Its folder's name has it all; some on the hub have no config.
        assert saexp.load_sae(place).d_sae == D_SAE
    else:
        assert "is no SAE saexp knows" in line_of(place) or "pickle" in line_of(place)


@EVERY
@pytest.mark.parametrize("damage", ["truncated", "longer", "garbage", "empty", "header"])
def test_damaged_weights(form: str, damage: str, tmp_path: Path) -> None:
    write, weights, _, _ = FORMATS[form]
    place = write(tmp_path)
    content = (place / weights).read_bytes()
    damaged = {
        "truncated": content[: len(content) // 2],
        "longer": content + b"more",
        "garbage": bytes(range(256)) * 40,
        "empty": b"",
        "header": b"\xff" * 12 + content[12:],
    }[damage]
    (place / weights).write_bytes(damaged)
    if damage == "longer" and form in ("Gemma Scope", "dictionary_learning"):
        # A zip archive is read from its end, which may have something behind it.
        return
    assert line_of(place).startswith(f"{place / weights} is no ")


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
    place = _saelens(tmp_path)
    text = json.dumps(header).encode()
    file = place / "sae_weights.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    assert line_of(place).startswith(f"{file} is no safetensors file (")


@EVERY
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_shapes_of_other_axes(form: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    write, weights, decoder, _ = FORMATS[form]
    encoder = decoder.replace("dec", "enc", 1)
    for name in (decoder, encoder):
        place = write(tmp_path / name)
        own = "encoder.weight" if form == "sparsify" and name == encoder else name

        def reshape(tensors: dict[str, Tensor], own: str = own) -> None:
            assert own in tensors
            tensors[own] = torch.ones(shape)

        change(place / weights, reshape)
        assert f"has shape {list(shape)}, not" in line_of(place)


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_biases_of_other_shapes(shape: tuple[int, ...], tmp_path: Path) -> None:
    for number, (form, name) in enumerate(
        [("Gemma Scope", "b_dec"), ("Llama Scope", "encoder.bias"), ("SAELens", "b_enc")]
    ):
        write, weights, _, _ = FORMATS[form]
        place = write(tmp_path / str(number))
        change(place / weights, lambda t, name=name: t.update({name: torch.ones(shape)}))
        assert "has shape" in line_of(place)
    place = write_llama(tmp_path / "norms", sparsity_include_decoder_norm=True)
    file = place / "checkpoints/final.safetensors"
    change(file, lambda t: t.update({"encoder.bias": torch.ones(shape)}))
    assert "these shapes do not fit together: encoder.weight [40, 12], enc" in line_of(place)


def test_objects_and_names_in_a_pickle(tmp_path: Path) -> None:
    place = write_dictionary(tmp_path / "t", "AutoEncoder", tensors={1: torch.ones(2)})
    assert "it holds other objects too" in line_of(place)
    tensors = dictionary("AutoEncoderTopK") | {"k": torch.tensor(-3)}
    place = write_dictionary(tmp_path / "k", "AutoEncoderTopK", tensors=tensors)
    assert "k in its weights is -3, not a positive integer" in line_of(place)
    tensors = dictionary("AutoEncoderTopK") | {"b_dec": torch.ones(D_IN).to_sparse()}
    place = write_dictionary(tmp_path / "sparse", "AutoEncoderTopK", tensors=tensors)
    assert "b_dec is sparse or quantized, not a plain tensor" in line_of(place)


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_hostile_pickles_are_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "it ran"
    place = write_dictionary(tmp_path / "t", "AutoEncoder", tensors={"bias": Hostile(proof)})
    assert line_of(place).startswith(f"{place / 'ae.pt'} is no plain file of tensors (")
    (place / "ae.pt").write_bytes(pickle.dumps(Hostile(proof)))
    assert line_of(place).startswith(f"{place / 'ae.pt'} is no plain file of tensors (")
    assert not proof.exists()
    np.savez(tmp_path / "params.npz", W_enc=np.array([Hostile(proof)], dtype=object))
    with pytest.raises(SAEError, match="is no npz file of plain arrays"):
        saexp.load_sae(tmp_path / "params.npz", layer=3, stream="resid_post")
    assert not proof.exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.tensor([0.5, -2.0]), "holds no list of log10 frequencies"),
        (torch.ones(2, 2), "holds no list of log10 frequencies"),
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


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 50)
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["topk", "none", "standard", HOOK_NAME, "expected_average_only_in"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@pytest.mark.parametrize("form", [name for name, about in FORMATS.items() if about[3]])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_settings_are_read_or_refused_in_one_line(
    form: str, data: st.DataObject, tmp_path: Path
) -> None:
    place = tmp_path / "sae"
    if not place.exists():
        made = FORMATS[form][0](tmp_path / "made")
        place.symlink_to(made)
        (tmp_path / "config").write_text((made / str(FORMATS[form][3])).read_text())
    place = place.resolve()
    file = place / str(FORMATS[form][3])
    cfg = json.loads((tmp_path / "config").read_text())
    sections = [cfg, *(v for v in cfg.values() if isinstance(v, dict))]
    for _ in range(data.draw(st.integers(1, 3))):
        section = data.draw(st.sampled_from(sections))
        section[data.draw(st.sampled_from(sorted(section)))] = data.draw(ANY)
    file.write_text(json.dumps(cfg))
    try:
        saexp.load_sae(place)
    except SAEError as error:
        assert "\n" not in str(error)
        str(error).encode()
