"""A latent that is never active on the data has a decoder direction all the same."""

from pathlib import Path
from typing import Any

import pytest

import saexp
from saexp.context import ObjectCache
from saexp.data.tokenization import tokenize
from saexp.errors import SaexpError
from saexp.models.loading import LanguageModel
from saexp.results import Result
from tests.shipped_texts import FEW_NEUTRAL
from tests.unit.interventions.plain_loop import Hooked, plain_generate

SMALL = ["tracker=none", "analyzer.n_bootstrap=0", "intervention.n_prompts=4", "sae.check=off"]
SMALL += ["intervention.n_controls=3", "intervention.n_choice_prompts=2", "coefficient=[0,6]"]
SMALL += ["intervention.where=last", "intervention.max_new_tokens=8", "intervention.n_neutral=1"]
SMALL += ["dataset.n_examples=60", "analyzer.n_background=500", FEW_NEUTRAL]
OBJECTS = ObjectCache()
"""Shared by the runs of this file, as by the cells of a sweep (see test_shared.py)."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def ran(cache: Path, folder: Path, *words: str) -> Result:
    return saexp.run(saexp.compose([*SMALL, f"cache_dir={cache}", *words]), folder, objects=OBJECTS)


@pytest.fixture(scope="module")
def listed(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """Latents that are active at some row of the shipped data."""
    result = ran(cache, tmp_path_factory.mktemp("run"), "intervention=none")
    return result.tables["latents"]["latent"].tolist()


@pytest.fixture(scope="module")
def inactive(listed: list[int]) -> int:
    """A latent that is active at no row of the shipped data."""
    return min(set(range(256)) - set(listed))


@pytest.fixture(scope="module")
def active(listed: list[int]) -> int:
    return listed[0]


def objects(*words: str) -> tuple[LanguageModel, Any]:
    cfg = saexp.compose(words)
    model = saexp.build("model", cfg.model)
    return model, saexp.build("sae", cfg.sae, model=model)


@pytest.mark.parametrize("analyzer", ["contrast", "stats"])
def test_its_direction_is_added_as_a_plain_hook_adds_it(
    cache: Path, tmp_path: Path, inactive: int, analyzer: str
) -> None:
    words = [f"intervention.latents=[{inactive}]", "intervention.unit=raw", f"analyzer={analyzer}"]
    result = ran(cache, tmp_path, *words)
    model, sae = objects()
    effects = result.tables["effects"]
    own = effects[effects["condition"] == f"latent_{inactive}"]
    assert set(own["group"]) == {"known", "unknown"}
    step = sae.directions([inactive])[0].float()
    for row in own.to_dict("records"):
        (tokens,) = tokenize([row["prompt"]], model.tokenizer, 512, model.prepend_bos)
        change = Hooked(
            sae.hookpoint.layer,
            lambda x, c=row["coefficient"]: x + c * step,
            (len(tokens) - 1,),
        )
        generated = plain_generate(model, tokens.ids, 8, change)
        assert model.tokenizer.decode(generated, skip_special_tokens=True) == row["generated_text"]
    assert effects["generated_text"].nunique() > 3
    notes = [n for n in result.notes if f"latent {inactive} is never active" in n]
    assert len(notes) == 1
    controls = effects[effects["of"] == f"latent_{inactive}"]
    assert controls.loc[controls["control_kind"] == "frequency", "latent"].nunique() == 3
    table = result.tables["controls"].query("control_kind == 'frequency'")
    assert len(table) == 3 and not table["matched"].any() and table["frequency_ratio"].isna().all()


def test_beside_one_that_is_active_both_are_tried(
    cache: Path, tmp_path: Path, inactive: int, active: int
) -> None:
    few = ["intervention.n_controls=1", "intervention.n_prompts=2"]
    result = ran(cache, tmp_path, f"intervention.latents=[{inactive},{active}]", *few)
    effects = result.tables["effects"]
    written = set(effects.loc[effects["role"] == "single", "latent"])
    assert written == {str(inactive), str(active)}


@pytest.mark.parametrize(
    "words",
    [
        ["intervention=clamp", "intervention.values=[30.0]"],
        ["intervention=ablate"],
        ["intervention=project_out", "coefficient=[0,1]"],
        ["intervention=orthogonalize", "coefficient=[0,1]"],
    ],
    ids=lambda words: words[0],
)
def test_operations_on_its_direction_run(
    cache: Path, tmp_path: Path, inactive: int, words: list[str]
) -> None:
    few = ["intervention.n_controls=1", "intervention.n_prompts=2"]
    result = ran(cache, tmp_path, f"intervention.latents=[{inactive}]", *few, *words)
    effects = result.tables["effects"]
    assert (effects["latent"] == str(inactive)).any()


@pytest.mark.parametrize(("unit", "analyzer"), [("max_act", "contrast"), ("p99_act", "stats")])
def test_a_unit_of_its_own_activation_is_one_line(
    cache: Path, tmp_path: Path, inactive: int, unit: str, analyzer: str
) -> None:
    with pytest.raises(SaexpError) as error:
        ran(
            cache,
            tmp_path,
            f"intervention.latents=[{inactive}]",
            f"intervention.unit={unit}",
            f"analyzer={analyzer}",
        )
    assert str(error.value) == (
        f"intervention.unit={unit}: latent {inactive} is never active on the train split at "
        "layer_2.resid_post, so this unit is undefined for it; type intervention.unit=resid_norm "
        "or raw"
    )


@pytest.mark.parametrize("analyzer", ["contrast", "stats"])
def test_a_latent_beyond_the_sae_is_an_error(cache: Path, tmp_path: Path, analyzer: str) -> None:
    with pytest.raises(SaexpError, match="latent 256, but the SAE of layer 2 has latents 0-255"):
        ran(cache, tmp_path, "intervention.latents=[256]", f"analyzer={analyzer}")
