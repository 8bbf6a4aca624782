"""Names and groups of runs, and the values of a config by which a tracker compares runs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from saexp.sweeps import group_name, group_of, run_name, tracked_config

CONFIG: dict[str, Any] = {
    **{"layer": 2, "width": "16k", "coefficient": [0.6], "seed": 0, "tracker": {"name": None}},
    **{"model": {"name": "google/gemma-2-2b"}, "sae": {"name": "gemmascope", "release": None}},
}


def plan_of(sweep: Path, *cells: list[str], **content: Any) -> Path:
    (sweep / "plan.json").write_text(json.dumps({"cells": cells, "passes": {}, **content}))
    return sweep


def test_runs_are_named_after_what_varies_in_their_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    assert run_name(CONFIG, tmp_path, None) == "gemma-2-2b · gemmascope · layer 2"
    cells = [[f"layer={n}", f"coefficient={c}", "seed=1"] for n in (1, 2) for c in (0, 0.6)]
    sweep = plan_of(tmp_path, *cells)
    names = [run_name(CONFIG, sweep / f"{n}_x", sweep) for n in range(4)]
    assert names[3] == "gemma-2-2b · layer 2 · coefficient 0.6"
    assert len(set(names)) == 4
    own = {**CONFIG, "tracker": {"name": "mine"}}
    assert run_name(own, tmp_path, None) == "mine"
    assert run_name(own, sweep / "0_x", sweep) == "mine · layer 1 · coefficient 0"
    plan_of(sweep, *[["analyzer.seed=1", f"dataset.seed={n}", f"seed={n}"] for n in (1, 2)])
    assert run_name(CONFIG, sweep / "1", sweep) == "gemma-2-2b · dataset.seed 2 · seed 2"
    plan_of(sweep, *[[f"dataset.path={'x' * 300}{n}"] for n in (1, 2)])
    names = [run_name(CONFIG, sweep / f"{n}_x", sweep) for n in range(2)]
    assert names[0] != names[1]
    assert max(map(len, names)) == 120
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    name = "gemma-2-2b · gemmascope · layer 2 · width 16k · coefficient 0.6"
    assert run_name({**CONFIG, "coefficient": 0.6}, tmp_path, None) == name


def test_a_sweep_keeps_its_group_when_it_is_started_again(tmp_path: Path) -> None:
    time_of = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    sweep = tmp_path / "06-30-00-123456"
    sweep.mkdir()
    assert re.fullmatch(time_of, group_name(sweep, [["a=1"]], None))
    assert re.fullmatch(f"{time_of} · exp", group_name(sweep, [["a=1"]], "exp"))
    assert re.fullmatch(f"{time_of} · {tmp_path.name}", group_name(tmp_path, [["a=1"]], None))
    assert group_of(None) is None
    assert group_of(sweep) == "06-30-00-123456"
    plan_of(sweep, ["a=1"], group="earlier")
    assert group_of(sweep) == "earlier"
    assert group_name(sweep, [["a=1"]], "exp") == "earlier"
    assert group_name(sweep, [["a=2"]], "exp") != "earlier"


def test_trackers_get_plain_values_to_compare_runs_by() -> None:
    config = tracked_config(CONFIG)
    plain = {"layer": 2, "width": 16384, "coefficient": 0.6, "seed": 0}
    plain |= {"model.name": "google/gemma-2-2b", "sae.release": "gemmascope"}
    assert {key: config[key] for key in plain} == plain
    assert config["model"] == CONFIG["model"]
    tracked = tracked_config({**CONFIG, "width": "average_l0_80", "coefficient": [0, 1]})
    assert (tracked["width"], tracked["coefficient"]) == ("average_l0_80", [0, 1])
