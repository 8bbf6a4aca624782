"""Which commit of a hub repository a revision stands for, and the files of it that are cached."""

import re
from functools import cache
from pathlib import Path

_SECONDS = 5.0
"""How long the hub is waited for; the cache's word is taken then."""


def snapshot(repo: str, revision: str | None = None, kind: str = "model") -> Path | None:
    """Folder of a repository's files in the local cache, at the commit that `revision` (main where
    not given) stands for now; None where none is cached, or the name is no repository's.

    As a run would load it: by the hub's word where it is in reach, else by the cache's.
    """
    from huggingface_hub import constants

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo):
        return None
    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{repo.replace('/', '--')}"
    wanted = revision or "main"
    if re.fullmatch(r"[0-9a-f]{40}", wanted):
        commit = wanted
    else:
        commit = None if constants.HF_HUB_OFFLINE else _on_the_hub(repo, wanted, kind)
        commit = commit or _in_the_cache(folder / "refs" / wanted)
    if commit is None or not (folder / "snapshots" / commit).is_dir():
        return None
    return folder / "snapshots" / commit


def _in_the_cache(ref: Path) -> str | None:
    try:
        return ref.read_text("utf-8").strip() or None
    except OSError:
        return None


@cache
def _on_the_hub(repo: str, revision: str, kind: str) -> str | None:
    """Asked once per process: what was loaded of it stays loaded."""
    from huggingface_hub import HfApi

    try:
        return HfApi().repo_info(repo, revision=revision, repo_type=kind, timeout=_SECONDS).sha
    except Exception:
        # Whatever keeps the hub from answering, the run itself will say what it lacks.
        return None
