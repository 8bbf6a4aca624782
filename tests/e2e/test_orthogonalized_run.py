"""A run under orthogonalised weights against a copy of the model edited by hand."""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import saexp
from saexp.data import Example
from saexp.data.datasets import background_texts
from saexp.data.positions import entity_tokens
from saexp.data.tokenization import tokenize
from saexp.models.loading import LanguageModel
from saexp.results import Result
from saexp.saes import SparseAutoencoder
from saexp.stats.significance import paired_head_test
from tests.edited_weights import by_hand, divergence
from tests.shipped_texts import FEW_NEUTRAL


@dataclass(frozen=True)
class Ran:
    """A run under orthogonalised weights on the shipped model, and what it ran on."""

    result: Result
    model: LanguageModel
    sae: SparseAutoencoder
    examples: dict[str, Example]
    page: str

    def table(self, name: str, condition: str) -> pd.DataFrame:
        table = self.result.tables[name]
        return table[(table["condition"] == condition) & (table["coefficient"] == 1)]

    def without(self, condition: str) -> Any:
        """A copy of the model without what the condition takes out."""
        latents = self.table("effects", condition)["latent"].iloc[0]
        directions = self.sae.W_dec[[int(x) for x in latents.split("+")]].float()
        return by_hand(self.model.hf, directions)


CONDITIONS = ("unknown_group", "unknown_group_frequency_01")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("orthogonalize")
    words = [
        "tracker=none",
        "analyzer.n_bootstrap=0",
        "analyzer.scores=false",
        "sae.check=off",
        f"cache_dir={folder}/cache",
        FEW_NEUTRAL,
    ]
    words += ["intervention=orthogonalize", "intervention.n_controls=1", "intervention.n_prompts=8"]
    words += ["intervention.n_choice_prompts=4", "intervention.n_neutral=3", "device=cpu"]
    words += ["intervention.outcomes=[answer_logit,neutral_kl,attention]", "intervention.top_k=2"]
    cfg = saexp.compose(words)
    result = saexp.run(cfg, folder / "run")
    examples = [e.as_prompt() for e in saexp.build("dataset", cfg.dataset).examples]
    page = (folder / "run" / "report.html").read_text("utf-8")
    model, sae = saexp.build("model", cfg.model), saexp.build("sae", cfg.sae)
    return Ran(result, model, sae, {e.id: e for e in examples}, page)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_run_reports_what_edited_weights_cost(ran: Ran, condition: str) -> None:
    texts = background_texts(saexp.compose([]).dataset)[:3]
    prompts = [list(t.ids) for t in tokenize(texts, ran.model.tokenizer, 48)]
    copied = ran.without(condition)
    wanted = [divergence(ran.model.hf, copied, ids) for ids in prompts]
    row = ran.table("costs", condition).iloc[0]
    assert row["neutral_kl"] == pytest.approx(np.mean(wanted), rel=1e-3)
    assert row["neutral_kl_sd"] == pytest.approx(np.std(wanted, ddof=1), rel=1e-3)
    assert row["n_texts"] == 3
    assert row["neutral_kl"] > 1e-4
    costs = ran.result.tables["costs"]
    assert (costs.loc[costs["coefficient"] == 0, "neutral_kl"] == 0).all()
    assert set(costs["role"]) == {"group", "single", "control"}


def attention_by_hand(hf: Any, model: LanguageModel, examples: list[Example]) -> np.ndarray:
    """transformers' own weights in eager attention, `[n, n_layers, n_heads]`."""
    attention = []
    hf.set_attn_implementation("eager")
    for example, text in zip(
        examples, tokenize([e.text for e in examples], model.tokenizer, 128), strict=True
    ):
        with torch.no_grad():
            out = hf(torch.tensor([text.ids]), output_attentions=True)
        keys = entity_tokens(example, text)
        attention.append([a[0, :, -1, keys].sum(-1).tolist() for a in out.attentions])
    return np.array(attention)


def test_attention_under_edited_weights_is_transformers_own(ran: Ran) -> None:
    condition = CONDITIONS[0]
    effects = ran.table("effects", condition)
    ids = effects.loc[effects["split"] == "test", "example_id"]
    examples = [ran.examples[i] for i in ids]
    original = attention_by_hand(copy.deepcopy(ran.model.hf), ran.model, examples)
    edited = attention_by_hand(ran.without(condition), ran.model, examples)
    table = ran.table("attention", condition)
    assert table["n"].unique().tolist() == [len(examples)]
    for name, values in (("original", original), ("edited", edited)):
        np.testing.assert_allclose(table[name], values.mean(0).ravel(), atol=1e-5)
    head_test = paired_head_test(
        original.reshape(len(ids), -1), edited.reshape(len(ids), -1), [e.unit for e in examples]
    )
    np.testing.assert_allclose(table["difference"], head_test.difference, atol=1e-5)
    # Eight entities have 256 sign flips, and heads that do not change differ by rounding alone.
    np.testing.assert_allclose(table["p_corrected"], head_test.p_corrected, atol=0.1)
    assert np.abs(head_test.difference).max() > 1e-3
    summary = ran.result.tables["attention_summary"]
    assert set(CONDITIONS) <= set(summary["condition"])
    control = summary[summary["condition"] == CONDITIONS[1]].iloc[0]
    other = attention_by_hand(ran.without(CONDITIONS[1]), ran.model, examples)
    assert control["edited"] == pytest.approx(other.mean(), abs=1e-5)


def test_the_report_shows_both(ran: Ran) -> None:
    assert "per token of neutral text, with the edited weights." in ran.page
    assert "Heads that change most: unknown_group" in ran.page
    assert 'id="fig-costs"' in ran.page
    assert 'id="fig-attention"' in ran.page
