"""Pages in a real browser, without a window."""

import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")


def dom(page: Path, folder: Path) -> str:
    """The page's DOM once its scripts have run; the browser's own files go to `folder`."""
    assert CHROMIUM is not None
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--dump-dom"]
    words += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    words += [f"--user-data-dir={folder / 'profile'}", "--window-size=1280,900", page.as_uri()]
    done = subprocess.run([CHROMIUM, *words], capture_output=True, text=True, check=True)
    return done.stdout
