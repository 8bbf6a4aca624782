"""The commands that task=label recommends fit what it found."""

import pandas as pd

from saexp.config import LabelConfig
from saexp.tasks.label_files import MIN_OF_GROUP, label_usage, memorization_usage

OPTIONS = LabelConfig(name="label")


def entities(known: int, unknown: int) -> pd.DataFrame:
    return pd.DataFrame({"group": ["known"] * known + ["unknown"] * unknown + ["dropped"]})


def answers(correct: int, incorrect: int) -> list[dict[str, str]]:
    return [{"group": "correct"}] * correct + [{"group": "incorrect"}] * incorrect


def passages(perfect: int, none: int) -> pd.DataFrame:
    matching = [50] * perfect + [0] * none
    return pd.DataFrame({"matching_tokens": matching, "perfect_match": [m > 0 for m in matching]})


def test_labels_of_both_groups_are_used_with_their_path() -> None:
    n = MIN_OF_GROUP
    usage = label_usage(entities(n, n), answers(n, n), OPTIONS)
    assert usage["entities.jsonl"].startswith("use them with: dataset=jsonl")
    assert "experiment=uncertainty 'dataset.path=" in usage["answers.jsonl"]
    (note,) = memorization_usage(passages(n, n)).values()
    assert note.startswith("use it with: dataset=memorization")


def test_where_nothing_is_known_or_memorized_no_contrast_of_it_is_recommended() -> None:
    few = MIN_OF_GROUP - 1
    usage = label_usage(entities(few, 90), answers(0, 90), OPTIONS)
    assert f"{few} entities known and 90 unknown are too few" in usage["entities.jsonl"]
    assert "task.min_correct=" in usage["entities.jsonl"]
    assert "are too few for experiment=uncertainty" in usage["answers.jsonl"]
    (known_all,) = [label_usage(entities(90, 0), [], OPTIONS)["entities.jsonl"]]
    assert "task.max_unknown=" in known_all
    (note,) = memorization_usage(passages(0, 40)).values()
    assert "use it with" not in note
    assert "0 texts continued exactly and 40 without a matching token are too few" in note
    assert "task.continuation_tokens=" in note
    (note,) = memorization_usage(passages(40, 0)).values()
    assert "add texts that the model cannot have seen" in note
