"""What is sent where: nothing, a JSONL file, or W&B offline; tables may lack values."""

import json
import time
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest

import saexp
from saexp.config import TrackerConfig
from saexp.errors import ConfigError
from saexp.registry import build, register
from saexp.tracking import Guarded, JsonlTracker, NullTracker
from saexp.tracking.wandb import has_key

ABOUT = {"config": {"a": 1}, "name": "n", "job_type": "analyze", "group": "g"}
TABLE = pd.DataFrame({"latent": [1, 2], "rank": pd.array([1, pd.NA], dtype="Int64")})


def use(tracker, folder: Path) -> None:
    tracker.start(folder=folder, **ABOUT)
    tracker.metrics({"x/y": 1.5, "x/none": None, "x/nan": float("nan")})
    tracker.table("latents", TABLE)
    tracker.figure("f", go.Figure(go.Scatter(x=[1], y=[2])))
    tracker.finish(0)


def test_none_leaves_nothing(tmp_path: Path) -> None:
    use(build("tracker", TrackerConfig(name="none")), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_jsonl_is_one_object_per_event(tmp_path: Path) -> None:
    use(build("tracker", TrackerConfig(name="jsonl")), tmp_path)
    lines = [json.loads(x) for x in (tmp_path / "tracker.jsonl").read_text().splitlines()]
    assert [x["event"] for x in lines] == ["start", "metrics", "table", "figure", "finish"]
    assert lines[0]["group"] == "g"
    assert lines[1]["x/y"] == 1.5
    assert lines[2]["n_rows"] == 2
    assert lines[4]["exit_code"] == 0


def test_wandb_offline_two_runs_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        use(build("tracker", TrackerConfig(name="wandb")), tmp_path / name)
        runs = list((tmp_path / name / "wandb").glob("offline-run-*/*.wandb"))
        assert len(runs) == 1
        # W&B's service may write the end of a finished run a moment later.
        deadline = time.monotonic() + 20
        while runs[0].stat().st_size <= 1000 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert runs[0].stat().st_size > 1000


def test_no_key_means_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not has_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert has_key()


def test_a_netrc_that_cannot_be_read_as_text_holds_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_bytes(b"\xff\xfe\x00\x80")
    (tmp_path / ".netrc").mkdir()
    assert not has_key()


class _Broken(NullTracker):
    """Fails at everything but its start."""

    def metrics(self, values: object) -> None:
        raise RuntimeError(f"no room for {values}")

    def finish(self, exit_code: int) -> None:
        raise OSError(f"no end with {exit_code}")


def test_errors_of_a_started_tracker_are_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    tracker = Guarded(_Broken(TrackerConfig(name="broken")), "broken")
    tracker.metrics({"a": 1})
    tracker.metrics({"a": 2})
    tracker.table("latents", TABLE)
    tracker.finish(0)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("tracker=broken did not record metrics (no room for {'a': 1}); the")


class _Damaging(JsonlTracker):
    """Damages the run's provenance, as a disk may, before the run is recorded."""

    def metrics(self, values: object) -> None:
        self.path.with_name("provenance.json").write_text(f"{{{values}")


def test_a_run_that_cannot_be_recorded_is_tracked_as_failed(tmp_path: Path) -> None:
    register("tracker", "damaging")(_Damaging)
    words = ["intervention=none", "dataset.n_examples=20", "analyzer.n_bootstrap=0"]
    words += ["tracker=jsonl", "tracker.name=damaging", f"cache_dir={tmp_path / 'cache'}"]
    with pytest.raises(ValueError, match="Expecting"):
        saexp.run(saexp.compose(words), tmp_path / "run")
    events = (tmp_path / "run/tracker.jsonl").read_text("utf-8").splitlines()
    assert json.loads(events[-1]) == {"event": "finish", "exit_code": 1}
    assert (tmp_path / "run/error.txt").read_text("utf-8").startswith("JSONDecodeError: ")


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="tracker.mode=sometimes: choose online, offline"):
        build("tracker", TrackerConfig(name="wandb", mode="sometimes"))


@pytest.mark.parametrize("by", ["tracker.mode", "WANDB_MODE"])
def test_online_without_a_key_is_one_line_and_no_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    if by == "WANDB_MODE":
        monkeypatch.setenv("WANDB_MODE", "online")
    mode = "online" if by == "tracker.mode" else None
    tracker = build("tracker", TrackerConfig(name="wandb", mode=mode))
    with pytest.raises(ConfigError, match=rf"^{by}=online, but no W&B key is set; ") as error:
        tracker.start(folder=tmp_path, **ABOUT)
    assert "\n" not in str(error.value)


def test_an_invalid_api_key_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "short")
    tracker = build("tracker", TrackerConfig(name="wandb", mode="online"))
    with pytest.raises(ConfigError, match=r"^tracker=wandb: W&B refuses the run \(") as error:
        tracker.start(folder=tmp_path, **ABOUT)
    assert "\n" not in str(error.value)
