"""What is sent where: nothing, a JSONL file, or W&B offline; tables may lack values."""

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pytest

import saexp
from saexp.config import TrackerConfig
from saexp.errors import ConfigError
from saexp.registry import build, register
from saexp.tracking import (
    Artifact,
    Guarded,
    JsonlTracker,
    MlflowTracker,
    NullTracker,
    check,
    start,
    whole_steps,
)
from saexp.tracking.wandb import has_key
from tests.shipped_texts import FEW_NEUTRAL
from tests.unit.reports.run_outputs import wandb_runs

ABOUT = {"config": {"a": 1}, "name": "n", "job_type": "analyze", "group": "g"}
TABLE = pd.DataFrame({"latent": [1, 2], "rank": pd.array([1, pd.NA], dtype="Int64")})


def use(tracker, folder: Path) -> None:
    tracker.start(folder=folder, **ABOUT)
    for at in (0, 2):
        tracker.series("coefficient", {"coefficient": at, "effect/a/b": at / 4})
    tracker.metrics({"x/y": 1.5, "x/none": None, "x/nan": float("nan")})
    tracker.table("latents", TABLE)
    tracker.figure("f", go.Figure(go.Scatter(x=[1], y=[2])))
    tracker.finish(0)


def test_none_leaves_nothing(tmp_path: Path) -> None:
    use(build("tracker", TrackerConfig(kind="none")), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_jsonl_is_one_object_per_event(tmp_path: Path) -> None:
    use(build("tracker", TrackerConfig(kind="jsonl")), tmp_path)
    lines = [json.loads(x) for x in (tmp_path / "tracker.jsonl").read_text().splitlines()]
    events = ["start", "series", "series", "metrics", "table", "figure", "finish"]
    assert [x["event"] for x in lines] == events
    assert lines[0]["group"] == "g"
    assert lines[2] == {
        **{"event": "series", "axis": "coefficient"},
        **{"coefficient": 2, "effect/a/b": 0.5},
    }
    assert lines[3]["x/y"] == 1.5
    assert lines[4]["n_rows"] == 2
    assert lines[6]["exit_code"] == 0


def test_wandb_offline_two_runs_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        use(build("tracker", TrackerConfig(kind="wandb")), tmp_path / name)
        runs = list((tmp_path / name / "wandb").glob("offline-run-*/*.wandb"))
        assert len(runs) == 1
        # W&B's service may write the end of a finished run a moment later.
        deadline = time.monotonic() + 20
        while runs[0].stat().st_size <= 1000 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert runs[0].stat().st_size > 1000


def offline_run(folder: Path, cfg: TrackerConfig, **about: Any) -> dict[str, Any]:
    tracker = build("tracker", cfg)
    folder.mkdir(parents=True, exist_ok=True)
    tracker.start(folder=folder, **{**ABOUT, **about})
    for at in (0, 2, 4):
        tracker.series("coefficient", {"coefficient": at, "effect/a/b": at / 4, "effect/c/d": 1})
    tracker.metrics({"effect/a/b": 0.5, "x/y": 1.5, "x/none": None, "x/inf": float("inf")})
    tracker.finish(0)
    (run,) = wandb_runs(about.get("sweep") or folder)
    return run


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return monkeypatch


@pytest.mark.usefixtures("no_variables")
def test_wandb_gets_series_over_their_axis_and_everything_else_as_summary(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        run = offline_run(tmp_path, TrackerConfig(kind="wandb", tags=["t"], notes="why"))
    (hint,) = [r.getMessage() for r in caplog.records if "wandb sync" in r.getMessage()]
    synced = tmp_path.cwd() / hint.partition("type: wandb sync ")[2]
    assert len(list(synced.glob("run-*.wandb"))) == 1
    assert run["axes"] == {"effect/*": "coefficient"}
    numbers = [{k: v for k, v in row.items() if k[0] != "_"} for row in run["history"]]
    assert numbers == [
        {"coefficient": at, "effect/a/b": at / 4, "effect/c/d": 1} for at in (0, 2, 4)
    ]
    summary = {k: v for k, v in run["summary"].items() if k[0] != "_"}
    assert summary == {"effect/a/b": 0.5, "x/y": 1.5}
    assert (run["tags"], run["notes"], run["project"]) == (["t"], "why", "saexp")
    assert (run["group"], run["job_type"], run["config"]["a"]) == ("g", "analyze", 1)


@pytest.mark.usefixtures("no_variables")
def test_wandb_gets_what_a_run_read_and_wrote(tmp_path: Path) -> None:
    store, sae = tmp_path / "cache" / "17e1", tmp_path / "w.safetensors"
    (store / "layer_2.resid_post").mkdir(parents=True)
    for file in (store / "manifest.json", store / "layer_2.resid_post" / "0.safetensors", sae):
        file.write_text("{}")
    tracker = build("tracker", TrackerConfig(kind="wandb"))
    (tmp_path / "run").mkdir()
    tracker.start(folder=tmp_path / "run", **ABOUT)
    for artifact in (
        Artifact("activations-17e1", "store", {"manifest.json": store / "manifest.json"}, store),
        Artifact("an sae / x", "sae", reference=sae, metadata={"d_sae": 4}, is_input=True),
        Artifact("results", "results", {"a.json": store / "manifest.json"}),
    ):
        tracker.artifact(artifact)
    tracker.finish(0)
    (run,) = wandb_runs(tmp_path / "run")
    activations, used, results = run["artifacts"]
    entries = {entry.path: entry.ref for entry in activations.manifest.contents}
    shard = "17e1/layer_2.resid_post/0.safetensors"
    assert entries.keys() == {"manifest.json", "17e1/manifest.json", shard}
    assert entries[shard] == (store / "layer_2.resid_post" / "0.safetensors").as_uri()
    assert not entries["manifest.json"]
    assert [a.use_after_commit for a in run["artifacts"]] == [False, True, False]
    assert (used.name, json.loads(used.metadata)) == ("an-sae-x", {"d_sae": 4})
    assert [entry.ref for entry in used.manifest.contents] == [sae.as_uri()]
    assert results.name == f"results-{run['id']}"


def test_variables_of_wandb_count_where_the_config_names_nothing(
    tmp_path: Path, no_variables: pytest.MonkeyPatch
) -> None:
    for key, value in {
        **{"PROJECT": "p", "RUN_GROUP": "h", "NOTES": "n", "TAGS": "t,u", "JOB_TYPE": "j"},
        **{"RUN_ID": "abc", "DIR": str(tmp_path / "elsewhere")},
    }.items():
        no_variables.setenv(f"WANDB_{key}", value)
    (tmp_path / "elsewhere").mkdir()
    tracker = build("tracker", TrackerConfig(kind="wandb"))
    tracker.start(folder=tmp_path / "run", **ABOUT)
    tracker.finish(0)
    (run,) = wandb_runs(tmp_path / "elsewhere")
    assert (run["project"], run["group"], run["notes"], run["id"]) == ("p", "h", "n", "abc")
    assert (run["tags"], run["job_type"]) == (["t", "u"], "j")
    typed = TrackerConfig(kind="wandb", project="q", group="i", notes="m", tags=["v"])
    tracker = build("tracker", typed)
    no_variables.setenv("WANDB_DIR", str(tmp_path / "typed"))
    (tmp_path / "typed").mkdir()
    tracker.start(folder=tmp_path / "run", **ABOUT)
    tracker.finish(0)
    (run,) = wandb_runs(tmp_path / "typed")
    assert (run["project"], run["group"], run["notes"]) == ("q", "i", "m")
    assert run["tags"] == ["v"]


def test_a_cell_that_is_started_again_has_the_id_of_its_run(
    tmp_path: Path, no_variables: pytest.MonkeyPatch
) -> None:
    no_variables.setenv("WANDB_RUN_ID", "one-for-all")
    cfg = TrackerConfig(kind="wandb")
    ids = []
    for attempt, (cell, config) in enumerate([("0", 1), ("0", 1), ("1", 1), ("0", 2)]):
        no_variables.setenv("WANDB_DIR", str(tmp_path / str(attempt)))
        (tmp_path / str(attempt)).mkdir()
        tracker = build("tracker", cfg)
        about = {**ABOUT, "config": {"layer": config, "resume": attempt}}
        tracker.start(folder=tmp_path / cell, sweep=tmp_path, **about)
        tracker.finish(0)
        ids.append(wandb_runs(tmp_path / str(attempt))[0]["id"])
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3


def test_the_former_key_of_the_kind_is_read(caplog: pytest.LogCaptureFixture) -> None:
    cfg = saexp.compose(["tracker=wandb", "tracker.name=jsonl"])
    assert (cfg.tracker.kind, cfg.tracker.name) == ("jsonl", None)
    assert "tracker.name=jsonl is now tracker.kind=jsonl" in caplog.text
    cfg = saexp.compose(["tracker=wandb", "tracker.name=mine"])
    assert (cfg.tracker.kind, cfg.tracker.name) == ("wandb", "mine")


@pytest.mark.usefixtures("no_variables")
def test_several_trackers_record_the_same_run(tmp_path: Path) -> None:
    cfg = saexp.compose(["tracker=[jsonl,wandb]"]).tracker
    tracker = start(cfg, folder=tmp_path, **ABOUT)
    tracker.series("coefficient", {"coefficient": 1, "effect/a/b": 2})
    tracker.metrics({"x/y": 3})
    tracker.finish(0)
    (run,) = wandb_runs(tmp_path)
    assert run["summary"]["x/y"] == 3
    lines = [json.loads(x) for x in (tmp_path / "tracker.jsonl").read_text().splitlines()]
    assert [x["event"] for x in lines] == ["start", "series", "metrics", "finish"]
    alone = saexp.compose(["tracker=jsonl", "tracker.kind=none"]).tracker
    start(alone, folder=tmp_path / "nothing", **ABOUT).finish(0)
    assert not (tmp_path / "nothing").exists()


PLAIN = {"layer": 2, "coefficient": [0, 0.3], "model": {"name": "tiny"}, "model.name": "tiny"}


def use_with_artifact(tracker, folder: Path, exit_code: int) -> None:
    """Two series, a table, a figure, an artifact and final numbers, as a run records them."""
    weights = folder / "w.txt"
    weights.write_text("1")
    tracker.start(folder=folder, **{**ABOUT, "config": PLAIN})
    for tokens in (100, 200):
        tracker.series("train/tokens", {"train/tokens": tokens, "train/loss": 1 / tokens})
    for at in (0.0, 0.3):
        tracker.series("coefficient", {"coefficient": at, "effect/a/b": at, "effect/c": None})
    tracker.table("latents", TABLE)
    tracker.artifact(Artifact("sae", "sae", {"w.txt": weights}, weights, is_input=True))
    tracker.figure("f", go.Figure(go.Scatter(x=[1], y=[2])))
    tracker.metrics({"x/y": 1.5, "effect/a/b": 0.25, "x/none": None, "x/nan": float("nan")})
    tracker.finish(exit_code)


def test_tensorboard_reads_back_what_a_run_records(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    use_with_artifact(build("tracker", TrackerConfig(kind="tensorboard", tags=["t"])), tmp_path, 0)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = {
        tag: {e.step: round(e.value, 6) for e in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }
    assert scalars == {
        "train/loss": {100: 0.01, 200: 0.005},
        "effect/a/b by coefficient in thousandths": {0: 0.0, 300: 0.3},
        "x/y": {0: 1.5},
        "effect/a/b": {0: 0.25},
    }
    texts = {
        tag.removesuffix("/text_summary"): events.Tensors(tag)[0]
        .tensor_proto.string_val[0]
        .decode()
        for tag in events.Tags()["tensors"]
    }
    assert set(texts) == {"run", "config", "tables/latents", "artifacts/sae", "exit_code"}
    assert json.loads(texts["config"]) == PLAIN
    assert json.loads(texts["run"])["tags"] == ["t"]
    assert "| 2 | <NA> |" in texts["tables/latents"]
    compared = str(events.SummaryMetadata("_hparams_/session_start_info"))
    assert all(word in compared for word in ("model.name", "layer", "[0, 0.3]"))
    tracker = build("tracker", TrackerConfig(kind="tensorboard"))
    tracker.start(folder=tmp_path / "sweep", **{**ABOUT, "job_type": "sweep"})
    tracker.metrics({"sweep/finished": 2})
    tracker.finish(0)
    events = EventAccumulator(str(tmp_path / "sweep" / "tensorboard")).Reload()
    assert not any("_hparams_" in tag for tag in events.summary_metadata)


def test_mlflow_reads_back_what_a_run_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    cfg = TrackerConfig(kind="mlflow", tags=["t"], notes="why")
    for name, exit_code in (("one", 0), ("two", 1)):
        (tmp_path / name).mkdir()
        use_with_artifact(build("tracker", cfg), tmp_path / name, exit_code)
    client = mlflow.MlflowClient(str(tmp_path / "one" / "mlruns"))
    experiment = client.get_experiment_by_name("saexp").experiment_id
    (run,) = client.search_runs([experiment])
    assert (run.info.run_name, run.info.status) == ("n", "FINISHED")
    assert run.data.params["model.name"] == "tiny"
    assert run.data.params["coefficient"] == "[0, 0.3]"
    tags = {"t": "true", "group": "g", "job_type": "analyze", "mlflow.note.content": "why"}
    assert tags.items() <= run.data.tags.items()
    assert run.data.tags["input.sae"] == str(tmp_path / "one" / "w.txt")

    def history(name: str) -> dict[int, float]:
        return {m.step: m.value for m in client.get_metric_history(run.info.run_id, name)}

    assert history("train/loss") == {100: 0.01, 200: 0.005}
    assert history("effect/a/b by coefficient in thousandths") == {0: 0.0, 300: 0.3}
    assert history("effect/a/b") == {0: 0.25}
    assert "x/nan" not in run.data.metrics
    (folder,) = (tmp_path / "one").glob("mlruns/*/*/artifacts")
    assert json.loads((folder / "tables" / "latents.json").read_text())["data"] == [
        [1, 1],
        [2, None],
    ]
    assert (folder / "artifacts" / "sae" / "w.txt").read_text() == "1"
    assert "plotly" in (folder / "figures" / "f.html").read_text()
    client = mlflow.MlflowClient(str(tmp_path / "two" / "mlruns"))
    (run,) = client.search_runs([client.get_experiment_by_name("saexp").experiment_id])
    assert run.info.status == "FAILED"


class _Client:
    """An MLflow client whose calls take `seconds` and fail, but for those in `accepted`."""

    def __init__(self, seconds: float = 0.0, accepted: tuple[str, ...] = ()) -> None:
        self.seconds, self.accepted = seconds, accepted
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> None:
            self.calls.append((name, *arguments, *options.values()))
            time.sleep(self.seconds)
            if name not in self.accepted:
                raise TimeoutError("no answer")

        return call


def with_client(client: _Client) -> MlflowTracker:
    tracker = MlflowTracker(TrackerConfig(kind="mlflow"))
    tracker.client, tracker.run, tracker.patience_seconds = client, "r", 0.05
    return tracker


def record_all(recorder: Any, file: Path) -> None:
    recorder.table("latents", TABLE)
    recorder.artifact(Artifact("sae", "sae", {"w": file}))
    recorder.figure("f", go.Figure())
    recorder.finish(1)


def test_after_a_call_that_hangs_mlflow_gets_nothing_but_the_end(tmp_path: Path) -> None:
    client = _Client(seconds=0.06)
    record_all(Guarded({"mlflow": with_client(client)}), tmp_path)
    assert [call[0] for call in client.calls] == ["log_table", "set_terminated"]


def test_after_a_record_that_mlflow_refuses_it_gets_the_others(tmp_path: Path) -> None:
    client = _Client(accepted=("log_artifact", "log_text", "set_terminated"))
    record_all(Guarded({"mlflow": with_client(client)}), tmp_path)
    names = [call[0] for call in client.calls]
    assert names == ["log_table", "log_artifact", "log_text", "set_terminated"]
    assert client.calls[-1][1:] == ("r", "FAILED")


def test_names_that_mlflow_forbids_become_others_one_to_one() -> None:
    tracker = with_client(_Client())
    typed = ["train/k=16/loss", "train/k_16/loss", "/x//../y", "..", "a:b", "é (p)", "c/" * 300]
    names = [tracker._permitted(name) for name in typed]
    assert names[:3] == ["train/k_16/loss", "train/k_16/loss_", "x/y"]
    assert len(set(names)) == len(names)
    assert [tracker._permitted(name) for name in typed] == names
    for name in names:
        # What mlflow.utils.validation accepts on every system.
        assert re.fullmatch(r"[/\w.\- ]+", name)
        assert os.path.normpath(name) == name
        assert len(name) <= 250


class _NeverStarts(NullTracker):
    def start(self, **_: Any) -> None:
        raise ConfigError("nowhere to record")


def test_where_a_later_tracker_cannot_start_the_earlier_ones_end_as_failed(tmp_path: Path) -> None:
    register("tracker", "never")(_NeverStarts)
    cfg = TrackerConfig(kind="never", kinds={"jsonl": True, "never": True})
    with pytest.raises(ConfigError, match="nowhere to record"):
        start(cfg, folder=tmp_path, **ABOUT)
    events = [json.loads(x) for x in (tmp_path / "tracker.jsonl").read_text().splitlines()]
    assert events[-1] == {"event": "finish", "exit_code": 1}


@pytest.mark.parametrize("kind", ["tensorboard", "mlflow"])
def test_a_tracker_without_its_package_is_one_line(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == kind]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard.writer", raising=False)
    monkeypatch.setitem(sys.modules, kind, None)
    cfg = saexp.compose([f"tracker=[{kind},jsonl]"]).tracker
    with pytest.raises(ConfigError, match=rf"tracker={kind} needs .*'saexp\[{kind}\]'"):
        start(cfg, folder=tmp_path, **ABOUT)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("at", [0, 7, 0.25, 0.6, -1.5])
def test_steps_of_trackers_that_know_whole_numbers_alone(at: float) -> None:
    step, numbers = whole_steps("x", {"x": at, "a": 1, "none": None})
    if isinstance(at, int):
        assert (step, numbers) == (at, {"a": 1})
    else:
        assert (step / 1000, numbers) == (at, {"a by x in thousandths": 1})


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
    tracker = Guarded({"broken": _Broken(TrackerConfig(kind="broken"))})
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
    words = ["intervention=none", "dataset.n_examples=20", "analyzer.n_bootstrap=0", FEW_NEUTRAL]
    words += ["tracker=jsonl", "tracker.kind=damaging", f"cache_dir={tmp_path / 'cache'}"]
    with pytest.raises(ValueError, match="Expecting"):
        saexp.run(saexp.compose(words), tmp_path / "run")
    events = (tmp_path / "run/tracker.jsonl").read_text("utf-8").splitlines()
    assert json.loads(events[-1]) == {"event": "finish", "exit_code": 1}
    assert (tmp_path / "run/error.txt").read_text("utf-8").startswith("JSONDecodeError: ")


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="tracker.mode=sometimes: choose online, offline"):
        check(TrackerConfig(kind="wandb", mode="sometimes"))


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
    with pytest.raises(ConfigError, match=rf"^{by}=online, but no W&B key is set; ") as error:
        start(TrackerConfig(kind="wandb", mode=mode), folder=tmp_path, **ABOUT)
    assert "\n" not in str(error.value)


def test_an_invalid_api_key_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "short")
    tracker = build("tracker", TrackerConfig(kind="wandb", mode="online"))
    with pytest.raises(ConfigError, match=r"^tracker=wandb: W&B refuses the run \(") as error:
        tracker.start(folder=tmp_path, **ABOUT)
    assert "\n" not in str(error.value)
