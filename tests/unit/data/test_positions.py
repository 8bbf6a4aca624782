"""Which tokens each kind of position takes, why it skips, and the table of rows."""

import re

import pandas as pd
import pytest

from saexp import registry
from saexp.config import DatasetConfig, PositionsConfig
from saexp.data import Example
from saexp.data.positions import resolve_positions
from saexp.data.rows import ROW_COLUMNS
from saexp.data.tokenization import tokenize
from saexp.errors import ConfigError, DataError
from tests.random_models import tokenizer

TEXT = "The player Fenlet Baszad met Fenlet Baszad."
FIRST, LAST = (11, 24), (29, 42)


def example(text=TEXT, spans=(LAST,), **fields):
    return Example(**{"id": "1", "text": text, "spans": spans, **fields})


def placed(examples, name, max_length=64, seed=0, **options):
    chosen = [examples] if isinstance(examples, Example) else examples
    tokens = tokenize([e.text for e in chosen], tokenizer(), max_length)
    positions = registry.build("positions", PositionsConfig(name=name, **options))
    return resolve_positions(chosen, tokens, positions, tokenizer(), seed)


def text_of(placement) -> str:
    return tokenizer().decode(placement.rows["token_id"].tolist())


def indices(placement) -> list[int]:
    return placement.rows["token_index"].tolist()


def reasons(examples, name, **options):
    """Why an example is skipped, beside one that is not (else it would be an error)."""
    good = example(id="good", text="The player Fenlet Baszad met Ed. Wow!", spans=((11, 24),))
    placement = placed([good, examples], name, **options)
    assert set(placement.rows["example_id"]) == {"good"}
    assert [s.example_id for s in placement.skips] == [examples.id]
    return placement.skips[0].reason


IDS = tokenizer()(TEXT).input_ids
N = len(IDS)


def test_entity_last_is_the_last_token_of_the_last_mention():
    got = placed(example(spans=(FIRST, LAST)), "entity_last")
    assert indices(got) == [N - 2]
    assert "Baszad".endswith(text_of(got).strip())


def test_entity_all_is_every_token_of_every_mention():
    assert text_of(placed(example(), "entity_all")) == " Fenlet Baszad"
    both = placed(example(spans=(FIRST, LAST)), "entity_all")
    assert text_of(both) == " Fenlet Baszad Fenlet Baszad"
    assert indices(both) == sorted(set(indices(both)))


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_every_mention_in_a_file_is_read_and_the_last_one_where_one_is_meant(tmp_path, kind):
    file = tmp_path / f"f.{kind}"
    table = pd.DataFrame({"text": [TEXT], "entity": ["Fenlet Baszad"]})
    if kind == "csv":
        table.to_csv(file, index=False)
    else:
        table.to_json(file, orient="records", lines=True)
    examples = registry.build("dataset", DatasetConfig(name=kind, path=str(file))).examples
    both, last = (example(spans=spans) for spans in ((FIRST, LAST), (LAST,)))
    assert indices(placed(examples, "entity_all")) == indices(placed(both, "entity_all"))
    for name in ("entity_last", "entity_last_n", "after_entity"):
        assert indices(placed(examples, name)) == indices(placed(last, name))


def test_entity_last_n_takes_all_where_there_are_fewer():
    everything = indices(placed(example(), "entity_all"))
    assert indices(placed(example(), "entity_last_n", n=2)) == everything[-2:]
    assert indices(placed(example(), "entity_last_n", n=99)) == everything


def test_after_entity_are_the_next_tokens():
    text = "Fenlet Baszad met Ed."
    got = placed(example(text, ((0, 13),)), "after_entity", n=2)
    last = indices(placed(example(text, ((0, 13),)), "entity_last"))[0]
    assert indices(got) == [last + 1, last + 2]


def test_last_all_and_middle_leave_bos_out():
    assert indices(placed(example(), "last", n=3)) == [N - 3, N - 2, N - 1]
    assert indices(placed(example(), "last", n=99)) == list(range(1, N))
    assert indices(placed(example(), "all")) == list(range(1, N))
    assert indices(placed(example(), "middle")) == [1 + (N - 2) // 2]


def test_include_special_lets_bos_in():
    options = {"include_special": True}
    assert indices(placed(example(), "all", **options)) == list(range(N))
    assert indices(placed(example(), "middle", **options)) == [(N - 1) // 2]
    assert indices(placed(example(), "indices", indices=[0], **options)) == [0]
    assert indices(placed(example(), "indices", indices=[0])) == [1]


def test_the_middle_of_an_even_number_is_the_earlier_one():
    for text in ("abc", "abcd"):
        there = len(tokenizer()(text).input_ids) - 1
        assert indices(placed(example(text, ()), "middle")) == [1 + (there - 1) // 2]


def test_indices_count_from_both_ends_once_each():
    got = placed(example(), "indices", indices=[-1, 0, 0, 2])
    assert indices(got) == [1, 3, N - 1]


def test_substring_is_its_last_place():
    got = placed(example(spans=()), "substring", substring="Fenlet")
    assert text_of(got) == " Fenlet"
    assert indices(got)[0] > N / 2


@pytest.mark.parametrize(
    ("text", "mention"),
    [
        ("The part is Art's, not Arthur's", 12),
        ("Arthur met Arthur", 11),
        ("Art, the end of Part", 0),
    ],
)
def test_a_substring_within_a_longer_word_counts_only_where_there_is_no_other(text, mention):
    got = placed(example(text, ()), "substring", substring="Art")
    tokens = tokenize([text], tokenizer(), 64)[0]
    covered = [tokens.offsets[i] for i in indices(got)]
    assert min(a for a, _ in covered) <= mention < max(b for _, b in covered)
    assert all(max(a, mention) < min(b, mention + 3) for a, b in covered)


def test_continuation_is_all_of_the_span():
    text = "Once upon a time there was."
    got = placed(example(text, ((16, len(text)),)), "continuation")
    assert text_of(got) == text[16:]


def test_random_is_seeded_without_repetition_and_not_the_same_in_every_text():
    examples = [example(id=str(n), text=f"{TEXT} {n}", spans=()) for n in range(8)]
    got = placed(examples, "random", n=4)
    chosen = [tuple(g) for _, g in got.rows.groupby("example_id", sort=False)["token_index"]]
    assert all(len(set(c)) == 4 and list(c) == sorted(c) and min(c) > 0 for c in chosen)
    assert len(set(chosen)) > 4
    assert got.rows.equals(placed(examples, "random", n=4).rows)
    assert not got.rows.equals(placed(examples, "random", n=4, seed=1).rows)


def test_random_takes_all_where_there_are_fewer():
    assert indices(placed(example("ab", ()), "random", n=50)) == [1, 2]


@pytest.mark.parametrize(
    "name", ["entity_last", "entity_all", "entity_last_n", "after_entity", "continuation"]
)
def test_without_a_span_there_is_no_position(name):
    what = "continuation" if name == "continuation" else "entity"
    assert reasons(example(spans=()), name) == f"no {what} span"


def test_reasons_name_what_truncation_cut():
    text = "A long beginning, then the player Fenlet Baszad. And more."
    cut = example(text, ((34, 47),))
    assert reasons(cut, "entity_last", max_length=14) == "entity cut off by truncation"
    assert reasons(cut, "continuation", max_length=14) == "continuation cut off by truncation"
    late = example("A long beginning that goes on and on; then Fenlet.", ())
    got = reasons(late, "substring", substring="Fenlet", max_length=14)
    assert got == "substring cut off by truncation"


def test_other_reasons():
    blank = example("of   now", ((2, 5),))
    assert reasons(blank, "entity_last") == "entity has no token"
    at_end = example("met Fenlet", ((4, 10),))
    assert reasons(at_end, "after_entity", n=2) == "fewer than 2 tokens after the entity"
    assert reasons(example("ab", ()), "indices", indices=[2]) == "index 2 outside the text"
    assert reasons(example("ab", ()), "indices", indices=[-3]) == "index -3 outside the text"
    assert reasons(example("ab", ()), "substring", substring="met") == "substring not found"
    for name in ("last", "all", "random", "middle"):
        assert reasons(example("<eos>", ()), name) == "text has no ordinary token"


def test_nothing_placed_at_all_is_an_error_with_every_reason():
    examples = [example(id="1", spans=()), example(id="2", text="of   now", spans=((2, 5),))]
    message = "none of 2 texts has the requested position: entity has no token; no entity span"
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        placed(examples, "entity_last")
    with pytest.raises(
        DataError, match="none of 0 texts has the requested position: the data set is empty"
    ):
        placed([], "all")


def test_kinds_that_need_a_setting_say_so():
    with pytest.raises(ConfigError, match=r"^positions=indices needs indices: type 'positions\."):
        placed(example(), "indices")
    with pytest.raises(ConfigError, match="^positions=substring needs a string: type positions."):
        placed(example(), "substring")


def test_rows_are_in_dataset_order_with_what_the_contract_names():
    examples = [
        example(id="b", group="known", split="test", entity="Fenlet Baszad", entity_type="player"),
        example(id="a", text="No entity here", spans=()),
        example(id="c", text="New Bresk", spans=((0, 9),), group="unknown", extra={"year": 1987}),
    ]
    placement = placed(examples, "entity_all")
    rows = placement.rows
    assert list(rows.columns[: len(ROW_COLUMNS)]) == list(ROW_COLUMNS)
    assert {
        *("row", "example_id", "group", "split", "entity_type"),
        *("text", "token_index", "token_id", "token"),
    } <= set(rows.columns)
    assert rows["row"].tolist() == list(range(len(rows)))
    assert rows["example_id"].unique().tolist() == ["b", "c"]
    assert rows["text"].tolist() == [placement.texts[i].text for i in rows["text_id"]]
    for row in rows.itertuples():
        assert placement.texts[row.text_id].ids[row.token_index] == row.token_id
    assert rows["token"].tolist() == tokenizer().convert_ids_to_tokens(rows["token_id"].tolist())
    assert (rows["n_entity_tokens"] == rows.groupby("example_id")["row"].transform("size")).all()
    assert rows["unit"].unique().tolist() == ["player:Fenlet Baszad", "c"]
    assert rows["year"].isna().tolist() == (rows["example_id"] == "b").tolist()
    assert [(s.example_id, s.reason) for s in placement.skips] == [("a", "no entity span")]


def test_one_text_of_several_examples_is_kept_once():
    placement = placed([example(id="1"), example(id="2", spans=(FIRST,))], "entity_last")
    assert len(placement.texts) == 1
    assert placement.rows["text_id"].tolist() == [0, 0]
    assert len(set(indices(placement))) == 2


def test_a_files_column_never_replaces_one_of_ours(tmp_path):
    extra = {name: "theirs" for name in ROW_COLUMNS} | {"mine": "kept"}
    rows = placed(example(extra=extra, group="known"), "entity_last").rows
    assert rows["group"].tolist() == ["known"]
    assert rows["token_index"].tolist() == [N - 2]
    for name in ROW_COLUMNS:
        assert rows[f"{name}_in_file"].tolist() == ["theirs"]
    assert rows["mine"].tolist() == ["kept"]
    rows.to_parquet(tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2.5, None], [1.0, 2.5, None]),
        ([True, None, False], [True, None, False]),
        (["a", 1, True], ["a", "1", "True"]),
        ([True, 1, None], ["True", "1", None]),
        ([2**80, 1, None], [str(2**80), "1", None]),
        ([[1, 2], {"k": "v"}, None], ["[1, 2]", "{'k': 'v'}", None]),
    ],
)
def test_columns_of_the_file_fit_into_parquet_whatever_they_mix(values, expected, tmp_path):
    examples = [example(id=str(n), extra={"x": v}) for n, v in enumerate(values)]
    rows = placed(examples, "entity_last").rows
    rows.to_parquet(tmp_path / "rows.parquet", index=False)
    back = pd.read_parquet(tmp_path / "rows.parquet")
    assert [None if pd.isna(v) else v for v in back["x"]] == expected
    assert back.equals(rows)


class Plain:
    """Positions as a plugin may define them: `select` and nothing else."""

    def __init__(self, *chosen: int) -> None:
        self.chosen = chosen

    def select(self, _at):
        return self.chosen


def test_positions_of_a_plugin_need_nothing_but_select():
    tokens = tokenize([TEXT], tokenizer(), 4)
    got = resolve_positions([example()], tokens, Plain(0, 2), tokenizer(), 0)
    assert indices(got) == [0, 2]
    assert got.n_truncated == 1


@pytest.mark.parametrize(
    ("chosen", "part"), [((), "no position chosen"), ((-1,), "index -1"), ((4,), "index 4")]
)
def test_what_a_plugin_chooses_is_checked(chosen, part):
    tokens = tokenize([TEXT], tokenizer(), 4)
    with pytest.raises(DataError, match=part):
        resolve_positions([example()], tokens, Plain(*chosen), tokenizer(), 0)
