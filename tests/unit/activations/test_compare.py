"""Two stores compared: what differs is said in names, with the hashes behind them."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import saexp
from saexp.activations import ActivationStore
from saexp.tasks import collect as stores
from saexp.tasks.collect import differences, headline
from tests.e2e.test_cache import store
from tests.unit.reports.run_outputs import command


def store_with(folder: Path, lines: list[str], **ingredients: Any) -> ActivationStore:
    """A store without activations."""
    rows = pd.DataFrame({"row": range(len(lines)), "text": lines})
    return ActivationStore.create_or_open(
        folder, {"model": "tiny", **ingredients}, rows, shard_rows=4
    )


def test_only_the_ingredients_that_differ_are_named(tmp_path: Path) -> None:
    first = store(tmp_path, "a", weights="x", max_length=512)
    second = store(tmp_path, "a", weights="x", max_length=64, revision=None)
    third = store(tmp_path, "b", weights="x", max_length=512)
    assert differences(first, first) == []
    assert differences(first, second) == ["max_length: 512 and 64"]
    texts = "texts: set {} ({}) and set {} ({}); 0 texts in both"
    assert differences(first, third) == [texts.format(*"aabb")]
    assert differences(third, second) == ["max_length: 512 and 64", texts.format(*"bbaa")]


def test_hashes_stand_behind_the_names_they_are_of(tmp_path: Path) -> None:
    one = store_with(tmp_path, ["a"], weights="0123456789", tokenizer="a" * 64)
    two = store_with(tmp_path, ["a"], weights="9876543210", tokenizer="b" * 64, model="tuned")
    assert differences(one, two) == [
        'model: "tiny" and "tuned"',
        "tokenizer: tiny (aaaaaaaa) and tuned (bbbbbbbb)",
        "weights: tiny (01234567) and tuned (98765432)",
    ]


@pytest.mark.parametrize(
    ("second", "difference"),
    [
        (["a", "c"], "; 1 text in both"),
        (["b", "a", "a"], "; the same texts in another order"),
        (["a", "b"], "; the same texts, other tokens"),
    ],
)
def test_differences_count_the_texts_in_common(
    tmp_path: Path, second: list[str], difference: str
) -> None:
    one, two = (
        store_with(tmp_path, ["a", "a", "b"], texts="x"),
        store_with(tmp_path, second, texts="y"),
    )
    assert differences(one, two) == [f"texts: unnamed (x) and unnamed (y){difference}"]
    (two.path / "rows.parquet").write_bytes(b"")
    assert differences(one, two) == ["texts: unnamed (x) and unnamed (y)"]


def collected(folder: Path, *words: str) -> str:
    """Key of the store that task=collect makes."""
    base = ["task=collect", "layer=1", "tracker=none", f"cache_dir={folder}/cache"]
    before = {s.path.name for s in stores.stores(folder / "cache")}
    saexp.run(saexp.compose([*base, *words]), folder / "run")
    return ({s.path.name for s in stores.stores(folder / "cache")} - before).pop()


def test_stores_of_runs_name_their_data_set_and_positions(tmp_path: Path) -> None:
    file = tmp_path / "my.jsonl"
    texts = [f"The player Bo Li{n}" for n in range(3)]
    file.write_text("".join(f"{json.dumps({'text': t})}\n" for t in texts), encoding="utf-8")
    data = ["dataset=jsonl", f"dataset.path={file}"]
    random = collected(tmp_path, *data, "positions=random", "positions.n=2")
    last = collected(tmp_path, *data, "positions=last")
    bare = collected(tmp_path, *data, "positions=last", "model.prepend_bos=false")
    line = collected(tmp_path, "dataset=text", "dataset.text=The player", "positions=last")

    def differences_without_digests(*keys: str) -> list[str]:
        both = [stores.find(tmp_path / "cache", key) for key in keys]
        digests = {
            name: [s.manifest["ingredients"][name][:8] for s in both]
            for name in ("texts", "positions")
        }
        lines = differences(both[0], both[1])
        for name, pair in digests.items():
            lines = [x.replace(pair[0], name).replace(pair[1], name) for x in lines]
        return lines

    assert differences_without_digests(random, last) == [
        "positions: random, n=2, 6 rows (positions) and last, 3 rows (positions)"
    ]
    # Without BOS in front the last token has another index.
    assert differences_without_digests(last, bare)[-1] == (
        "texts: jsonl, 3 texts, with BOS in front (texts) and jsonl, 3 texts, without BOS in front "
        "(texts); the same texts, other tokens"
    )
    path = f"path={file}"[:65]
    path += "…" if len(str(file)) > 60 else ""
    assert differences_without_digests(last, line)[-1] == (
        f"texts: jsonl, {path}, 3 texts (texts) and text, text=The player, 1 text (texts); "
        "0 texts in both"
    )
    opened = stores.find(tmp_path / "cache", last)
    assert headline(opened) == f"{last}: tiny, jsonl, last, 3 rows, float32, layer_1.resid_post"
    # As a store of an earlier version has it.
    for name in ("dataset_settings", "positions_settings", "begins_with_bos"):
        del opened.manifest["about"][name]
    del opened.manifest["sha256"], opened.manifest["checked"]
    (opened.path / "manifest.json").write_text(json.dumps(opened.manifest), encoding="utf-8")
    assert differences_without_digests(random, last) == [
        "positions: random, n=2, 6 rows (positions) and last, 3 rows (positions)"
    ]


def test_the_names_are_no_part_of_the_key(tmp_path: Path) -> None:
    file = tmp_path / "my.jsonl"
    file.write_text('{"text": "The player"}\n', encoding="utf-8")
    key = collected(tmp_path, "dataset=text", "dataset.text=The player", "positions=last")
    words = ["dataset=jsonl", f"dataset.path={file}", "positions=last", "positions.seed=3"]
    words += ["task=collect", "layer=1", "tracker=none", f"cache_dir={tmp_path}/cache"]
    metrics = saexp.run(saexp.compose(words), tmp_path / "run").metrics
    (new_store,) = stores.stores(tmp_path / "cache")
    assert metrics["collection/tokens_forwarded"] == 0
    assert new_store.path.name == key
    assert new_store.manifest["about"]["dataset"] == "text"


def test_the_beginning_of_a_key_may_look_like_a_number() -> None:
    words = ["task=cache", "task.action=compare", 'task.stores=["17e1","9e9a"]']
    assert saexp.compose(words).task.stores == ["17e1", "9e9a"]


def test_task_cache_prints_the_comparison_alone(tmp_path: Path) -> None:
    text_stores = [store(tmp_path / "outputs/cache", t) for t in "ab"]
    both = ",".join(s.path.name for s in text_stores)
    words = ["task=cache", "task.action=compare", "hydra.run.dir=compared"]
    compared = command(tmp_path, *words, f"task.stores=[{both}]")
    description = "tiny, set {}, last, 6 rows, float32, layer_0.resid_post, layer_1.resid_post"
    assert compared.out.splitlines() == [
        *(
            f"note: {s.path.name}: {description.format(t)}"
            for s, t in zip(text_stores, "ab", strict=True)
        ),
        "note: texts: set a (a) and set b (b); 0 texts in both",
        "folder: compared",
    ]
    assert len(pd.read_parquet(tmp_path / "compared/stores.parquet")) == 2
