"""dashboard.html: rendered from dashboard.json alone, self-contained, small, quick to open."""

import json
import re
from pathlib import Path

import pytest

from saexp.errors import StoreError
from saexp.reports.latents import read_dashboard, write_dashboard
from tests.unit.reports.cards import card, written
from tests.unit.reports.run_outputs import body_of
from tests.unit.reports.written import NASTY, run


def test_fifty_latents_are_under_five_megabytes(tmp_path: Path) -> None:
    assert written(tmp_path, [card(i) for i in range(50)]).stat().st_size < 5e6


def test_the_page_holds_the_file_and_loads_nothing(tmp_path: Path) -> None:
    linked = {"neuronpedia": "https://neuronpedia.org/a/b/7"}
    page = written(tmp_path, [card(7, **linked)])
    text = page.read_text("utf-8")
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert match is not None
    assert json.loads(match[1]) == read_dashboard(tmp_path)
    body = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not [w for w in ("http://", "https://", "src=", "<link", "@import") if w in body]
    assert "plotly" not in text


def test_text_is_never_markup(tmp_path: Path) -> None:
    page = written(tmp_path, [card(7)])
    assert NASTY not in page.read_text("utf-8")
    assert "found &lt;/script&gt;&lt;b&gt;&amp;" in body_of(page)
    assert "<p>a note &amp; &lt;i&gt;</p>" in body_of(page)


def test_a_folder_without_the_file_is_an_error(tmp_path: Path) -> None:
    run(tmp_path, causal=False)
    with pytest.raises(StoreError, match=r"holds no dashboard \(dashboard.json"):
        write_dashboard(tmp_path)
