"""Why one store was not used in place of another, in words."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from saexp.activations.store import ActivationStore
from saexp.wording import counted

_SHOWN = 8
"""Hex digits shown of a hash."""
_TOLD = 60
"""Characters shown of a setting."""


def headline(store: ActivationStore) -> str:
    """One line on what a store holds."""
    about, made_of = store.manifest.get("about", {}), store.manifest["ingredients"]
    parts = [made_of.get("model"), about.get("dataset"), about.get("positions")]
    parts += [counted(store.n_rows, "row"), made_of.get("dtype"), *store.manifest["hookpoints"]]
    return f"{store.path.name}: {', '.join(str(part) for part in parts if part)}"


def differences(first: ActivationStore, second: ActivationStore) -> list[str]:
    """A line per ingredient of the key that differs; hashes stand behind the names they are of."""
    a, b = first.manifest["ingredients"], second.manifest["ingredients"]
    lines = []
    for name in sorted({*a, *b}):
        if a.get(name) == b.get(name):
            continue
        if name in _NAMED and name in a and name in b:
            one, two = (_NAMED[name](s, o) for s, o in ((first, second), (second, first)))
            line = f"{name}: {one} ({_short(a[name])}) and {two} ({_short(b[name])})"
            lines.append(line + (_common(first, second) if name == "texts" else ""))
        else:
            lines.append(f"{name}: {json.dumps(a.get(name))} and {json.dumps(b.get(name))}")
    return lines


def _short(digest: Any) -> str:
    return str(digest)[:_SHOWN]


def _model(store: ActivationStore, _: ActivationStore) -> str:
    return str(store.manifest["ingredients"].get("model"))


def _texts(store: ActivationStore, other: ActivationStore) -> str:
    about = store.manifest.get("about", {})
    settings = _settings(store, other, "dataset_settings")
    n, bos = about.get("n_texts"), about.get("begins_with_bos")
    if n is not None:
        settings.append(counted(n, "text"))
    if bos is not None and bos != other.manifest.get("about", {}).get("begins_with_bos", bos):
        settings.append(f"{'with' if bos else 'without'} BOS in front")
    return ", ".join([str(about.get("dataset", "unnamed")), *settings])


def _positions(store: ActivationStore, other: ActivationStore) -> str:
    name = str(store.manifest.get("about", {}).get("positions", "unnamed"))
    settings = _settings(store, other, "positions_settings")
    return ", ".join([name, *settings, counted(store.n_rows, "row")])


def _settings(store: ActivationStore, other: ActivationStore, kind: str) -> list[str]:
    """What was set otherwise than in the other store, as `key=value`."""
    mine, theirs = (s.manifest.get("about", {}).get(kind, {}) for s in (store, other))
    told = {k: str(v) for k, v in mine.items() if k not in theirs or theirs[k] != v}
    return [f"{k}={v if len(v) <= _TOLD else v[:_TOLD] + '…'}" for k, v in told.items()]


_NAMED: Mapping[str, Callable[[ActivationStore, ActivationStore], str]] = {
    "texts": _texts,
    "positions": _positions,
    "weights": _model,
    "tokenizer": _model,
}
"""Ingredients that are hashes -> (store, the other one) -> what the hash is of."""


def _common(first: ActivationStore, second: ActivationStore) -> str:
    """What the two stores' texts have in common; nothing where a rows table does not tell."""
    tables = [s.saved_rows(["text"]) for s in (first, second)]
    if any(rows is None for rows in tables):
        return ""
    one, two = (list(dict.fromkeys(rows["text"])) for rows in tables if rows is not None)
    if one == two:
        return "; the same texts, other tokens"
    if set(one) == set(two):
        return "; the same texts in another order"
    return f"; {counted(len(set(one) & set(two)), 'text')} in both"
