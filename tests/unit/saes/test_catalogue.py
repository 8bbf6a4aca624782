"""sae-lens' real catalogue: which SAE a config names, and what is said where there is none."""

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import saexp
from saexp.config import SAEConfig
from saexp.errors import SAEError
from saexp.models import Hookpoint
from saexp.registry import build
from saexp.saes.catalogue import (
    FORMATS,
    catalogue,
    entries,
    find_entry,
    format_of,
    n_latents,
    neuronpedia_of,
    show_width,
)
from saexp.saes.formats.gemma_scope import streams_of


def chosen(*words: str) -> tuple[str, str]:
    entry = find_entry(saexp.compose(list(words)).sae)
    return entry.release, entry.id


def released(**options: Any) -> SAEConfig:
    return SAEConfig(name="saelens", loader="release", **options)


@pytest.mark.parametrize(
    ("words", "release", "sae_id"),
    [
        ("model=gemma2b sae=gemmascope layer=12 width=65536", "2b-pt-res", "layer_12/width_65k"),
        ("model=gemma9b sae=gemmascope layer=41", "9b-pt-res", "layer_41/width_16k"),
        ("model=gemma9b_it sae=gemmascope layer=9 width=128k", "9b-it-res", "layer_9/width_131k"),
    ],
)
def test_gemma_scope(words: str, release: str, sae_id: str) -> None:
    assert chosen(*words.split()) == (f"gemma-scope-{release}-canonical", f"{sae_id}/canonical")


def test_entries_are_those_of_sae_lens_own_reader() -> None:
    """The command of the README: where its file is, and what Neuronpedia calls it."""
    entry = find_entry(saexp.compose(["model=gemma2b", "sae=gemmascope", "layer=12"]).sae)
    [listed] = [
        s
        for s in catalogue()["gemma-scope-2b-pt-res-canonical"]["saes"]
        if s["id"] == "layer_12/width_16k/canonical"
    ]
    assert entry.path == listed["path"]
    assert entry.path.startswith("layer_12/width_16k/average_l0_")
    assert (entry.repo, entry.loader) == ("google/gemma-scope-2b-pt-res", "gemma_2")
    assert entry.neuronpedia == "gemma-2-2b/12-gemmascope-res-16k"
    assert streams_of(entry.repo, entry.path) == (Hookpoint(12, "resid_post"), None)


UNREADABLE = {
    ("temporal-sae-gemma-2-2b", "blocks.12.hook_resid_post"),
    ("temporal-sae-llama-3.1-8b", "blocks.15.hook_resid_post"),
    ("temporal-sae-llama-3.1-8b", "blocks.26.hook_resid_post"),
}
"""Temporal SAEs: their latents at a token depend on the tokens before."""
STREAMS = {
    "res": {"resid_pre", "resid_mid", "resid_post", "embed"},
    "att": {"attn_z", "attn_out"},
    "mlp": {"mlp_out"},
    "transcoder": {"mlp_in", "mlp_in_normalized"},
    "clt": {"resid_mid"},
}
"""Word in an id of Neuronpedia -> what such SAEs read."""


MISPLACED = ("gemma-scope-9b-pt-res", "layer_2/width_16k/average_l0_8")
"""Its id on Neuronpedia, in sae-lens 6.54, is that of an SAE of layer 20."""


def test_every_sae_of_the_catalogue_has_a_reader_and_a_hookpoint() -> None:
    """By the name alone; the layer and the kind are also in Neuronpedia's ids, made by others."""
    unreadable, n_checked = set(), 0
    for release in catalogue():
        for entry in entries(release):
            if entry.loader not in FORMATS:
                unreadable.add((release, entry.id))
                continue
            form = format_of(entry)
            assert callable(form.read)
            at, out = form.streams(entry)
            assert (at.stream == "embed") or at.layer == entry.layer, entry
            assert out is None or (out.layer, out.stream) == (at.layer, "mlp_out"), entry
            assert (out is not None) == any(w in release for w in ("transcoder", "clt")), entry
            match = re.search(
                r"/(\d+)-(?:[\w.]+-)*?(res|att|mlp|transcoder|clt)", entry.neuronpedia or ""
            )
            if match is None:
                continue
            n_checked += 1
            if (release, entry.id) == ("gpt2-small-res-jb", "blocks.11.hook_resid_post"):
                assert neuronpedia_of(entry) == "gpt2-small/12-res-jb"
                continue
            if (release, entry.id) == MISPLACED:
                assert neuronpedia_of(entry) is None
                continue
            assert neuronpedia_of(entry) == entry.neuronpedia
            assert (at.layer, True) == (int(match[1]), at.stream in STREAMS[match[2]]), entry
    assert unreadable == UNREADABLE
    assert n_checked > 1500


def test_hookpoints_are_those_of_sae_lens_own_readers(lens: ModuleType) -> None:
    """Of the formats whose readers need no file to say it."""
    loaders = lens.loading.pretrained_sae_loaders
    own = {
        "gemma_2": loaders.get_gemma_2_config_from_hf,
        "gemma_2_transcoder": loaders.get_gemma_2_transcoder_config_from_hf,
        "goodfire": loaders.get_goodfire_config_from_hf,
        "deepseek_r1": loaders.get_deepseek_r1_config_from_hf,
        "qwen_scope": loaders.get_qwen_scope_config_from_hf,
    }
    n_checked = 0
    for release, about in catalogue().items():
        if (getter := own.get(about.get("conversion_func"))) is None:
            continue
        for entry in entries(release):
            at, out = format_of(entry).streams(entry)
            if at.stream == "embed":
                continue
            cfg: Any = getter(entry.repo, entry.path, "cpu")
            assert at.transformer_lens == cfg["hook_name"], entry
            assert (out.transformer_lens if out else None) == cfg.get("hook_name_out"), entry
            n_checked += 1
    assert n_checked > 3000


def test_a_release_of_a_format_that_is_not_read() -> None:
    cfg = released(release="temporal-sae-gemma-2-2b", layer=12)
    with pytest.raises(SAEError, match=r"the format 'temporal', which is not supported; saexp re"):
        build("sae", cfg)


@pytest.mark.parametrize(
    ("release", "words", "message"),
    [
        ("gemma-scope-2b-pt-mlp-canonical", {"stream": "resid_post"}, "was trained on layer_5.mlp"),
        ("llama_scope_lxa_8x", {"stream": "resid_post"}, "was trained on layer_5.attn_out"),
        (
            "qwen-scope-3.5-2b-base-w32k-l50",
            {"stream": "mlp_out"},
            "was trained on layer_5.resid_p",
        ),
    ],
)
def test_a_stream_that_it_was_not_trained_on_is_refused_before_any_download(
    hub_cache: Path, release: str, words: dict[str, str], message: str
) -> None:
    cfg = released(release=release, layer=5, width="16k" if "gemma" in release else None, **words)
    with pytest.raises(SAEError, match=message):
        build("sae", cfg)
    assert not any(hub_cache.iterdir())


def test_every_listed_sae_is_an_entry() -> None:
    for release, about in catalogue().items():
        listed = entries(release)
        assert [e.id for e in listed] == [s["id"] for s in about["saes"]]
        unplaced = [e.id for e in listed if e.layer is None]
        assert all("embedding" in sae_id for sae_id in unplaced), unplaced


def test_llama_scope() -> None:
    words = ["model=llama8b", "sae=llamascope", "layer=7"]
    assert chosen(*words) == ("llama_scope_lxr_8x", "l7r_8x")
    assert chosen(*words, "width=32k") == ("llama_scope_lxr_8x", "l7r_8x")
    wide = [*words, "sae.release=llama_scope_lxr_32x"]
    assert chosen(*wide, "width=128k") == ("llama_scope_lxr_32x", "l7r_32x")
    assert chosen(*wide, "width=131072") == ("llama_scope_lxr_32x", "l7r_32x")
    with pytest.raises(
        SAEError,
        match="^llama_scope_lxr_8x has no width=128k at layer=7; it has 32k; try width=32k "
        "or sae.release=llama_scope_lxr_32x$",
    ):
        find_entry(saexp.compose([*words, "width=128k"]).sae)


def test_gpt2_jb() -> None:
    entry = find_entry(saexp.compose(["model=gpt2", "sae=gpt2_jb", "layer=8"]).sae)
    assert (entry.release, entry.id) == ("gpt2-small-res-jb", "blocks.8.hook_resid_pre")
    assert (entry.repo, entry.layer, entry.width) == ("jbloom/GPT2-Small-SAEs-Reformatted", 8, None)
    assert entry.neuronpedia == "gpt2-small/8-res-jb"
    assert entry.overrides["model_from_pretrained_kwargs"] == {"center_writing_weights": True}


def test_by_l0() -> None:
    cfg = released(release="gemma-scope-2b-pt-res", layer=12, width="16k", l0=41)
    assert find_entry(cfg).id == "layer_12/width_16k/average_l0_41"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"release": None}, r"sae.release is not set; type e.g. sae.release=gpt2-small-res-jb"),
        (
            {"release": "gpt2-small-res-jp", "layer": 8},
            r"sae.release=gpt2-small-res-jp is not known; did you mean gpt2-small-res-jb, ",
        ),
        (
            {"release": "gemma-scope-{model}-res-canonical", "model_name": "google/gemma-2-2b-it"},
            r"sae.release=gemma-scope-2b-it-res-canonical is not known; did you mean .*gemma-scope-"
            "2b-pt-res-canonical",
        ),
        ({"release": "qqqqqqqqqqqqqqqqqq"}, r"is not known; there are \S+, \S+, .* …$"),
        (
            {"release": "gpt2-small-res-jb", "id": "blocks.8.hook_resid_pr"},
            r"sae.id=blocks.8.hook_resid_pr is not in gpt2-small-res-jb; did you mean "
            "blocks.8.hook_resid_pre",
        ),
        (
            {"release": "gpt2-small-res-jb"},
            r"which SAE of gpt2-small-res-jb\? type layer=<block index> or sae.id=<id>",
        ),
        (
            {"release": "gpt2-small-res-jb", "layer": 14},
            r"gpt2-small-res-jb has no SAE at layer=14; it has layers 0, 1, .*, 11; try layer=11",
        ),
        (
            {"release": "gpt2-small-res-jb", "layer": 11},
            r"gpt2-small-res-jb has 2 SAEs at layer=11: blocks.11.hook_resid_pre, "
            r"blocks.11.hook_resid_post; type sae.id=<id>",
        ),
        (
            {"release": "gemma-scope-9b-it-res-canonical", "layer": 20, "width": "40k"},
            r"gemma-scope-9b-it-res-canonical has no width=40k at layer=20; it has 16k, 131k; "
            "try width=16k$",
        ),
        (
            {"release": "gemma-scope-9b-it-res-canonical", "layer": 20, "width": "100k"},
            "it has 16k, 131k; try width=131k$",
        ),
        (
            {"release": "gemma-scope-2b-pt-res", "layer": 12, "width": "16k", "l0": 50},
            r"gemma-scope-2b-pt-res has no sae.l0=50 at layer=12; it has 22, 41, 82, 176, 445; "
            "try sae.l0=41",
        ),
        (
            {"release": "gemma-scope-2b-pt-res", "layer": 12, "width": "16k"},
            r"gemma-scope-2b-pt-res has 5 SAEs at layer=12: layer_12/width_16k/average_l0_176, .*; "
            "type sae.id=<id>",
        ),
    ],
)
def test_what_is_not_there(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SAEError, match=message) as caught:
        find_entry(released(**options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("typed", "latents", "shown"),
    [
        ("16k", 16384, "16k"),
        ("32K", 32768, "32k"),
        ("64k", 65536, "65k"),
        ("65k", 65536, "65k"),
        ("128k", 131072, "131k"),
        ("131k", 131072, "131k"),
        ("262k", 262144, "262k"),
        ("524k", 524288, "524k"),
        ("1m", 1048576, "1m"),
        ("24k", 24576, "24k"),
        (256, 256, "256"),
        ("131072", 131072, "131k"),
    ],
)
def test_widths(typed: Any, latents: int, shown: str) -> None:
    """Releases name 2**16 and 2**17 by their thousands; both they and multiples of 1024 count."""
    assert n_latents(typed) == latents
    assert show_width(latents) == shown
    assert n_latents(shown) == latents


def test_every_width_in_a_catalogue_path_is_a_power_of_two() -> None:
    """What n_latents makes of the releases' own names."""
    widths = {e.width for r in catalogue() if r.startswith("gemma-scope") for e in entries(r)}
    widths.discard(None)
    assert widths == {2**n for n in (12, 14, 15, 16, 17, 18, 19, 20)}
