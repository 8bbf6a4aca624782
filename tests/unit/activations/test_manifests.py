"""A manifest that is lost or damaged is made anew from the shards, which prove themselves."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from saexp.activations import ActivationStore
from saexp.activations.shard_files import read_manifest, write_manifest
from saexp.errors import StoreError
from saexp.files import USED
from saexp.models import Hookpoint
from saexp.models.loading import LanguageModel
from saexp.tasks import collect as stores
from tests.random_models import random_hf, random_lm, tokenizer
from tests.unit.activations.collecting import POSTS, digests, placed, run

SHARD_ROWS = 45
"""Three shards of each hookpoint."""


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return random_lm("llama")


@pytest.fixture(scope="module")
def ingredients(collected: Path) -> dict[str, Any]:
    (folder,) = (collected / "activations").iterdir()
    return read_manifest(folder)["ingredients"]


@pytest.fixture(scope="module")
def collected(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache_dir = tmp_path_factory.mktemp("collected")
    run(model, cache_dir, shard_rows=SHARD_ROWS)
    return cache_dir


@pytest.fixture()
def folder(collected: Path, tmp_path: Path) -> Path:
    """A store's folder, in `tmp_path`."""
    shutil.copytree(collected, tmp_path, dirs_exist_ok=True)
    (store_folder,) = (tmp_path / "activations").iterdir()
    return store_folder


def n_shards(folder: Path) -> int:
    return len(list(folder.glob("layer_*/*.safetensors")))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def write(content: bytes) -> Callable[[Path], Any]:
    return lambda file: file.write_bytes(content)


def to_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()
    (file / "something").write_text("x")


def change(do: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        manifest = json.loads(file.read_text())
        do(manifest)
        file.write_text(json.dumps(manifest))

    return damage


POST = POSTS[1].name
DAMAGES: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "empty": write(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:200]),
    "not UTF-8": write(b"\xff\xfe\x00{"),
    "list": write(b"[]"),
    "null": write(b"null"),
    "deep": write(b"[" * 100_000),
    "no settings": write(b"{}"),
    "folder": to_folder,
    "a number for shards": change(lambda m: m["hookpoints"].update({POST: 3})),
    "an entry without checksum": change(lambda m: m["hookpoints"][POST]["00000"].pop("sha256")),
    "an entry without bytes": change(lambda m: m["hookpoints"][POST]["00000"].pop("bytes")),
    "an entry of text": change(lambda m: m["hookpoints"][POST].update({"00000": "x"})),
    "a shard that cannot be": change(lambda m: m["hookpoints"][POST].update({"00099": {}})),
    "a shard's name": change(lambda m: m["hookpoints"][POST].update({"../x": {}})),
    "a hookpoint's name": change(lambda m: m["hookpoints"].update({"../../x": {}})),
    "negative rows": change(lambda m: m.update(n_rows=-1)),
    "rows of another store": change(lambda m: m.update(n_rows=m["n_rows"] + 1)),
    "rows of true": change(lambda m: m.update(n_rows=True)),
    "shards of no rows": change(lambda m: m.update(shard_rows=0)),
    "shards of other rows": change(lambda m: m.update(shard_rows=SHARD_ROWS + 1)),
    "NaN": change(lambda m: m.update(shard_rows=float("nan"))),
    "about": change(lambda m: m.update(about=[])),
    "ingredients of another": change(lambda m: m["ingredients"].update(model="other")),
    "ingredients of a number": change(lambda m: m.update(ingredients=3)),
    "checksum": change(lambda m: m.update(sha256="0" * 64)),
    "no checksum": change(lambda m: m.pop("sha256")),
    "an entry that is lost": change(lambda m: m["hookpoints"][POST].pop("00000")),
    "another checksum of a shard": change(
        lambda m: m["hookpoints"][POST]["00000"].update(sha256="0" * 64)
    ),
    "a list of checked shards": change(lambda m: m.update(checked=[1])),
    "a number of checked shards": change(lambda m: m.update(checked={POST: 3})),
    "checked shards of a list": change(lambda m: m.update(checked={POST: [[]]})),
}
EVERY = pytest.mark.parametrize("damage", DAMAGES)


@EVERY
def test_it_is_rewritten_with_every_shard(
    damage: str,
    folder: Path,
    ingredients: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def opened(shard_rows: int) -> ActivationStore:
        return ActivationStore.create_or_open(
            tmp_path, ingredients, placed(), shard_rows=shard_rows, about={}
        )

    before = digests(folder)
    DAMAGES[damage](folder / "manifest.json")
    with pytest.raises(StoreError) as error:
        # What is another store's is seen by those alone who know which it should be.
        read_manifest(folder)
        raise StoreError("another store's")
    assert "\n" not in str(error.value)
    store = opened(SHARD_ROWS + 5)
    assert store.missing(POSTS) == {}
    n = n_shards(folder)
    (line,) = warnings(caplog)
    assert line.endswith(
        f"and is rebuilt from the shards: {n} shards kept, 0 collected again where needed"
    )
    assert str(folder / "manifest.json") in line
    assert digests(store.path) == before
    caplog.clear()
    assert opened(SHARD_ROWS).missing(POSTS) == {}
    assert warnings(caplog) == []


@EVERY
def test_listing_verifying_and_pruning_go_on(damage: str, folder: Path, tmp_path: Path) -> None:
    DAMAGES[damage](folder / "manifest.json")
    table, lost = stores.listing(tmp_path), stores.unreadable(tmp_path)
    assert len(table) + len(lost) == 1
    stores.verify(stores.stores(tmp_path))
    os.utime(folder / USED, (1, 1))
    assert stores.prune(tmp_path, max_size=None, max_age="1d").removed == [folder.name]
    assert not folder.exists()


def test_shards_that_prove_nothing_are_collected_again(
    folder: Path,
    model: LanguageModel,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before, n = digests(folder), n_shards(folder)
    (folder / "manifest.json").unlink()
    shards = sorted(folder.glob("layer_*/*.safetensors"))
    # As an earlier version wrote it, without a label; one value changed; cut off; of another place.
    save_file(load_file(shards[0]), shards[0])
    content = bytearray(shards[1].read_bytes())
    content[-2] ^= 1
    shards[1].write_bytes(content)
    shards[2].write_bytes(shards[2].read_bytes()[:-4])
    other = folder / POSTS[2].name / shards[0].name
    shutil.copy(folder / POSTS[1].name / shards[0].name, other)
    store, stats = run(model, tmp_path, shard_rows=SHARD_ROWS)
    assert stats.tokens_forwarded > 0
    assert f"{n - 4} shards kept, 4 collected again" in warnings(caplog)[0]
    assert digests(store.path) == before


@pytest.mark.parametrize("manifest", ["missing", "of the other store"])
def test_a_shard_of_another_store_is_not_taken_over(
    folder: Path, model: LanguageModel, tmp_path: Path, manifest: str
) -> None:
    stranger = LanguageModel.wrap(random_hf("llama", seed=1), tokenizer(), name="random-llama")
    other, _ = run(stranger, tmp_path / "other", shard_rows=SHARD_ROWS)
    expected = ActivationStore.open(folder).acts(0).clone()
    name = f"{POSTS[0].name}/00000.safetensors"
    shutil.copy(other.path / name, folder / name)
    if manifest == "missing":
        (folder / "manifest.json").unlink()
    else:
        shutil.copy(other.path / "manifest.json", folder / "manifest.json")
    store, _ = run(model, tmp_path, shard_rows=SHARD_ROWS)
    assert torch.equal(store.acts(0), expected)


def test_a_manifest_of_an_earlier_version_has_no_checksum(
    folder: Path, model: LanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change(lambda m: (m.pop("sha256"), m.pop("checked")))(folder / "manifest.json")
    _, stats = run(model, tmp_path, shard_rows=SHARD_ROWS)
    assert (stats.tokens_forwarded, warnings(caplog)) == (0, [])


def test_an_earlier_version_may_add_shards(
    folder: Path, model: LanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = read_manifest(folder)
    added = whole["hookpoints"].pop(POST)
    write_manifest(folder, whole)
    change(lambda m: m["hookpoints"].update({POST: added}))(folder / "manifest.json")
    _, stats = run(model, tmp_path, shard_rows=SHARD_ROWS)
    assert (stats.tokens_forwarded, warnings(caplog)) == (0, [])


@pytest.mark.parametrize("entry", [{"file": "joined-00.bin", "bytes": 4, "sha256": "0"}, 3])
def test_joined_files_of_an_earlier_version_are_ignored_and_removed_by_pruning(
    folder: Path,
    model: LanguageModel,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    entry: object,
) -> None:
    before = digests(folder)
    change(lambda m: m.update(joined={POST: entry}))(folder / "manifest.json")
    joined = folder / POST / "joined-00.bin"
    joined.write_bytes(b"1234")
    store, stats = run(model, tmp_path, shard_rows=SHARD_ROWS, verify=True)
    assert (stats.tokens_forwarded, warnings(caplog)) == (0, [])
    assert stores.verify([store]) == {}
    # The next change of the manifest drops the entry.
    run(model, tmp_path, [Hookpoint(0, "mlp_out")], shard_rows=SHARD_ROWS)
    assert "joined" not in read_manifest(folder)
    assert joined.exists()
    stores.prune(tmp_path, max_size="1TB", max_age=None)
    left = digests(folder)
    assert not joined.exists()
    assert {n: d for n, d in left.items() if n in before and n != "manifest.json"} == {
        n: d for n, d in before.items() if n != "manifest.json"
    }


def test_any_other_value_in_it_is_noticed(folder: Path) -> None:
    whole = read_manifest(folder)
    for key, value in (("about", {"dataset": "x"}), ("shard_rows", 7), ("key", "x")):
        write_manifest(folder, whole)
        assert read_manifest(folder) == whole
        change(lambda m, key=key, value=value: m.update({key: value}))(folder / "manifest.json")
        with pytest.raises(StoreError, match=r"manifest.json cannot be read \((checksum|layer)"):
            read_manifest(folder)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_and_other_values_are_an_error_in_one_line(
    data: st.DataObject, collected: Path, tmp_path: Path
) -> None:
    (source,) = collected.glob("activations/*/manifest.json")
    content = bytearray(source.read_bytes())
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        manifest = json.loads(content)
        holder = data.draw(st.sampled_from([manifest, manifest["hookpoints"][POST]["00000"]]))
        value = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
        key = data.draw(st.sampled_from(sorted(holder)))
        holder[key] = data.draw(value | st.lists(value, max_size=2))
        content = bytearray(json.dumps(manifest).encode())
    (tmp_path / "manifest.json").write_bytes(content)
    try:
        parsed = read_manifest(tmp_path)
    except StoreError as error:
        assert "\n" not in str(error)
    else:
        # White space, say.
        assert parsed == json.loads(source.read_bytes())
