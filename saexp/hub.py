"""The Hugging Face hub: connection test, cached files and cached revisions."""

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saexp.errors import brief

log = logging.getLogger(__name__)


PATIENCE = 4.0
"""Seconds that connecting may take, name resolution included; HF_HUB_ETAG_TIMEOUT overrides it."""
_VALID_SECONDS = 60.0
"""How long the result of a connection test is used."""


@dataclass
class _Process:
    """What is known about the hub in one process."""

    tested: float | None = None
    """Time of the last connection test."""
    reason: str | None = None
    """Why the hub could not be reached then; None if it could."""
    commits: dict[tuple[str, str, str], str | None] = field(default_factory=dict)
    """(repository, revision, kind) -> commit on the hub, asked once: loaded files stay loaded."""


_PROCESS = _Process()
"""One per process: whether a machine is online is no property of a run, and every test costs
seconds where it is not."""


@contextmanager
def hub() -> Iterator[None]:
    """Context in which only cached files are used if the hub cannot be reached."""
    from huggingface_hub import constants

    for client in ("httpx", "httpx2"):
        # It would log a line per request, two per file.
        logging.getLogger(client).setLevel(logging.WARNING)
    if constants.HF_HUB_OFFLINE or unreachable() is None:
        yield
        return
    holders: list[Any] = [constants]
    # `datasets` copies the setting when it is imported.
    holders += [m for m in [sys.modules.get("datasets.config")] if m is not None]
    before = [holder.HF_HUB_OFFLINE for holder in holders]
    try:
        for holder in holders:
            holder.HF_HUB_OFFLINE = True
        yield
    finally:
        for holder, value in zip(holders, before, strict=True):
            holder.HF_HUB_OFFLINE = value


def unreachable() -> str | None:
    """Why the hub cannot be reached; None if it can, however slowly.

    Tests the connection at most once a minute. Failed name resolution and a refused connection are
    noticed at once; otherwise the test waits PATIENCE seconds for a connection.
    """
    now = time.monotonic()
    if _PROCESS.tested is None or now - _PROCESS.tested > _VALID_SECONDS:
        _PROCESS.tested, _PROCESS.reason = now, _connection_error()
        if _PROCESS.reason is not None:
            log.debug("the hub cannot be reached (%s); using only its cache", _PROCESS.reason)
    return _PROCESS.reason


def _connection_error() -> str | None:
    from huggingface_hub import constants, get_session

    patience = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or PATIENCE)
    decided = threading.Event()
    reasons: list[str] = []

    def on_event(name: str, _info: Any) -> None:
        # Connected to the hub, or to its proxy; what follows may take longer.
        if name.endswith("connect_tcp.complete"):
            decided.set()

    def ask() -> None:
        try:
            # Twice the patience, so that the wait below, with the better message, ends first.
            session, trace = get_session(), {"trace": on_event}
            session.head(constants.ENDPOINT, timeout=2 * patience, extensions=trace)
        except Exception as error:
            if not decided.is_set():
                reasons.append(brief(str(error) or type(error).__name__, 120))
        decided.set()

    # Name resolution has no timeout, so the thread is abandoned if it takes too long.
    threading.Thread(target=ask, daemon=True, name="saexp-hub").start()
    if not decided.wait(patience):
        return f"no connection within {patience:g} s; HF_HUB_ETAG_TIMEOUT=<seconds> waits longer"
    return reasons[0] if reasons else None


def why_absent(error: BaseException) -> str:
    """Why something cannot be loaded from the hub, from the error that its client raised."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    cause: BaseException | None = error
    while cause is not None:
        absent = isinstance(cause, LocalEntryNotFoundError | OfflineModeIsEnabled)
        # `datasets` keeps only the name of the error.
        if absent or OfflineModeIsEnabled.__name__ in str(cause):
            if constants.HF_HUB_OFFLINE:
                return "HF_HUB_OFFLINE is set"
            if _PROCESS.reason is not None:
                return f"the hub cannot be reached: {_PROCESS.reason}"
        cause = cause.__cause__ or cause.__context__
    return brief(str(error), 240)


def is_path(name: str) -> bool:
    """Whether a name can only be a local folder or file, not a repository of the hub.

    Hub ids are `owner/name`, files in a repository `owner/name/…`. Paths into an existing local
    folder `owner/name` take precedence; a folder with only the owner's name does not.
    """
    if name.startswith((".", "~", os.sep)) or "\\" in name or Path(name).is_absolute():
        return True
    parts = name.split("/")
    return len(parts) > 2 and Path(parts[0], parts[1]).is_dir()


_SECONDS = 5.0
"""How long to wait for the hub before the cached revision is used."""


def snapshot(repo: str, revision: str | None = None, kind: str = "model") -> Path | None:
    """Folder of a repository's files in the local cache, at the current commit of `revision` (main
    by default); None if none is cached or the name is not that of a repository.

    The commit is that which a run would load: the hub's if it can be reached, else the cache's.
    """
    from huggingface_hub import constants

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo):
        return None
    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{repo.replace('/', '--')}"
    revision = revision or "main"
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        commit = revision
    else:
        commit = None if constants.HF_HUB_OFFLINE else _on_the_hub(repo, revision, kind)
        commit = commit or _in_the_cache(folder / "refs" / revision)
    if commit is None or not (folder / "snapshots" / commit).is_dir():
        return None
    return folder / "snapshots" / commit


def _in_the_cache(ref: Path) -> str | None:
    try:
        return ref.read_text("utf-8").strip() or None
    except OSError:
        return None


def _on_the_hub(repo: str, revision: str, kind: str) -> str | None:
    """The commit of a revision on the hub; None if it does not answer."""
    key = repo, revision, kind
    if key not in _PROCESS.commits:
        _PROCESS.commits[key] = _ask_commit(*key)
    return _PROCESS.commits[key]


def _ask_commit(repo: str, revision: str, kind: str) -> str | None:
    from huggingface_hub import HfApi

    try:
        # If the hub cannot be reached, this raises at once.
        with hub():
            return HfApi().repo_info(repo, revision=revision, repo_type=kind, timeout=_SECONDS).sha
    except Exception:
        # Whatever the reason, the run itself reports what it cannot load.
        return None
