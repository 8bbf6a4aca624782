"""The cache folder as a whole: listed, verified, pruned, compared; and task=cache."""

import os
import re
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import saexp
from saexp.activations import USED, ActivationStore
from saexp.errors import ConfigError, ModelError
from saexp.files import locked
from saexp.models import Hookpoint
from saexp.tasks import collect as stores
from tests.unit.reports.run_outputs import command

POSTS = [Hookpoint(0, "resid_post"), Hookpoint(1, "resid_post")]
ROWS = 6


def store(
    cache_dir: Path, texts: str = "a", *, days: float = 0, width: int = 4, **ingredients: Any
) -> ActivationStore:
    """A whole store of two hookpoints in two shards, last used some days ago."""
    activation_store = ActivationStore.create_or_open(
        cache_dir,
        {"model": "tiny", "dtype": "float32", "texts": texts, **ingredients},
        pd.DataFrame({"row": range(ROWS), "text": texts}),
        shard_rows=4,
        about={"dataset": f"set {texts}", "positions": "last"},
    )
    for hookpoint in POSTS:
        for index, (first, end) in enumerate(activation_store.shard_bounds):
            activation_store.write_shard(hookpoint, index, torch.ones(end - first, width))
    activation_store.close()
    used(activation_store, days)
    return activation_store


def used(activation_store: ActivationStore, days: float) -> None:
    at = time.time() - 86400 * days
    os.utime(activation_store.path / USED, (at, at))


def keys(cache_dir: Path) -> set[str]:
    return {p.parent.name for p in cache_dir.glob("activations/*/manifest.json")}


def line_of(make: Any) -> str:
    with pytest.raises(ConfigError) as error:
        make()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_listing_says_of_each_store_what_it_is_of(tmp_path: Path) -> None:
    stored = [store(tmp_path, "a", days=1), store(tmp_path, "b", days=3, model="other")]
    (tmp_path / "activations/0_damaged").mkdir()
    (tmp_path / "activations/0_damaged/manifest.json").write_text("{")
    table = stores.listing(tmp_path).set_index("key")
    assert table.index.tolist() == [stored[1].path.name, stored[0].path.name]
    row = table.loc[stored[1].path.name]
    assert row[["model", "dataset", "positions", "n_rows", "dtype"]].tolist() == [
        *("other", "set b", "last", ROWS, "float32")
    ]
    assert row["hookpoints"] == "layer_0.resid_post, layer_1.resid_post"
    files = [p for p in stored[1].path.rglob("*") if p.is_file()]
    assert row["bytes"] == sum(len(p.read_bytes()) for p in files)
    age = pd.Timestamp.now() - row["last_used"]
    assert abs(age - pd.Timedelta(days=3)) < pd.Timedelta(minutes=5)


def test_an_empty_cache_has_a_listing_without_rows(tmp_path: Path) -> None:
    table = stores.listing(tmp_path / "none")
    assert len(table) == 0
    assert {"key", "bytes", "last_used"} <= set(table)


def test_stores_are_in_the_order_of_their_last_use_and_opening_uses_one(tmp_path: Path) -> None:
    first, second, third = (store(tmp_path, t, days=d) for t, d in (("a", 1), ("b", 9), ("c", 5)))
    assert [s.path for s in stores.stores(tmp_path)] == [second.path, third.path, first.path]
    again = ActivationStore.create_or_open(
        tmp_path, second.manifest["ingredients"], second.rows, shard_rows=4
    )
    assert again.path == second.path
    assert [s.path for s in stores.stores(tmp_path)] == [third.path, first.path, second.path]
    (third.path / USED).unlink()
    os.utime(third.path / "manifest.json", (1, 1))
    assert stores.last_used(third.path) == 1


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def test_verifying_names_every_damaged_shard_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Large shards are not hashed when a store is opened.
    monkeypatch.setattr("saexp.activations._HASH_ON_OPEN_BYTES", 1)
    sound, damaged = store(tmp_path, "a"), store(tmp_path, "b")
    assert stores.damaged(damaged) == []
    flip(damaged.path / "layer_1.resid_post/00001.safetensors")
    assert ActivationStore.open(damaged.path).missing(POSTS) == {}
    assert stores.damaged(damaged) == ["layer_1.resid_post/00001"]
    (damaged.path / "layer_0.resid_post/00000.safetensors").unlink()
    (sound.path / "rows.parquet").write_bytes(b"PAR1")
    assert stores.verify([sound, damaged]) == {
        sound.path.name: ["rows.parquet"],
        damaged.path.name: ["layer_0.resid_post/00000", "layer_1.resid_post/00001"],
    }


def test_pruning_by_size_drops_those_used_longest_ago(tmp_path: Path) -> None:
    stored = [store(tmp_path, t, days=d, width=5000) for t, d in (("a", 1), ("b", 9), ("c", 5))]
    sizes = [stores.size(s.path) for s in stored]
    room = f"{sum(sizes) * 0.99 / 1000}kB"
    pruned = stores.prune(tmp_path, max_size=room, max_age=None)
    assert (pruned.removed, pruned.skipped) == ([stored[1].path.name], {})
    assert pruned.n_bytes == sizes[0] + sizes[2]
    assert not stored[1].path.exists()
    assert stores.prune(tmp_path, max_size=room, max_age=None).removed == []
    assert stores.prune(tmp_path, max_size="0 GB", max_age=None) == stores.Pruned(
        [stored[2].path.name, stored[0].path.name], {}, 0
    )
    assert keys(tmp_path) == set()


@pytest.mark.parametrize(
    ("max_age", "left"), [("2d", "a"), ("30h", "a"), ("1w", "ac"), ("1000d", "abc"), ("0.5D", "")]
)
def test_pruning_by_age_drops_what_was_not_used_for_so_long(
    tmp_path: Path, max_age: str, left: str
) -> None:
    stored = {t: store(tmp_path, t, days=d) for t, d in (("a", 1), ("b", 9), ("c", 5))}
    removed = stores.prune(tmp_path, max_size=None, max_age=max_age).removed
    assert keys(tmp_path) == {stored[t].path.name for t in left}
    assert set(removed) == {stored[t].path.name for t in "abc" if t not in left}


def test_both_limits_hold_together(tmp_path: Path) -> None:
    stored = {t: store(tmp_path, t, days=d) for t, d in (("a", 1), ("b", 9), ("c", 5))}
    size = f"{stores.size(stored['a'].path) * 1.5 / 1000}kb"
    removed = stores.prune(tmp_path, max_size=size, max_age="1w").removed
    assert removed == [stored["b"].path.name, stored["c"].path.name]


def test_a_store_that_a_process_works_on_stays(tmp_path: Path) -> None:
    busy, idle = store(tmp_path, "a", days=9), store(tmp_path, "b", days=8)
    with locked(busy.shard_lock(1)):
        pruned = stores.prune(tmp_path, max_size=None, max_age="1d")
    assert pruned.removed == [idle.path.name]
    assert pruned.skipped == {busy.path.name: "a process is writing it"}
    assert ActivationStore.open(busy.path).hookpoints == POSTS
    assert stores.prune(tmp_path, max_size=None, max_age="1d").removed == [busy.path.name]


UNREADABLE = [("max_size", "20 apples"), ("max_size", "20"), ("max_size", "GB"), ("max_size", "")]
UNREADABLE += [("max_size", "-1GB"), ("max_age", "30"), ("max_age", "3m"), ("max_age", "soon")]
NO_NUMBERS = [("max_size", "1.2.3GB"), ("max_age", ".d")]


@pytest.mark.parametrize(("key", "text"), [*UNREADABLE, *NO_NUMBERS])
def test_a_limit_that_cannot_be_read_is_one_line_and_removes_nothing(
    tmp_path: Path, key: str, text: str
) -> None:
    stored = store(tmp_path, days=999)
    limits: dict[str, Any] = {"max_size": None, "max_age": None, key: text}
    units = "kb, mb, gb, tb" if key == "max_size" else "h, d, w"
    example = "20GB" if key == "max_size" else "30d"
    assert line_of(lambda: stores.prune(tmp_path, **limits)) == (
        f"task.{key}={text} cannot be read; type a number with one of {units}, such as "
        f"task.{key}={example}"
    )
    assert stored.path.is_dir()


def test_no_limit_is_one_line(tmp_path: Path) -> None:
    assert line_of(lambda: stores.prune(tmp_path, max_size=None, max_age=None)) == (
        "task.action=prune needs a limit: type task.max_size=20GB or task.max_age=30d"
    )


def test_a_store_is_found_by_the_beginning_of_its_key(tmp_path: Path) -> None:
    assert line_of(lambda: stores.find(tmp_path, "ab")) == (
        f"stores=ab: no key begins with it; {tmp_path} holds none"
    )
    # With 17 keys two begin with the same digit.
    names = sorted(store(tmp_path, str(n), days=-n).path.name for n in range(17))
    a, b = next((a, b) for a, b in zip(names, names[1:], strict=False) if a[0] == b[0])
    shared = os.path.commonprefix([a, b])
    assert stores.find(tmp_path, a[: len(shared) + 1]).path.name == a
    assert stores.find(tmp_path, b).path.name == b
    n = sum(name.startswith(shared) for name in names)
    assert line_of(lambda: stores.find(tmp_path, shared)).startswith(
        f"stores={shared}: {n} keys begin with it; {tmp_path} holds "
    )
    message = line_of(lambda: stores.find(tmp_path, "nokey"))
    assert message.startswith("stores=nokey: no key begins with it; ")
    assert all(name in message for name in names)


def test_task_cache_lists_and_verifies(tmp_path: Path) -> None:
    stored = [store(tmp_path / "outputs/cache", t) for t in "ab"]
    listed = command(tmp_path, "task=cache", "hydra.run.dir=listed")
    assert listed.code == 0, listed.err
    assert all(s.path.name in listed.out and "layer_1.resid_post" in listed.out for s in stored)
    assert "note: 2 stores, " in listed.out
    # Sizes with their unit and times to the minute where they are read; whole in the table.
    assert re.search(r" kB +\d{4}-\d\d-\d\d \d\d:\d\d$", listed.out.splitlines()[1])
    assert "size" in listed.out.splitlines()[0]
    assert pd.read_parquet(tmp_path / "listed/stores.parquet")["bytes"].tolist() == [
        stores.size(s.path) for s in stored
    ]
    assert pd.read_parquet(tmp_path / "listed/stores.parquet")["key"].tolist() == [
        s.path.name for s in stored
    ]
    assert not list(tmp_path.rglob("wandb"))
    words = ["task=cache", "task.action=verify"]
    assert "note: all sound" in command(tmp_path, *words).out.splitlines()


def test_task_cache_that_finds_damage_lists_everything_and_ends_with_code_1(
    tmp_path: Path,
) -> None:
    sound, damaged, broken = (store(tmp_path / "outputs/cache", t) for t in "abc")
    flip(damaged.path / "layer_0.resid_post/00001.safetensors")
    (broken.path / "manifest.json").write_text("{")
    result = command(tmp_path, "task=cache", "task.action=verify", "hydra.run.dir=verified")
    assert result.code == 1
    *listed, last = result.err.splitlines()
    assert last == (
        f"saexp: damaged: {damaged.path.name}: layer_0.resid_post/00001; run what needs them with "
        "verify=true, which computes them again; manifest.json cannot be read in "
        f"outputs/cache/activations/{broken.path.name}: the command that wrote it writes it again "
        "from its shards"
    )
    for one in (sound, damaged, broken):
        assert any(one.path.name in line for line in listed)
    assert any(f"{damaged.path.name}: damaged layer_0.resid_post/00001" in line for line in listed)
    assert not any("all sound" in line for line in listed)
    assert len(pd.read_parquet(tmp_path / "verified/stores.parquet")) == 2
    assert "Traceback" not in result.err


def test_task_cache_prunes_and_says_what(tmp_path: Path) -> None:
    old, new = (store(tmp_path / "cache", t, days=d) for t, d in (("a", 9), ("b", 1)))
    words = ["task=cache", f"cache_dir={tmp_path}/cache", "task.action=prune"]
    with locked(old.shard_lock(0)):
        result = command(tmp_path, *words, "task.max_age=1w")
    assert "note: removed nothing" in result.out.splitlines()
    assert f"note: {old.path.name} stays: a process is writing it" in result.out.splitlines()
    result = command(tmp_path, *words, "task.max_age=1w")
    assert f"note: removed {old.path.name}" in result.out.splitlines()
    assert keys(tmp_path / "cache") == {new.path.name}


WRONG = [
    (
        ["task.action=bogus"],
        "task.action=bogus is not known; choose from list, verify, prune, compare",
    ),
    (["task.action=verfy"], "task.action=verfy is not known; did you mean verify?"),
    (
        ["task.action=prune"],
        "task.action=prune needs a limit: type task.max_size=20GB or task.max_age=30d",
    ),
    (
        ["task.action=prune", "task.max_size='20 apples'"],
        "task.max_size=20 apples cannot be read; type a number with one of kb, mb, gb, tb, such as "
        "task.max_size=20GB",
    ),
    (
        ["task.action=compare"],
        'task.action=compare takes two keys; type \'task.stores=["17e1","9e9a"]\'',
    ),
]


@pytest.mark.parametrize(("words", "line"), WRONG)
def test_what_task_cache_cannot_do_is_one_line(tmp_path: Path, words: list[str], line: str) -> None:
    result = command(tmp_path, "task=cache", *words)
    assert (result.code, result.out) == (1, "")
    assert result.err.splitlines() == [f"saexp: {line}"]


def test_a_run_that_succeeds_where_one_failed_before_leaves_no_error(tmp_path: Path) -> None:
    words = ["task=collect", "tracker=none", f"cache_dir={tmp_path}/cache", "dataset.n_examples=4"]
    with pytest.raises(ModelError):
        saexp.run(saexp.compose([*words, "layer=9"]), tmp_path / "run")
    assert (tmp_path / "run/error.txt").is_file()
    saexp.run(saexp.compose([*words, "layer=1"]), tmp_path / "run")
    assert not (tmp_path / "run/error.txt").exists()


def test_cells_of_task_cache_finish(tmp_path: Path) -> None:
    result = command(tmp_path, "-m", "task=cache", "task.action=list,verify")
    assert "sweep: 2 cells: 2 finished" in result.out.splitlines()
