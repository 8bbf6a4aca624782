"""`collector=imported`: activations that another tool wrote, read without the model's weights.

Formats:
- `memmap`: a folder with `acts.dat`, float32 `[n, n_layers, n_positions, d_model]`, and perhaps
  `ids.dat`, `[n, seq_len]`, as the code of Ferrando et al. 2024 (arXiv 2411.14257) writes them.
- `npy`: one array, or a folder of arrays called after hookpoints (`layer_2.resid_post.npy`,
  `blocks.2.hook_resid_post.npy`), with the token ids in `ids.npy` or `token_ids.npy`.
- `npz`: the same as the entries of one file.
- `safetensors`: a file or a folder. A tensor, its file or its folder is called after the hookpoint;
  files of one hookpoint are joined in the order of their names.
- `saelens`: the dataset that SAELens' `CacheActivationsRunner` writes, a column per hook name and
  `token_ids`.

An array is `[n, d_model]`, one row per analysed position in the order of the run's rows, or
`[n, n_positions, d_model]`, one row per text. Rows of texts are matched like this:

- With token ids, a row belongs to the text whose token ids it begins with (or, padded on the left,
  ends with). Only the tokens up to the last analysed position must agree, because the activations
  of a causal model do not depend on later ones. The order of rows does not matter.
- Without token ids, row i belongs to example i of the data set, and their numbers must be equal.
- Where there are token ids and `n_positions` equals their length, all tokens of a text are there.
  Otherwise the n_positions vectors of a row belong to the positions that the run chooses in that
  text, in their order, and their numbers must be equal.

Every mismatch is an error; no row is guessed.
"""

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saexp.activations.collector import CollectionRequest, Collector, row_ingredients
from saexp.activations.forward import Batch
from saexp.config import CollectorConfig, ImportedConfig, StoreConfig
from saexp.data.positions import Placement
from saexp.digests import contents, digest_of
from saexp.errors import ConfigError, DataError, ModelError, StoreError
from saexp.models.hookpoints import Hookpoint
from saexp.models.loading import LanguageModel
from saexp.wording import counted

log = logging.getLogger(__name__)

_CHUNK_ROWS = 2048
_IDS = ("ids", "token_ids", "input_ids")
_NAMELESS = ("acts", "activations")
_ANY_WIDTH = ("attn_z",)
"""Streams whose width is not d_model in every model."""
_STORED = (torch.float32, torch.bfloat16, torch.float16)


class TensorArray:
    """Memory-mapped tensors `[n, d]` or `[n, n_positions, d]`, joined along their first axis."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])
        self.shape = (int(self.ends[-1]), *parts[0].shape[1:])
        self.dtype = parts[0].dtype

    def take(self, rows: np.ndarray, columns: np.ndarray | None) -> Tensor:
        """`[k, d]`: the vectors at these rows, and of `[n, n_positions, d]` at these columns."""
        out = torch.empty(len(rows), self.shape[-1], dtype=self.dtype)
        holders = np.searchsorted(self.ends, rows, side="right")
        for holder in np.unique(holders).tolist():
            here = np.flatnonzero(holders == holder)
            part = self.parts[holder]
            local = torch.from_numpy(rows[here] - (self.ends[holder] - len(part)))
            at = (local,) if columns is None else (local, torch.from_numpy(columns[here]))
            out[torch.from_numpy(here)] = part[at]
        return out


class DatasetColumn:
    """A column of a `datasets` dataset, `[n, n_positions, d]`."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.name = dataset.with_format("numpy"), name
        first = torch.from_numpy(np.array(self.dataset[0][name]))
        self.shape, self.dtype = (len(dataset), *first.shape), first.dtype

    def take(self, rows: np.ndarray, columns: np.ndarray | None) -> Tensor:
        """`[k, d]`: the vectors at these rows and columns."""
        assert columns is not None
        out = torch.empty(len(rows), self.shape[-1], dtype=self.dtype)
        for row in np.unique(rows).tolist():
            # One row at a time, because it holds the activations of a whole context.
            here = np.flatnonzero(rows == row)
            context = torch.from_numpy(np.array(self.dataset[row][self.name]))
            out[torch.from_numpy(here)] = context[torch.from_numpy(columns[here])]
        return out


ActivationArray = TensorArray | DatasetColumn


@dataclass(frozen=True)
class ImportedActivations:
    """What the files hold."""

    path: Path
    arrays: Mapping[Hookpoint, ActivationArray]
    token_ids: Int[np.ndarray, "..."] | None
    """`[n, seq_len]` of texts, or `[n]` of positions."""

    @classmethod
    def read(cls, cfg: ImportedConfig) -> "ImportedActivations":
        """Open the files of `cfg.path`; arrays are memory-mapped where the format allows.

        Raises ConfigError for options that the format needs, DataError for files that cannot be
        read or do not fit one another.
        """
        if not cfg.path:
            raise ConfigError(
                "collector=imported needs the activations: type collector.path=FILE or a folder"
            )
        path = Path(cfg.path)
        if not path.exists():
            raise DataError(f"collector.path={path}: no such file or folder")
        kind = _recognised(path) if cfg.format == "auto" else cfg.format
        try:
            arrays, token_ids = _READERS[kind](path, cfg)
        except (OSError, ValueError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"collector.path={path} cannot be read as {kind} ({reason})") from error
        if not arrays:
            raise DataError(
                f"collector.path={path}: no array is called after a hookpoint such as "
                "layer_12.resid_post; rename them, or, for one array, type "
                "'collector.layers=[12]' collector.stream=resid_post"
            )
        if len({array.shape[:-1] for array in arrays.values()}) > 1:
            shapes = ", ".join(f"{h.name} {list(a.shape)}" for h, a in sorted(arrays.items()))
            raise DataError(f"collector.path={path}: the hookpoints have different rows: {shapes}")
        return cls(path, arrays, token_ids)

    @property
    def shape(self) -> tuple[int, ...]:
        """`(n,)` or `(n, n_positions)`, the same for every hookpoint."""
        return next(iter(self.arrays.values())).shape[:-1]

    def locate(self, positions: Placement) -> tuple[np.ndarray, np.ndarray | None]:
        """(row, column or None) in the files of each row of `positions.rows`.

        Raises DataError where they do not match; the rule is in the module's docstring.
        """
        if len(self.shape) == 1:
            return self._locate_vectors(positions)
        texts = _TextMatcher(self, positions)
        return texts.rows, texts.columns

    def _locate_vectors(self, positions: Placement) -> tuple[np.ndarray, None]:
        n, n_rows = self.shape[0], len(positions.rows)
        if n == n_rows:
            rows = np.arange(n)
        elif n == positions.n_examples and not positions.rows["example_id"].duplicated().any():
            rows = positions.example_index
        else:
            raise DataError(
                f"{self.path} holds {counted(n, 'vector')}, but the run analyses "
                f"{counted(n_rows, 'position')} of {counted(positions.n_examples, 'example')}; "
                "give one vector per analysed position, in the order of rows.parquet"
            )
        if self.token_ids is not None:
            self._check_ids(positions, self.token_ids.reshape(-1)[rows])
        return rows, None

    def _check_ids(self, positions: Placement, found: np.ndarray) -> None:
        wanted = positions.rows["token_id"].to_numpy()
        wrong = np.flatnonzero(found != wanted)
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"{self.path}: vector {row} is of token id {found[row]}, and the run's row {row} "
                f"(example '{positions.rows['example_id'].iloc[row]}') is of {wanted[row]}; the "
                "files are of other texts, positions or another tokenizer"
            )


class _TextMatcher:
    """Matches the rows `[n, n_positions]` of files to the texts of a run."""

    def __init__(self, files: ImportedActivations, positions: Placement) -> None:
        self.files, self.positions = files, positions
        self.n, self.n_positions = files.shape
        self.token_ids = files.token_ids
        by_example = positions.rows.groupby(positions.example_index, sort=False)
        self.ordinal = by_example.cumcount().to_numpy()
        """Of each row, its number among the positions of its example."""
        self.n_chosen = by_example["row"].transform("size").to_numpy()
        whole = self.token_ids is not None and self.token_ids.shape[1] == self.n_positions
        if not whole:
            self._check_counts()
        if self.token_ids is None:
            self.rows, self.columns = self._by_order(), self.ordinal
            return
        matches = [self._match(text_id) for text_id in range(len(positions.texts))]
        of_text = positions.rows["text_id"].to_numpy()
        self.rows = np.array([row for row, _ in matches])[of_text]
        starts = np.array([start for _, start in matches])[of_text]
        tokens = positions.rows["token_index"].to_numpy()
        self.columns = starts + tokens if whole else self.ordinal
        if not whole:
            self._check_unique()

    def _check_counts(self) -> None:
        wrong = np.flatnonzero(self.n_chosen != self.n_positions)
        if len(wrong):
            example = self.positions.rows["example_id"].iloc[int(wrong[0])]
            raise DataError(
                f"{self.files.path} holds {counted(self.n_positions, 'position')} of each text, "
                f"but the run chooses {self.n_chosen[wrong[0]]} in example '{example}'; choose "
                "other positions=, or give the token ids beside activations of every token"
            )

    def _by_order(self) -> np.ndarray:
        n_examples = self.positions.n_examples
        if self.n != n_examples:
            raise DataError(
                f"{self.files.path} holds {counted(self.n, 'text')} and no token ids, but the "
                f"data set has {counted(n_examples, 'example')}; without token ids row i must be "
                "example i"
            )
        return self.positions.example_index

    @cached_property
    def _sorted_rows(self) -> list[tuple[tuple[int, ...], int]]:
        assert self.token_ids is not None
        return sorted((tuple(ids), row) for row, ids in enumerate(self.token_ids.tolist()))

    @cached_property
    def _n_read(self) -> np.ndarray:
        """Tokens of each text up to its last analysed position."""
        last = self.positions.rows.groupby("text_id")["token_index"].max()
        return last.reindex(range(len(self.positions.texts))).to_numpy() + 1

    @cached_property
    def _left_padded(self) -> dict[tuple[int, ...], tuple[int, int]]:
        """Token ids behind the padding of a row -> (row, index of their first)."""
        assert self.token_ids is not None
        found: dict[tuple[int, ...], tuple[int, int]] = {}
        for row, ids in enumerate(self.token_ids.tolist()):
            n_pad = next((i for i, token in enumerate(ids) if token != ids[0]), 0)
            # Where padding is the BOS token, the last of them may belong to the text.
            for start in (n_pad, n_pad - 1):
                if start > 0:
                    found.setdefault(tuple(ids[start:]), (row, start))
        return found

    def _match(self, text_id: int) -> tuple[int, int]:
        """(row, index of the text's first token in it)."""
        text = self.positions.texts[text_id]
        prefix = text.ids[: int(self._n_read[text_id])]
        at = bisect_left(self._sorted_rows, (prefix, -1))
        if at < len(self._sorted_rows) and self._sorted_rows[at][0][: len(prefix)] == prefix:
            return self._sorted_rows[at][1], 0
        if text.ids in self._left_padded:
            return self._left_padded[text.ids]
        raise DataError(self._no_match(text.text, prefix, at))

    def _no_match(self, text: str, prefix: tuple[int, ...], at: int) -> str:
        """The error for a text that no row holds, with the row that agrees longest."""
        near = [self._sorted_rows[i] for i in (at - 1, at) if 0 <= i < len(self._sorted_rows)]
        shared = {row: _n_shared(ids, prefix) for ids, row in near}
        row = max(shared, key=lambda row: shared[row])
        n = shared[row]
        ids = next(ids for ids, number in near if number == row)
        there = ids[n] if n < len(ids) else "nothing"
        return (
            f"{self.files.path} has no row with the {len(prefix)} token ids of the text "
            f"'{text[:60]}': row {row} agrees longest and has {there} instead of {prefix[n]} at "
            f"index {n}; the files are of other texts, of another tokenizer, or differ in BOS "
            "(model.prepend_bos=)"
        )

    def _check_unique(self) -> None:
        """Rows with some positions of a text serve one example each: others may be of other ones.

        Where rows and examples have the same order and token ids, that order decides.
        """
        assert self.token_ids is not None
        index = self.positions.example_index
        if self.n == self.positions.n_examples:
            same = (self.token_ids[self.rows] == self.token_ids[index]).all()
            if same:
                self.rows = index
                return
        examples_of_row: dict[int, int] = {}
        for row, example in zip(self.rows.tolist(), index.tolist(), strict=True):
            if examples_of_row.setdefault(row, example) != example:
                name = self.positions.rows["example_id"].iloc[int(np.argmax(index == example))]
                raise DataError(
                    f"{self.files.path}: row {row} is of the text of several examples, such as "
                    f"'{name}', and does not say of which positions; give one row per example in "
                    "the order of the data set, or activations of every token"
                )


def _n_shared(a: Sequence[int], b: Sequence[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _recognised(path: Path) -> str:
    """The format of a file or folder. Raises DataError where none is recognised."""
    if path.suffix in (".npy", ".npz", ".safetensors"):
        return path.suffix[1:]
    if path.suffix == ".dat" or (path / "acts.dat").is_file():
        return "memmap"
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return "saelens"
    for kind in ("safetensors", "npy"):
        if next(path.rglob(f"*.{kind}"), None) is not None:
            return kind
    raise DataError(
        f"collector.path={path} holds neither acts.dat, .npy, .npz, .safetensors nor a dataset "
        "that SAELens cached; type its collector.format="
    )


_Arrays = tuple[dict[Hookpoint, ActivationArray], np.ndarray | None]


def _read_memmap(path: Path, cfg: ImportedConfig) -> _Arrays:
    file = path if path.is_file() else path / "acts.dat"
    if cfg.shape is None:
        raise ConfigError(
            f"{file} does not hold its own shape; type "
            "'collector.shape=[n,n_layers,n_positions,d_model]'"
        )
    rest = tuple(cfg.shape[1:])
    n, n_left = divmod(file.stat().st_size, 4 * int(np.prod(rest)))
    if n_left or cfg.shape[0] not in (n, -1):
        raise ValueError(
            f"{file.stat().st_size} bytes are not float32 of shape {list(cfg.shape)}; "
            "collector.shape="
        )
    # Copy-on-write, so that torch does not warn of a read-only array; nothing is written.
    acts = np.memmap(file, dtype=np.float32, mode="c", shape=(n, *rest))
    ids_file = file.with_name("ids.dat")
    token_ids = None
    if ids_file.is_file():
        flat = np.fromfile(ids_file, dtype=cfg.ids_dtype)
        if len(flat) % n:
            raise ValueError(
                f"{ids_file} holds {len(flat)} ids for {n} texts; collector.ids_dtype="
            )
        token_ids = flat.reshape(n, -1).astype(np.int64)
    return _named(acts, cfg), token_ids


def _named(array: np.ndarray, cfg: ImportedConfig) -> dict[Hookpoint, ActivationArray]:
    """Hookpoints of an array without names, by `collector.layers` and `collector.stream`."""
    if array.ndim == 4:
        layers = list(range(array.shape[1])) if cfg.layers is None else list(cfg.layers)
        if len(layers) != array.shape[1]:
            raise ValueError(
                f"{array.shape[1]} layers, but collector.layers={layers} has {len(layers)}"
            )
        parts = [array[:, i] for i in range(len(layers))]
    elif cfg.layers is None:
        return {}
    elif len(cfg.layers) != 1:
        raise ValueError(f"one layer, but collector.layers={list(cfg.layers)}")
    else:
        layers, parts = list(cfg.layers), [array]
    return {
        Hookpoint(layer, cfg.stream).stored: TensorArray([torch.from_numpy(part)])
        for layer, part in zip(layers, parts, strict=True)
    }


def _hookpoint(name: str) -> Hookpoint | None:
    try:
        return Hookpoint.parse(name).stored
    except (ModelError, ValueError):
        return None


def _from_entries(entries: Mapping[str, np.ndarray], cfg: ImportedConfig) -> _Arrays:
    """Arrays by their names; of a single one without a hookpoint's name, by the config."""
    arrays: dict[Hookpoint, ActivationArray] = {}
    token_ids, nameless = None, []
    for name, array in entries.items():
        at = _hookpoint(name)
        if name in _IDS:
            token_ids = np.asarray(array).astype(np.int64)
        elif at is not None:
            arrays[at] = TensorArray([torch.from_numpy(array)])
        else:
            nameless.append(array)
    if not arrays and len(nameless) == 1:
        return _named(nameless[0], cfg), token_ids
    return arrays, token_ids


def _read_npy(path: Path, cfg: ImportedConfig) -> _Arrays:
    files = [path] if path.is_file() else sorted(path.glob("*.npy"))
    if path.is_file():
        files += [f for name in _IDS if (f := path.with_name(f"{name}.npy")).is_file()]
    entries = {f.stem: np.load(f, mmap_mode="c", allow_pickle=False) for f in files}
    return _from_entries(entries, cfg)


def _read_npz(path: Path, cfg: ImportedConfig) -> _Arrays:
    with np.load(path, allow_pickle=False) as entries:
        return _from_entries(dict(entries), cfg)


def _read_safetensors(path: Path, cfg: ImportedConfig) -> _Arrays:
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    parts: dict[Hookpoint, list[Tensor]] = {}
    nameless: list[Tensor] = []
    token_ids: list[np.ndarray] = []
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                values = opened.get_tensor(name)
                if name in _IDS or (name not in _NAMELESS and file.stem in _IDS):
                    token_ids.append(values.numpy().astype(np.int64))
                    continue
                names = (name, file.stem, file.parent.name)
                at = next((h for n in names if (h := _hookpoint(n)) is not None), None)
                if at is None:
                    nameless.append(values)
                else:
                    parts.setdefault(at, []).append(values)
    ids = np.concatenate(token_ids) if token_ids else None
    if not parts and len(nameless) == 1:
        return _named(nameless[0].numpy(), cfg), ids
    return {at: TensorArray(tensors) for at, tensors in parts.items()}, ids


def _read_saelens(path: Path, cfg: ImportedConfig) -> _Arrays:  # noqa: ARG001
    import datasets

    dataset: Any = datasets.load_from_disk(str(path))
    if isinstance(dataset, datasets.DatasetDict):
        dataset = next(iter(dataset.values()))
    columns = {at: name for name in dataset.column_names if (at := _hookpoint(name)) is not None}
    arrays: dict[Hookpoint, ActivationArray] = {
        at: DatasetColumn(dataset, name) for at, name in columns.items()
    }
    token_ids = None
    if "token_ids" in dataset.column_names:
        token_ids = np.asarray(dataset.with_format("numpy")["token_ids"][:]).astype(np.int64)
    return arrays, token_ids


_READERS: Mapping[str, Callable[[Path, ImportedConfig], _Arrays]] = {
    "memmap": _read_memmap,
    "npy": _read_npy,
    "npz": _read_npz,
    "safetensors": _read_safetensors,
    "saelens": _read_saelens,
}


class ImportedCollector(Collector):
    """`collector=imported`: copies the activations of the run's positions into a store, once."""

    def __init__(self, cfg: CollectorConfig, *, model: LanguageModel, store: StoreConfig) -> None:
        super().__init__(cfg, model=model, store=store)
        assert isinstance(cfg, ImportedConfig)
        self.options = cfg
        self.files = ImportedActivations.read(cfg)
        # Asked for once per shard.
        self._locate = lru_cache(maxsize=1)(self.files.locate)

    @property
    def dtype(self) -> torch.dtype:
        """That of the files where `store.dtype` is auto; float32 for other kinds of numbers."""
        if self.store.dtype != "auto":
            return getattr(torch, self.store.dtype)
        dtype = next(iter(self.files.arrays.values())).dtype
        return dtype if dtype in _STORED else torch.float32

    def ingredients(self, request: CollectionRequest) -> dict[str, Any]:
        """The content of the files stands in the place of the model's weights."""
        cfg = self.options
        return {
            "collector": cfg.name,
            "model": self.model.name,
            "files": digest_of(contents(self.files.path)),
            "layout": digest_of(cfg.format, cfg.shape, cfg.layers, cfg.stream, cfg.ids_dtype),
            **row_ingredients(self.model, request.positions, request.max_length, self.dtype),
        }

    def check(self, request: CollectionRequest) -> None:
        """Raise where the files lack a hookpoint, or their rows do not match the run's."""
        for hookpoint in request.hookpoints:
            self.model.check_layer(hookpoint.layer)
            self.check_hookpoint(hookpoint)
        self._locate(request.positions)

    def check_hookpoint(self, hookpoint: Hookpoint) -> None:
        """Raise DataError where the files do not hold a hookpoint."""
        at, d_model = hookpoint.stored, self.model.d_model
        if at not in self.files.arrays:
            names = ", ".join(h.name for h in sorted(self.files.arrays))
            raise DataError(f"collector.path={self.files.path} has no {at.name}; it has {names}")
        width = self.files.arrays[at].shape[-1]
        if width != d_model and at.stream not in _ANY_WIDTH:
            raise DataError(
                f"collector.path={self.files.path}: {at.name} has vectors of {width} numbers, but "
                f"{self.model.name} has d_model={d_model}"
            )

    def batches(
        self, request: CollectionRequest, rows: Int[np.ndarray, " n"], hookpoints: list[Hookpoint]
    ) -> Iterator[Batch]:
        file_rows, file_columns = self._locate(request.positions)
        text_ids = request.positions.rows["text_id"].to_numpy()
        for start in range(0, len(rows), _CHUNK_ROWS):
            chosen = rows[start : start + _CHUNK_ROWS]
            columns = None if file_columns is None else file_columns[chosen]
            values = {
                h: self.files.arrays[h.stored].take(file_rows[chosen], columns).to(self.dtype)
                for h in hookpoints
            }
            yield Batch(
                rows=np.arange(start, start + len(chosen)),
                text_ids=text_ids[chosen],
                host={h: (lambda v=v: v) for h, v in values.items()},
                n_tokens=0,
                n_padding=0,
            )

    def not_finite(self, hookpoint: Hookpoint, text: str, is_nan: bool) -> StoreError:  # noqa: ARG002
        return StoreError(
            f"collector.path={self.files.path}: NaN or Inf at {hookpoint.name} in the text "
            f"'{text[:60]}'; leave the text out, or write the files again in float32"
        )
