"""Files of hub repositories, from the local cache where they are there; what a file is known by."""

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from saexp.digests import content_name
from saexp.errors import SAEError
from saexp.hub import hub, why_absent


def download(repo: str, path: str) -> Path:
    """A file of a hub repository, from the cache where it is there."""
    try:
        with hub():
            return Path(hf_hub_download(repo, path))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise SAEError(
            f"{repo}/{path} is neither cached nor in reach ({why_absent(error)}); go online "
            "once, or point HF_HOME to a cache that holds it"
        ) from error


def present(repo: str, path: str) -> Path | None:
    """A file of a hub repository, None where it is neither there nor in reach."""
    try:
        return download(repo, path)
    except SAEError:
        return None


def about(file: Path, config: Path | None = None) -> dict[str, Any]:
    """Path and fingerprint of the weights, and the fingerprint of the config beside them."""
    known = {"path": str(file), "fingerprint": content_name(file)}
    if config is not None and config.is_file():
        known["config_fingerprint"] = content_name(config)
    return known
