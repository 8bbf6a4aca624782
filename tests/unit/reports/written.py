"""Folders as runs and sweeps leave them, written by hand, so that every number is known."""

import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

CONFIG = {
    "task": {"name": "analyze"},
    "model": {"name": "tiny"},
    "sae": {"name": "tiny"},
    "dataset": {"name": "entities"},
    "intervention": {"name": "steer"},
    "layer": 2,
    "width": 256,
    "coefficient": [0.0, 0.5],
}


def write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


def cell(
    sweep: Path,
    number: int,
    *overrides: str,
    metrics: dict[str, Any] | None = None,
    effects: list[dict[str, Any]] | None = None,
    error: str | None = None,
    **config: Any,
) -> Path:
    """A cell's folder: finished with these metrics, failed with this error, or else cut off.

    `effects` are rows of its effects_summary.parquet.
    """
    cell_folder = sweep / f"{number}_{','.join(overrides)}"[:100].replace("/", "_")
    (cell_folder / ".hydra").mkdir(parents=True)
    text = yaml.safe_dump(list(overrides))
    (cell_folder / ".hydra/overrides.yaml").write_text(text, encoding="utf-8")
    about: dict[str, Any] = {"config": {**CONFIG, **config}}
    if metrics is not None:
        write_json(cell_folder / "metrics.json", metrics)
        about = {"status": "finished", **about}
        (cell_folder / "report.html").touch()
    if effects:
        pd.DataFrame(effects).to_parquet(cell_folder / "effects_summary.parquet", index=False)
    write_json(cell_folder / "provenance.json", about)
    if error is not None:
        (cell_folder / "error.txt").write_text(error, encoding="utf-8")
    return cell_folder


def contrast(
    group: str,
    latent: int | None,
    *,
    train: Any = None,
    test: Any = None,
    p_value: float = 1e-5,
) -> dict[str, Any]:
    """A direction's metrics; intervals are 0.03 below to 0.01 above, separation is half."""
    key, metrics = "contrast/best", {f"contrast/best_latent_{group}": latent}
    metrics[f"{key}_p_value_{group}_test"] = None if test is None else p_value
    for name, share in (("auroc", 1.0), ("separation", 0.5)):
        for suffix, value in (("", train), ("_test", test)):
            here = None if value is None else value * share
            metrics[f"{key}_{name}_{group}{suffix}"] = here
            metrics[f"{key}_{name}_{group}_ci_low{suffix}"] = None if here is None else here - 0.03
            metrics[f"{key}_{name}_{group}_ci_high{suffix}"] = None if here is None else here + 0.01
    return metrics


def effect(
    direction: str,
    coefficient: float,
    value: float,
    low: Any = None,
    high: Any = None,
    *,
    condition: str | None = None,
    train: float | None = None,
    p: float | None = None,
    chosen: bool = False,
) -> list[dict[str, Any]]:
    """Rows of a summary: the rate when acting on a direction's latents, and its controls' range.

    Without changes the rate is 0.3; `train` is its change on train prompts, where controls do
    nothing. The interval is 0.1 to each side.
    """
    name = condition or f"{direction}_group"
    about = {"condition": name, "role": "single" if condition else "group", "of": name}
    about |= {"direction": direction, "coefficient": coefficient, "main": True, "split": "test"}
    about |= {"refusal_n": 40, "group": "all", "chosen": chosen, "refusal_p_controls_floor": 0.01}
    about |= {"refusal_p_controls": float("nan") if p is None else p}

    def row(value: float, **more: Any) -> dict[str, Any]:
        numbers = {"refusal": value, "refusal_change": value - 0.3}
        numbers |= {"refusal_ci_low": value - 0.1, "refusal_ci_high": value + 0.1}
        return about | numbers | more

    rows = [row(value)]
    control = {"role": "control", "main": False}
    for number, end in enumerate((low, high)):
        if end is not None:
            rows.append(row(end, condition=f"{name}_control_{number}", **control))
    if train is not None:
        of_train = {"split": "train", "chosen": False}
        rows.append(row(0.3 + train, **of_train))
        rows.append(row(0.3, **of_train, **control, condition=f"{name}_control_0"))
    return rows


METRICS = {
    **{"contrast/n_units_known_test": 18, "contrast/n_units_unknown_test": 22},
    **{"contrast/n_units_test": 40, "contrast/n_significant": 3, "contrast/n_tested": 90},
    **{"collection/n_rows": 80, "sparsity/l0": 12.5},
    **contrast("known", 7, train=0.95, test=0.9),
    **{"contrast/best_min_auroc_known_test": 0.85, "contrast/best_min_separation_known_test": 0.4},
    **contrast("unknown", None),
}
NASTY = "</script><b>&"
N_CONTROLS = 49


def latents() -> pd.DataFrame:
    """Two selected latents for `known` (rank 2 stands first), one selected for none."""
    return _latents().copy()


@cache
def _latents() -> pd.DataFrame:
    table = pd.DataFrame({"latent": [4, 7, 30], "layer": 2, "rank": [2, 1, 0]})
    table["selected"], table["direction"] = [True, True, False], ["known", "known", "unknown"]
    table["auroc_test"], table["min_auroc_test"] = [0.8, 0.9, 0.5], [0.7, 0.85, 0.5]
    table["ci_low_test"], table["ci_high_test"] = [0.7, 0.87, 0.4], [0.9, 0.91, 0.6]
    table["p_value_test"] = [0.01, 1e-7, 1.0]
    table["q_value"], table["q_value_test"] = [0.01, 1e-9, 1.0], [0.02, 1e-6, 1.0]
    for group in ("known", "unknown"):
        table[f"freq_{group}_test"] = [0.5, 0.9, 0.1]
        table[f"mean_{group}_test"] = [1.5, 2.0, 0.0]
    for kind in ("player", "city"):
        table[f"separation_{kind}"] = table[f"separation_{kind}_test"] = [0.4, 0.45, 0.0]
    table["separation"] = table["separation_test"] = table["min_separation_test"] = [0.4, 0.45, 0.0]
    table["background_freq"] = 0.001
    return table


def summary() -> pd.DataFrame:
    """`known_group` on unknown prompts, test split; 0.6 was chosen on train prompts."""
    return _summary().copy()


@cache
def _summary() -> pd.DataFrame:
    keys = ["condition", "role", "of", "direction", "latent", "group", "coefficient", "refusal"]
    selected = ["known_group", "group", "", "known", "7+4", "unknown"]
    single = ["known_7", "single", "", "known", "7", "unknown"]
    rows: list[list[Any]] = [["baseline_unknown", "baseline", "", "", "", "unknown", 0.0, 0.8]]
    rows += [
        [*selected, 0.0, 0.8],
        [*selected, 0.6, 0.3],
        [*selected, 0.9, 0.2],
        [*single, 0.6, 0.5],
    ]
    for at, low, high in ((0.6, 0.7, 0.75), (0.9, 0.25, 0.3)):
        for number in range(N_CONTROLS):
            control = [f"control_{number}", "control", "known_group", "known", ""]
            rows.append([*control, "unknown", at, low if number % 2 == 0 else high])
    table = pd.DataFrame(rows, columns=keys)
    table["refusal_n"] = table["refusal_n_prompts"] = 20
    table["refusal_change"], table["refusal_p"] = table["refusal"] - 0.8, 0.004
    for suffix in ("_change_ci_low", "_change_ci_high"):
        table[f"refusal{suffix}"] = table["refusal_change"]
    table["split"], table["in_resid_norm"] = "test", table["coefficient"]
    known = table["condition"].str.startswith("known")
    table["chosen"] = (table["coefficient"] == 0.6) & known
    table["main"] = table["condition"] == "known_group"
    table["refusal_ci_low"], table["refusal_ci_high"] = table["refusal"] - 0.1, table["refusal"]
    is_control = table["role"] == "control"
    table["control_kind"] = np.where(is_control, "random_norm", "")
    tested = table["main"] & (table["coefficient"] > 0)
    for name in ("p_random_norm", "p_controls"):
        table[f"refusal_{name}"] = np.where(tested, 0.02, np.nan)
    table["refusal_p_controls_floor"] = np.where(tested, 0.02, np.nan)
    table["refusal_p_controls_holm"] = np.where(tested & table["chosen"], 0.04, np.nan)
    return table


def controls() -> pd.DataFrame:
    """The controls of `summary`: random directions, all matched."""
    table = summary()
    table = table[table["role"] == "control"]
    frame = table[["of", "condition", "control_kind", "coefficient"]].copy()
    frame["frequency_ratio"], frame["norm_ratio"], frame["kl_ratio"] = np.nan, 1.0, 0.5
    return frame.assign(kl=0.1, kl_own=0.2, matched=True)


def effects(texts: dict[str, str]) -> pd.DataFrame:
    """One prompt under every condition; `texts` are by condition."""
    table = summary()[["condition", "role", "of", "group", "coefficient"]]
    return table.assign(
        example_id="a",
        entity_type="player",
        prompt=f"prompt {NASTY}",
        split="test",
        generated_text=[texts.get(c, "plain") for c in table["condition"]],
        refusal=False,
    )


def _rows() -> pd.DataFrame:
    return pd.DataFrame({"entity": ["Ada", None], "text": ["about Ada", "none"]})


def _effects() -> pd.DataFrame:
    return effects({"known_group": f"steered {NASTY}", "control_0": "first control"})


@cache
def _parquet_of(table: Callable[[], pd.DataFrame]) -> bytes:
    """What the table's file holds, written once for the folders of all tests."""
    file = io.BytesIO()
    table().to_parquet(file, index=False)
    return file.getvalue()


def run(folder: Path, *, causal: bool = True, notes: tuple[str, ...] = ()) -> Path:
    """A finished run's folder with everything that reports read."""
    config = {
        **CONFIG,
        "positions": {"name": "entity_last"},
        "analyzer": {"name": "contrast", "alpha": 0.05},
        "intervention": {
            "name": "steer" if causal else "none",
            "unit": "resid_norm",
            "where": "entity_last",
            "outcomes": ["refusal"],
        },
    }
    write_json(folder / "metrics.json", METRICS)
    about = {"status": "finished", "config": config, "groups": ["known", "unknown"], "seed": 0}
    about |= {"notes": list(notes), "skips": {"no entity": 2}, "command": f"saexp {NASTY}"}
    about |= {"started": "2026-01-01", "versions": {"saexp": "0"}, "seconds": {"load": 1.0}}
    about["model"] = {"name": "org/tiny", "revision": None, "fingerprint": "ab", "d_model": 8}
    about["sae"] = {"name": "mine", "hookpoint": "layer_2.resid_post", "d_sae": 256}
    about["sae"] |= {"architecture": "relu", "fingerprint": "cd"}
    about["dataset"] = {"name": "entities", "n_examples": 80}
    about["machine"] = {"system": "Linux", "cores": 2, "device": "cpu"}
    about["store"] = {"key": "17e1"}
    write_json(folder / "provenance.json", about)
    tables: dict[str, Callable[[], pd.DataFrame]] = {"latents": latents, "rows": _rows}
    if causal:
        tables |= {"effects_summary": summary, "controls": controls, "effects": _effects}
    for name, table in tables.items():
        (folder / f"{name}.parquet").write_bytes(_parquet_of(table))
    return folder
