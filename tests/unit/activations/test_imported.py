"""`collector=imported` gives the values of `collector=hf` for files of every format."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from saexp.activations import ActivationStore
from saexp.activations.collection import collect
from saexp.activations.collector import CollectionRequest
from saexp.activations.imported import ImportedCollector
from saexp.config import ImportedConfig, StoreConfig
from saexp.data.positions import PositionTable
from saexp.errors import ConfigError, DataError, StoreError
from saexp.models import Hookpoint
from saexp.models.loading import LanguageModel
from tests.random_models import D_MODEL, N_LAYERS, TEXTS, random_lm
from tests.unit.activations.collecting import MAX_LENGTH, placed, run

LAST = Hookpoint(1, "resid_post")
MIDDLE = [Hookpoint(n, "resid_post") for n in range(N_LAYERS)]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return random_lm("llama")


def imported(
    model: LanguageModel,
    cache: Path,
    positions: PositionTable,
    hookpoints: list[Hookpoint] | None = None,
    store: StoreConfig | None = None,
    **options: Any,
) -> ActivationStore:
    """The store of imported activations; other keyword arguments go into the collector's config."""
    cfg = ImportedConfig(name="imported", **options)
    imported_store, stats = collect(
        ImportedCollector(cfg, model=model, store=store or StoreConfig()),
        CollectionRequest(
            positions=positions, hookpoints=hookpoints or [LAST], max_length=MAX_LENGTH
        ),
        cache_dir=cache,
    )
    assert (stats.tokens_forwarded, stats.n_rows) == (0, len(positions.rows))
    return imported_store


@pytest.fixture(scope="module")
def every(model: LanguageModel) -> tuple[np.ndarray, list[tuple[int, ...]]]:
    """Activations of all tokens, `[n, n_layers, longest, d_model]`, and the token ids."""
    texts = [text.ids for text in placed(include_special=True).texts]
    acts = np.zeros((len(texts), N_LAYERS, max(map(len, texts)), D_MODEL), dtype=np.float32)
    for i, ids in enumerate(texts):
        with torch.no_grad():
            states = model.hf.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        # The last entry is behind the final norm, so the streams are block inputs.
        for layer in range(N_LAYERS):
            acts[i, layer, : len(ids)] = states[layer][0].numpy()
    return acts, texts


def padded(texts: list[tuple[int, ...]], left: bool = False, pad: int = 0) -> np.ndarray:
    longest = max(map(len, texts))
    out = np.full((len(texts), longest), pad, dtype=np.int32)
    for i, ids in enumerate(texts):
        out[i, slice(longest - len(ids), None) if left else slice(0, len(ids))] = ids
    return out


def write_memmap(folder: Path, acts: np.ndarray, ids: np.ndarray | None) -> dict[str, Any]:
    """As the code of the entity-recognition paper writes its files."""
    folder.mkdir()
    acts.astype(np.float32).tofile(folder / "acts.dat")
    if ids is not None:
        ids.tofile(folder / "ids.dat")
    return {"path": str(folder), "shape": list(acts.shape), "stream": "resid_pre"}


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("name", ["all", "last", "middle"])
def test_acts_dat_of_every_token_is_matched_by_token_ids(
    model: LanguageModel, every: Any, tmp_path: Path, left: bool, order: int, name: str
) -> None:
    acts, texts = every
    if left:
        shifts = [acts.shape[2] - len(ids) for ids in texts]
        acts = np.stack([np.roll(a, n, 1) for a, n in zip(acts, shifts, strict=True)])
    options = write_memmap(tmp_path / "files", acts[::order], padded(texts, left)[::order])
    positions = placed(name=name)
    store = imported(model, tmp_path / "cache", positions, MIDDLE[:2], **options)
    expected, _ = run(model, tmp_path / "hf", MIDDLE[:2], positions)
    for at in MIDDLE[:2]:
        torch.testing.assert_close(store.acts(at.layer), expected.acts(at.layer))


@pytest.mark.parametrize("ids", [True, False])
def test_acts_dat_of_chosen_tokens_is_matched_by_the_chosen_positions(
    model: LanguageModel, every: Any, tmp_path: Path, ids: bool
) -> None:
    acts, texts = every
    positions = placed(name="last", n=2)
    chosen = positions.rows["token_index"].to_numpy().reshape(-1, 2)
    some = np.stack([a[:, c] for a, c in zip(acts, chosen, strict=True)])
    options = write_memmap(tmp_path / "files", some, padded(texts) if ids else None)
    store = imported(model, tmp_path / "cache", positions, **options)
    expected, _ = run(model, tmp_path / "hf", [LAST], positions)
    torch.testing.assert_close(store.acts(1), expected.acts(1))


def arrays_by_name(every: Any) -> dict[str, np.ndarray]:
    """Arrays called as TransformerLens and saexp call hookpoints."""
    acts, texts = every
    return {
        "blocks.1.hook_resid_pre": acts[:, 1].copy(),
        "layer_1.resid_post": acts[:, 2].copy(),
        "token_ids": padded(texts),
    }


def write_npz(folder: Path, every: Any) -> Path:
    np.savez(folder / "acts.npz", **arrays_by_name(every))
    return folder / "acts.npz"


def write_npy(folder: Path, every: Any) -> Path:
    for name, array in arrays_by_name(every).items():
        np.save(folder / f"{name}.npy", array)
    return folder


def write_safetensors(folder: Path, every: Any) -> Path:
    """Two files a hookpoint, in a folder of its name, and token ids beside."""
    for name, array in arrays_by_name(every).items():
        tensor = torch.from_numpy(array)
        if name == "token_ids":
            save_file({name: tensor}, folder / "token_ids.safetensors")
            continue
        (folder / name).mkdir()
        for i, part in enumerate((tensor[:3].clone(), tensor[3:].clone())):
            save_file({"acts": part}, folder / name / f"{i:05d}.safetensors")
    return folder


def write_saelens(folder: Path, every: Any) -> Path:
    """As SAELens' CacheActivationsRunner: fixed contexts, a column per hook name."""
    from datasets import Array2D, Dataset, Features, Sequence, Value

    arrays = arrays_by_name(every)
    n = arrays["token_ids"].shape[1]
    array = Array2D(shape=(n, D_MODEL), dtype="float32")
    ids = Sequence(Value("int32"), length=n)
    features = Features({k: ids if k == "token_ids" else array for k in arrays})
    Dataset.from_dict(arrays, features=features).save_to_disk(folder / "cached")
    return folder / "cached"


@pytest.mark.parametrize("write", [write_npz, write_npy, write_safetensors, write_saelens])
def test_named_arrays_of_every_format(
    model: LanguageModel, every: Any, tmp_path: Path, write: Callable[[Path, Any], Path]
) -> None:
    (tmp_path / "files").mkdir()
    positions = placed()
    hookpoints = [Hookpoint(1, "resid_pre"), LAST]
    path = write(tmp_path / "files", every)
    store = imported(model, tmp_path / "cache", positions, hookpoints, path=str(path))
    expected, _ = run(model, tmp_path / "hf", hookpoints, positions)
    for layer in (0, 1):
        torch.testing.assert_close(store.acts(layer), expected.acts(layer))


def test_one_array_with_a_vector_per_position(model: LanguageModel, tmp_path: Path) -> None:
    positions = placed()
    expected, _ = run(model, tmp_path / "hf", [LAST], positions)
    np.save(tmp_path / "acts.npy", expected.acts(1).numpy())
    np.save(tmp_path / "ids.npy", positions.rows["token_id"].to_numpy())
    options = {"path": str(tmp_path / "acts.npy"), "layers": [1]}
    store = imported(model, tmp_path / "cache", positions, **options)
    assert torch.equal(store.acts(1), expected.acts(1))
    other = placed(TEXTS[::-1])
    with pytest.raises(DataError, match="vector 0 is of token id .* of other texts, positions or"):
        imported(model, tmp_path / "cache", other, **options)
    fewer = placed(TEXTS[:2])
    with pytest.raises(DataError, match="vectors, but the run analyses .* positions of 2 examples"):
        imported(model, tmp_path / "cache", fewer, **options)


def test_a_store_is_reused_until_the_files_change(
    model: LanguageModel, every: Any, tmp_path: Path
) -> None:
    path = write_npz(tmp_path, every)
    first = imported(model, tmp_path, placed(), path=str(path)).path
    assert imported(model, tmp_path, placed(), path=str(path)).path == first
    assert imported(model, tmp_path, placed(), path=str(path), stream="resid_pre").path != first
    np.savez(path, **{k: v * 2 for k, v in arrays_by_name(every).items() if v.ndim == 3})
    with pytest.raises(DataError, match="the run chooses"):
        imported(model, tmp_path, placed(), path=str(path))


def test_files_of_other_texts_are_one_clear_error(
    model: LanguageModel, every: Any, tmp_path: Path
) -> None:
    path = write_npz(tmp_path, every)
    with pytest.raises(DataError) as error:
        imported(model, tmp_path, placed([*TEXTS, "Something else."]), path=str(path))
    message = str(error.value)
    assert message.startswith(f"{path} has no row with the ")
    assert "token ids of the text 'Something else.': row " in message
    assert message.endswith("or differ in BOS (model.prepend_bos=)")


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, ConfigError, "^collector=imported needs the activations: type collector.path=FILE"),
    ({"path": "nowhere"}, DataError, "^collector.path=nowhere: no such file or folder$"),
    ({"path": "."}, DataError, "holds neither acts.dat, .npy, .npz, .safetensors nor a dataset"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD)
def test_missing_files_are_one_clear_error(
    model: LanguageModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    kind: type[Exception],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=message):
        imported(model, tmp_path, placed(), **options)


def test_options_that_do_not_fit_the_files_are_one_clear_error(
    model: LanguageModel, every: Any, tmp_path: Path
) -> None:
    options = write_memmap(tmp_path / "files", every[0], None)
    shape = options.pop("shape")

    def message(positions: PositionTable | None = None, **more: Any) -> str:
        with pytest.raises((ConfigError, DataError)) as error:
            imported(model, tmp_path, positions or placed(), **{**options, **more})
        return str(error.value)

    assert "type 'collector.shape=[n,n_layers,n_positions,d_model]'" in message()
    assert "are not float32 of shape" in message(shape=[1, *shape[1:]])
    assert "collector.layers=[4] has 1" in message(shape=shape, layers=[4])
    assert "has no layer_1.resid_post; it has layer_6.resid_post" in message(
        shape=shape, layers=[7, 8, 9]
    )
    wide = [shape[0], shape[1] * 2, shape[2], D_MODEL // 2]
    assert f"but random-llama has d_model={D_MODEL}" in message(shape=wide, layers=None)
    some = write_memmap(tmp_path / "some", every[0][:, :, :1], None)
    assert "holds 1 position of each text, but the run chooses" in message(**some)
    last = placed([*TEXTS, "One more."], "last")
    assert "and no token ids, but the data set has" in message(last, **some)


def test_a_row_of_some_positions_serves_one_example(
    model: LanguageModel, every: Any, tmp_path: Path
) -> None:
    acts, texts = every
    files = write_memmap(tmp_path / "files", acts[:, :, :1], padded(texts))
    with pytest.raises(DataError, match="is of the text of several examples, such as "):
        imported(model, tmp_path, placed([*TEXTS, TEXTS[0]], "last"), **files)


def test_a_value_that_is_not_finite_names_file_and_text(
    model: LanguageModel, every: Any, tmp_path: Path
) -> None:
    acts = every[0].copy()
    acts[2, 2] = np.nan
    options = write_memmap(tmp_path / "files", acts, padded(every[1]))
    with pytest.raises(StoreError, match=f"files: NaN or Inf at {LAST.name} in the text"):
        imported(model, tmp_path, placed(), **options)


def test_no_pickle_is_opened(model: LanguageModel, tmp_path: Path) -> None:
    np.save(tmp_path / "acts.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read as npy"):
        imported(model, tmp_path, placed(), path=str(tmp_path / "acts.npy"))
