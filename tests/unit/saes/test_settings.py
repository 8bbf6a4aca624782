"""Settings in configs of every format: values of other types and impossible ones are one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import saexp
from saexp.errors import SAEError
from tests.unit.saes.every_format import EVERY, FORMATS, line_of
from tests.unit.saes.make import D_IN, D_SAE, HOOK_NAME

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


def write_config(form: str, sae_folder: Path, changes: dict[str, Any]) -> Path:
    """Change a format's config; a key of two parts is of a section."""
    name = FORMATS[form][3]
    assert name is not None
    cfg = json.loads((sae_folder / name).read_text())
    for key, value in changes.items():
        section, _, inner = key.rpartition(".")
        (cfg[section] if section else cfg)[inner] = value
    (sae_folder / name).write_text(json.dumps(cfg))
    return sae_folder / name


@pytest.mark.parametrize(("form", "key", "value", "message"), WRONG)
def test_wrong_settings(form: str, key: str, value: Any, message: str, tmp_path: Path) -> None:
    sae_folder = FORMATS[form][0](tmp_path)
    file = write_config(form, sae_folder, {key: value})
    line = line_of(sae_folder)
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
    sae_folder = write(tmp_path)
    (sae_folder / config).write_bytes(content)
    valid = content in (b"[]", b'"text"', b"null", b"3")
    what = "a JSON object" if valid else "valid JSON"
    assert line_of(sae_folder).startswith(f"{sae_folder / config} is not {what}")
    (sae_folder / config).unlink()
    (sae_folder / config).mkdir()
    if form == "Gemma Scope 2":
        # Its folder's name has it all; some on the hub have no config.
        assert saexp.load_sae(sae_folder).d_sae == D_SAE
    else:
        assert "is not an SAE in a format that saexp reads" in line_of(
            sae_folder
        ) or "pickle" in line_of(sae_folder)


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
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_settings_are_read_or_refused_in_one_line(
    form: str, data: st.DataObject, tmp_path: Path
) -> None:
    sae_folder = tmp_path / "sae"
    if not sae_folder.exists():
        written = FORMATS[form][0](tmp_path / "made")
        sae_folder.symlink_to(written)
        (tmp_path / "config").write_text((written / str(FORMATS[form][3])).read_text())
    sae_folder = sae_folder.resolve()
    file = sae_folder / str(FORMATS[form][3])
    cfg = json.loads((tmp_path / "config").read_text())
    sections = [cfg, *(v for v in cfg.values() if isinstance(v, dict))]
    for _ in range(data.draw(st.integers(1, 3))):
        section = data.draw(st.sampled_from(sections))
        section[data.draw(st.sampled_from(sorted(section)))] = data.draw(ANY)
    file.write_text(json.dumps(cfg))
    try:
        saexp.load_sae(sae_folder)
    except SAEError as error:
        assert "\n" not in str(error)
        str(error).encode()
