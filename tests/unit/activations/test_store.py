"""The store on disk: shards, keys, rows, damage, and the errors where it cannot be used."""

import hashlib
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import saexp
from saexp.activations import ActivationStore, store_key
from saexp.activations.reader import ShuffledReader
from saexp.config import ModelConfig
from saexp.errors import ModelError, StoreError
from saexp.files import write_atomically
from saexp.models import Hookpoint
from saexp.models.loading import LanguageModel
from tests.random_models import TEXTS, random_hf, random_lm, save, tokenizer
from tests.unit.activations.collecting import MAX_LENGTH, POSTS, digests, n_tokens, placed, run

SHARDS = 7
SHARD_ROWS = -(-len(placed().rows) // SHARDS)


@pytest.fixture(scope="module")
def model():
    return random_lm("llama")


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A store in seven shards, which no test changes."""
    return run(model, tmp_path_factory.mktemp("whole"), shard_rows=SHARD_ROWS)[0]


@pytest.fixture()
def sharded(whole, tmp_path):
    """A copy of it, in `tmp_path`."""
    folder = tmp_path / "activations" / whole.path.name
    shutil.copytree(whole.path, folder)
    return ActivationStore.open(folder)


def message_of(make) -> str:
    with pytest.raises(StoreError) as error:
        make()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_several_shards_hold_what_one_holds_in_dataset_order(model, whole, tmp_path):
    one, _ = run(model, tmp_path)
    assert (len(one.shard_bounds), len(whole.shard_bounds)) == (1, SHARDS)
    assert one.rows.equals(whole.rows)
    for layer in range(3):
        torch.testing.assert_close(whole.acts(layer), one.acts(layer), atol=1e-5, rtol=0)
        folder = whole.path / f"layer_{layer}.resid_post"
        shards = [load_file(f)["acts"] for f in sorted(folder.glob("*.safetensors"))]
        assert len(shards) == SHARDS
        assert torch.equal(torch.cat(shards), whole.acts(layer))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard_rows", [SHARD_ROWS, 10**6])
def test_acts_are_memory_mapped_and_writing_to_them_changes_no_file(
    model, tmp_path, shard_rows, dtype
):
    store, _ = run(model, tmp_path, shard_rows=shard_rows, dtype=dtype)
    acts = store.acts(1)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(store.path) in maps.read_text()
    original, before = acts.clone(), digests(store.path)
    acts += 1
    assert digests(store.path) == before
    assert torch.equal(ActivationStore.open(store.path).acts(1), original)


def test_reading_a_store_writes_no_file_into_it(whole):
    before = digests(whole.path)
    acts = whole.acts(1)
    assert digests(whole.path) == before
    assert torch.equal(whole.values(1)[:], acts)
    assert digests(whole.path) == before


def test_values_are_read_by_rows_masks_and_slices_from_the_shards_that_hold_them(whole):
    acts, values = whole.acts(1), whole.values(1)
    assert (len(values), values.shape, values.dtype) == (len(acts), tuple(acts.shape), acts.dtype)
    rows = np.random.default_rng(0).integers(0, len(acts), 50)
    assert torch.equal(values[rows], acts[rows])
    assert torch.equal(values[torch.from_numpy(rows)], acts[rows])
    mask = torch.from_numpy(np.random.default_rng(1).random(len(acts)) < 0.3)
    assert torch.equal(values[mask], acts[mask])
    for part in (slice(None), slice(3, 5), slice(2, -3, 4), slice(5, 5), slice(len(acts), None)):
        assert torch.equal(values[part], acts[part])
    assert values[[]].shape == (0, acts.shape[1])
    for index, shown in ((3, "0-d int"), (rows[None], "2-d int"), (rows / 2, "1-d float")):
        with pytest.raises(IndexError, match=rf"{shown}\w* indices; type row numbers in one"):
            values[index]
    with pytest.raises(IndexError, match="several indices; type row numbers in one dimension"):
        values[3, 0]
    assert values[rows[:0]].shape == (0, acts.shape[1])


@pytest.mark.parametrize("damage", ["shortened", "removed"])
def test_a_shard_that_is_damaged_while_it_is_read_is_one_clear_error(sharded, damage):
    values, rows = sharded.values(1), np.arange(sharded.n_rows)[::-2]
    _ = values.shape
    file = sharded.path / "layer_1.resid_post" / "00003.safetensors"
    content = file.read_bytes()
    file.unlink() if damage == "removed" else file.write_bytes(content[: len(content) // 2])
    assert "00003.safetensors cannot be read" in message_of(lambda: values[rows])


def peak_of(read) -> int:
    """Bytes by which the resident memory of this process grows at most while `read` runs."""
    Path("/proc/self/clear_refs").write_text("5", "utf-8")
    before = _resident("VmRSS")
    read()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux resets a process's peak memory"
)
def test_random_rows_of_a_large_shard_are_unmapped_while_the_next_are_read(tmp_path):
    n_rows, width = 2**16, 128
    rows = pd.DataFrame({"text_id": np.arange(n_rows), "token_index": 0, "token_id": 0})
    store = ActivationStore.create_or_open(tmp_path, {"weights": "w"}, rows, shard_rows=n_rows)
    written = torch.arange(n_rows, dtype=torch.float32)[:, None].expand(n_rows, width)
    store.write_shard(Hookpoint(0, "resid_post"), 0, written)
    values, rng = store.values(0), np.random.default_rng(0)

    def read() -> None:
        for _ in range(4):
            chosen = rng.integers(0, n_rows, n_rows // 16)
            assert torch.equal(values[chosen][:, 5].long(), torch.from_numpy(chosen))

    read()
    assert peak_of(read) < 2**24, "of the 32 MB of the shard, whose rows are all over it"


def test_shuffled_batches_of_several_shards_are_those_of_one_tensor(whole):
    rows = np.arange(1, whole.n_rows, 2)
    readers = [ShuffledReader(of, rows, 7, seed=0) for of in (whole.acts(1), whole.values(1))]
    for one, several in itertools.islice(zip(*readers, strict=True), 12):
        assert torch.equal(one, several)


@pytest.mark.parametrize("rows", [[-1], [0, 10**6], [True]])
def test_rows_that_a_store_does_not_have_are_an_index_error(whole, rows):
    with pytest.raises(IndexError):
        whole.values(1)[np.asarray(rows)]


@pytest.mark.parametrize("chunk_rows", [1, 5, SHARD_ROWS, 1000])
def test_chunks_and_norms_are_those_of_all_rows(whole, chunk_rows):
    chunks = list(whole.chunks(POSTS[1], chunk_rows))
    assert torch.equal(torch.cat([acts for _, acts in chunks]), whole.acts(1))
    assert all(len(acts) <= chunk_rows for _, acts in chunks)
    assert [first for first, _ in chunks] == [
        sum(len(a) for _, a in chunks[:i]) for i in range(len(chunks))
    ]
    expected = np.sqrt((whole.acts(1).numpy().astype(np.float64) ** 2).sum(1))
    opened = ActivationStore.open(whole.path)
    np.testing.assert_allclose(opened.norms(POSTS[1]), expected)
    assert opened.norms(POSTS[1]) is opened.norms(POSTS[1]), "computed once"


def test_rows_have_the_columns_of_the_contract(whole):
    rows, placement = saexp.open_store(whole.path).rows, placed()
    assert rows.equals(placement.rows)
    assert {
        *("row", "example_id", "group", "split", "entity_type"),
        *("text", "token_index", "token_id", "token"),
    } <= set(rows.columns)
    assert len(rows) == whole.n_rows
    for row in rows.itertuples():
        ids = tokenizer()(row.text).input_ids
        assert ids[row.token_index] == row.token_id
        assert tokenizer().convert_ids_to_tokens(row.token_id) == row.token


def test_the_manifest_says_it_in_words_with_a_checksum_per_shard(whole, model):
    manifest = json.loads((whole.path / "manifest.json").read_text())
    assert manifest["key"] == whole.path.name == store_key(manifest["ingredients"])
    ingredients = manifest["ingredients"]
    assert ingredients["model"] == "random-llama"
    assert ingredients["weights"] == model.fingerprint
    assert (ingredients["dtype"], ingredients["max_length"]) == ("float32", MAX_LENGTH)
    assert manifest["n_rows"] == whole.n_rows
    assert set(manifest["hookpoints"]) == {p.name for p in POSTS}
    for name, shards in manifest["hookpoints"].items():
        assert len(shards) == SHARDS
        assert sum(s["n_rows"] for s in shards.values()) == whole.n_rows
        for index, shard in shards.items():
            content = (whole.path / name / f"{index}.safetensors").read_bytes()
            assert hashlib.sha256(content).hexdigest() == shard["sha256"]
            assert len(content) == shard["bytes"]


def test_the_key_does_not_depend_on_how_it_is_collected(model, whole, tmp_path):
    settings = [
        {"hookpoints": POSTS[:1]},
        {"hookpoints": [Hookpoint(1, "mlp_out")]},
        {"batch_tokens": 3},
        {"shard_rows": 1000},
        {"dtype": "float32"},
    ]
    for number, options in enumerate(settings):
        other, _ = run(model, tmp_path / str(number), **options)
        assert other.path.name == whole.path.name


def test_labels_are_no_part_of_the_key_and_the_last_ones_are_in_rows(sharded, model, tmp_path):
    other = placed(groups=("a", "b"))
    again, stats = run(model, tmp_path, placement=other)
    assert again.path == sharded.path
    assert stats.tokens_forwarded == 0
    assert again.rows.equals(other.rows)
    assert again.rows["group"].unique().tolist() == ["a", "b"]


def test_the_key_depends_on_all_that_determines_the_values(whole, tmp_path):
    def key(hf=None, placement=None, revision=None, **options):
        hf = hf or random_lm("llama").hf
        model = LanguageModel.wrap(hf, tokenizer(), name="random-llama")
        model.cfg.revision = revision
        return run(model, tmp_path, POSTS[:1], placement, **options)[0].path.name

    # One token differs and no position does.
    other_texts = [*TEXTS[:4], TEXTS[4].replace(".", "!")]
    assert placed(other_texts).rows["token_index"].equals(placed().rows["token_index"])
    changed = random_hf("llama")
    changed.model.layers[2].mlp.up_proj.weight[0, 0] += 1
    assert key() == whole.path.name
    keys = [
        key(hf=changed),
        key(hf=random_hf("llama").bfloat16(), dtype="float32"),
        key(placement=placed(other_texts)),
        key(placement=placed(TEXTS[::-1])),
        key(placement=placed(name="last")),
        key(placement=placed(name="last", n=2)),
        key(dtype="bfloat16"),
        key(max_length=MAX_LENGTH + 1),
        key(revision="v2"),
    ]
    assert len({*keys, whole.path.name}) == len(keys) + 1


def test_the_rows_table_is_left_alone_by_a_run_with_the_same_labels(sharded, model, tmp_path):
    file = sharded.path / "rows.parquet"
    before = file.stat().st_mtime_ns, file.stat().st_ino
    run(model, tmp_path, [Hookpoint(0, "embed")])
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == before


@pytest.mark.parametrize("content", [None, b"", b"PAR1 but not really"])
def test_a_lost_or_damaged_rows_table_is_written_again(sharded, model, tmp_path, content):
    file = sharded.path / "rows.parquet"
    file.unlink() if content is None else file.write_bytes(content)
    again, stats = run(model, tmp_path)
    assert stats.tokens_forwarded == 0
    assert again.rows.equals(placed().rows)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_a_damaged_shard_is_noticed_and_computed_again(sharded, model, tmp_path, damage):
    before = digests(sharded.path)
    damage(sharded.path / "layer_1.resid_post" / "00002.safetensors")
    opened = ActivationStore.open(sharded.path)
    assert opened.missing(POSTS) == {2: [POSTS[1]]}
    assert opened.hookpoints == [POSTS[0], POSTS[2]]
    assert message_of(lambda: opened.acts(1)) == (
        f"{sharded.path} does not have all of layer_1.resid_post; "
        "it has layer_0.resid_post, layer_2.resid_post"
    )
    _, stats = run(model, tmp_path)
    assert 0 < stats.tokens_forwarded < n_tokens(placed())
    assert digests(sharded.path) == before


def test_verify_reads_large_shards_too(sharded, monkeypatch):
    monkeypatch.setattr("saexp.activations._HASH_ON_OPEN_BYTES", 10)
    flip(sharded.path / "layer_1.resid_post" / "00002.safetensors")
    assert ActivationStore.open(sharded.path).missing(POSTS) == {}
    assert ActivationStore.open(sharded.path, verify=True).missing(POSTS) == {2: [POSTS[1]]}


def test_opening_a_folder_that_is_not_a_store_is_an_error(tmp_path, sharded):
    assert message_of(lambda: ActivationStore.open(tmp_path)) == (
        f"{tmp_path} holds no activation store (no manifest.json)"
    )
    (sharded.path / "manifest.json").write_text("{")
    assert message_of(lambda: saexp.open_store(sharded.path)).startswith(
        f"{sharded.path}/manifest.json cannot be read ("
    )


def test_asking_for_what_was_not_collected(whole):
    assert message_of(lambda: whole.acts(1, "mlp_out")) == (
        f"{whole.path} does not have all of layer_1.mlp_out; "
        "it has layer_0.resid_post, layer_1.resid_post, layer_2.resid_post"
    )
    with pytest.raises(ModelError, match="^no stream 'resid'; did you mean resid"):
        whole.acts(1, "resid")


def test_a_cache_folder_that_cannot_be_written(model, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for cache_dir in (tmp_path / "file", tmp_path / "file" / "deeper"):
        message = message_of(lambda cache_dir=cache_dir: run(model, cache_dir))
        assert message.startswith(f"cannot write {cache_dir}/activations/")
        assert message.endswith(": Not a directory; choose another cache_dir=")


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    file = tmp_path / "kept.bin"
    file.write_bytes(b"before")

    def full_disk(path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    message = message_of(lambda: write_atomically(file, full_disk))
    assert message.startswith(f"disk full: {file}, and ")
    assert message.endswith("run the command again, or choose another cache_dir=")
    assert [p.name for p in tmp_path.iterdir()] == ["kept.bin"]
    assert file.read_bytes() == b"before"


def test_at_one_path_other_weights_and_another_dtype_make_other_stores(tmp_path):
    keys = set()
    for seed, dtype in ((0, "float32"), (0, "bfloat16"), (1, "float32")):
        save(random_hf("gpt2", seed=seed), tmp_path / "model")
        cfg = ModelConfig(name=str(tmp_path / "model"), device="cpu", dtype=dtype)
        keys.add(run(LanguageModel(cfg), tmp_path, POSTS[:1], dtype="float32")[0].path.name)
    assert len(keys) == 3
