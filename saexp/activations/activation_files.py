"""Files of activations that other tools wrote.

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

An array is `[n, d_model]` or `[n, n_positions, d_model]`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saexp.config import ImportedConfig
from saexp.errors import ConfigError, DataError, ModelError
from saexp.models import Hookpoint

_IDS = ("ids", "token_ids", "input_ids")
_NAMELESS = ("acts", "activations")


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
class ActivationFiles:
    """Activations that another tool wrote, by hookpoint."""

    path: Path
    arrays: Mapping[Hookpoint, ActivationArray]
    token_ids: Int[np.ndarray, "..."] | None
    """`[n, seq_len]` of texts, or `[n]` of positions."""

    @classmethod
    def read(cls, cfg: ImportedConfig) -> "ActivationFiles":
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
    return _by_hookpoint(acts, cfg), token_ids


def _by_hookpoint(array: np.ndarray, cfg: ImportedConfig) -> dict[Hookpoint, ActivationArray]:
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
        return _by_hookpoint(nameless[0], cfg), token_ids
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
        return _by_hookpoint(nameless[0].numpy(), cfg), ids
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
