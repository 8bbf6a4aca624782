"""The documentation site builds strictly: a broken link or reference is an error."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.readme_commands import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("mkdocs") is None, reason="needs the extra saexp[docs]"
    ),
]


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    assert "load_model" in (site / "reference/api.html").read_text("utf-8")
    assert "analyzer.alpha" in (site / "reference/config.html").read_text("utf-8")
    assert "python -m saexp" in (site / "reference/cli.html").read_text("utf-8")
