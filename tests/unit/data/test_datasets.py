"""Each data set there is an option for, from shipped files, the user's, and `datasets` folders."""

import csv as csv_module
import json

import datasets as hf_datasets
import pytest

from saexp import registry
from saexp.config import DatasetConfig
from saexp.data.datasets import ASSETS, MEMORIZATION_COLUMNS, background_texts
from saexp.errors import ConfigError, DataError, SaexpError


def build(name, **options):
    return registry.build("dataset", DatasetConfig(name=name, **options))


def message_of(make, kind: type[SaexpError] = DataError) -> str:
    with pytest.raises(kind) as error:
        make()
    assert "\n" not in str(error.value)
    return str(error.value)


def span_texts(example) -> list[str]:
    return [example.text[a:b] for a, b in example.spans]


@pytest.mark.parametrize("model", ["tiny", "tiny_control"])
def test_entities_of_the_shipped_models(model):
    got = build("entities", model_name=model)
    assert set(got.groups) == {"known", "unknown"}
    assert {e.entity_type for e in got.examples} == {"player", "movie", "city", "song"}
    assert {e.split for e in got.examples} == {"train", "val", "test"}
    assert all(span_texts(e) == [e.entity] for e in got.examples)
    assert all(e.as_prompt().spans for e in got.examples)


def test_entities_of_other_models_are_made_by_template():
    got = build("entities", model_name="openai-community/gpt2", entity_types=["city"])
    jordan = next(e for e in got.examples if e.entity == "New Delhi")
    assert jordan.text == "The city New Delhi"
    assert jordan.answers == ("India",)
    assert jordan.prompt == "In which country is the city of New Delhi?"
    assert span_texts(jordan) == ["New Delhi"]
    assert set(got.groups) == {"known", "unknown"}


def test_custom_templates_are_used():
    options = {"model_name": "any", "entity_types": ["song"], "n_examples": 3}
    got = build(
        "entities",
        template="{entity} is a {entity_type}",
        prompt_template="Sing {entity}",
        **options,
    )
    assert len(got) == 6
    for one in got.examples:
        assert one.text == f"{one.entity} is a song"
        assert one.prompt == f"Sing {one.entity}"


@pytest.mark.parametrize("key", ["template", "prompt_template"])
@pytest.mark.parametrize(
    "template", ["The {player}", "{}", "{entity.year}", "{entity", "{entity[x]"]
)
def test_a_template_with_something_else_in_it(key, template):
    options = {"model_name": "any", key: template}
    assert message_of(lambda: build("entities", **options), ConfigError) == (
        f"dataset.{key}={template}: only {{entity}} and {{entity_type}} may be in braces"
    )


def test_a_template_without_the_entity():
    message = message_of(lambda: build("entities", model_name="any", template="The thing"))
    assert message.endswith("' does not occur in its text 'The thing'")


def test_custom_entities_are_read(tmp_path):
    file = tmp_path / "mine.jsonl"
    rows = [{"text": f"A {g}", "entity": g, "group": g} for g in ("known", "unknown")]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert [e.entity for e in build("entities", path=str(file)).examples] == ["known", "unknown"]


def test_a_type_that_is_not_there():
    message = message_of(lambda: build("entities", model_name="any", entity_types=["river"]))
    assert message == (
        "the shipped entities: no rows of entity type 'river'; the types are city, movie, player, "
        "song"
    )


def test_n_examples_is_per_group_and_type():
    got = build("entities", model_name="tiny", n_examples=2)
    assert len(got) == 2 * 2 * 4
    assert got.examples == build("entities", model_name="tiny", n_examples=2).examples
    assert got.examples != build("entities", model_name="tiny", n_examples=2, seed=1).examples


def test_ioi_of_the_shipped_model_are_its_held_out_pairs():
    got = build("ioi", model_name="tiny")
    assert len(got) == 200
    assert got.groups == ()
    for one in got.examples:
        assert one.text.count(one.extra["foil"]) == 2
        assert one.text.count(one.answers[0]) == 1


def test_ioi_of_other_models_is_generated():
    got = build("ioi", model_name="any")
    assert len({e.text for e in got.examples}) == 200
    for one in got.examples:
        assert one.text.endswith(" to")
        assert one.text.count(one.extra["foil"].strip()) == 2
        assert one.text.count(one.answers[0].strip()) == 1
    assert len(build("ioi", model_name="any", n_examples=7)) == 7
    again, other = (build("ioi", model_name="any", seed=s).examples for s in (0, 1))
    assert got.examples == again
    assert got.examples != other


def test_memorization_of_the_shipped_model():
    got = build("memorization", model_name="tiny")
    assert set(got.groups) == {"memorized", "not_memorized"}
    for one in got.examples:
        assert one.text == one.prompt + one.answers[0]
        assert span_texts(one) == list(one.answers)


@pytest.fixture()
def memorized(tmp_path):
    """Write rows of (perfect_match, matching_tokens) in the published columns."""

    def write(*rows, columns=("perfect_match", "matching_tokens")):
        with (tmp_path / "m.csv").open("w", newline="") as file:
            out = csv_module.writer(file)
            out.writerow(["input_text", "generated_continuation_text", *columns])
            out.writerows([f"prompt {n}", f" continuation {n}", *r] for n, r in enumerate(rows))
        return str(tmp_path / "m.csv")

    return write


def test_memorization_leaves_out_what_matches_in_part(memorized):
    path = memorized(("True", 50), ("False", 0), ("False", 7), ("1", "50.0"), ("false", "0.0"))
    got = build("memorization", path=path).examples
    assert [(e.id, e.group) for e in got] == [
        ("2", "memorized"),
        ("3", "not_memorized"),
        ("5", "memorized"),
        ("6", "not_memorized"),
    ]
    assert got[0].extra == {"perfect_match": "True", "matching_tokens": "50"}


def test_memorization_counts_what_it_leaves_out(memorized):
    path = memorized(("True", 50), ("False", 0), ("False", 7), ("False", 3))
    got = build("memorization", path=path)
    assert got.notes == ["2 of 4 rows match in part and are left out"]


@pytest.mark.parametrize("nothing", ["", "nan", "NaN", "None"])
def test_a_memorization_row_without_a_value_is_a_counted_skip(tmp_path, nothing):
    rows = [
        ("a prompt", " goes on", "True", "50"),
        ("a prompt", nothing, "False", "0"),
        (nothing, " goes on", "True", "50"),
        ("another", " stops", "False", nothing),
        ("another", " stops", nothing, "0"),
        ("another", " stops", nothing, "4"),
        ("another", " stops", "True", nothing),
    ]
    path = tmp_path / "m.csv"
    with path.open("w", newline="") as file:
        csv_module.writer(file).writerows([MEMORIZATION_COLUMNS, *rows])
    got = build("memorization", path=str(path))
    assert [(e.id, e.group) for e in got.examples] == [
        ("2", "memorized"),
        ("6", "not_memorized"),
        ("8", "memorized"),
    ]
    assert got.notes[-1] == (
        "4 of 7 rows were skipped: generated_continuation_text is empty or a missing value (1), "
        "input_text is empty or a missing value (1), matching_tokens is empty or a missing value "
        "(1), perfect_match is empty or a missing value (1)"
    )


def test_a_fraction_of_a_token_is_not_none(memorized):
    path = memorized(("True", "inf"), ("False", "0.5"), ("False", "-0.0"))
    got = build("memorization", path=path)
    assert [e.group for e in got.examples] == ["memorized", "not_memorized"]


def test_memorization_errors(memorized):
    path = memorized(("False", "many"))
    assert message_of(lambda: build("memorization", path=path)) == (
        f"{path}:2: matching_tokens 'many' is not a number"
    )
    path = memorized(("False", 3))
    assert message_of(lambda: build("memorization", path=path)) == (
        f"{path}: no row is a perfect match or has matching_tokens 0"
    )
    path = memorized(("False", 0), ("False", 0))
    assert message_of(lambda: build("memorization", path=path)) == (
        f"{path}: all rows are of one group, not_memorized (2); a contrast needs two"
    )
    path = memorized(("True",), columns=("perfect_match",))
    assert message_of(lambda: build("memorization", path=path)) == (
        f"{path}:2: column 'matching_tokens' is missing; the file needs input_text, "
        "generated_continuation_text, perfect_match, matching_tokens"
    )
    message = message_of(lambda: build("memorization", model_name="any"), ConfigError)
    assert message == "dataset=csv needs a file: type dataset.path=FILE"


def test_text_of_a_file_and_of_a_folder(tmp_path):
    (tmp_path / "b.txt").write_text("three\n")
    (tmp_path / "a.txt").write_text("one\n\n  two  \n \t \n")
    (tmp_path / "c.md").write_text("not read\n")
    of_file, of_folder = (build("text", path=str(p)) for p in (tmp_path / "a.txt", tmp_path))
    assert [e.text for e in of_file.examples] == ["one", "  two  "]
    assert [(e.id, e.text) for e in of_folder.examples] == [
        ("1", "one"),
        ("2", "  two  "),
        ("3", "three"),
    ]
    assert of_folder.groups == ()
    assert all(e.split for e in of_folder.examples)


def test_a_text_of_the_command_line():
    (one,) = build("text", text="as typed ").examples
    assert (one.text, one.split) == ("as typed ", "test")


def test_text_errors(tmp_path):
    assert message_of(lambda: build("text"), ConfigError) == (
        "dataset.path is not set: type dataset.path=FILE (one text per line) or a folder"
    )
    for folder in (tmp_path, tmp_path / "absent.txt"):
        assert message_of(lambda folder=folder: build("text", path=str(folder))) == (
            f"dataset.path={folder}: no such text file, nor a folder with .txt files"
        )
    (tmp_path / "empty.txt").write_text(" \n")
    path = str(tmp_path / "empty.txt")
    assert message_of(lambda: build("text", path=path)) == (
        f"{path}: is empty; it needs at least one line of text"
    )
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    path = str(tmp_path / "latin.txt")
    assert message_of(lambda: build("text", path=path)) == f"{path}: is not UTF-8 text (byte 3)"


def test_background_is_the_users_else_what_ships(tmp_path):
    (tmp_path / "mine.txt").write_text("neutral\n")
    cfg = DatasetConfig(name="any", background=str(tmp_path / "mine.txt"), model_name="tiny")
    assert background_texts(cfg) == ["neutral"]
    tiny = background_texts(DatasetConfig(name="any", model_name="tiny"))
    assert len(tiny) == len((ASSETS / "tiny" / "background.txt").read_text().splitlines())
    others = background_texts(DatasetConfig(name="any", model_name="google/gemma-2-2b"))
    assert len(others) > 20
    assert set(others).isdisjoint(tiny)
    missing = DatasetConfig(name="any", background="absent.txt")
    assert message_of(lambda: background_texts(missing)).startswith("dataset.background=absent.txt")


ROWS = {
    "text": ["The player Bo Li", "The player Ed Xu"],
    "entity": ["Bo Li", "Ed Xu"],
    "group": ["known", "unknown"],
    "answer": [["x"], None],
    "year": [1987, None],
}


def test_a_folder_that_datasets_saved(tmp_path):
    hf_datasets.Dataset.from_dict(ROWS).save_to_disk(tmp_path / "saved")
    got = build("hf", path=str(tmp_path / "saved"))
    assert [span_texts(e) for e in got.examples] == [["Bo Li"], ["Ed Xu"]]
    assert [e.answers for e in got.examples] == [("x",), ()]
    assert got.groups == ("known", "unknown")
    assert got.examples[0].extra == {"year": 1987}


def test_a_saved_folder_with_several_splits(tmp_path):
    rows = hf_datasets.Dataset.from_dict(ROWS)
    hf_datasets.DatasetDict({"train": rows, "test": rows.select([1, 0])}).save_to_disk(
        tmp_path / "saved"
    )
    path = str(tmp_path / "saved")
    assert build("hf", path=path).examples[0].entity == "Bo Li"
    assert build("hf", path=path, hf_split="test").examples[0].entity == "Ed Xu"
    assert message_of(lambda: build("hf", path=path, hf_split="dev")) == (
        f"dataset.path={path}: cannot be loaded (no split dev; the splits are train, test)"
    )


def test_hf_errors_name_the_row(tmp_path):
    hf_datasets.Dataset.from_dict({"text": ["a", " "]}).save_to_disk(tmp_path / "saved")
    path = str(tmp_path / "saved")
    assert message_of(lambda: build("hf", path=path)).startswith(
        f"{path}:2: column 'text' is empty"
    )


def test_a_dataset_that_cannot_be_loaded(tmp_path):
    assert message_of(lambda: build("hf"), ConfigError) == (
        "dataset=hf needs a data set: type dataset.path=<hub id or local folder>"
    )
    absent = str(tmp_path / "absent")
    assert message_of(lambda: build("hf", path=absent)) == f"dataset.path={absent}: no such folder"
    for path in ("nothing", "nobody/nothing"):
        message = message_of(lambda path=path: build("hf", path=path))
        assert message.startswith(f"dataset.path={path}: cannot be loaded (")
