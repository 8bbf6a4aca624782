"""task=dashboard on the shipped model: what is chosen, and every number against a dense one."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional

import saexp
from saexp.config import DashboardConfig, SAEConfig
from saexp.context import ObjectCache
from saexp.data.datasets import ASSETS
from saexp.errors import ConfigError
from saexp.models.loading import LanguageModel
from saexp.results import Result
from saexp.saes import SparseAutoencoder
from saexp.saes.loading import random_sae
from saexp.tasks import dashboard
from saexp.tasks.dashboard import parse_latents
from tests.random_models import D_MODEL, N_LAYERS, random_hf, random_lm, save
from tests.shipped_texts import FEW_NEUTRAL

SMALL = [
    "task=dashboard",
    "dataset.n_examples=40",
    "analyzer.n_bootstrap=20",
    "layer=2",
    "tracker=none",
]
SMALL += ["analyzer.n_background=500", FEW_NEUTRAL]
N_BEST = 2
OBJECTS = ObjectCache()
"""Shared by the runs of this file, as by the cells of a sweep (see test_shared.py)."""


@dataclass(frozen=True)
class DashboardRun:
    result: Result
    content: dict[str, Any]
    acts: np.ndarray
    """float64 `[n_rows, d_sae]`, dense."""
    rows: pd.DataFrame
    model: LanguageModel
    sae: SparseAutoencoder


def make(folder: Path, cache: Path, *words: str) -> DashboardRun:
    cfg = saexp.compose([*SMALL, *words, f"cache_dir={cache}"])
    result = saexp.run(cfg, folder, objects=OBJECTS)
    sae = saexp.build("sae", cfg.sae)
    about = json.loads((folder / "provenance.json").read_text("utf-8"))
    x = saexp.open_store(about["store"]["path"]).acts(sae.hookpoint.layer, sae.hookpoint.stream)
    content = json.loads((folder / "dashboard.json").read_text("utf-8"))
    acts = sae.encode(x.float()).double().numpy()
    return DashboardRun(
        result, content, acts, result.tables["rows"], saexp.build("model", cfg.model), sae
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> DashboardRun:
    return make(tmp_path_factory.mktemp("best"), cache, f"task.latents=top:{N_BEST}")


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> DashboardRun:
    words = ["task.latents=[154,143,154]", "positions=entity_all", "task.n_quantile=1"]
    return make(tmp_path_factory.mktemp("listed"), cache, *words)


def test_the_best_are_what_the_contrast_selects(
    best: DashboardRun, cache: Path, tmp_path: Path
) -> None:
    words = [w for w in SMALL if not w.startswith("task")]
    words += ["tracker=none", "intervention=none", f"cache_dir={cache}"]
    table = saexp.run(saexp.compose(words), tmp_path).tables["latents"]
    selected = table[table["selected"]].set_index("latent")
    shown = [c["latent"] for c in best.content["latents"]]
    assert len(shown) == N_BEST
    expected = selected.sort_values(["rank", "q_value"]).index[:N_BEST].tolist()
    assert shown == expected
    assert best.content["how_chosen"] == "the contrast's best at entity last"
    for card in best.content["latents"]:
        row = selected.loc[card["latent"]]
        assert card["contrast"]["direction"] == row["direction"]
        known = row["direction"] == "known"
        auroc = row["auroc_test"] if known else 1 - row["auroc_test"]
        assert card["contrast"]["auroc"] == pytest.approx(auroc)
        low = row["ci_low_test"] if known else 1 - row["ci_high_test"]
        assert card["contrast"]["ci_low"] == pytest.approx(low)
        assert card["contrast"]["freq_known"] == row["freq_known_test"]
        assert card["contrast"]["is_above_chance"] == (auroc > 0.5 and row["q_value_test"] <= 0.05)


def test_named_latents_come_in_their_order_once(listed: DashboardRun) -> None:
    assert [c["latent"] for c in listed.content["latents"]] == [154, 143]
    assert listed.content["how_chosen"] == "as named"
    assert listed.content["positions"] == "entity_all"


@pytest.mark.parametrize("which", ["best", "listed"])
def test_numbers_equal_dense_ones(which: str, request: pytest.FixtureRequest) -> None:
    dashboard_run: DashboardRun = request.getfixturevalue(which)
    assert dashboard_run.content["n_rows"] == len(dashboard_run.acts) == len(dashboard_run.rows)
    group = dashboard_run.rows["group"].to_numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = np.corrcoef(dashboard_run.acts.T)
    for card in dashboard_run.content["latents"]:
        values = dashboard_run.acts[:, card["latent"]]
        firing = values > 0
        assert card["n_active"] == firing.sum()
        assert card["density"] == pytest.approx(firing.mean())
        assert card["max"] == pytest.approx(values.max(), rel=1e-5)
        assert card["active_of_group"] == [
            int(firing[group == g].sum()) for g in dashboard_run.content["groups"]
        ]
        counts = np.array(card["histogram"]["counts"]).sum(0)
        edges = np.arange(len(counts) + 1) * card["histogram"]["width"]
        assert counts.tolist() == np.histogram(values[firing], edges)[0].tolist()
        row = correlation[card["latent"]]
        order = [f for f in np.argsort(-np.nan_to_num(row, nan=-9)) if f != card["latent"]]
        assert [f for f, _ in card["correlated"]] == order[:6]
        assert [r for _, r in card["correlated"]] == pytest.approx(row[order[:6]], rel=1e-3)
        measured = dashboard_run.result.tables["dashboard"].set_index("latent").loc[card["latent"]]
        assert measured["n_active"] == card["n_active"]


@pytest.mark.parametrize("which", ["best", "listed"])
def test_every_token_of_an_example_has_its_own_value(
    which: str, request: pytest.FixtureRequest
) -> None:
    dashboard_run: DashboardRun = request.getfixturevalue(which)
    of_example = {e: part for e, part in dashboard_run.rows.groupby("example_id")}
    for card in dashboard_run.content["latents"]:
        values = dashboard_run.acts[:, card["latent"]]
        top = [e["value"] for e in card["top"]]
        by_text = pd.Series(values).groupby(dashboard_run.rows["text_id"]).max()
        strongest = by_text[by_text > 0].sort_values(ascending=False).head(10)
        assert top == pytest.approx(strongest.tolist(), rel=1e-3)
        for example in card["top"]:
            part = of_example[example["id"]]
            shown = [v for v in example["values"] if v is not None]
            inside = [values[r] for r in part["row"]]
            text = part["text"].iloc[0]
            ordinary = [t for t in example["tokens"] if t in text]
            assert "".join(ordinary) in text
            assert example["value"] == example["values"][example["peak"]] == max(shown)
            if not any(example["cut"]):
                assert shown == pytest.approx(inside, rel=1e-3)


def test_similar_directions_are_torchs(best: DashboardRun) -> None:
    decoder = best.sae.W_dec
    for card in best.content["latents"]:
        own = decoder[card["latent"]]
        cosines = functional.cosine_similarity(own[None], decoder)
        cosines[card["latent"]] = -1
        expected = cosines.topk(6)
        assert [f for f, _ in card["similar"]] == expected.indices.tolist()
        assert [c for _, c in card["similar"]] == pytest.approx(expected.values.tolist(), rel=1e-3)


def test_promoted_tokens_are_those_of_the_models_own_norm_and_head(best: DashboardRun) -> None:
    """Llama's norm: gain times x over its size; so gain times the direction, times the head."""
    hf, words = best.model.hf, best.model.tokenizer
    gain, head = hf.model.norm.weight, hf.lm_head.weight
    for card in best.content["latents"]:
        logits = head @ (gain * best.sae.W_dec[card["latent"]])
        for side, sign in (("promoted", 1), ("suppressed", -1)):
            expected = (sign * logits).topk(10).indices.tolist()
            values = logits[expected].tolist()
            assert [v for _, v in card[side]] == pytest.approx(values, rel=1e-3)
            shown = [words.decode([t]) for t in expected]
            assert [t.strip() for t, _ in card[side]] == [s.strip() for s in shown]


def independent(architecture: str, hf: Any, d: torch.Tensor) -> torch.Tensor:
    if architecture == "gemma2":
        return hf.lm_head.weight @ ((1 + hf.model.norm.weight) * d)
    if architecture == "gpt2":
        return hf.lm_head.weight @ (hf.transformer.ln_f.weight * (d - d.mean()))
    assert architecture == "gpt_neox"
    return hf.get_output_embeddings().weight @ (
        hf.gpt_neox.final_layer_norm.weight * (d - d.mean())
    )


@pytest.mark.parametrize("architecture", ["gemma2", "gpt2", "gpt_neox"])
def test_promoted_tokens_under_other_norms(architecture: str) -> None:
    model = random_lm(architecture)
    settings = {"name": "r", "loader": "random", "layer": N_LAYERS - 1, "device": "cpu"}
    sae = random_sae(SAEConfig(**settings, d_in=D_MODEL, width=64))
    cards, treated, notes = dashboard.promoted_tokens(
        [5, 40], sae, model, DashboardConfig(n_tokens=7)
    )
    assert treated is not None
    assert not notes
    n = len(model.tokenizer)
    for card, latent in zip(cards, (5, 40), strict=True):
        logits = independent(architecture, model.hf, sae.W_dec[latent])[:n]
        for side, largest in (("promoted", True), ("suppressed", False)):
            expected = logits.topk(7, largest=largest).values.tolist()
            assert [v for _, v in card[side]] == pytest.approx(expected, rel=2e-3)


def test_a_direction_that_is_not_written_to_the_stream_promotes_nothing() -> None:
    model = random_lm("gpt2")
    about = {"name": "r", "loader": "random", "layer": 1, "stream": "attn_z", "device": "cpu"}
    sae = random_sae(SAEConfig(**about, d_in=D_MODEL, width=64))
    cards, treated, notes = dashboard.promoted_tokens([5], sae, model, DashboardConfig())
    assert (cards, treated) == ([{}], None)
    assert notes == [
        "promoted tokens are not shown: attn_z is not what the residual stream is made of"
    ]


def test_without_groups_the_most_frequent_are_shown_with_a_note(tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("The city of Orvann\nThe song is sung again\nA movie about a song\n")
    words = ["dataset=text", f"dataset.path={file}", "task.latents=top:4"]
    dashboard_run = make(tmp_path / "run", tmp_path / "cache", *words)
    counts = (dashboard_run.acts > 0).sum(0)
    shown = [c["latent"] for c in dashboard_run.content["latents"]]
    assert shown == np.argsort(-counts, kind="stable")[:4].tolist()
    assert any("the data set has no groups" in n for n in dashboard_run.result.notes)
    assert dashboard_run.content["groups"] == ["all rows"]
    assert all(c["contrast"] is None for c in dashboard_run.content["latents"])


def test_rows_that_the_contrast_leaves_out_are_in_a_note(
    tmp_path: Path, best: DashboardRun, cache: Path
) -> None:
    assert best.result.path is not None
    rows = pd.read_parquet(best.result.path / "rows.parquet").drop_duplicates("unit")
    rows = rows[["text", "entity", "group", "split", "entity_type"]]
    again = rows[rows["group"] == "known"]
    file = tmp_path / "rows.jsonl"
    pd.concat([rows, again.assign(text="So " + again["text"])]).to_json(
        file, orient="records", lines=True
    )
    dashboard_run = make(
        tmp_path / "run", cache, "dataset=jsonl", f"dataset.path={file}", "task.latents=[3]"
    )
    (note,) = [n for n in dashboard_run.result.notes if "every entity contributes 1 row" in n]
    assert re.match(r"contrast at entity_last: \d+ of \d+ rows left out", note)


def test_a_latent_that_never_fires_and_fewer_selected_than_asked_for(
    tmp_path: Path, best: DashboardRun, cache: Path
) -> None:
    silent = int(np.flatnonzero(best.acts.max(0) == 0)[0])
    dashboard_run = make(
        tmp_path / "silent", cache, f"task.latents={silent}", "task.n_correlated=0"
    )
    (card,) = dashboard_run.content["latents"]
    assert (card["n_active"], card["top"], card["quantiles"]) == (0, [], [])
    assert card["mean_active"] is None
    assert card["correlated"] == []
    assert dashboard_run.result.metrics["dashboard/n_inactive"] == 1
    many = make(tmp_path / "many", cache, "task.latents=top:255")
    assert any("not the 255 requested" in n for n in many.result.notes)


def test_the_run_leaves_its_files_and_says_what_it_is(best: DashboardRun) -> None:
    folder = best.result.path
    assert folder is not None
    for name in ("dashboard.html", "dashboard.json", "rows.parquet", "contrast.parquet"):
        assert (folder / name).stat().st_size > 0, name
    finding, searched = json.loads((folder / "provenance.json").read_text("utf-8"))["finding"]
    assert searched.startswith("Searched texts: the data set")
    assert finding.startswith(
        "tiny, layer_2.resid_post, SAE of 256 latents: 2 of them (the contrast"
    )


def test_what_names_latents() -> None:
    assert parse_latents("top:20") == 20
    assert parse_latents([12, "160", 12]) == [12, 160]
    assert parse_latents(7) == [7]


WRONG = [None, [], "top:0", "top:", "best", [1.5], [-1], True, [True], "12,160", {"a": 1}]


@pytest.mark.parametrize("value", WRONG, ids=str)
def test_what_names_none_is_said(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"is not a list of latents; type task.latents=top:20"):
        parse_latents(value)


BAD = {
    "task.latents=[3,256]": r"latents=\[3, 256\]: .* has latents 0-255, not 256",
    "+task.n_tops=3": "no key 'task.n_tops'; did you mean task.n_top",
    "task.n_top=0": r"task.n_top=0 must be from 1 to",
    "task.n_tokens=-1": "task.n_tokens=-1 must be from 0 to",
    "task.quantiles=[0.5,2]": r"task.quantiles=\[0.5, 2.0\] must be from 0 to 1",
    "task.n_top=many": "task.n_top=many is not a whole number",
}


@pytest.mark.parametrize(("word", "message"), BAD.items(), ids=list(BAD))
def test_bad_input_is_one_clear_line(word: str, message: str, tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        saexp.run(saexp.compose([*SMALL, f"cache_dir={cache}", word]), tmp_path)


def test_a_model_whose_data_are_names_is_searched_in_neutral_prose(tmp_path: Path) -> None:
    model = tmp_path / "my_llama"
    save(random_hf("llama"), model)
    words = ["task=dashboard", "task.latents=[1,2]", "tracker=none", f"cache_dir={tmp_path / 'c'}"]
    words += [f"model.name={model}", "model=hf", "sae=random", "width=64", "layer=1"]
    words += ["device=cpu", "dataset.n_examples=12", "dataset.max_length=48", "sae.check=off"]
    result = saexp.run(saexp.compose(words), tmp_path / "run")
    about = json.loads((tmp_path / "run/provenance.json").read_text("utf-8"))
    assert about["finding"][0].startswith("my_llama, layer_1.resid_post")
    assert "160 neutral texts that ship with saexp (background.txt)" in about["finding"][1]
    assert set(result.tables["rows"]["text"]) <= set(
        (ASSETS / "background.txt").read_text("utf-8").splitlines()
    )
    page = (tmp_path / "run/dashboard.html").read_text("utf-8")
    assert "neutral texts that ship with saexp" in page
    names = saexp.run(saexp.compose([*words, "task.texts=dataset"]), tmp_path / "names")
    assert len(names.tables["rows"]["text"].unique()) == 96
    assert "Searched texts: the data set" in (tmp_path / "names/dashboard.html").read_text("utf-8")
