"""A tokenization that is killed goes on after its last checkpoint, to the same files."""

import json
import os
import signal
import time

import pytest

from saexp.data.corpora import tokenized
from tests import interpreters
from tests.unit.data.test_corpora import config, documents, info, write_jsonl

KILLED = """
import sys
from tests.unit.data.test_corpora import config, info
from pathlib import Path
from saexp.data import corpora
corpora._BATCH_CHARACTERS = 2000
corpora._BATCHES_PER_CHECKPOINT = 1
corpora.tokenized(config(Path(sys.argv[1])), info(), 16, sys.argv[2])
"""


@pytest.mark.parametrize("delay", [0.0, 0.05])
def test_tokenization_continues_after_kill_9(tmp_path, delay):
    path = write_jsonl(tmp_path / "a.jsonl", documents(6_000, lengths=(3, 20, 60)))
    cache = tmp_path / "cache"
    process = interpreters.Process(["-c", KILLED, str(path), str(cache)])
    while process.poll() is None and not list(cache.glob("corpora/*/progress.json")):
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    [folder] = [f for f in (cache / "corpora").iterdir() if f.is_dir()]
    if (folder / "progress.json").is_file():
        state = json.loads((folder / "progress.json").read_text("utf-8"))
        assert 0 < state["n_documents"] <= 6_000
        # What was written after the checkpoint, in part, must not count.
        with (folder / "tokens.bin").open("ab") as file:
            file.write(os.urandom(101))
    resumed = tokenized(config(path), info(), 16, cache)
    fresh = tokenized(config(path), info(), 16, tmp_path / "other")
    assert resumed.manifest["files"] == fresh.manifest["files"]
    assert resumed.manifest["n_documents"] == 6_000
