"""Answers before and after the SAE: against transformers and the SAE's formula written out here."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from safetensors.torch import load_file
from scipy import sparse
from transformers import AutoModelForCausalLM, AutoTokenizer

import saexp
from saexp.analysis import AnalysisInputs
from saexp.analysis.capability import (
    CapabilityAnalyzer,
    _paired_rate_bounds,
    _rate_bounds,
    questions,
)
from saexp.config import CapabilityConfig
from saexp.data import Example
from saexp.errors import ConfigError, DataError
from saexp.latents import Latents
from saexp.models import Hookpoint
from saexp.models.loading import LanguageModel
from saexp.results import Result
from saexp.saes import SAESettings, SparseAutoencoder
from saexp.stats import mean_interval, paired_difference_interval
from tests.random_models import D_MODEL, random_hf, random_lm, tokenizer

TINY = Path(saexp.__file__).parent / "assets/tiny"
LAYER = 2


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return saexp.build("model", saexp.compose(["device=cpu"]).model)


@pytest.fixture(scope="module")
def ioi() -> list[Example]:
    return saexp.build("dataset", saexp.compose(["dataset=ioi"]).dataset).examples[:24]


def identity(d: int, layer: int) -> SparseAutoencoder:
    """relu(x) - relu(-x) = x."""
    eye = torch.eye(d)
    parameters = {"W_enc": torch.cat([eye, -eye], dim=1), "W_dec": torch.cat([eye, -eye])}
    return SparseAutoencoder(
        {**parameters, "b_enc": torch.zeros(2 * d), "b_dec": torch.zeros(d)},
        SAESettings(architecture="standard", hookpoint=Hookpoint(layer, "resid_post")),
    )


def capability(
    model: LanguageModel,
    sae: SparseAutoencoder,
    examples: list[Example],
    *,
    n_bootstrap: int = 50,
    max_length: int = 512,
    **options: object,
) -> Result:
    cfg = CapabilityConfig(name="capability", n_bootstrap=n_bootstrap, **options)  # type: ignore[arg-type]
    rows = pd.DataFrame({"row": [0]})
    return CapabilityAnalyzer(cfg).analyze(
        AnalysisInputs(
            latents=Latents(sparse.csr_array((1, sae.d_sae), dtype=np.float32), rows),
            groups=(),
            layer=LAYER,
            examples=examples,
            model=model,
            sae=sae,
            max_length=max_length,
        )
    )


def shipped_sae() -> SparseAutoencoder:
    return saexp.build("sae", saexp.compose([f"layer={LAYER}", "device=cpu"]).sae)


@cache
def shipped_by_transformers() -> tuple[Any, Any]:
    """Model and tokenizer."""
    hf = AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.float32).eval()
    return hf, AutoTokenizer.from_pretrained(TINY / "model")


@torch.no_grad()
def by_hand(prompt: str, *, through_sae: bool) -> torch.Tensor:
    """Last logits by transformers alone; the SAE's formula is that of a JumpReLU, all but BOS."""
    hf, words = shipped_by_transformers()
    ids = words(prompt, return_tensors="pt")["input_ids"]
    handles = []
    if through_sae:
        file = TINY / f"sae/layer_{LAYER}/width_256/sae_weights.safetensors"
        w = {name: tensor.float() for name, tensor in load_file(file).items()}

        def splice(_m: Any, _a: Any, output: Any) -> Any:
            x = output if isinstance(output, torch.Tensor) else output[0]
            pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
            out = (pre.relu() * (pre > w["threshold"])) @ w["W_dec"] + w["b_dec"]
            out[:, 0] = x[:, 0]
            return out if isinstance(output, torch.Tensor) else (out, *output[1:])

        handles.append(hf.model.layers[LAYER].register_forward_hook(splice))
    logits = hf(ids).logits[0, -1]
    for handle in handles:
        handle.remove()
    return logits


def test_against_transformers_by_hand(model: LanguageModel, ioi: list[Example]) -> None:
    result = capability(model, shipped_sae(), ioi)
    table, tops = result.tables["prompts"].set_index("example_id"), result.tables["top_tokens"]
    _, words = shipped_by_transformers()
    for example in ioi[:5]:
        answer = words(example.text + example.answers[0])["input_ids"][len(words(example.text)[0])]
        foil = words(example.text + example.extra["foil"])["input_ids"][len(words(example.text)[0])]
        for state in ("clean", "sae"):
            logits = by_hand(example.text, through_sae=state == "sae")
            row = table.loc[example.id]
            assert row["answer_token_id"] == answer
            assert row[f"rank_{state}"] == 1 + int((logits > logits[answer]).sum())
            assert row[f"logit_{state}"] == pytest.approx(float(logits[answer]), abs=1e-3)
            probability = float(logits.softmax(0)[answer])
            assert row[f"probability_{state}"] == pytest.approx(probability, abs=1e-4)
            difference = float(logits[answer] - logits[foil])
            assert row[f"logit_difference_{state}"] == pytest.approx(difference, abs=1e-3)
            example_tops = tops[(tops["example_id"] == example.id) & (tops["state"] == state)]
            assert example_tops["token_id"].tolist() == logits.topk(10).indices.tolist()
            assert example_tops["rank"].tolist() == list(range(1, 11))


def test_means_and_intervals_are_of_the_prompts(model: LanguageModel, ioi: list[Example]) -> None:
    result = capability(model, shipped_sae(), ioi, n_bootstrap=400)
    prompts, m = result.tables["prompts"], result.metrics
    for measure in ("rank", "logit", "probability", "logit_difference", "top1"):
        clean, sae = (prompts[f"{measure}_{s}"].astype(float) for s in ("clean", "sae"))
        assert m[f"capability/{measure}_clean"] == pytest.approx(clean.mean())
        assert m[f"capability/{measure}_sae"] == pytest.approx(sae.mean())
        assert m[f"capability/{measure}_change"] == pytest.approx((sae - clean).mean())
    assert m["capability/top1_clean"] > 0.9
    low, high = mean_interval(prompts["logit_clean"].to_numpy()[:, None], 0, n_resamples=400)
    assert m["capability/logit_clean_ci_low"] == pytest.approx(low[0])
    assert m["capability/logit_clean_ci_high"] == pytest.approx(high[0])
    for state in ("clean", "sae"):
        right = int(prompts[f"top1_{state}"].sum())
        expected = scipy.stats.binomtest(right, len(prompts)).proportion_ci(method="wilson")
        assert m[f"capability/top1_{state}_ci_low"] == pytest.approx(expected.low)
        assert m[f"capability/top1_{state}_ci_high"] == pytest.approx(expected.high)
    before, after = prompts["top1_clean"], prompts["top1_sae"]
    pairs = [after & before, after & ~before, ~after & before, ~after & ~before]
    low, high = paired_difference_interval(*(int(x.sum()) for x in pairs))
    assert m["capability/top1_change_ci_low"] == pytest.approx(low)
    assert m["capability/top1_change_ci_high"] == pytest.approx(high)
    assert low < m["capability/top1_change"] < high


def test_prompts_of_one_entity_are_drawn_together(model: LanguageModel, ioi: list[Example]) -> None:
    """Each prompt three times, as three of one entity: intervals are those of the prompts once."""
    some = [replace(e, entity=f"entity {i}") for i, e in enumerate(ioi[:20])]
    once = capability(model, shipped_sae(), some, n_bootstrap=300).metrics
    copies = [replace(e, id=f"{e.id} {i}") for i in range(3) for e in some]
    often = capability(model, shipped_sae(), copies, n_bootstrap=300).metrics
    for measure in ("logit", "probability", "top1"):
        for name in ("clean", "sae", "change"):
            for end in ("", "_ci_low", "_ci_high"):
                key = f"capability/{measure}_{name}{end}"
                assert often[key] == pytest.approx(once[key], abs=1e-4), key
    assert (often["capability/n_prompts"], often["capability/n_units"]) == (60, 20)


def test_one_entity_has_no_interval() -> None:
    assert _rate_bounds(np.array([0.5])) == (None, None)
    assert _paired_rate_bounds(pd.Series([1.0, 0.0]), pd.Series([1.0, 1.0]), np.zeros(2, int)) == (
        None,
        None,
    )


def test_an_identity_sae_changes_nothing(model: LanguageModel, ioi: list[Example]) -> None:
    prompts = capability(model, identity(model.d_model, LAYER), ioi).tables["prompts"]
    assert (prompts["rank_clean"] == prompts["rank_sae"]).all()
    np.testing.assert_allclose(prompts["logit_sae"], prompts["logit_clean"], atol=1e-4)


def test_batches_do_not_matter(model: LanguageModel, ioi: list[Example]) -> None:
    """Prompts of different lengths, padded together and each by itself."""
    mixed = [*ioi[:4], Example(id="short", text="The player", answers=(" Fenlet",))]
    sae = shipped_sae()
    together = capability(model, sae, mixed).tables["prompts"]
    alone = capability(model, sae, mixed, batch_tokens=1).tables["prompts"]
    assert together["example_id"].tolist() == [e.id for e in mixed]
    numbers = [c for c in together if c.endswith(("_clean", "_sae")) and "rank" not in c]
    np.testing.assert_allclose(
        together[numbers].astype(float), alone[numbers].astype(float), atol=1e-4
    )
    assert together["logit_difference_clean"].isna().tolist() == [False] * 4 + [True]


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "gemma2"])
def test_other_architectures_with_an_identity_sae(architecture: str) -> None:
    lm = random_lm(architecture)
    examples = [
        Example(id="1", text="The player Fenlet", answers=(" scored",), extra={"foil": " The"}),
        Example(id="2", text="The city of New Bresk lies on the wide", answers=(" river",)),
    ]
    prompts = capability(lm, identity(D_MODEL, 1), examples).tables["prompts"]
    assert (prompts["rank_clean"] == prompts["rank_sae"]).all()
    for row, example in zip(prompts.to_dict("records"), examples, strict=True):
        ids = torch.tensor([lm.tokenizer(example.text)["input_ids"]])
        with torch.no_grad():
            logits = lm.hf(ids).logits[0, -1]
        assert row["logit_clean"] == pytest.approx(float(logits[row["answer_token_id"]]), abs=1e-4)


def test_an_answer_that_merges_with_the_prompt_is_a_counted_skip() -> None:
    lm = random_lm("llama")
    examples = [
        Example(id="whole", text="The player", answers=(" Fenlet",)),
        Example(id="cut", text="The pla", answers=("yer",), answer_space="never"),
        Example(id="none", text="The player"),
        Example(id="empty", text="The player", answers=("",)),
    ]
    assert lm.tokenizer("The player")["input_ids"][:3] != lm.tokenizer("The pla")["input_ids"][:3]
    asked, skips = questions(examples, lm, 512)
    assert [q.example.id for q in asked] == ["whole"]
    assert {s.example_id: s.reason for s in skips} == {
        "cut": "answer merges with the prompt's last token",
        "none": "no answer",
        "empty": "answer has no token",
    }
    result = capability(lm, identity(D_MODEL, 1), examples)
    assert result.metrics["capability/n_not_asked"] == 3
    assert len(result.tables["unanswered"]) == 3
    assert any("1 of 4 examples not asked: answer merges" in note for note in result.notes)


def test_a_prompt_that_is_cut_off_is_a_skip(model: LanguageModel, ioi: list[Example]) -> None:
    _, skips = questions(ioi[:2], model, 5)
    assert {s.reason for s in skips} == {"prompt longer than 5 tokens"}
    with pytest.raises(DataError, match=r"none of 2 examples has a usable answer.*longer than 5"):
        capability(model, shipped_sae(), ioi[:2], max_length=5)


def test_foils_that_say_nothing_are_noted(model: LanguageModel) -> None:
    text = "When Laura and Irene went to the library, Irene gave the ring to"
    same = Example(id="same", text=text, answers=(" Laura",), extra={"foil": " Laura"})
    result = capability(model, shipped_sae(), [same])
    assert any("1 prompt has no logit difference: foil begins" in n for n in result.notes)
    assert "capability/logit_difference_clean" not in result.metrics


def test_answers_without_their_space_get_it_and_are_noted(model: LanguageModel) -> None:
    bare = Example(id="1", text="Tom saw", answers=("Laura",), extra={"foil": "Irene"})
    spaced = replace(bare, answers=(" Laura",), extra={"foil": " Irene"})
    results = [capability(model, shipped_sae(), [example]) for example in (bare, spaced)]
    first, second = (r.tables["prompts"] for r in results)
    pd.testing.assert_frame_equal(first, second)
    noted = [
        any(n.startswith("a space was added before 1 answers") for n in r.notes) for r in results
    ]
    assert noted == [True, False]


def test_chat_prompts_stand_in_their_template() -> None:
    lm = LanguageModel.wrap(random_hf("llama"), tokenizer(chat=True), name="chat")
    lm.cfg.chat = True
    asked, _ = questions([Example(id="1", text="The player", answers=(" Fenlet",))], lm, 512)
    question = asked[0]
    assert question.example.text == "<bos>user: The player\nmodel:"
    assert question.tokens.ids.count(lm.tokenizer.bos_token_id) == 1
    ids = lm.tokenizer("Fenlet", add_special_tokens=False)["input_ids"]
    assert question.answer_id == ids[0]


def test_the_prompt_of_the_data_counts_where_there_is_one(model: LanguageModel) -> None:
    entity = saexp.build("dataset", saexp.compose([]).dataset).examples[0]
    asked, _ = questions([entity], model, 512)
    assert asked[0].example.text == entity.prompt != entity.text


def test_invalid_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="n_top=0 is too small; it must be at least 1"):
        CapabilityConfig(name="capability", n_top=0)
