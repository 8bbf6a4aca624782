"""GPT-2 small with gpt2-small-res-jb: quality of an SAE, a capability, a data set of one's own."""

import json
from collections.abc import Iterator

import pytest

from tests.e2e.real_models.terminal import (
    Terminal,
    check_effects,
    check_tokens,
    command_on,
    few,
    forget,
)
from tests.hub_caches import add_gpt2_jb, repository, save_gpt_2

pytestmark = pytest.mark.slow

NAME = "openai-community/gpt2"
PLACES = (
    *("Old", "New", "Great", "Little", "Upper", "Lower", "North"),
    *("South", "East", "West", "Green", "White", "Black", "Red"),
)


def write_examples(user: Terminal) -> None:
    """my.jsonl: kitchens against gardens, so that one token of the name tells the groups apart."""
    lines = [
        {
            "text": f"Yesterday we walked to the {place} {group}",
            "entity": f"{place} {group}",
            "entity_type": "place",
            "group": group,
            "prompt": f"What is the {place} {group} known for?",
            "answer": answer,
        }
        for place in PLACES
        for group, answer in (("kitchen", "bread"), ("garden", "roses"))
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (user.folder / "my.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    user = Terminal(tmp_path_factory.mktemp("gpt2"))
    with repository(user.home, NAME) as files:
        save_gpt_2(files)
    add_gpt2_jb(user.home, 8)
    write_examples(user)
    yield user
    forget()


def test_the_quality_of_an_sae(user: Terminal) -> None:
    words, of_study = (
        command_on(page, "experiment=sae_quality", "gpt2_jb")
        for page in ("docs/guides/judging-saes.md", "experiments/sae_quality/README.md")
    )
    assert words == of_study
    fewer = ("tracker=none", "task.n_texts=6", "task.n_bootstrap=10")
    user.read.clear()
    run = user.run("quality", words, *fewer)
    m = run.metrics
    assert m["evaluation/n_texts"] == 6
    assert run.about["sae"]["hookpoint"] == "layer_8.resid_pre"
    assert run.about["sae"]["name"] == "gpt2-small-res-jb/blocks.8.hook_resid_pre"
    metric_names = ("ce_clean", "ce_sae", "ce_zero", "ce_mean", "kl_score", "explained_variance")
    metric_names += ("explained_variance_legacy", "mse", "cosine", "l2_ratio")
    assert all(m[f"reconstruction/{name}"] is not None for name in metric_names)
    # A random model may lose nothing by zeros; then the score is not defined, and that is said.
    score = m["reconstruction/ce_loss_score"]
    assert score is not None or "ce_loss_score" in " ".join(run.about["notes"])
    assert 5 < m["sparsity/l0"] < 200
    assert not any("without a BOS" in note for note in run.about["notes"])
    assert "texts.txt" in json.dumps(run.about["config"])


def test_a_capability(user: Terminal) -> None:
    words = command_on("docs/guides/judging-saes.md", "analyzer=capability", "dataset=ioi")
    more = ("model=gpt2", "sae=gpt2_jb", "layer=8", "intervention=none")
    run = user.run("capability", words, *more, *few(n_examples=8))
    prompts = run.table("prompts")
    assert 0 < len(prompts) <= 8
    assert len(prompts) + run.metrics["capability/n_not_asked"] == 8
    assert {"rank_clean", "rank_sae", "logit_difference_clean"} <= {*prompts.columns}


def test_a_custom_data_set(user: Terminal) -> None:
    words = command_on(
        "docs/guides/own-data.md", "model=gpt2", "dataset=jsonl", "dataset.path=my.jsonl"
    )
    run = user.run("own", words, *few(n_examples=14))
    assert run.about["sae"]["hookpoint"] == "layer_8.resid_pre"
    assert run.about["groups"] == ["kitchen", "garden"]
    rows = run.table("rows")
    assert rows.groupby("group")["entity"].nunique().to_dict() == {"kitchen": 14, "garden": 14}
    tokenizer = user.tokenizer(NAME)
    check_tokens(run, tokenizer, n_bos=1)
    for row in rows.to_dict("records"):
        last = row["text"][: row["text"].index(row["entity"]) + len(row["entity"])]
        assert last.endswith(tokenizer.decode([row["token_id"]]))
    m = run.metrics
    assert m["contrast/n_significant_test"] > 10 and m["contrast/n_selected_garden"] > 0
    assert m["contrast/best_auroc_garden_test"] == 1.0
    check_effects(run, [0.0, 0.3, 0.6, 0.9], never_refuses=True)
    assert m["effect/refusal/baseline_garden"] == 0
    assert m["effect/dont_know/baseline_garden"] < 0
