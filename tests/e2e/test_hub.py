"""A hub that cannot be reached is noticed at once, one that is slow is waited for."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from saexp import hub
from saexp.config import DatasetConfig, ModelConfig, SAEConfig
from saexp.errors import ModelError, SAEError, SaexpError, brief
from saexp.hub import snapshot
from saexp.models.loading import LanguageModel
from saexp.registry import build
from tests import interpreters
from tests.hub_caches import repository
from tests.random_models import random_hf, save


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """As if nothing said that the network is off; an empty cache, nothing looked at so far."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "_PROCESS", hub._Process())
    return monkeypatch


@pytest.fixture
def refused(online: pytest.MonkeyPatch) -> None:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    online.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")


@pytest.fixture
def silent(online: pytest.MonkeyPatch) -> Iterator[None]:
    """A firewall that drops what it is sent: no connection is ever made."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        online.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield
        for client in waiting:
            client.close()


@pytest.fixture
def slow(online: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that takes longer to answer than a connection may take."""

    class Slow(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:  # noqa: N802
            time.sleep(1)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Slow)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    online.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    thread.join()
    server.server_close()


def seconds_of(make: object, message: str) -> float:
    began = time.monotonic()
    with pytest.raises(SaexpError, match=message) as error:
        make()  # type: ignore[operator]
    assert "\n" not in str(error.value)
    return time.monotonic() - began


GEMMA_SCOPE = SAEConfig(
    name="g", loader="release", release="gemma-scope-2b-pt-res-canonical", layer=12, width="16k"
)
ABSENT = {
    "model": lambda: LanguageModel(ModelConfig(name="google/gemma-2-2b")),
    "sae": lambda: build("sae", GEMMA_SCOPE),
    "repository": lambda: build("sae", SAEConfig(name="l", loader="path", path="someone/theirs/x")),
    "dataset": lambda: build("dataset", DatasetConfig(name="hf", path="someone/texts")),
}


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize("what", ABSENT)
def test_what_is_not_cached_is_one_line_at_once(
    what: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Six requests with pauses between them took half a minute."""
    assert seconds_of(ABSENT[what], r"\(the hub cannot be reached: .*[Cc]onnection refused") < 20
    assert hub.unreachable() is not None
    out, err = capfd.readouterr()
    assert "Retry" not in out + err


@pytest.mark.usefixtures("refused")
def test_a_format_that_sae_lens_reads() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sae_lens  # noqa: F401
    name = "mwhanna-qwen3-0.6b-transcoders-lowl0"
    cfg = SAEConfig(name="m", loader="release", release=name, layer=2)
    seconds_of(lambda: build("sae", cfg), r"cannot be loaded \(the hub cannot be reached: .*refu")


@pytest.mark.usefixtures("silent")
def test_a_connection_that_is_never_made_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.5")
    message = "no connection within 0.5 s; HF_HUB_ETAG_TIMEOUT=<seconds> waits longer"
    assert hub.unreachable() == message
    assert seconds_of(ABSENT["sae"], message) < 20


@pytest.mark.usefixtures("silent")
def test_commits_of_many_repositories_are_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep without a connection asks for the commits of its model, SAEs and data set."""
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.5")
    began = time.monotonic()
    assert [snapshot(f"someone/repository-{i}") for i in range(8)] == [None] * 8
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_hub_behind_a_proxy_is_in_reach(scheme: str, tmp_path: Path) -> None:
    """The proxy alone can be connected to, and it alone resolves the hub's name."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        dropped = re.compile(r".*_proxy|HF_HUB_OFFLINE|TRANSFORMERS_OFFLINE", re.IGNORECASE)
        environment = {k: v for k, v in os.environ.items() if not dropped.fullmatch(k)}
        environment |= {
            f"{scheme.upper()}_PROXY": f"http://127.0.0.1:{proxy.getsockname()[1]}",
            "HF_ENDPOINT": f"{scheme}://hub.invalid",
            "HF_HOME": str(tmp_path),
        }
        asked = [sys.executable, "-c", "from saexp import hub; print(hub.unreachable())"]
        process = subprocess.run(
            asked, env=environment, capture_output=True, text=True, timeout=120
        )
    assert process.stdout == "None\n", process.stderr


@pytest.mark.usefixtures("slow")
def test_a_slow_hub_is_no_absent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.5")
    assert hub.unreachable() is None
    with hub.hub():
        assert not constants.HF_HUB_OFFLINE


@pytest.mark.usefixtures("refused")
def test_the_clients_setting_is_as_before_on_any_exit() -> None:
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    with pytest.raises(RuntimeError), hub.hub():
        assert constants.HF_HUB_OFFLINE
        assert datasets.config.HF_HUB_OFFLINE
        raise RuntimeError
    assert not constants.HF_HUB_OFFLINE
    assert before == datasets.config.HF_HUB_OFFLINE


@pytest.mark.usefixtures("refused")
def test_a_local_folder_needs_no_hub(tmp_path: Path) -> None:
    model = LanguageModel(save(random_hf("llama"), tmp_path / "model"))
    assert model.hf is not None
    assert model.tokenizer is not None
    assert model.fingerprint
    assert hub._PROCESS.tested is None


def test_switched_off_by_the_user(online: pytest.MonkeyPatch) -> None:
    online.setattr(constants, "HF_HUB_OFFLINE", True)
    seconds_of(
        ABSENT["model"], r"its config cannot be loaded \(HF_HUB_OFFLINE is set\); type a hub"
    )
    seconds_of(
        ABSENT["sae"], r"is neither cached nor reachable \(HF_HUB_OFFLINE is set\); go online"
    )
    assert hub._PROCESS.tested is None


ONLINE = """
import runpy, sys
from huggingface_hub import constants
# What the library reads from the environment when it is imported.
constants.HF_HUB_OFFLINE = False
constants.ENDPOINT, constants.HF_HUB_CACHE = "http://127.0.0.1:9", sys.argv[1]
sys.argv[:2] = ["saexp"]
runpy.run_module("saexp", run_name="__main__", alter_sys=True)
"""


def test_a_run_ends_in_one_line(tmp_path: Path) -> None:
    """From the terminal, with the network neither there nor switched off."""
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    words = ["model=gemma2b", "sae=gemmascope", "layer=12", f"hydra.run.dir={tmp_path / 'run'}"]
    words = ["-c", ONLINE, str(tmp_path / "hub"), *words, "tracker=none"]
    process = interpreters.run(words, tmp_path, environment, timeout=120)
    assert process.returncode == 1
    assert re.fullmatch(
        r"saexp: model.name=google/gemma-2-2b: its config cannot be loaded \(the hub cannot be "
        r"reached: .*\); type a hub id .*\n",
        process.stderr,
    )


@pytest.mark.parametrize("name", ["/no/such/folder", "./models/mine", "~/models/mine", "a/b/c"])
def test_a_name_that_can_only_be_a_folder(name: str) -> None:
    with pytest.raises(ModelError) as error:
        LanguageModel(ModelConfig(name=name))
    assert str(error.value) == (
        f"model.name={name}: no such folder; type a folder with a model's config.json, or a hub id "
        "such as google/gemma-2-2b"
    )


def test_a_hub_id_beside_a_folder_of_the_owners_name(
    online: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Who keeps other models in ./google still loads google/gemma-2-2b from the hub."""
    with repository(tmp_path, "google/small") as folder:
        save(random_hf("llama"), folder)
    online.chdir(tmp_path)
    online.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "google" / "other").mkdir(parents=True)
    model = LanguageModel(ModelConfig(name="google/small", device="cpu"))
    assert model.n_layers == 3
    with pytest.raises(ModelError) as error:
        LanguageModel(ModelConfig(name="google/absent"))
    assert str(error.value).startswith(
        "model.name=google/absent: no such folder here, and its config cannot be loaded (HF_HUB_"
    )


def test_a_name_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ModelError, match="is a file; type the folder of the model"):
        LanguageModel(ModelConfig(name=str(tmp_path / "weights.bin")))


@pytest.mark.parametrize("path", ["/no/such", "./mine", "~/mine", "here/run/sae", "mine"])
def test_an_sae_path_that_can_only_be_a_folder(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder above it is here: it is no repository of the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here" / "run").mkdir(parents=True)
    with pytest.raises(SAEError) as error:
        build("sae", SAEConfig(name="local", loader="path", path=path))
    shown = Path(path).expanduser()
    assert str(error.value) == f"sae.path={shown}: no such folder or file"


def test_an_sae_path_that_may_be_either(online: pytest.MonkeyPatch, tmp_path: Path) -> None:
    online.chdir(tmp_path)
    (tmp_path / "saes").mkdir()
    online.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SAEError) as error:
        build("sae", SAEConfig(name="local", loader="path", path="saes/mine"))
    assert str(error.value) == (
        "sae.path=saes/mine: no such folder here, and saes/mine/cfg.json is neither cached nor "
        "reachable (HF_HUB_OFFLINE is set); go online once, or point HF_HOME to a cache that "
        "holds it"
    )


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save(random_hf("llama"), tmp_path / "models" / "mine")
    assert LanguageModel(ModelConfig(name="~/models/mine", device="cpu")).n_layers == 3


def test_a_long_reason_is_cut_between_words() -> None:
    text = "Please check your connection and try again\nor make sure that it is on."
    for length in range(8, 90):
        cut = brief(text, length)
        assert len(cut) <= length
        assert "\n" not in cut
        words = cut.removesuffix(" …").split()
        assert words == text.split()[: len(words)] or words[-1] + "," in text
    assert brief(text, 90) == " ".join(text.split())
