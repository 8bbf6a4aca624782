"""What a user has: an empty folder, a hub cache, no network, and the commands of the READMEs."""

import io
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from torch import Tensor, nn
from transformers import AutoTokenizer

from saexp.cli import main
from saexp.data.datasets import ASSETS
from saexp.sweeps.planning import PROCESS
from tests.readme_commands import commands, fenced_commands
from tests.unit.saes.make import COMMIT

ROOT = Path(__file__).parents[3]
_FEW = {
    "tracker": "none",
    "sae.check": "off",
    "dataset.n_examples": 3,
    "dataset.background": "neutral.txt",
    "analyzer.n_background": 32,
    "analyzer.n_bootstrap": 10,
    "intervention.n_prompts": 1,
    "intervention.n_choice_prompts": 1,
    "intervention.top_k": 1,
    "intervention.n_controls": 1,
    "intervention.max_new_tokens": 2,
    "intervention.n_neutral": 1,
}


def few(**other: int) -> list[str]:
    """Fewer texts, prompts, resamples and tokens, and nothing else of a command is changed.

    `n_examples=14` and the like are other numbers than the fewest.
    """
    full_keys = {key.rpartition(".")[2]: key for key in _FEW}
    return [f"{k}={v}" for k, v in {**_FEW, **{full_keys[n]: v for n, v in other.items()}}.items()]


@dataclass(frozen=True)
class Run:
    """The files that a run left."""

    folder: Path

    @property
    def metrics(self) -> dict[str, Any]:
        """metrics.json."""
        return json.loads((self.folder / "metrics.json").read_text("utf-8"))

    @property
    def about(self) -> dict[str, Any]:
        """provenance.json."""
        return json.loads((self.folder / "provenance.json").read_text("utf-8"))

    def table(self, name: str) -> pd.DataFrame:
        """A parquet table."""
        return pd.read_parquet(self.folder / f"{name}.parquet")


@dataclass(frozen=True)
class CommandResult:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


class Terminal:
    """Runs commands in this process, in `folder`, with `home` as HF_HOME."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "hf"
        self.read: list[Tensor] = []
        """Token ids of every forward pass, `[rows, tokens]`."""
        lines = (ASSETS / "background.txt").read_text("utf-8").splitlines()
        (folder / "neutral.txt").write_text("\n".join(lines[:4]), encoding="utf-8")
        (folder / "texts.txt").write_text("\n".join(lines[8:]), encoding="utf-8")
        long = map(" ".join, zip(lines[8:20:2], lines[9:20:2], strict=True))
        (folder / "long.txt").write_text("\n".join(long), encoding="utf-8")

    def type(self, words: str | Sequence[str], *more: str) -> CommandResult:
        """Run `python -m saexp …` with words added to it."""
        words = shlex.split(words) if isinstance(words, str) else words
        assert list(words[:3]) == ["python", "-m", "saexp"]
        out, err, code = io.StringIO(), io.StringIO(), 0
        with (
            pytest.MonkeyPatch.context() as patch,
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            # HF_HOME is read where huggingface_hub is imported; test_gemma.py sets it once.
            patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(self.home / "hub"))
            patch.setattr(nn.Embedding, "forward", self._reading(nn.Embedding.forward))
            patch.chdir(self.folder)
            patch.setattr(sys, "argv", ["saexp", *words[3:], *more])
            try:
                main()
            except SystemExit as stop:
                code = int(stop.code or 0)
        return CommandResult(code, out.getvalue(), err.getvalue())

    def _reading(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def reading(embedding: nn.Embedding, ids: Tensor) -> Tensor:
            self.read.append(ids.detach().clone())
            return forward(embedding, ids)

        return reading

    def most(self, token: int) -> int:
        """How often a token stands in the row of a forward pass that has it most often."""
        return max(int((ids == token).sum(-1).max()) for ids in self.read)

    def run(self, name: str, words: str | Sequence[str], *more: str) -> Run:
        """A command that must succeed, in a folder of this name (of a sweep, the sweep's)."""
        words = shlex.split(words) if isinstance(words, str) else words
        folder_option = "hydra.sweep.dir" if "-m" in words[3:] else "hydra.run.dir"
        result = self.type(words, *more, f"{folder_option}={name}")
        assert result.code == 0, result.err[-2000:]
        return Run(self.folder / name)

    def tokenizer(self, repo: str) -> Any:
        """The one in a repository's snapshot."""
        root = self.home / "hub" / f"models--{repo.replace('/', '--')}"
        return AutoTokenizer.from_pretrained(root / "snapshots" / COMMIT)

    def script(self, words: Sequence[str], extra: Sequence[str]) -> list[list[str]]:
        """The commands of `NAME=value … experiments/<study>/run.sh`, recorded by a stand-in.

        Their runs go below the folder `runs`; every one gets the words `extra`.
        """
        recorded, stand_in = self.folder / "recorded", self.folder / "stand_in"
        recorded.unlink(missing_ok=True)
        stand_in.write_text(
            f'#!/bin/sh\nprintf "%s\\n" "$@" >> {recorded}\necho == >> {recorded}\n'
        )
        stand_in.chmod(0o755)
        variables = dict(word.split("=", 1) for word in words[:-1])
        added = " ".join(word for word in extra if word != "tracker=none")
        own = {"PYTHON": str(stand_in), "OUT": str(self.folder / "runs"), "EXTRA": added}
        subprocess.run(
            ["bash", str(ROOT / words[-1])], env={**os.environ, **variables, **own}, check=True
        )
        parts = recorded.read_text("utf-8").split("==\n")
        return [["python", *part.splitlines()] for part in parts if part]


def forget() -> None:
    """Drop the models, SAEs and results that this process holds."""
    PROCESS.objects.clear()


def command_on(page: str, *having: str) -> list[str]:
    """The words of the one command of a page that contains all of these."""
    read = fenced_commands if page.startswith("docs/") else commands
    listed = read((ROOT / page).read_text("utf-8"))
    matching = [shlex.split(c) for c in listed if all(h in c for h in having)]
    assert len(matching) == 1, f"{page} has {len(matching)} commands with {', '.join(having)}"
    return matching[0]


def check_tokens(run: Run, tokenizer: Any, *, n_bos: int) -> None:
    """Rows name the tokens that the tokenizer gives, behind BOS where texts begin with it."""
    rows, bos = run.table("rows"), tokenizer.bos_token_id
    assert len(rows) == run.metrics["collection/n_rows"] > 0
    assert run.metrics.get("check/begins_with_bos", n_bos) == n_bos
    texts = {
        text: [bos] * n_bos + tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in rows["text"].unique()
    }
    for row in rows.to_dict("records"):
        assert texts[row["text"]][row["token_index"]] == row["token_id"] != bos


def check_effects(
    run: Run, coefficients: Sequence[float], *, never_refuses: bool = False
) -> pd.DataFrame:
    """Prompts were run and their texts kept, without an edit and at every coefficient.

    A model that never refuses generates without an edit alone (`intervention.alternatives`).
    """
    effects = run.table("effects")
    has_text = effects["role"] == "baseline" if never_refuses else True
    assert (effects["generated_text"].notna() == has_text).all()
    assert effects["generated_text"].dropna().map(len).max() > 0
    assert {"baseline", "control"} < set(effects["role"])
    edited = effects[effects["role"] != "baseline"]
    assert set(edited["coefficient"]) == set(coefficients)
    return effects
