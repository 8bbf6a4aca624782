"""Every option in conf/ composes; values are read and refused as the contract says."""

import re
from pathlib import Path

import pytest

import saexp
from saexp.config import parse_coefficients, parse_layers, parse_width
from saexp.config.run import conf_folder
from saexp.errors import ConfigError
from saexp.registry import name_field

GROUPS = (
    "task",
    "model",
    "sae",
    "dataset",
    "positions",
    "analyzer",
    "intervention",
    "tracker",
    "sae_trainer",
)
OPTIONS = [
    (group, file.stem) for group in GROUPS for file in sorted((conf_folder() / group).glob("*"))
]
NEEDED = {
    ("model", "hf"): "model.name=some/model",
    ("sae", "local"): "sae.path=some/folder",
    ("sae", "saelens"): "sae.release=some-release",
    ("positions", "indices"): "positions.indices=[0]",
    ("positions", "substring"): "positions.substring=a",
}


OF_GROUP = {group: [option for g, option in OPTIONS if g == group] for group in GROUPS}
N_LARGEST = max(map(len, OF_GROUP.values()))


@pytest.mark.parametrize("number", range(N_LARGEST))
def test_every_option_composes(number: int) -> None:
    """One option of each group at a time, so that all options of the largest group occur."""
    chosen = {group: options[number % len(options)] for group, options in OF_GROUP.items()}
    words = [f"{group}={option}" for group, option in chosen.items()]
    words += [NEEDED[choice] for choice in chosen.items() if choice in NEEDED]
    cfg = saexp.compose([*words, "dataset.path=some/file"])
    for group, option in chosen.items():
        if group not in ("model", "sae") and option != "tutorial":
            assert getattr(getattr(cfg, group), name_field(group)) == option


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_begins_with_a_comment(group: str, option: str) -> None:
    assert (conf_folder() / group / f"{option}.yaml").read_text("utf-8").startswith("# ")


def test_every_experiment_is_one_of_a_study() -> None:
    """The commands of the studies' scripts are run by `tests/e2e/test_experiments.py`."""
    scripts = (Path(__file__).parents[3] / "experiments").glob("*/*.sh")
    typed = re.findall(r"experiment=(\w+)", " ".join(s.read_text("utf-8") for s in scripts))
    assert {f.stem for f in (conf_folder() / "experiment").glob("*.yaml")} == set(typed)


def test_every_documented_option_exists() -> None:
    there = {f"{g}={o}" for g, o in OPTIONS}
    models = "tiny tiny_control smollm2 gpt2 pythia70m gemma2b gemma2b_it gemma9b gemma9b_it"
    assert {f"model={m}" for m in f"{models} llama8b llama8b_it hf".split()} <= there
    positions = "entity_last entity_all entity_last_n after_entity last all random middle indices"
    assert {f"positions={p}" for p in f"{positions} substring continuation".split()} <= there


def test_the_top_level_keys_reach_their_groups() -> None:
    cfg = saexp.compose(
        ["layer=3", "width=16k", "coefficient=4", "seed=7", "device=cpu", "dtype=float16"]
    )
    assert (cfg.sae.layer, cfg.sae.width, cfg.sae.seed) == (3, "16k", 7)
    assert (cfg.intervention.coefficient, cfg.intervention.seed) == (4, 7)
    assert (cfg.model.device, cfg.model.dtype) == ("cpu", "float16")
    assert cfg.dataset.seed == cfg.analyzer.seed == cfg.positions.seed == 7


def test_gemmascope_resolves_to_its_release_and_sae() -> None:
    from saexp.saes.catalogue import find_entry

    cfg = saexp.compose(["model=gemma2b", "sae=gemmascope", "layer=12"])
    entry = find_entry(cfg.sae)
    assert entry.release == "gemma-scope-2b-pt-res-canonical"
    assert entry.id == "layer_12/width_16k/canonical"


@pytest.mark.parametrize(
    ("value", "width"), [("16k", 16384), (16384, 16384), ("1m", 2**20), ("512", 512), (None, None)]
)
def test_widths(value: object, width: int | None) -> None:
    assert parse_width(value) == width


@pytest.mark.parametrize("value", [True, -1, 0, "16q", 1.5, ""])
def test_invalid_widths_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="is not an SAE width; type a number such as width=16k"):
        parse_width(value)


def test_layers_and_coefficients() -> None:
    assert parse_layers(3) == [3]
    assert parse_layers([0, "2"]) == [0, 2]
    assert parse_coefficients("2.5") == [2.5]
    assert parse_coefficients([0, -1]) == [0.0, -1.0]
    for wrong in (True, -1, 1.5, "a", None):
        with pytest.raises(ConfigError, match="is not a block index"):
            parse_layers(wrong)
    for wrong in (True, "a", float("nan"), float("inf"), None):
        with pytest.raises(ConfigError, match="is not a number"):
            parse_coefficients(wrong)


def test_columns_are_mapped_one_by_one_and_all_at_once() -> None:
    names = ("text", "group", "entity", "span", "entity_type", "prompt", "answer", "id", "split")
    none = dict.fromkeys(names)
    base = ["dataset=jsonl", "dataset.path=some/file"]
    assert saexp.compose(base).dataset.columns == none
    one = saexp.compose(["dataset=jsonl", "dataset.columns.text=input_text"])
    assert one.dataset.columns == {**none, "text": "input_text"}
    both = saexp.compose([*base, "dataset.columns={text: input_text, group: label}"])
    assert both.dataset.columns == {**none, "text": "input_text", "group": "label"}


def test_only_typed_numbers_that_can_change_a_run_are_part_of_its_fingerprint():
    def kept_numbers(*words: str) -> list[str]:
        return saexp.compose(list(words)).intervention.effective_keep()

    assert kept_numbers("intervention.n_prompts=7") == kept_numbers() == []
    assert kept_numbers("intervention.n_prompts=100") == ["n_prompts"]
    both = ["intervention.top_k=4", "intervention.n_prompts=100"]
    assert kept_numbers(*both) == kept_numbers(*reversed(both)) == ["n_prompts", "top_k"]
    assert kept_numbers("intervention=none", "intervention.n_prompts=100") == []
