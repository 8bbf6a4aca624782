"""Files of hub repositories, from the local cache where they are there; what a file is known by."""

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from saexp.errors import SAEError
from saexp.hub import hub, why_absent
from saexp.models.digests import file_sha256


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


def about(file: Path) -> dict[str, Any]:
    """Path and fingerprint; a file of the hub's cache is named by its hash already."""
    blob = file.resolve()
    named = file.is_symlink() and blob.parent.name == "blobs"
    return {"path": str(file), "fingerprint": blob.name if named else file_sha256(blob)}
