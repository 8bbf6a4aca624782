"""Llama 3.1 8B with Llama Scope: memorised against not, from a table and from the model itself."""

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.e2e.real_models.terminal import (
    Run,
    Terminal,
    check_effects,
    check_tokens,
    command_on,
    few,
    forget,
)
from tests.hub_caches import add_llama_scope, repository, save_llama_3

pytestmark = pytest.mark.slow

NAME = "meta-llama/Llama-3.1-8B"
BOS = 0
N = 14
WORDS = {
    ("True", 8): "harbour boats tide gulls rope sails",
    ("False", 0): "kitchen bread flour dough salt",
}
COLUMNS = ("input_text", "generated_continuation_text", "perfect_match", "matching_tokens")


def write_table(file: Path) -> None:
    """The published columns: N perfect matches, N without a matching token, two in between."""
    rng = np.random.default_rng(0)
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(COLUMNS)
        for i in range(N):
            for label, words in WORDS.items():
                quote = " ".join(rng.choice(words.split(), 8))
                writer.writerow((f"Page {i} of the book says", f" {quote}", *label))
        writer.writerow(("Page 98 says", " the harbour bread", "False", 2))
        writer.writerow(("Page 99 says", " the kitchen tide", "False", 1))


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    user = Terminal(tmp_path_factory.mktemp("llama"))
    with repository(user.home, NAME) as files:
        save_llama_3(files)
    add_llama_scope(user.home, 7)
    write_table(user.folder / "FILE.csv")
    yield user
    forget()


def test_memorization_of_a_published_table(user: Terminal) -> None:
    words = command_on("experiments/memorization/README.md", "MODEL=", "llama8b", "run.sh")
    for command in user.script(words, [*few(n_examples=N), "width=null"]):
        result = user.type(command)
        assert result.code == 0, f"{command}: {result.err[-2000:]}"
    stats, contrast = (Run(user.folder / "runs" / name) for name in ("stats", "contrast"))
    tokenizer = user.tokenizer(NAME)
    for run in (stats, contrast):
        check_tokens(run, tokenizer, n_bos=1)
        # The study's notebook read resid_pre 7 with the SAE of resid_post 7.
        assert run.about["sae"]["hookpoint"] == "layer_7.resid_post"
        assert run.about["sae"]["id"] == "l7r_8x"
        assert run.about["groups"] == ["memorized", "not_memorized"]
        rows = run.table("rows")
        assert rows.groupby("group")["example_id"].nunique().tolist() == [N, N]
        for text, text_rows in rows.groupby("text"):
            assert str(text).endswith(tokenizer.decode(text_rows["token_id"].tolist()))
            assert text_rows["token_index"].max() == len(tokenizer(str(text))["input_ids"]) - 1
    assert user.most(BOS) == 1
    assert stats.metrics["stats/n_units_memorized"] == N
    assert stats.metrics["stats/n_units_not_memorized"] == N
    assert len(stats.table("frequent")) == 20
    assert stats.metrics["collection/tokens_forwarded"] > 0
    assert contrast.metrics["collection/tokens_forwarded"] == 0
    assert contrast.metrics["contrast/n_selected_memorized"] > 0
    assert contrast.metrics["contrast/best_auroc_memorized_test"] > 0.8
    check_effects(contrast, [0.0, 0.1, 0.2, 0.4])
    assert "effect/exact_match/baseline_memorized" in contrast.metrics


def test_the_table_from_the_model_itself(user: Terminal) -> None:
    words = command_on("experiments/memorization/README.md", "task=label", "dataset=memorization")
    run = user.run("label", words, "model=llama8b", "dataset.path=long.txt")
    table = pd.read_csv(run.folder / "memorization.csv", keep_default_na=False)
    assert tuple(table.columns) == COLUMNS
    assert len(table) == run.metrics["memorized/n_texts"] > 5
    tokenizer = user.tokenizer(NAME)
    texts = (user.folder / "long.txt").read_text("utf-8").splitlines()
    for row in table.to_dict("records"):
        [text] = [t for t in texts if t.startswith(row["input_text"])]
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer(row["input_text"], add_special_tokens=False)["input_ids"] == plain[:50]
        assert row["perfect_match"] == (row["matching_tokens"] == 50)
    # It goes on with the study; a random model has memorised nothing, and that is said.
    result = user.type(
        "python -m saexp experiment=memorization model=llama8b sae=llamascope layer=7",
        f"dataset.path={run.folder}/memorization.csv",
        "width=null",
        "tracker=none",
    )
    assert result.code == 1
    assert "all rows are of one group, not_memorized (6)" in result.err
