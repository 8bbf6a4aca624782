"""The Hugging Face hub: a short connection test, cached files and cached revisions."""

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from saexp.wording import brief

log = logging.getLogger(__name__)


PATIENCE = 4.0
"""Seconds that a connection may take, name look-up included; HF_HUB_ETAG_TIMEOUT replaces it."""
_REMEMBERED = 60.0
"""Seconds that a look holds for."""
_seen: dict[str, Any] = {}
"""When the last look was (`time`), and why the hub cannot be reached (`reason`; None: it can)."""


@contextmanager
def hub() -> Iterator[None]:
    """Inside, files come from the cache alone if the hub cannot be reached."""
    from huggingface_hub import constants

    for client in ("httpx", "httpx2"):
        # A line for each request, two for each file.
        logging.getLogger(client).setLevel(logging.WARNING)
    if constants.HF_HUB_OFFLINE or unreachable() is None:
        yield
        return
    holders: list[Any] = [constants]
    # It reads the setting once, when it is imported.
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
    """Why the hub cannot be reached; None where it can, however slowly.

    Looks once a minute. A name that is not found and a connection that is refused are seen at once,
    and a connection that is not there after PATIENCE seconds counts as none.
    """
    now = time.monotonic()
    if not _seen or now - _seen["time"] > _REMEMBERED:
        _seen.update(time=now, reason=_look())
        if _seen["reason"] is not None:
            log.debug("the hub cannot be reached (%s); using its cache alone", _seen["reason"])
    return _seen["reason"]


def _look() -> str | None:
    from huggingface_hub import constants, get_session

    patience = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or PATIENCE)
    known = threading.Event()
    reasons: list[str] = []

    def on_event(name: str, _info: Any) -> None:
        # Of the hub, or of the proxy before it; what follows may take its time.
        if name.endswith("connect_tcp.complete"):
            known.set()

    def ask() -> None:
        try:
            # Twice the patience, so that the wait below, which names the option, always ends first.
            session, trace = get_session(), {"trace": on_event}
            session.head(constants.ENDPOINT, timeout=2 * patience, extensions=trace)
        except Exception as error:
            if not known.is_set():
                reasons.append(brief(str(error) or type(error).__name__, 120))
        known.set()

    # A name look-up knows no time limit, so it is left behind where it takes too long.
    threading.Thread(target=ask, daemon=True, name="saexp-hub").start()
    if not known.wait(patience):
        return f"no connection within {patience:g} s; HF_HUB_ETAG_TIMEOUT=<seconds> waits longer"
    return reasons[0] if reasons else None


def why_absent(error: BaseException) -> str:
    """Why something of the hub cannot be had, from what its client raised."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    cause: BaseException | None = error
    while cause is not None:
        absent = isinstance(cause, LocalEntryNotFoundError | OfflineModeIsEnabled)
        # `datasets` keeps the name alone.
        if absent or OfflineModeIsEnabled.__name__ in str(cause):
            if constants.HF_HUB_OFFLINE:
                return "HF_HUB_OFFLINE is set"
            if _seen and _seen["reason"] is not None:
                return f"the hub cannot be reached: {_seen['reason']}"
        cause = cause.__cause__ or cause.__context__
    return brief(str(error), 240)


def is_path(name: str) -> bool:
    """Whether a name can only mean a folder or file here, and no repository of the hub.

    Hub ids are `owner/name`, files in a repository `owner/name/…`. Paths into an existing folder
    `owner/name` come first; a folder that has only the owner's name decides nothing.
    """
    if name.startswith((".", "~", os.sep)) or "\\" in name or Path(name).is_absolute():
        return True
    parts = name.split("/")
    return len(parts) > 2 and Path(parts[0], parts[1]).is_dir()


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
        # Where the hub cannot be reached, this raises at once.
        with hub():
            return HfApi().repo_info(repo, revision=revision, repo_type=kind, timeout=_SECONDS).sha
    except Exception:
        # Whatever keeps the hub from answering, the run itself will say what it lacks.
        return None
