"""Texts that are cut at dataset.max_length: read as the whole text, skipped, or noted."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import saexp
from saexp import registry
from saexp.config import PositionsConfig
from saexp.data import Example
from saexp.data.positions import NO_SPAN, TRUNCATED, resolve_positions
from saexp.data.tokenization import tokenize
from saexp.errors import ConfigError, DataError
from tests.random_models import tokenizer

LEFT = type(tokenizer())(
    tokenizer_object=tokenizer()._tokenizer, bos_token="<bos>", truncation_side="left"
)
SHORT = "It's raining."
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("entity_last", {}),
    ("entity_all", {}),
    ("entity_last_n", {"n": 3}),
    ("after_entity", {"n": 2}),
    ("last", {"n": 1}),
    ("last", {"n": 3}),
    ("indices", {"indices": [0, 2]}),
    ("indices", {"indices": [-1]}),
    ("indices", {"indices": [1, -2]}),
    ("substring", {"substring": "river"}),
    ("continuation", {}),
]
READ_AS_FAR = [("all", {}), ("random", {"n": 3}), ("middle", {})]
WORDS = ["Bo", "lies", "on", "the", "wide", "river", "Paris", "\u65e5\u672c", "it's", "42"]


def placed(
    texts: list[str], of: Any, kind: str, options: dict[str, Any], n: int, **how: Any
) -> Any:
    examples = []
    for number, text in enumerate(texts):
        start = text.rfind("Bo")
        spans = ((start, start + 2),) if start >= 0 else ()
        examples.append(Example(id=str(number), text=text, spans=spans, entity="Bo"))
    positions = registry.build("positions", PositionsConfig(name=kind, **options))
    return resolve_positions(examples, tokenize(texts, of, n), positions, of, 0, **how)


def characters(placement: Any, of: Any, number: int, n: int) -> list[tuple[int, int]]:
    """Where the tokens chosen are in the text."""
    rows = placement.rows[placement.rows["example_id"] == str(number)]
    if rows.empty:
        return []
    [tokens] = tokenize([rows["text"].iloc[0]], of, n)
    return [tokens.offsets[i] for i in rows["token_index"]]


@pytest.mark.parametrize("of", [tokenizer(), LEFT], ids=["cut at the end", "cut at the beginning"])
@pytest.mark.parametrize(("kind", "options"), KINDS, ids=lambda v: str(v))
@settings(max_examples=20)
@given(words=st.lists(st.sampled_from(WORDS), min_size=4, max_size=14), n=st.integers(2, 30))
def test_what_is_read_in_a_cut_text_is_what_is_read_in_the_whole_text(
    of: Any, kind: str, options: dict[str, Any], words: list[str], n: int
) -> None:
    """Or the text is a skip that says so. The text beside it makes sure that something is read."""
    texts = [" ".join(words), "Bo by the river is on it"]
    try:
        cut = placed(texts, of, kind, options, n)
    except DataError:
        return
    whole = placed(texts, of, kind, options, 512)
    assert cut.n_truncated == sum(
        t.truncated
        for number, t in enumerate(tokenize(texts, of, n))
        if kind in ("last", "indices") and characters(cut, of, number, n)
    )
    reasons = {s.example_id: s.reason for s in cut.skips}
    own = {s.example_id: s.reason for s in whole.skips}
    for number, tokens in enumerate(tokenize(texts, of, n)):
        if str(number) in own:
            # The whole text lacks it as well.
            assert str(number) in reasons
        elif str(number) in reasons:
            assert tokens.truncated
            assert (
                reasons[str(number)] == TRUNCATED or "cut off by truncation" in reasons[str(number)]
            )
        else:
            assert characters(cut, of, number, n) == characters(whole, of, number, 512)


@pytest.mark.parametrize(("kind", "options"), READ_AS_FAR)
def test_kinds_that_read_as_far_as_a_text_goes_count_the_cut_ones(
    kind: str, options: dict[str, Any]
) -> None:
    long = "The city of New Bresk lies on the wide river; its old harbour is busy."
    texts = [long, SHORT, long, long.replace("New", "Old")]
    placement = placed(texts, tokenizer(), kind, options, 12)
    assert placement.skips == []
    # Of distinct texts.
    assert placement.n_truncated == 2
    assert placed(texts, tokenizer(), kind, options, 512).n_truncated == 0


@pytest.mark.parametrize(("kind", "options"), [("last", {}), ("indices", {"indices": [-1]})])
def test_keep_reads_the_cut_text_and_counts_it(kind: str, options: dict[str, Any]) -> None:
    long = "The city of New Bresk lies on the wide river; its old harbour is busy."
    placement = placed([long, SHORT], tokenizer(), kind, options, 12, truncation="keep")
    assert placement.rows["token_index"].tolist()[0] == 11
    assert (placement.n_truncated, placement.skips) == (1, [])


def test_a_custom_kind_counts_as_reading_to_the_end_of_a_text() -> None:
    class Third:
        cfg = PositionsConfig(name="third")

        def select(self, at: Any) -> list[int]:
            return [3] if len(at.tokens) > 3 else []

    long = "The city of New Bresk lies on the wide river; its old harbour is busy."
    examples = [Example(id="1", text=long)]
    placement = resolve_positions(
        examples, tokenize([long], tokenizer(), 9), Third(), tokenizer(), 0
    )
    assert (len(placement.rows), placement.n_truncated) == (1, 1)


def test_nothing_but_cut_texts_is_an_error_that_names_the_options() -> None:
    message = (
        r"none of 2 texts has the requested position: text longer than dataset.max_length.*"
        r"type a larger dataset.max_length="
    )
    with pytest.raises(DataError, match=message):
        placed(["a b c d e f g h", "a b c d e f g i"], tokenizer(), "last", {}, 4)
    with pytest.raises(DataError, match=NO_SPAN):
        placed(["a b c d e f g h"], tokenizer(), "entity_last", {}, 4)


def test_an_entity_that_was_cut_off_has_no_number_of_tokens() -> None:
    texts = ["The city lies on the wide river and Bo", "Bo lies on the wide river"]
    rows = placed(texts, tokenizer(), "all", {}, 8).rows
    of = rows.groupby("example_id")["n_entity_tokens"].first()
    assert of.isna().tolist() == [True, False]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines of 4 and of about 60 tokens, and neutral text of which one line is long."""
    folder = tmp_path_factory.mktemp("texts")
    long = "The captain painted the deep well by noon and went to the river. " * 5
    short = [f"The captain saw {name}." for name in ("Laura", "Irene", "Tom", "Anna")]
    (folder / "texts.txt").write_text("\n".join([*short, long, long + "Then"]), encoding="utf-8")
    (folder / "neutral.txt").write_text("\n".join([*short, long]), encoding="utf-8")
    return folder


def ran(files: Path, folder: Path, *words: str) -> tuple[Any, dict[str, Any]]:
    always = [f'dataset.path="{files / "texts.txt"}"', "dataset=text", "dataset.max_length=24"]
    always += ["layer=1", "device=cpu", "tracker=none", f"cache_dir={folder / 'cache'}"]
    result = saexp.run(saexp.compose([*always, *words]), folder / "run")
    return result, json.loads((folder / "run/provenance.json").read_text("utf-8"))


@pytest.mark.parametrize(
    ("words", "n_rows", "n_skipped", "note"),
    [
        (["positions=last"], 4, 2, f"2 of 6 examples were skipped: {TRUNCATED} (2)"),
        (["positions=last", "dataset.truncation=keep"], 6, 0, "text: 2 of 6 texts were cut at"),
        (["positions=middle"], 6, 0, "text: 2 of 6 texts were cut at dataset.max_length=24"),
        (["positions=last", "dataset.max_length=512"], 6, 0, None),
    ],
)
def test_a_run_counts_what_was_cut(
    files: Path, tmp_path: Path, words: list[str], n_rows: int, n_skipped: int, note: str | None
) -> None:
    result, provenance = ran(files, tmp_path, "task=collect", *words)
    assert result.metrics["collection/n_rows"] == n_rows
    assert result.metrics["collection/n_skipped"] == n_skipped
    skips = pd.read_parquet(tmp_path / "run/skips.parquet")
    assert skips["reason"].tolist() == [TRUNCATED] * n_skipped
    noted = [n for n in provenance["notes"] if n.startswith(("text: ", "2 of 6"))]
    assert len(noted) == (note is not None)
    if note is not None:
        assert noted[0].startswith(note)


def test_cut_neutral_text_is_noted(files: Path, tmp_path: Path) -> None:
    words = [
        "analyzer=top_features",
        "intervention=none",
        "positions=last",
        "analyzer.n_bootstrap=0",
    ]
    words += [f'dataset.background="{files / "neutral.txt"}"', "analyzer.n_background=30"]
    _, provenance = ran(files, tmp_path, *words)
    noted = [n for n in provenance["notes"] if n.startswith("background: 1 of 5 texts was cut at")]
    assert len(noted) == 1


def test_the_option_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"dataset.truncation=drop"):
        saexp.compose(["dataset.truncation=drop"])
